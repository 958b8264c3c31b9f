"""Arguments: defaults are those of the design, every bad flag is named, and all problems come in one message."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROJECT, parse

import train_with_preference_prompt as T

CORES = os.cpu_count()

# design §3: launcher variable in lower case → value
DEFAULTS = {
    "training_mode": "text",
    "prompt_embedding_path": "",
    "num_virtual_tokens": 10,
    "policy_model_path": "",
    "train_dataset_path": "",
    "test_dataset_path": "",
    "gpu_nodes": "auto",
    "beta": 0.05,
    "alpha": 0.1,
    "learning_rate": 5e-4,
    "num_epochs": 1.0,
    "gradient_accum_steps": 16,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": "all-linear",
    "max_length": 300,
    "max_prompt_length": 128,
    "output_dir": "./model_output/Preference_Guided_DPO",
    "log_dir": "./logs/Preference_Guided_DPO",
    "resume": False,
    "overwrite": False,
}
# design §3: variables whose default the design leaves open
OPEN = """preference_text pairs_per_forward seed eval_steps loss_type label_smoothing prompt_init gradient_checkpointing
precision zero_stage offload ds_config hostfile node_rank master_addr master_port cpu_ranks load_in_4bit adapter_path preset
ptuning_learning_rate reference_cache adapter_reference test_share data_format"""

# field → (values just inside, values just outside)
BORDERS = {
    "beta": (("1e-9", "1e9"), ("0", "-0.1", "inf", "nan")),
    "alpha": (("0", "1e9"), ("-1e-9", "inf", "nan")),
    "label_smoothing": (("0", "0.499"), ("0.5", "-1e-9", "nan")),
    "learning_rate": (("1e-9", "0.999"), ("0", "1", "-5e-4", "nan")),
    "ptuning_learning_rate": (("1e-9", "0.999"), ("0", "1", "-3e-2", "nan")),
    "num_virtual_tokens": (("1", "4096"), ("0", "-1", "4097")),
    "warmup_ratio": (("0", "0.999"), ("-1e-9", "1", "nan")),
    "weight_decay": (("0", "1e9"), ("-1e-9", "inf", "nan")),
    "max_grad_norm": (("1e-9", "1e9"), ("0", "-1", "inf", "nan")),
    "num_epochs": (("1e-9", "1e6"), ("0", "1e9", "-1", "inf", "nan")),
    "gradient_accum_steps": (("1", str(2**20)), ("0", "-1", str(2**20 + 1))),
    "pairs_per_forward": (("1", str(2**20)), ("0", "-1", str(2**20 + 1))),
    "lora_r": (("1", "512"), ("0", "-1")),
    "lora_alpha": (("1", "512"), ("0", "-1")),
    "lora_dropout": (("0", "0.999"), ("-1e-9", "1", "nan")),
    "lora_target_modules": (("all-linear", "q_proj", "q_proj, v_proj"), ("", " ", "q_proj,", "q_proj,,v_proj")),
    "max_prompt_length": (("1", "299"), ("0", "-1")),
    "test_share": (("1e-9", "0.999"), ("0", "1", "-0.1", "nan")),
    "seed": (("0", str(2**32 - 1)), ("-1", str(2**32))),
    "eval_steps": (("0", "1"), ("-1",)),
    "cpu_ranks": (("1", str(CORES)), ("0", "-1", str(CORES + 1))),
    "node_rank": (("", "0", "1"), ("-1", "1.0", "first", "²")),
    "master_addr": (("", "10.0.0.1", "node-1.lan", "2001:db8::1"), ("10.0.0.1 ", "node1;", "ｎ1")),
    "master_port": (("", "1024", "65535"), ("1023", "65536", "-1", "x", "²⁹⁵⁰⁰")),
    "output_dir": (("x",), ("", " ")),
    "log_dir": (("x",), ("", " ")),
    "preference_text": (("", "a\nb", "简短"), ("\udcff", "\ue000")),
    "lr_scheduler_type": (("linear", "cosine", "constant"), ("", "Linear", "triangular")),
}

# field → (every accepted value, some refused ones, words of the remedy)
ONLY = {
    "training_mode": (
        ("text", "embedding", "ptuning"),
        ("Text", "p-tuning", "embeddings", ""),
        "'text' or 'embedding' or 'ptuning'",
    ),
    "prompt_init": (("text", "random"), ("Random", "zeros", ""), "'text' or 'random'"),
    "data_format": (
        ("auto", "plain", "messages", "repeated", "transcript"),
        ("Plain", "chatml", ""),
        "'auto' or 'plain' or 'messages' or 'repeated' or 'transcript'",
    ),
    "loss_type": (("sigmoid", "ipo", "hinge", "robust"), ("IPO", "dpo", ""), "'sigmoid' or 'ipo' or"),
    "precision": (("auto", "bf16", "fp16", "fp32"), ("int8", "float32", ""), "'auto' or 'bf16' or 'fp16' or 'fp32'"),
    "adapter_reference": (("", "base", "adapter"), ("policy", "Base"), "'base' or 'adapter'"),
    "zero_stage": (("", "0", "1", "2", "3"), ("4", "two", "2.0"), "'' or '0' or '1' or '2' or '3'"),
    "offload": (
        ("", "optimizer", "parameters", "both"),
        ("cpu", "param"),
        "'' or 'optimizer' or 'parameters' or 'both'",
    ),
    "preset": (
        ("", "conservative", "balanced", "aggressive"),
        ("gentle", "Balanced"),
        "'' or 'conservative' or 'balanced' or",
    ),
}

# field → a value that its type cannot be read from
WRONG_TYPE = {
    "beta": "zero",
    "alpha": "0,1",
    "learning_rate": "5e-4x",
    "ptuning_learning_rate": "3%",
    "warmup_ratio": "a tenth",
    "weight_decay": "",
    "max_grad_norm": "none",
    "label_smoothing": "x",
    "lora_dropout": "10%",
    "num_epochs": "one",
    "test_share": "10%",
    "gradient_accum_steps": "16.0",
    "pairs_per_forward": "four",
    "lora_r": "1.5",
    "lora_alpha": "2r",
    "max_length": "3e2",
    "max_prompt_length": "long",
    "num_virtual_tokens": "ten",
    "seed": "",
    "eval_steps": "0.5",
    "cpu_ranks": "all",
    "load_in_4bit": "maybe",
    "gradient_checkpointing": "maybe",
    "resume": "perhaps",
    "overwrite": "2",
    "plan": "dry",
    "evaluate_only": "score",
    "sweep_table": "all",
}


# field or value → what else must be set for it to be accepted
NEEDED = {"embedding": ["--prompt_embedding_path=soft.pt"], "label_smoothing": ["--loss_type=robust"]}
NEEDED |= dict.fromkeys(("base", "adapter"), ["--adapter_path=adapter"])
NEEDED |= {"master_addr": ["--gpu_nodes=node1:0,node2:0"]}
NEEDED |= {"node_rank": ["--gpu_nodes=node1:0,node2:0", "--master_addr=10.0.0.1"]}


def problems(*argv: str) -> list[str]:
    """The lines of the one error that this command line raises."""
    with pytest.raises(T.InputError) as caught:
        parse(list(argv))
    return str(caught.value).splitlines()


def border_cases(table, place):
    return [(name, value) for name, row in table.items() for value in row[place]]


# --- defaults and derived values


def test_defaults_are_the_designs():
    values = asdict(T.ScriptArguments())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert set(values) >= set(OPEN.split())
    assert values["preference_text"].strip()


def test_an_empty_command_line_gives_the_defaults():
    assert parse([]) == T.ScriptArguments()


def test_every_setting_says_what_it_is():
    shown = T.FlagParser().format_help()  # a stray % in a help text would raise here
    for name in asdict(T.ScriptArguments()):
        assert f"--{name}" in shown
    helps = [field.metadata["help"] for field in T.dataclasses.fields(T.ScriptArguments)]
    assert all(helps) and len(set(helps)) == len(helps)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--beta", "2e-1"], "beta", 0.2),
        (["--beta=.2"], "beta", 0.2),
        (["--lora_r", "8"], "lora_r", 8),
        (["--resume", "true"], "resume", True),
        (["--resume=no"], "resume", False),
        (["--overwrite"], "overwrite", True),
        (["--gpu_nodes", "localhost:0,1"], "gpu_nodes", "localhost:0,1"),
        (["--preference_text", ""], "preference_text", ""),
        (["--preference_text", "- Be brief.\n- Be honest."], "preference_text", "- Be brief.\n- Be honest."),
    ],
)
def test_every_type_of_value_is_read(argv, name, value):
    assert parse(argv) == T.ScriptArguments(**{name: value})


def test_the_rank_that_the_launcher_passes_is_ignored():
    assert parse(["--local_rank=1", "--beta", "0.2"]) == T.ScriptArguments(beta=0.2)


@pytest.mark.parametrize(
    ("pairs", "forward", "expected"), [(16, 4, 4), (5, 2, 3), (1, 1, 1), (1, 64, 1), (7, 7, 1), (512, 3, 171)]
)
def test_forwards_per_update(pairs, forward, expected):
    args = T.ScriptArguments(gradient_accum_steps=pairs, pairs_per_forward=forward)
    assert args.forwards_per_update == expected


@pytest.mark.parametrize(
    ("mode", "alpha", "conditions", "rate"),
    [
        ("text", 1e-9, ("base", "pref"), 0.2),
        ("text", 0.0, ("base",), 0.2),
        ("embedding", 0.1, ("base", "pref"), 0.2),
        ("embedding", 0.0, ("base",), 0.2),
        ("ptuning", 0.1, ("pref",), 0.7),
        ("ptuning", 0.0, ("pref",), 0.7),
    ],
)
def test_what_a_mode_scores_and_how_fast_it_learns(mode, alpha, conditions, rate):
    args = T.ScriptArguments(training_mode=mode, alpha=alpha, learning_rate=0.2, ptuning_learning_rate=0.7)
    assert (args.conditions, args.peak_learning_rate) == (conditions, rate)
    assert args.trains_prefix == (mode == "ptuning")


def sources(train: str = "", test: str = "") -> dict[str, list[tuple[str, float]]]:
    args = T.ScriptArguments(train_dataset_path=train, test_dataset_path=test)
    return {split: [tuple(source) for source in found] for split, found in args.sources.items()}


def test_where_the_data_comes_from():
    """Without a test set, a share of the user's own training data is held out: no test source."""
    bundled = {split: [(str(PROJECT / "data" / f"{split}.jsonl"), 1)] for split in ("train", "test")}
    assert sources() == bundled
    assert sources("a.jsonl") == {"train": [("a.jsonl", 1)]}
    assert sources("", "b.jsonl") == {"train": bundled["train"], "test": [("b.jsonl", 1)]}
    assert sources("a.jsonl, o/n:c:s*2 ,~/c.csv*.5", "b, d") == {
        "train": [("a.jsonl", 1), ("o/n:c:s", 2), ("~/c.csv", 0.5)],
        "test": [("b", 1), ("d", 1)],
    }


def test_a_path_that_exists_is_taken_as_it_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c*2", "d:train", "e"):
        (tmp_path / name).write_text("")
    assert sources("a,b.jsonl")["train"] == [("a,b.jsonl", 1)]
    assert sources("e,a,b.jsonl*3,f,c*2,d:train")["train"] == [
        ("e", 1), ("a,b.jsonl", 3), ("f", 1), ("c*2", 1), ("d:train", 1),
    ]  # fmt: skip
    assert T.place_of("d:train") == (Path("d:train"), []) and T.place_of("e:train") == (Path("e"), ["train"])


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("org/name", (None, [])),
        ("org/name:test_prefs", (None, ["test_prefs"])),
        ("org/name:main:test", (None, ["main", "test"])),
        ("./none", (Path("none"), [])),
        ("/org/name", (Path("/org/name"), [])),
        ("none", (Path("none"), [])),
        ("org/none.jsonl", (Path("org/none.jsonl"), [])),
        ("org/none.json.gz:a", (Path("org/none.json.gz:a"), [])),
        ("here/none", (Path("here/none"), [])),
    ],
)
def test_what_is_looked_for_on_the_hub(monkeypatch, tmp_path, path, place):
    """Neither what has the name of a data file nor what would lie in a folder that is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert T.place_of(path) == place


def test_a_source_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert T.place_of("~/a:train") == (tmp_path / "a", ["train"])


@pytest.mark.parametrize(
    ("name", "value", "phrase"),
    [
        ("train", "a.jsonl,,b.jsonl", "names nothing before, after or between commas"),
        ("train", "a.jsonl,", "names nothing"),
        ("test", " ", "names nothing"),
        ("train", "data/*.jsonl", "what follows * is a weight, a number above 0 and at most 1000"),
        ("train", "a.jsonl*0", "what follows * is a weight"),
        ("train", "a.jsonl*-1", "what follows * is a weight"),
        ("train", "a.jsonl*nan", "what follows * is a weight"),
        ("train", "a.jsonl*1001", "what follows * is a weight"),
        ("test", "a.jsonl*0.5", "weights belong to the training data; leave *0.5 out"),
        ("train", "a.jsonl,~nobody7/b", "there is no user nobody7"),
    ],
)
def test_sources_that_cannot_be_read(name, value, phrase):
    (line,) = problems("--train_dataset_path=a", f"--{name}_dataset_path={value}")
    assert line.startswith(f"- {name.upper()}_DATASET_PATH (--{name}_dataset_path) is {value!r}: ") and phrase in line


def test_ds_config_is_found_here_or_beside_the_module(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert T.ScriptArguments().ds_config_path == PROJECT / "ds_config.json"
    (tmp_path / "ds_config.json").write_text("{}")
    assert T.ScriptArguments().ds_config_path.resolve() == tmp_path / "ds_config.json"
    assert T.ScriptArguments(ds_config=str(tmp_path / "none.json")).ds_config_path == tmp_path / "none.json"


# --- values out of range


def test_every_limit_has_its_borders_here():
    assert set(BORDERS) == set(T.LIMITS)
    assert set(ONLY) == set(T.ONLY)


@pytest.mark.parametrize(("name", "value"), border_cases(BORDERS, 0) + border_cases(ONLY, 0))
def test_values_just_inside_are_accepted(name, value):
    args = parse([f"--{name}={value}", *NEEDED.get(name, NEEDED.get(value, []))])
    kind = type(getattr(T.ScriptArguments(), name))
    assert getattr(args, name) == (False if kind is bool else kind(value))


@pytest.mark.parametrize(("name", "value"), border_cases(BORDERS, 1))
def test_values_just_outside_are_refused(name, value):
    lines = problems(f"--{name}={value}", *NEEDED.get(name, []))
    read = type(getattr(T.ScriptArguments(), name))(value)
    assert len(lines) == 1 and lines[0].startswith(f"- {name.upper()} (--{name}) is {read!r}: must ")


@pytest.mark.parametrize(("name", "value"), border_cases(ONLY, 1))
def test_other_values_are_refused_with_reason_and_remedy(name, value):
    lines = problems(f"--{name}={value}")
    assert len(lines) == 1 and lines[0].startswith(f"- {name.upper()} (--{name}) is ")
    reasons = ("not available", "no other", "DS_CONFIG", "there is no such", "starts from")
    assert any(reason in lines[0] for reason in reasons)
    assert ONLY[name][2] in lines[0]


def follows_from_the_update_number(schedule: str) -> bool:
    """Whether a schedule needs neither further settings nor a metric under the Trainer's own name `eval_loss`."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    try:
        built = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10)
    except (TypeError, ValueError):
        return False
    needs_torchs_optimizer = schedule == "polynomial"  # it reads `optimizer.defaults`, which DeepSpeed's lacks
    return isinstance(built, torch.optim.lr_scheduler.LambdaLR) and not needs_torchs_optimizer


@pytest.mark.parametrize("schedule", [kind.value for kind in transformers.SchedulerType])
def test_a_schedule_is_accepted_only_if_a_run_can_follow_it(schedule):
    if follows_from_the_update_number(schedule):
        assert parse(["--lr_scheduler_type", schedule]).lr_scheduler_type == schedule
    else:
        assert "LR_SCHEDULER_TYPE" in problems("--lr_scheduler_type", schedule)[0]


@pytest.mark.parametrize(
    ("length", "prompt", "good"), [(129, 128, True), (128, 128, False), (2, 1, True), (1, 1, False)]
)
def test_max_length_must_exceed_max_prompt_length(length, prompt, good):
    argv = [f"--max_length={length}", f"--max_prompt_length={prompt}"]
    if good:
        assert parse(argv).max_length == length
    else:
        (line,) = problems(*argv)
        assert line.startswith(f"- MAX_LENGTH (--max_length) is {length}: ")
        assert f"MAX_PROMPT_LENGTH, {prompt}," in line and "raise one or lower the other" in line


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_only_the_robust_loss_smooths_labels(loss_type):
    (line,) = problems(f"--loss_type={loss_type}", "--label_smoothing=0.1")
    assert line.startswith("- LABEL_SMOOTHING (--label_smoothing) is 0.1: only LOSS_TYPE=robust uses it")
    assert loss_type in line and "set the one to 0 or the other to robust" in line


@pytest.mark.parametrize("name", T.PATHS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nobody7/x", "there is no user nobody7; name another path"),
        ("x" * 300, "file name too long; name another path"),
        ("a\nb", "holds control characters; name a path without them"),
        (os.fsdecode(b"caf\xe9"), "holds bytes that are not UTF-8; name a path without them"),
    ],
)
def test_a_path_that_cannot_be_looked_up(name, path, words):
    needed = {
        "prompt_embedding_path": ["--training_mode=embedding"],
        "adapter_path": ["--adapter_reference=base"],
        "evaluation_file": ["--evaluate_only"],
    }
    (line,) = problems(f"--{name}={path}", *needed.get(name, []))
    assert line == f"- {T.describe(name, path)}: {words}"


PATH, TEXT = "--prompt_embedding_path=soft.pt", "--preference_text="
MODES = [  # flags → the problem's variable and words of it, or None
    ("embedding", [PATH], None),
    ("embedding", [PATH, TEXT], None),
    ("embedding", [PATH, "--prompt_init=random", "--num_virtual_tokens=7"], None),  # the plan names them as not used
    (
        "embedding",
        [],
        ("PROMPT_EMBEDDING_PATH", "'', but TRAINING_MODE is 'embedding'; name a soft prompt"),
    ),
    ("text", [TEXT], None),
    (
        "text",
        [PATH],
        ("PROMPT_EMBEDDING_PATH", "only TRAINING_MODE=embedding reads a soft prompt, and TRAINING_MODE is"),
    ),
    ("ptuning", [], None),
    ("ptuning", [PATH], ("PROMPT_EMBEDDING_PATH", "'ptuning'; empty the one or change the other")),
    ("ptuning", [TEXT], ("PREFERENCE_TEXT", "PROMPT_INIT=text the soft prompt starts from its words")),
    ("ptuning", [TEXT + " \n"], ("PREFERENCE_TEXT", "state the preference or set PROMPT_INIT=random")),
    ("ptuning", [TEXT, "--prompt_init=random"], None),
]


@pytest.mark.parametrize(("mode", "flags", "problem"), MODES)
def test_what_a_mode_needs_and_refuses(mode, flags, problem):
    argv = [f"--training_mode={mode}", *flags]
    if problem is None:
        assert parse(argv).training_mode == mode
    else:
        variable, words = problem
        (line,) = problems(*argv)
        assert line.startswith(f"- {variable} (--{variable.lower()}) is ") and words in line


def test_resume_and_overwrite_exclude_each_other():
    (line,) = problems("--resume", "true", "--overwrite", "true")
    assert "RESUME" in line and "OVERWRITE" in line


# --- what is no value, or no flag


def test_every_number_and_switch_has_a_wrong_type_here():
    assert set(WRONG_TYPE) == {
        name for name, value in asdict(T.ScriptArguments()).items() if not isinstance(value, str)
    }


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE.items())
def test_values_of_a_wrong_type(name, value):
    lines = problems(f"--{name}", value)
    assert len(lines) == 1 and lines[0].startswith(f"- {name.upper()} (--{name}) is {value!r}: ")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--bta", "--beta"),
        ("--learning_rat=1e-3", "--learning_rate"),
        ("--bta=0.0123456789", "--beta"),
        ("--max_lenght", "--max_length"),
        ("--OUTPUT_DIR", ""),
        ("--qqqq", ""),
        ("stray", ""),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, nearest):
    (line,) = problems(flag)
    hint = f"did you mean {nearest}?" if nearest else "--help lists all flags"
    assert line == f"- {flag!r} is not a flag of this program nor the value of one; {hint}"


@pytest.mark.parametrize(("flag", "whole"), [("--max_len", "--max_length"), ("--learning", "--learning_rate")])
def test_an_abbreviation_is_not_accepted(flag, whole):
    lines = problems(flag, "200")
    assert lines[0].startswith(f"- {flag!r} is not a flag") and f"did you mean {whole}?" in lines[0]


def test_a_flag_without_its_value():
    (line,) = problems("--beta")
    assert "--beta" in line and "expected one argument" in line


def test_all_problems_are_reported_together():
    wrong = "--beta -1 --alpha much --lora_r 0 --training_mode ptune --sede --seed -1 --max_length 64"
    soft = "--prompt_embedding_path soft.pt --num_virtual_tokens 0 --prompt_init zeros"
    lines = problems(*wrong.split(), *soft.split(), "--resume", "--overwrite")
    named = (
        "ALPHA (",
        "'--sede'",
        "TRAINING_MODE (",
        "BETA (",
        "LORA_R (",
        "SEED (",
        "MAX_LENGTH (",
        "RESUME (",
        "PROMPT_EMBEDDING_PATH (",
        "NUM_VIRTUAL_TOKENS (",
        "PROMPT_INIT (",
    )
    assert len(lines) == len(named)
    for name in named:
        assert sum(line.startswith(f"- {name}") for line in lines) == 1


def test_a_missing_value_hides_no_other_problem():
    lines = problems("--alpha", "much", "--beta")
    assert len(lines) == 2 and "ALPHA" in lines[0] and "--beta" in lines[1]


def test_a_value_of_a_wrong_type_invents_no_second_problem():
    (line,) = problems("--max_length", "long", "--max_prompt_length", "299")
    assert line.startswith("- MAX_LENGTH (--max_length) is 'long': ")


# --- the real command line


def test_the_command_line_exits_with_2_and_only_the_first_rank_says_why(tmp_path):
    command = [sys.executable, str(PROJECT / "train_with_preference_prompt.py"), "--bad", "--beta", "zero"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    (out, first), (other_out, other) = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and out == other_out == ""
    assert "Traceback" not in first + other and (first.count("error:"), other.count("error:")) == (1, 0)
    message = first[first.index("error:") :].splitlines()
    assert len(message) == 3
    assert "BETA (--beta) is 'zero'" in message[1] and "'--bad' is not a flag of this program" in message[2]
