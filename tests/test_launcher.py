"""Launcher: every variable reaches Python unchanged, mistakes end before training."""

import io
import os
import re
import subprocess
import sys

import forkserver
import pytest
import torch
from conftest import PROJECT, launch, launch_stub, parse

import train_with_preference_prompt as T

SCRIPT = (PROJECT / "fast_train.sh").read_text(encoding="utf-8")
EDIT_BLOCK = SCRIPT.split("# ---- end of the edit block")[0]
DESIGN_VARIABLES = """
    TRAINING_MODE PREFERENCE_TEXT PROMPT_EMBEDDING_PATH GPU_NODES POLICY_MODEL_PATH TRAIN_DATASET_PATH TEST_DATASET_PATH
    BETA ALPHA LEARNING_RATE NUM_EPOCHS GRADIENT_ACCUM_STEPS PAIRS_PER_FORWARD LORA_R LORA_ALPHA LORA_DROPOUT
    LORA_TARGET_MODULES MAX_LENGTH MAX_PROMPT_LENGTH OUTPUT_DIR LOG_DIR RESUME OVERWRITE SEED EVAL_STEPS
    NUM_VIRTUAL_TOKENS LOSS_TYPE LABEL_SMOOTHING PROMPT_INIT GRADIENT_CHECKPOINTING PRECISION ZERO_STAGE OFFLOAD
    DS_CONFIG HOSTFILE NODE_RANK MASTER_ADDR MASTER_PORT CPU_RANKS LOAD_IN_4BIT ADAPTER_PATH PRESET DRY_RUN PTUNING_LEARNING_RATE
    REFERENCE_CACHE ADAPTER_REFERENCE TEST_SHARE DATA_FORMAT
""".split()
ODD = '-Sei "höflich",  it\'s $HOME $(date) `id` \\t *?[a] !x;&|<> #c\n第二行 '


def words_of(command: str) -> list[str]:
    """The words of a printed command, as a shell reads them."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    return printed.decode().split("\0")[:-1]


def printed_command(result) -> list[str]:
    return words_of(result.stderr.split("command:\n")[1].split("\nDRY_RUN")[0])


@pytest.fixture(scope="module")
def dry(tiny_run, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("dry")
    variables = {**tiny_run, "PREFERENCE_TEXT": ODD, "OUTPUT_DIR": "./out put $x", "DRY_RUN": "1"}
    result = launch(variables, "--weight_decay", "0.125", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return {"cwd": cwd, "result": result, "words": printed_command(result)}


def test_every_variable_of_the_design_is_in_the_edit_block():
    names = re.findall(r'^([A-Z_0-9]+)="\$\{\1:?-', EDIT_BLOCK, re.M)
    assert sorted(names) == sorted(DESIGN_VARIABLES)


def test_defaults_agree_with_the_module():
    """A setting has one default: the launcher's is the dataclass field's."""
    defaults = T.ScriptArguments()
    written = re.findall(r'^([A-Z_0-9]+)="\$\{\1:-(.*?)\}"', EDIT_BLOCK, re.M)
    assert len(written) > 35
    for name, text in written:
        if name != "DRY_RUN":
            value = getattr(defaults, name.lower())
            same = text == str(value).lower() if isinstance(value, bool) else type(value)(text) == value
            assert same, name
    assert re.search(r'^DEFAULT_PREFERENCE="(.*)"$', EDIT_BLOCK, re.M)[1] == defaults.preference_text


def test_values_reach_python_unchanged(dry):
    words = dry["words"]
    flags = words[next(i for i, w in enumerate(words) if w.endswith("train_with_preference_prompt.py")) + 1 :]
    args = parse(flags)
    assert args.preference_text == ODD and args.output_dir == "./out put $x" and args.weight_decay == 0.125
    assert len(flags) == len(DESIGN_VARIABLES) - 1 + 2  # every variable but DRY_RUN, then the extra flag and its value


def test_the_command_is_deepspeeds(dry):
    """Run by the Python itself: the script's first line names another one once its environment was moved."""
    script = next(place for place, word in enumerate(dry["words"]) if word.endswith("/deepspeed"))
    assert os.path.samefile(dry["words"][script - 1], sys.executable)
    assert "--include=localhost:0" in dry["words"]
    assert any(re.fullmatch(r"--master_port=\d+", word) for word in dry["words"])
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in dry["words"]


def test_a_dry_run_trains_and_writes_nothing(dry):
    assert list(dry["cwd"].iterdir()) == []
    for phrase in ("mode", "12 pairs", "updates", "devices", "out put $x", "logs/Preference_Guided_DPO"):
        assert phrase in dry["result"].stderr


def plan(variables: dict[str, str], cwd):
    """What the module says and prints when the launcher asks it for the plan."""
    flags = [f"--{name.lower()}={value}" for name, value in {**variables, "PLAN": "true"}.items()]
    return forkserver.start(flags, {"MASTER_PORT": "0"}, cwd).wait()


def test_a_soft_prompt_is_read_before_anything_starts(tiny_run, tmp_path_factory, tmp_path):
    soft = tmp_path_factory.mktemp("soft prompt") / "it's soft.pt"
    torch.save({"prompt_embeddings": torch.ones(7, 32)}, soft)  # 32 is the tiny model's hidden size
    result = plan({**tiny_run, "TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": str(soft)}, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"7 soft embeddings from {soft}" in result.stderr
    assert list(tmp_path.iterdir()) == []
    launched = launch_stub(tmp_path, {"TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": str(soft)})
    assert {f"--prompt_embedding_path={soft}", "--training_mode=embedding"} <= set(printed_command(launched))


def test_cores_are_shared_evenly(tiny_run, tmp_path):
    cores = os.cpu_count()
    planned = plan({**tiny_run, "CPU_RANKS": str(cores)}, tmp_path).stdout.splitlines()
    include = f"localhost:{','.join(map(str, range(cores)))}"
    own = [f"LOCAL_SIZE={cores}", "OMP_NUM_THREADS=1"]
    assert {f"INCLUDE={include}", *own} <= set(planned)
    words = printed_command(launch_stub(tmp_path, {}, f"INCLUDE={include}", *own))
    assert {f"--include={include}", *own} <= set(words)


@pytest.mark.parametrize(
    ("variables", "phrases"),
    [
        ({"GPU_NODES": "localhost:0,7"}, ["GPU_NODES (--gpu_nodes) is 'localhost:0,7'", "auto"]),
        (
            {"BETA": "-1", "TRAIN_DATASET_PATH": "/nowhere.jsonl", "POLICY_MODEL_PATH": "./nowhere"},
            [
                "BETA (--beta) is -1.0: must be a finite number above 0",
                "data file /nowhere.jsonl does not exist",
                "POLICY_MODEL_PATH (--policy_model_path) is './nowhere'",
            ],
        ),
        (
            {"TRAIN_DATASET_PATH": "/nowhere.jsonl", "POLICY_MODEL_PATH": "./nowhere"},
            ["data file /nowhere.jsonl does not exist", "POLICY_MODEL_PATH (--policy_model_path) is './nowhere'"],
        ),
        (
            {"TRAINING_MODE": "embedding"},
            ["PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is '', but TRAINING_MODE is 'embedding'"],
        ),
        (
            {"TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": "no such.pt", "OUTPUT_DIR": "/dev/null"},
            ["PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is 'no such.pt': there is no such file", "OUTPUT_DIR ("],
        ),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(tiny_run, tmp_path, variables, phrases):
    """In the plan that the launcher asks for; test_bad_input shows that it passes messages and status on."""
    result = plan({**tiny_run, **variables}, tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert "Traceback" not in result.stderr and result.stderr.count("error:\n") == 1
    for phrase in phrases:
        assert phrase in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_cpu_path_says_so(tmp_path):
    result = launch_stub(tmp_path, {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")})
    assert result.returncode == 2 and "no C++ compiler (no-such-compiler) was found" in result.stderr


def test_without_pythons_headers_the_cpu_path_says_so(tmp_path):
    """They are a package of their own in Debian and others."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sysconfig\nreal = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *more: '/nowhere' if name == 'include' else real(name, *more)\n"
    )
    variables = {"PYTHONPATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    result = launch_stub(tmp_path, variables)
    assert result.returncode == 2 and "has no Python.h, with which DeepSpeed compiles" in result.stderr


@pytest.mark.parametrize(
    ("variables", "flags", "phrase"),
    [
        ({"DRY_RUN": "maybe"}, [], "DRY_RUN is 'maybe': must be 0 or 1"),
        ({}, ["--plan"], "set DRY_RUN=1 to see the plan"),
        ({}, ["--dry-run=1"], "set DRY_RUN=1 to see the plan"),
        ({"TEST_DATASET_PATH": "none.jsonl"}, ["--evaluate-only"], "data file none.jsonl does not exist"),
    ],
)
def test_the_launchers_own_words(tmp_path, variables, flags, phrase):
    result = launch(variables, *flags, cwd=tmp_path)
    assert result.returncode == 2 and phrase in result.stderr and list(tmp_path.iterdir()) == []


def test_a_terminal_of_another_encoding_gets_every_message(monkeypatch):
    """What it cannot show is written as an escape."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["train", "--training_mode=höflich"])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit, match="2"):
        T.program()
    said = streams["stderr"].buffer.getvalue()
    assert rb"TRAINING_MODE (--training_mode) is 'h\xf6flich': there is no such mode" in said


ALLOCATOR = [  # PyTorch reads the older name first
    ({"PYTORCH_ALLOC_CONF": "a:1"}, ["PYTORCH_ALLOC_CONF=a:1,expandable_segments:True"]),
    ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, ["PYTORCH_CUDA_ALLOC_CONF=a:1,expandable_segments:True"]),
    (
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False", "PYTORCH_ALLOC_CONF": "a:1"},
        ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"],
    ),
]


@pytest.mark.parametrize(("given", "expected"), ALLOCATOR)
def test_settings_of_the_allocator_are_kept(given, expected, tmp_path):
    words = printed_command(launch_stub(tmp_path, given))
    assert [word for word in words if "_ALLOC_CONF=" in word] == expected


def test_through_a_symbolic_link_from_elsewhere(tiny_run, tmp_path):
    (tmp_path / "train").symlink_to(PROJECT / "fast_train.sh")
    environment = {**os.environ, **tiny_run, "CDPATH": "/tmp:/"}
    command = ["bash", "train", "--setup"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "setting up" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def help_of(folder, flag: str) -> str:
    """What --help prints where Python has its standard library only, as on a fresh machine."""
    (folder / "bin").mkdir()
    bare = folder / "bin" / "python3"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    work = folder / "work"
    work.mkdir()
    result = launch({"PATH": f"{bare.parent}:{os.environ['PATH']}", "COLUMNS": "90"}, flag, cwd=work, timeout=60)
    assert (result.returncode, result.stderr, list(work.iterdir())) == (0, "", [])
    return result.stdout


def test_help_explains_every_setting_without_any_package(tmp_path):
    """Variables and defaults are the edit block's, texts the fields': what is not in the one is not in the help."""
    shown = help_of(tmp_path, "--help")
    words = " ".join(shown.split())
    fields = {field.name: field for field in T.dataclasses.fields(T.ScriptArguments)}
    for name in DESIGN_VARIABLES:
        default = re.search(rf'^{name}="\$\{{{name}:?-(.*?)\}}"', EDIT_BLOCK, re.M)[1]
        default = default.replace("$DEFAULT_PREFERENCE", f'"{T.ScriptArguments.preference_text}"')
        assert shown.count(f"\n  {name}={default}\n") == 1, name
    for name, field in fields.items():
        own, text = name in T.LAUNCHERS_OWN, field.metadata["help"]
        for other in fields:  # in the launcher's names
            text = re.sub(rf"\b{other}\b", other.upper(), text) if "_" in other else text
        assert (text in words) != own, name
        variable = name.upper() in DESIGN_VARIABLES
        assert (f"\n  --{name}={field.default}\n" in shown) == (not own and not variable), name
    in_launcher = (name.upper() if name.upper() in DESIGN_VARIABLES else f"--{name}" for name in T.SWEPT)
    assert ", ".join(in_launcher) in words  # which may be lists


def test_help_begins_with_what_to_do(tmp_path):
    shown = help_of(tmp_path, "-h")
    assert shown.startswith("Preference-guided DPO: ")
    assert re.search(r"^  ./fast_train.sh +the bundled model and data$", shown, re.M)
    subjects = [subject[0].lower() + subject[1:] for subject in re.findall(r"^(\w.*)\n  [A-Z_]+=", shown, re.M)]
    assert subjects == re.findall(r"^# -+ (.*?) -+$", EDIT_BLOCK, re.M)


@pytest.mark.parametrize("there", ["nothing", "one whose Python is gone"])
def test_an_environment_without_the_packages_gets_a_venv(there, tmp_path):
    """With a python3 that lacks them the launcher makes .venv and installs there; here pip only records its calls."""
    clone, recorder = tmp_path / "clone", tmp_path / "pip.log"
    clone.mkdir()
    for name in ("fast_train.sh", "requirements.txt", "requirements-bundled.txt"):
        (clone / name).write_text((PROJECT / name).read_text(encoding="utf-8"), encoding="utf-8")
    if there != "nothing":
        (clone / ".venv/bin").mkdir(parents=True)
        (clone / ".venv/bin/python").symlink_to(tmp_path / "gone")
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!/bin/bash
case "$*" in
  *sys.executable*) echo "{fake}" ;;
  *version_info*) exit 0 ;;
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "{fake}" "$4/bin/python" ;;
  "-m pip "*) echo "$0 $*" >> "{recorder}" ;;
  *) exit 1 ;;
esac
"""
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "POLICY_MODEL_PATH": ""}
    command = ["bash", str(clone / "fast_train.sh"), "--setup"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    main, bundled = recorder.read_text().splitlines()
    assert main.startswith(str(clone / ".venv/bin/python")) and main.endswith(f"-r {clone / 'requirements.txt'}")
    assert "--no-deps" in bundled and bundled.endswith(f"-r {clone / 'requirements-bundled.txt'}")
    assert result.stdout.strip() == str(clone / ".venv/bin/python")
    assert "setting up" in result.stderr
