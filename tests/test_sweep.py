"""Sweeps: a run for each combination of listed values, none trained twice, none mixed with others, all in one table."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import launch, train
from test_interruptions import Launcher
from test_launcher import words_of
from test_trainer import finished

import train_with_preference_prompt as T

# --- lists


@pytest.mark.parametrize(
    ("flags", "lists"),
    [
        (["--beta=0.01 0.05 0.1"], {"beta": [0.01, 0.05, 0.1]}),
        (["--beta", " 1e-2\t.05\n"], {"beta": [0.01, 0.05]}),
        (["--beta= 0.05 "], {}),  # one value
        (["--alpha=0.1 0.2", "--beta=0.01 0.05"], {"beta": [0.01, 0.05], "alpha": [0.1, 0.2]}),  # the order is SWEPT's
        (["--seed=1 2", "--seed=3"], {}),  # the last flag counts
        (["--seed=3", "--seed=1 2"], {"seed": [1, 2]}),
        (["--loss_type=ipo hinge", "--num_epochs=1 2"], {"loss_type": ["ipo", "hinge"], "num_epochs": [1.0, 2.0]}),
        (["--weight_decay=0 0.01"], {"weight_decay": [0.0, 0.01]}),
        (["--preset=conservative aggressive"], {"preset": ["conservative", "aggressive"]}),
        (["--lora_target_modules=q_proj, v_proj"], {}),  # white space beside a comma
        (
            ["--lora_target_modules=all-linear q_proj ,v_proj\n,o_proj"],
            {"lora_target_modules": ["all-linear", "q_proj,v_proj,o_proj"]},
        ),
        (["--preference_text=a b", "--output_dir=a b", "--train_dataset_path=a b"], {}),  # never lists
    ],
)
def test_white_space_separates_the_values_of_a_list(flags, lists):
    _, found, problems = T.read_flags(flags)
    assert found == lists and list(found) == list(lists) and problems == []


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--beta=0.1,0.2", "BETA (--beta) is '0.1,0.2': must be a number; separate the values of a sweep by spaces"),
        ("--beta=0.1, 0.2", "BETA (--beta) is '0.1, 0.2': must be a number; separate the values of a sweep by spaces"),
        ("--seed=1 two 3 four", "SEED (--seed) is '1 two 3 four': each must be a whole number, unlike 'two', 'four'"),
        ("--eval_steps=1 2", "EVAL_STEPS (--eval_steps) is '1 2': must be a whole number"),
        ("--cpu_ranks=1,2", "CPU_RANKS (--cpu_ranks) is '1,2': must be a whole number"),
    ],
)
def test_what_is_no_list(flag, problem):
    _, lists, problems = T.read_flags([flag])
    assert (lists, problems) == ({}, [problem])


def test_every_swept_setting_changes_what_is_trained():
    """None of them only says where, how fast or how a run goes: those are the same for all runs."""
    recorded = T.recorded_settings(T.ScriptArguments(training_mode="ptuning"), ONE_RANK, {})
    recorded |= T.recorded_settings(T.ScriptArguments(), ONE_RANK, {})
    assert set(T.SWEPT) - {"preset"} <= set(recorded) and len(set(T.SWEPT)) == len(T.SWEPT)


def test_a_run_of_its_own_takes_no_list():
    _, problems = T.read_arguments(["--beta=0.1 0.2"])
    (problem,) = problems
    assert problem.startswith("BETA (--beta) is [0.1, 0.2]: a list is a sweep, which ./fast_train.sh trains")
    _, problems = T.read_arguments(["--sweep_table=true"])
    assert len(problems) == 1 and "no setting is a list" in problems[0]


# --- runs

ONE_RANK = T.Devices("localhost:0", 1, on_gpu=False)


def runs(tmp_path, lists, **changes):
    places = {"output_dir": f"{tmp_path}/my out", "log_dir": f"{tmp_path}/logs/"}
    return T.runs_of(T.ScriptArguments(**places, **changes), lists)


def test_each_combination_has_its_name_folders_and_settings(tmp_path):
    found = runs(tmp_path, {"beta": [0.01, 0.1], "alpha": [0.0, 0.2]}, seed=7)
    names = ["BETA=0.01_ALPHA=0", "BETA=0.01_ALPHA=0.2", "BETA=0.1_ALPHA=0", "BETA=0.1_ALPHA=0.2"]
    assert [run.name for run in found] == names
    for run, (beta, alpha) in zip(found, itertools.product((0.01, 0.1), (0.0, 0.2)), strict=True):
        assert run.args == T.ScriptArguments(
            beta=beta,
            alpha=alpha,
            seed=7,
            output_dir=f"{tmp_path}/my out-sweep/{run.name}",
            log_dir=f"{tmp_path}/logs-sweep/{run.name}",
        )


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("beta", 0.05, "0.05"),
        ("beta", 1.0, "1"),
        ("learning_rate", 5e-4, "0.0005"),
        ("learning_rate", 1e-5, "1e-05"),
        ("beta", 1 / 3, "0.3333333333333333"),  # to the last digit
        ("seed", 42, "42"),
        ("lora_target_modules", "q_proj,v_proj", "q_proj,v_proj"),
        ("lora_target_modules", "../a:%", "..%2Fa%3A%25"),  # nothing that a path would read otherwise
    ],
)
def test_a_value_has_one_name_which_is_a_folder(tmp_path, name, value, text):
    run = runs(tmp_path, {name: [value]})[0]
    assert run.name == f"{name.upper()}={text}" and Path(run.args.output_dir).parent == tmp_path / "my out-sweep"
    args, problems = T.read_arguments(run.flags)  # as the launcher passes them on
    assert problems == [] and args == dataclasses.replace(T.ScriptArguments(), **vars(run.args))


def test_a_preset_is_in_its_place_in_every_run(tmp_path):
    found = runs(tmp_path, {"preset": ["conservative", "aggressive"]})
    assert [(run.name, run.args.beta, run.args.alpha) for run in found] == [
        ("PRESET=conservative", 0.01, 0.05),
        ("PRESET=aggressive", 0.1, 0.2),
    ]


LIST_PROBLEMS = [  # lists, settings → words of the problems
    ({"beta": [0.1, 0.2]}, {}, []),
    ({"beta": [0.1, 0.1]}, {}, ["BETA (--beta) is '0.1 0.1': names a value twice"]),
    ({"alpha": [0.1, 0.2]}, {"training_mode": "ptuning"}, ["'0.1 0.2': it has no part in ptuning mode"]),
    ({"ptuning_learning_rate": [0.1, 0.2]}, {}, ["it has no part in text mode"]),
    ({"seed": range(32), "lora_r": range(32)}, {}, ["the lists make 1024 runs, more than 1000"]),
]


@pytest.mark.parametrize(("lists", "changes", "words"), LIST_PROBLEMS)
def test_lists_that_make_no_sweep(lists, changes, words):
    found = T.list_problems(T.ScriptArguments(**changes), lists)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("said_of", "where"),
    [
        (lambda beta, alpha: True, ""),
        (lambda beta, alpha: beta == 0.2, " (with BETA=0.2)"),
        (lambda beta, alpha: (beta, alpha) == (0.1, 0.3), " (with BETA=0.1 and ALPHA=0.3)"),
        (lambda beta, alpha: beta == 0.1 or alpha == 0.1, None),
    ],
)
def test_a_problem_names_the_runs_that_have_it(tmp_path, said_of, where):
    found = runs(tmp_path, {"beta": [0.1, 0.2], "alpha": [0.1, 0.2, 0.3]})
    lines = [["oh"] if said_of(**run.values) else [] for run in found]
    if where is None:  # no values tell them from the others
        where = f" (with {' and '.join(run.name for run, said in zip(found, lines, strict=True) if said)})"
    assert T.of_runs(found, lines) == [f"oh{where}"]


# --- what is in the folders


@pytest.fixture
def swept(tiny_run, tmp_path, monkeypatch):
    """Flags of a sweep of four runs on the tiny model and data, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    variables = {**tiny_run, "BETA": "0.01 0.1", "LORA_R": "4 8", "REFERENCE_CACHE": "off"}
    return [f"--{name.lower()}={value}" for name, value in variables.items()]


def runs_and_recorded(flags):
    """The runs of a sweep and what each would record."""
    args, lists, problems = T.read_flags(flags)
    found, checked = T.check_sweep(args, lists, problems)
    return found, [
        T.recorded_settings(run.args, devices, pairs) for run, (devices, pairs, _) in zip(found, checked, strict=True)
    ]


def fill(
    run: T.SweepRun, recorded: dict, accuracy: float = 0.5, margin: float = 0.1, done: bool = True, model: str = "m"
):
    """What a run leaves in its folder."""
    folder = run.args.output_path
    folder.mkdir(parents=True)
    content = recorded["content"] | {"the base model": model}
    T.write_json(folder / T.RUN_SETTINGS, recorded | {"content": content, "run": "x"})
    values = {"loss": 0.7, "accuracy": accuracy, "reward_margin": margin, "pref_advantage_ratio": 2.0}
    evaluation = {T.TAGS[name][1]: value for name, value in values.items()}
    begin = {tag: 9.0 for tag in evaluation}
    T.write_json(
        folder / T.TRAINER_STATE,
        {"global_step": 10, "log_history": [begin, {"loss/train": 1.0}, evaluation, {"train_runtime": 90.0}]},
    )
    if done:
        (folder / T.MODEL_CARD).write_text("card")


def planned(flags, capsys) -> tuple[str, dict[str, list[str]]]:
    """What a person reads, and name → flags of the runs that are to be trained, as the launcher reads them."""
    T.main([*flags, "--plan", "true"])
    printed = capsys.readouterr()
    lines = [line.removeprefix("RUN=").split("\t") for line in printed.out.splitlines() if line.startswith("RUN=")]
    return printed.err, {name: own for name, *own in lines}


def test_a_new_sweep_trains_every_run_and_writes_nothing_before(swept, tmp_path, capsys):
    said, started = planned(swept, capsys)
    assert "sweep of BETA (0.01, 0.1) × LORA_R (4, 8): 4 runs" in said
    for shared in ("mode              text", "12 pairs", f"outputs           {tmp_path}/model_output"):
        assert shared in said
    assert "β 0.01" not in said and said.count("to be trained") == 4  # what differs is in the runs' own plans
    assert list(started) == [f"BETA={beta}_LORA_R={r}" for beta in (0.01, 0.1) for r in (4, 8)]
    for name, own in started.items():
        beta, r = re.fullmatch(r"BETA=(.*)_LORA_R=(.*)", name).groups()
        places = [f"--output_dir={tmp_path}/model_output/Preference_Guided_DPO-sweep/{name}"]
        places += [f"--log_dir={tmp_path}/logs/Preference_Guided_DPO-sweep/{name}"]
        assert own == [f"--beta={beta}", f"--lora_r={r}", *places, "--resume=false", "--overwrite=false"]
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_is_told_the_sweeps_folders(swept, tmp_path, capsys):
    T.main([*swept, "--plan", "true"])
    lines = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("RUN="))
    assert lines["SWEEP"] == "4" and lines["INCLUDE"] == "localhost:0" and lines["MASTER_PORT"].isdigit()
    assert lines["OUTPUT"] == f"{tmp_path}/model_output/Preference_Guided_DPO-sweep"
    assert lines["LOGS"] == f"{tmp_path}/logs/Preference_Guided_DPO-sweep"


def test_finished_runs_are_kept_and_unfinished_ones_go_on(swept, capsys):
    (first, second, third, _), recorded = runs_and_recorded(swept)
    fill(first, recorded[0])
    fill(second, recorded[1], done=False)
    fill(third, recorded[2], done=False)
    checkpoint = third.args.output_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / T.TRAINER_STATE).write_text("{}")
    T.mark_complete(checkpoint)
    said, started = planned(swept, capsys)
    fates = dict(re.findall(r"^  (BETA=\S+) +(.*)$", said, re.M))
    assert list(fates.values()) == [
        "finished",
        "unfinished, no checkpoint yet: begins again",
        "unfinished, goes on from checkpoint-5",
        "to be trained",
    ]
    resumed = {name: "--resume=true" in own for name, own in started.items()}
    assert list(resumed.values()) == [True, True, False] and first.name not in resumed
    _, started = planned([*swept, "--overwrite=true"], capsys)  # begins anew what is not finished
    assert first.name not in started and sum("--overwrite=true" in own for own in started.values()) == 2


def test_folders_with_other_settings_or_data_are_all_named_and_only_replaced_when_asked(swept, capsys):
    (first, second, third, fourth), recorded = runs_and_recorded(swept)
    fill(first, recorded[0] | {"learning_rate": 0.25})
    fill(second, recorded[1] | {"content": {"the train data": "other"}}, done=False)
    fill(third, recorded[2])
    fill(fourth, recorded[3])
    (fourth.args.output_path / T.RUN_SETTINGS).write_text("[]")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(T.InputError) as caught:
        T.main([*swept, "--plan", "true"])
    words = [
        "the finished run had LEARNING_RATE 0.25, not 0.0005",
        "the train data has changed since the run was interrupted",
        "run_settings.json in it is damaged",
    ]
    assert len(caught.value.problems) == 3
    for run, word, problem in zip((first, second, fourth), words, caught.value.problems, strict=True):
        assert problem.startswith(f"{T.describe('output_dir', run.args.output_dir)}: holds another run: ")
        assert word in problem and "OVERWRITE=true" in problem and "another OUTPUT_DIR" in problem
    said, started = planned([*swept, "--overwrite=true"], capsys)
    assert said.count("replaces the run in its folder") == 3 and third.name not in started
    assert all("--overwrite=true" in own for own in started.values()) and len(started) == 3
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_finished_runs_of_two_base_models_are_not_mixed(swept):
    """The model's name is the same; that its content is not, only the finished runs know."""
    (first, second, *_), recorded = runs_and_recorded(swept)
    fill(first, recorded[0])
    fill(second, recorded[1], model="changed")
    with pytest.raises(T.InputError, match="the base model has changed between the finished runs") as caught:
        T.main([*swept, "--plan", "true"])
    assert first.name in str(caught.value) and second.name in str(caught.value)


def test_foreign_files_are_not_trained_over(swept):
    (first, *_), _ = runs_and_recorded(swept)
    first.args.output_path.mkdir(parents=True)
    (first.args.output_path / "mine.txt").write_text("mine")
    with pytest.raises(T.InputError, match="holds files that are not of a run of this program") as caught:
        T.main([*swept, "--overwrite=true", "--plan", "true"])
    assert len(caught.value.problems) == 1 and first.name in caught.value.problems[0]


def test_all_problems_of_all_runs_come_at_once_and_the_data_are_read_once(swept, monkeypatch):
    read = []
    read_pairs = T.read_pairs
    monkeypatch.setattr(T, "read_pairs", lambda name, *how: read.append(name) or read_pairs(name, *how))
    wrong = ["--beta=0.1 -1", "--max_length=64 300", "--lora_target_modules=all-linear nowhere", "--warmup_ratio=2"]
    wrong += ["--test_dataset_path=none.jsonl", "--sede=3", "--resume=true", "--overwrite=true"]
    with pytest.raises(T.InputError) as caught:
        T.main([*swept, *wrong, "--plan", "true"])
    found = caught.value.problems
    expected = [
        "'--sede=3' is not a flag",
        "BETA (--beta) is -1.0: must be a finite number above 0",
        "MAX_LENGTH (--max_length) is 64: must be larger than MAX_PROMPT_LENGTH",
        "WARMUP_RATIO (--warmup_ratio) is 2.0",
        "RESUME (--resume) is True, and so is OVERWRITE",
        "data file none.jsonl does not exist",
        "LORA_TARGET_MODULES (--lora_target_modules) is 'nowhere'",
    ]
    assert len(found) == len(expected)
    for words in expected:
        assert sum(line.startswith(words) for line in found) == 1, (words, found)
    assert next(line for line in found if line.startswith("BETA")).endswith(" (with BETA=-1)")
    assert next(line for line in found if line.startswith("MAX_LENGTH")).endswith(" (with MAX_LENGTH=64)")
    assert len(read) == 2  # the training and the test data, for sixteen runs


# --- the table


def table_of(text: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_table_is_sorted_by_accuracy_then_margin_and_names_what_failed(swept, tmp_path, capsys):
    (first, second, third, fourth), recorded = runs_and_recorded(swept)
    fill(first, recorded[0], accuracy=0.6, margin=0.9)
    fill(third, recorded[2], accuracy=0.8, margin=0.25)
    fill(fourth, recorded[3], accuracy=0.8, margin=0.5)
    T.main([*swept, "--sweep_table=true", f"--sweep_failed={second.name}:1 other:3"])
    said = capsys.readouterr().out
    header, _, *rows = ([cell.strip() for cell in row] for row in table_of(said))
    assert header == [
        *("BETA", "LORA_R", "accuracy", "reward_margin", "loss", "pref_advantage_ratio", "updates", "minutes")
    ]
    assert rows == [
        ["0.1", "8", "0.8000", "0.5000", "0.7000", "2.0000", "10", "1.5"],
        ["0.1", "4", "0.8000", "0.2500", "0.7000", "2.0000", "10", "1.5"],
        ["0.01", "4", "0.6000", "0.9000", "0.7000", "2.0000", "10", "1.5"],
        ["0.01", "8", "failed (exit status 1)", "", "", "", "", ""],
    ]
    widths = {len(line) for line in said.splitlines() if line.startswith("| ")}
    assert len(widths) == 1  # columns stand below each other
    assert f"The best: {fourth.args.output_dir}" in said
    # 4 of 5 pairs: Wilson's interval is 0.3755 to 0.9638
    assert "on 5 pairs: an accuracy is known to ± 0.29 (95 %)" in said
    assert "Rewards grow with β" in said
    kept = tmp_path / "model_output" / "Preference_Guided_DPO-sweep" / "BETA_LORA_R.md"
    assert kept.read_text().startswith("# Sweep of BETA × LORA_R\n") and f"kept in {kept}" in said
    assert table_of(kept.read_text()) == table_of(said)


def test_a_sweep_without_results_says_so(swept, capsys):
    T.main([*swept, "--sweep_table=true"])
    said = capsys.readouterr().out
    assert said.count("not finished") == 4 and "No run has finished." in said


def test_rewards_are_compared_where_they_are_on_one_scale(swept, capsys):
    flags = [*swept, "--beta=0.1", "--seed=1 2"]
    found, recorded = runs_and_recorded(flags)
    fill(found[0], recorded[0])
    T.main([*flags, "--sweep_table=true"])
    assert "Rewards grow with β" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "state", ["", "[]", '{"log_history": []}', '{"log_history": [{"loss/eval": 1}], "global_step": 1}']
)
def test_a_finished_run_whose_state_is_damaged_is_named(swept, state):
    (first, *_), recorded = runs_and_recorded(swept)
    fill(first, recorded[0])
    (first.args.output_path / T.TRAINER_STATE).write_text(state)
    with pytest.raises(T.InputError, match="trainer_state.json cannot be read") as caught:
        T.main([*swept, "--sweep_table=true"])
    assert str(first.args.output_path) in str(caught.value)


# --- the launcher's loop, with stand-ins for Python and DeepSpeed

PYTHON = r"""#!/bin/bash
case "$*" in
  *sys.executable*) echo "$0" ;;
  *version_info* | "- "*) ;;
  *sysconfig*) echo "$TOOLS" ;;
  */deepspeed\ *) exec "$@" ;;
  *--sweep_table*) printf '%s\n' "$@" >"$TOOLS/table"; echo "the table" ;;
  *)
    printf '%s\n' "$*" >>"$TOOLS/plans"
    for word in "$@"; do case "$word" in --output_dir=*) output="${word#*=}" ;; esac; done
    printf 'INCLUDE=localhost:0\nMASTER_PORT=1\nDEVICE=gpu\nOUTPUT=%s\nLOGS=%s\n' "$output" "logs of $output"
    case "$*" in *"--beta=0.01 "*) printf "SWEEP=3\n$PLANNED" ;; esac
    ;;
esac
"""
DEEPSPEED = r"""#!/bin/bash
printf '%s\n' "$*" >>"$TOOLS/runs"
for word in "$@"; do case "$word" in --output_dir=*) output="${word#*=}" ;; --beta=*) beta="${word#*=}" ;; esac; done
case "$beta" in 0.05) exit 3 ;; 0.2) exit 2 ;; 0.3) echo asleep; sleep 60 ;; esac
mkdir -p "$output" && touch "$output/README.md"
"""


@pytest.fixture
def stand_ins(tmp_path):
    """The environment of a sweep of some β's, whose runs take no time: 0.05 fails, 0.2 is refused, 0.3 sleeps."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("python3", PYTHON), ("deepspeed", DEEPSPEED)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def environment(*betas: str) -> dict[str, str]:
        lines = "".join(f"RUN=BETA={b}\\t--beta={b}\\t--output_dir={tmp_path}/out put/{b}\\n" for b in betas)
        variables = {"BETA": "0.01 " + " ".join(betas), "ALPHA": "0.125", "PLANNED": lines, "TOOLS": str(folder)}
        return {**variables, "PATH": f"{folder}:{os.environ['PATH']}"}

    return folder, environment


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_that_fails_does_not_stop_the_others(stand_ins, tmp_path):
    folder, environment = stand_ins
    result = launch(environment("0.1", "0.05", "0.4"), "--weight_decay", "0.5", cwd=tmp_path, timeout=60)
    assert result.returncode == 1 and result.stdout == "the table\n", result.stderr
    started = lines_of(folder / "runs")
    assert [re.findall(r"--beta=(\S*)", words) for words in started] == [["0.1"], ["0.05"], ["0.4"]]
    for beta, words in zip(("0.1", "0.05", "0.4"), started, strict=True):
        assert "--alpha=0.125" in words and "--weight_decay 0.5" in words
        assert re.findall(r"--output_dir=(.*)$", words) == [f"{tmp_path}/out put/{beta}"]
    assert len(lines_of(folder / "plans")) == 4  # the sweep's and each run's
    asked = lines_of(folder / "table")
    assert "--beta=0.01 0.1 0.05 0.4" in asked and "--sweep_failed=BETA=0.05:3" in asked
    assert "run 2 of 3: BETA=0.05" in result.stderr and "training stopped with exit status 3\n" in result.stderr
    assert "runs failed: BETA=0.05\n" in result.stderr and "RESUME" not in result.stderr.split("run 1")[1]


def test_a_sweep_that_ends_well_names_its_curves(stand_ins, tmp_path):
    folder, environment = stand_ins
    result = launch(environment("0.1", "0.4"), cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (0, "the table\n")
    assert "--sweep_failed=" in lines_of(folder / "table")
    curves, again = re.findall(r"to see the curves: (.*)", result.stderr)
    assert curves == again  # before and after
    assert words_of(curves)[-1] == "logs of ./model_output/Preference_Guided_DPO"  # the sweep's, as its plan said


def test_a_sweep_with_nothing_left_to_train_shows_its_table(stand_ins, tmp_path):
    folder, environment = stand_ins
    result = launch({**environment(), "BETA": "0.01 0.02", "PLANNED": ""}, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout, lines_of(folder / "runs")) == (0, "the table\n", [])


def test_a_run_that_is_refused_does_not_stop_the_others(stand_ins, tmp_path):
    """What its plan cannot know, such as too little memory for one of the lengths."""
    folder, environment = stand_ins
    result = launch(environment("0.1", "0.2", "0.4"), cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (1, "the table\n") and "runs failed: BETA=0.2\n" in result.stderr
    assert len(lines_of(folder / "runs")) == 3 and "--sweep_failed=BETA=0.2:2" in lines_of(folder / "table")


def test_a_dry_run_prints_every_runs_command(stand_ins, tmp_path):
    folder, environment = stand_ins
    result = launch({**environment("0.1", "0.4"), "DRY_RUN": "1"}, cwd=tmp_path, timeout=60)
    assert result.returncode == 0 and lines_of(folder / "runs") == lines_of(folder / "table") == []
    commands = [words_of(command) for command in re.findall(r"command:\n  (.*)\n", result.stderr)]
    for beta, words in zip(("0.1", "0.4"), commands, strict=True):
        assert [word for word in words if word.startswith("--beta=")] == [f"--beta={beta}"]
        assert words[-1] == f"--output_dir={tmp_path}/out put/{beta}"
    assert len(lines_of(folder / "plans")) == 1 and result.stderr.endswith("DRY_RUN: stopped before training\n")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_whole_sweep(stand_ins, tmp_path, sent):
    folder, environment = stand_ins
    variables = environment("0.1", "0.3", "0.4") | {"OVERWRITE": "true" if sent == signal.SIGINT else "false"}
    with Launcher(variables, tmp_path) as launcher:
        launcher.wait_for(lambda: "asleep" in launcher.said())
        launcher.process.send_signal(sent)
        assert launcher.ends() == 128 + sent
    but = ", with OVERWRITE=false," if sent == signal.SIGINT else ""  # which would train finished runs anew
    said = f"stopped by {sent.name}; the same command{but} continues the sweep"
    assert launcher.said().splitlines()[-1] == said
    assert len(lines_of(folder / "runs")) == 2 and not (folder / "table").exists()


def test_the_sweeps_own_flags_are_not_the_users(tmp_path):
    result = launch({}, "--sweep_failed=x", cwd=tmp_path)
    assert result.returncode == 2 and "--sweep_failed=x: a list makes a sweep" in result.stderr


# --- a real one


def test_a_sweep_keeps_what_is_finished_and_goes_on_with_the_rest(tiny_run, tmp_path):
    """Of two runs the first was finished and the second interrupted; the cache holds the reference's scores already."""
    variables = {**tiny_run, "NUM_EPOCHS": "1", "REFERENCE_CACHE": str(tmp_path / "cache")}
    folders = [tmp_path / "model_output" / "Preference_Guided_DPO-sweep" / f"BETA={beta}" for beta in ("0.01", "0.1")]
    for beta, folder in zip(("0.01", "0.1"), folders, strict=True):
        logs = tmp_path / "logs" / "Preference_Guided_DPO-sweep" / folder.name
        finished(train({**variables, "BETA": beta, "OUTPUT_DIR": str(folder), "LOG_DIR": str(logs)}, tmp_path))
    uninterrupted = json.loads((folders[1] / T.TRAINER_STATE).read_text())["log_history"]
    (folders[1] / T.MODEL_CARD).unlink()
    shutil.rmtree(T.newest_checkpoint(folders[1]))
    before = {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")}
    result = launch({**variables, "BETA": "0.01 1e-1"}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "run 1 of 1 left: BETA=0.1" in result.stderr and "BETA=0.1, resumed from checkpoint-2" in result.stderr
    assert result.stdout.count("reference log-probabilities, train data: 12 of 12 pairs from") == 1
    assert {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")} == before
    rows = {row[0].strip(): row for row in table_of(result.stdout)}
    for beta, folder in zip(("0.01", "0.1"), folders, strict=True):
        logged = json.loads((folder / T.TRAINER_STATE).read_text())["log_history"]
        last = [logs for logs in logged if "loss/eval" in logs][-1]
        assert rows[beta][1] == f"{last['rewards_eval/accuracy']:.4f}".ljust(8)
        assert rows[beta][3] == f"{last['loss/eval']:.4f}" and rows[beta][5].strip() == "3"
    evaluated = [[logs["loss/eval"] for logs in log if "loss/eval" in logs] for log in (uninterrupted, logged)]
    assert evaluated[0] == evaluated[1]
