"""Plan: which devices a run gets, what becomes of an earlier run in its folders, and what a person reads beforehand."""

import itertools
import json
import math
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROWS, make_model, write_rows

import train_with_preference_prompt as T

# --- devices

DEVICES = {  # GPU_NODES, CPU_RANKS, GPUs here → include, ranks, on_gpu
    "auto, four GPUs": (("auto", 1, [0, 1, 2, 3]), ("localhost:0,1,2,3", 4, True)),
    "auto, one GPU": (("auto", 1, [0]), ("localhost:0", 1, True)),
    "auto, the GPUs left to this process": (("auto", 1, [2, 5]), ("localhost:2,5", 2, True)),
    "auto, GPUs go before CPU ranks": (("auto", 2, [0]), ("localhost:0", 1, True)),
    "auto, no GPU": (("auto", 1, []), ("localhost:0", 1, False)),
    "auto, no GPU, two ranks": (("auto", 2, []), ("localhost:0,1", 2, False)),
    "some": (("localhost:0,1", 1, [0, 1, 2, 3]), ("localhost:0,1", 2, True)),
    "others": (("localhost:2,3", 1, [0, 1, 2, 3]), ("localhost:2,3", 2, True)),
    "all": (("localhost:0,1,2,3", 1, [0, 1, 2, 3]), ("localhost:0,1,2,3", 4, True)),
    "in another order": (("localhost:3,0", 1, [0, 1, 2, 3]), ("localhost:3,0", 2, True)),
    "two digits": (("localhost:10", 1, list(range(12))), ("localhost:10", 1, True)),
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name):
    asked, expected = DEVICES[name]
    found = T.resolve_devices(*asked)
    assert (found.include, found.ranks, found.on_gpu) == expected


WRONG_DEVICES = {  # GPU_NODES, GPUs here → what the error says
    "a GPU that is not there": ("localhost:0,4", [0, 1, 2, 3], "there is no GPU 4; GPUs here: 0, 1, 2, 3"),
    "two that are not there": ("localhost:7,5", [2, 3], "there is no GPU 5, 7; GPUs here: 2, 3"),
    "none here": ("localhost:0,1", [], "there is no GPU 0, 1; this machine has no GPU; auto trains on its CPU"),
    "one twice": ("localhost:0,0", [0, 1], "names a GPU twice on localhost"),
    "one twice in other words": ("localhost:1,01", [0, 1], "names a GPU twice on localhost"),
    "nothing": ("", [0], "must be auto, localhost:0,1, or several nodes"),
    "cpu": ("cpu", [], "must be auto, localhost:0,1, or several nodes"),
    "capitals": ("Auto", [0], "must be auto, localhost:0,1, or several nodes"),
    "numbers without a host": ("0,1", [0, 1], "must be auto, localhost:0,1, or several nodes"),
    "host without numbers": ("localhost", [0], "must be auto, localhost:0,1, or several nodes"),
    "host and colon": ("localhost:", [0], "must be auto, localhost:0,1, or several nodes"),
    "trailing comma": ("localhost:0,", [0], "must be auto, localhost:0,1, or several nodes"),
    "white space": ("localhost:0, 1", [0, 1], "must be auto, localhost:0,1, or several nodes"),
    "negative": ("localhost:-1", [0], "must be auto, localhost:0,1, or several nodes"),
    "a range": ("localhost:0-3", [0, 1, 2, 3], "must be auto, localhost:0,1, or several nodes"),
    "a number without end": (f"localhost:{'7' * 5000}", [0], "must be auto, localhost:0,1, or several nodes"),
    "a digit that is no number": ("localhost:²", [0, 1, 2], "must be auto, localhost:0,1, or several nodes"),
    "a digit of another script": ("localhost:٣", [3], "must be auto, localhost:0,1, or several nodes"),
    "another host": ("node1:0,1", [0, 1], "node1:0,1 is one node only; for this machine's GPUs say localhost:0,1"),
    "this host and another": ("localhost:0,node2:0", [0, 1], "localhost is another machine on every node"),
    "DeepSpeed's form": ("node1:0@node2:0", [0, 1], "several nodes with their GPU numbers: node1:0,1,node2:0,1; "),
}


@pytest.mark.parametrize("name", WRONG_DEVICES)
def test_wrong_devices_are_named_with_those_that_are_there(name):
    asked, gpus, expected = WRONG_DEVICES[name]
    with pytest.raises(T.InputError) as caught:
        T.resolve_devices(asked, 1, gpus)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"- GPU_NODES (--gpu_nodes) is {T.shortened(repr(asked))}: ") and expected in line


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 0, []),
        (None, 4, [0, 1, 2, 3]),
        ("", 0, []),
        ("0", 0, []),  # DeepSpeed's launcher sets it for CPU ranks, too
        ("2,3", 2, [2, 3]),
        ("0,7", 1, [0]),  # of a machine with two: CUDA stops at the first that is not there
        (" 2, 3 ", 2, [2, 3]),
    ],
)
def test_available_gpus_are_numbered_as_the_machine_counts_them(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert T.available_gpus() == expected


@pytest.fixture
def old_driver(monkeypatch, tmp_path):
    """A machine with a GPU whose driver is older than PyTorch's CUDA."""

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it")

    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(T, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return (
        f"PyTorch {torch.__version__} cannot use the GPU of this machine (The NVIDIA driver on your system is too old "
    )


def test_a_gpu_that_cannot_be_used_is_not_passed_over(old_driver, ready, monkeypatch, tmp_path):
    with pytest.raises(T.InputError) as caught:
        T.resolve_devices("localhost:0", 1, [])
    assert f"there is no GPU 0; {old_driver}" in str(caught.value) and "auto trains on its CPU" in str(caught.value)
    args = T.ScriptArguments(**ready)
    devices, _, reports = T.check_inputs(args)
    assert f"{old_driver}(found version 11040). Please update it): the run" in T.describe_plan(args, devices, reports)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants the CPU
    assert "cannot use the GPU" not in T.describe_plan(args, devices, reports)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 3, 1)])
def test_cpu_ranks_share_the_cores(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(T, "CORES", cores)
    assert T.resolve_devices("auto", ranks, []).threads_per_rank == threads


# --- the output folder

STATE = '{"global_step": 10}'
CONTENTS = {  # what is in the folder → its state, the newest complete checkpoint
    "missing": (None, "nothing", None),
    "empty": ({}, "nothing", None),
    "left by nodes that were killed": ({f".{'0f' * 16}.1": ""}, "nothing", None),
    "finished": (
        {"run_settings.json": "{}", "README.md": "card", "trainer_state.json": STATE, "pytorch_model.bin": "w"},
        "finished",
        None,
    ),
    "finished, checkpoints kept": (
        {
            "run_settings.json": "{}",
            "README.md": "card",
            "trainer_state.json": STATE,
            "checkpoint-10/trainer_state.json": STATE,
        },
        "finished",
        "checkpoint-10",
    ),
    "interrupted": (
        {"run_settings.json": "{}", "checkpoint-5/trainer_state.json": STATE, "checkpoint-5/x.bin": "w"},
        "unfinished",
        "checkpoint-5",
    ),
    "interrupted in its first checkpoint": ({"run_settings.json": "{}", "checkpoint-5/x.bin": "w"}, "unfinished", None),
    "interrupted in a later checkpoint": (
        {"run_settings.json": "{}", "checkpoint-5/trainer_state.json": STATE, "checkpoint-10/x.bin": "w"},
        "unfinished",
        "checkpoint-5",
    ),
    "nine is less than ten": (
        {"run_settings.json": "{}", **{f"checkpoint-{step}/trainer_state.json": STATE for step in (9, 10, 8)}},
        "unfinished",
        "checkpoint-10",
    ),
    "interrupted while it was saved": (
        {
            "run_settings.json": "{}",
            "checkpoint-10/trainer_state.json": STATE,
            "trainer_state.json": STATE,
            "pytorch_model.bin": "w",
        },
        "unfinished",
        "checkpoint-10",
    ),
    "started, nothing saved": ({"run_settings.json": "{}"}, "nothing", None),
    "started, some updates, nothing saved": ({"run_settings.json": "{}", "metrics.jsonl": "{}\n"}, "nothing", None),
    "somebody's metrics": ({"metrics.jsonl": "{}\n"}, "foreign", None),
    "checkpoints of another program": ({"checkpoint-5/trainer_state.json": STATE}, "foreign", "checkpoint-5"),
    "a project": ({"README.md": "mine", "notes.txt": "mine"}, "foreign", None),
    "a hidden file": ({".keep": ""}, "foreign", None),
    "a model": ({"config.json": "{}", "model.safetensors": "w"}, "foreign", None),
    "a state without a card": ({"trainer_state.json": STATE}, "foreign", None),
}


def fill(folder: Path, files) -> Path:
    """Writes the files and dates them to 2026-01-02 03:04:05 local time."""
    if files is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        set_time(path)
    return folder


def fill_run(folder: Path, files) -> Path:
    """The same with every checkpoint complete that has a state."""
    for state in fill(folder, files).glob("checkpoint-*/trainer_state.json"):
        T.mark_complete(state.parent)
    return folder


def set_time(path: Path, hour: int = 3) -> None:
    seconds = time.mktime((2026, 1, 2, hour, 4, 5, 0, 0, -1))
    os.utime(path, (seconds, seconds))


def snapshot(folder: Path) -> dict[str, str | None]:
    """Every file and folder below and its text."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def settings(tmp_path, **changes) -> T.ScriptArguments:
    return T.ScriptArguments(
        output_dir=str(tmp_path / "out" / "run"), log_dir=str(tmp_path / "logs" / "run"), **changes
    )


@pytest.mark.parametrize("name", CONTENTS)
def test_the_state_of_a_folder(tmp_path, name):
    files, state, newest = CONTENTS[name]
    folder = fill_run(tmp_path / "out" / "run", files)
    assert T.run_state(folder) == state
    assert T.newest_checkpoint(folder) == (newest and folder / newest)


def test_a_file_in_the_folders_place_is_foreign(tmp_path):
    (tmp_path / "out").write_text("mine")
    assert T.run_state(tmp_path / "out") == "foreign" and T.newest_checkpoint(tmp_path / "out") is None


PLAIN, RESUME, OVERWRITE = {}, {"resume": True}, {"overwrite": True}
OUTPUT_PROBLEMS = [  # what is in the folder, settings → a phrase of the problem, or None
    ("missing", PLAIN, None),
    ("missing", RESUME, "there is no run in it; name its folder or set RESUME=false"),
    ("missing", OVERWRITE, None),
    ("empty", PLAIN, None),
    ("empty", RESUME, "there is no run in it"),
    ("finished", PLAIN, None),
    ("finished", RESUME, "RESUME=false"),
    ("finished", OVERWRITE, None),
    ("finished, checkpoints kept", PLAIN, None),
    ("finished, checkpoints kept", RESUME, "the run in it is finished"),
    ("interrupted", PLAIN, "RESUME=true to continue it or OVERWRITE=true to replace it"),
    ("interrupted", RESUME, None),
    ("interrupted", OVERWRITE, None),
    ("interrupted in its first checkpoint", PLAIN, "unfinished"),
    ("interrupted in its first checkpoint", RESUME, None),  # begins again
    ("started, nothing saved", PLAIN, None),
    ("started, nothing saved", RESUME, None),
    ("interrupted in its first checkpoint", OVERWRITE, None),
    ("interrupted while it was saved", PLAIN, "unfinished"),
    ("interrupted while it was saved", RESUME, None),
    ("a project", PLAIN, "name another folder"),
    ("a project", RESUME, "there is no run in it"),
    ("a project", OVERWRITE, "name another folder"),
    ("a model", OVERWRITE, "name another folder"),
]


@pytest.mark.parametrize(("name", "changes", "phrase"), OUTPUT_PROBLEMS)
def test_output_problems(tmp_path, name, changes, phrase):
    args = settings(tmp_path, **changes)
    fill_run(Path(args.output_dir), CONTENTS[name][0])
    before = snapshot(tmp_path)
    found = T.output_problems(args)
    assert len(found) == (phrase is not None)
    assert phrase is None or (
        found[0].startswith(f"OUTPUT_DIR (--output_dir) is {args.output_dir!r}: ") and phrase in found[0]
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "variable"),
    [
        ({"output_dir": "file/run"}, "OUTPUT_DIR"),
        ({"log_dir": "file"}, "LOG_DIR"),
        ({"log_dir": "file/run"}, "LOG_DIR"),
    ],
)
def test_a_path_that_cannot_become_a_folder_is_a_problem(tmp_path, changes, variable):
    (tmp_path / "file").write_text("mine")
    args = settings(tmp_path)
    for name, path in changes.items():
        setattr(args, name, str(tmp_path / path))
    assert any(problem.startswith(f"{variable} (") for problem in T.output_problems(args))


# --- making way for a run

FINISHED = {
    "run_settings.json": "{}",
    "README.md": "card",
    "trainer_state.json": STATE,
    "pytorch_model.bin": "weights",
    "checkpoint-10/trainer_state.json": STATE,
    "checkpoint-10/global_step10/x.pt": "shard",
}
UNFINISHED = {"run_settings.json": "{}", "checkpoint-5/trainer_state.json": STATE, "checkpoint-5/x.pt": "shard"}
EVENTS = {"events.out.tfevents.1.a": "first", "events.out.tfevents.2.a": "second"}


OWNED_BY_NEW = {"logs/run/.run_id": "new"}


def make_way(args) -> Path | None:
    """What a new run does before it writes."""
    moved = T.make_way(args)
    T.make_way_for_events(args.log_path, "new")
    return moved


def below(folder: str, files) -> dict[str, str | None]:
    """The snapshot of these files below a folder, with the folders between."""
    folders = {str(parent) for name in files for parent in Path(folder, name).parents if str(parent) != "."}
    return {**dict.fromkeys(folders), **{f"{folder}/{name}": text for name, text in files.items()}}


def test_the_first_run_finds_its_folder(tmp_path):
    make_way(settings(tmp_path))
    assert snapshot(tmp_path) == {"out": None, "out/run": None, "logs": None, "logs/run": None, **OWNED_BY_NEW}


def test_a_finished_run_and_its_events_are_moved_aside_whole(tmp_path, capsys):
    fill(tmp_path / "out/run", FINISHED)
    fill(tmp_path / "logs/run", {**EVENTS, "note.txt": "mine", "runs/old/events.out.tfevents.0.a": "oldest"})
    make_way(settings(tmp_path))
    assert snapshot(tmp_path) == {
        **below("out/run-20260102-030405", FINISHED),
        "out/run": None,
        **OWNED_BY_NEW,
        **below("logs/run/runs/20260102-030405", EVENTS),
        **below("logs/run", {"note.txt": "mine", "runs/old/events.out.tfevents.0.a": "oldest"}),
    }
    assert str(tmp_path / "out/run-20260102-030405") in capsys.readouterr().out


def test_a_second_and_a_third_move_of_the_same_second_get_other_names(tmp_path):
    for number in (1, 2, 3):
        fill(tmp_path / "out/run", {**FINISHED, "README.md": f"card {number}"})
        fill(tmp_path / "logs/run", {name: f"{text} {number}" for name, text in EVENTS.items()})
        (tmp_path / "logs/run/.run_id").unlink(missing_ok=True)
        make_way(settings(tmp_path))
    expected = {"out/run": None, **OWNED_BY_NEW}
    for number, suffix in ((1, ""), (2, "-2"), (3, "-3")):
        expected |= below(f"out/run-20260102-030405{suffix}", {**FINISHED, "README.md": f"card {number}"})
        expected |= below(
            f"logs/run/runs/20260102-030405{suffix}", {name: f"{text} {number}" for name, text in EVENTS.items()}
        )
    assert snapshot(tmp_path) == expected


def test_a_moved_run_is_named_by_when_it_finished(tmp_path):
    fill(tmp_path / "out/run", FINISHED)
    set_time(tmp_path / "out/run/README.md", hour=17)
    fill(tmp_path / "logs/run", EVENTS)
    set_time(tmp_path / "logs/run/events.out.tfevents.2.a", hour=18)
    make_way(settings(tmp_path))
    assert (tmp_path / "out/run-20260102-170405/README.md").read_text() == "card"
    assert (tmp_path / "logs/run/runs/20260102-180405/events.out.tfevents.1.a").read_text() == "first"


@pytest.mark.parametrize("files", [FINISHED, UNFINISHED])
def test_overwrite_keeps_the_run_until_the_new_one_is_there(tmp_path, files):
    """What make_way returns is removed by the caller, after the new run has been saved (test_run)."""
    fill(tmp_path / "out/run", files)
    fill(tmp_path / "out/run-20260101-000000", FINISHED)
    fill(tmp_path / "logs/run", EVENTS)
    moved = make_way(settings(tmp_path, overwrite=True))
    assert moved == tmp_path / "out/run-20260102-030405"
    assert snapshot(tmp_path) == {
        "out/run": None,
        **OWNED_BY_NEW,
        **below("out/run-20260101-000000", FINISHED),
        **below("out/run-20260102-030405", files),
        **below("logs/run/runs/20260102-030405", EVENTS),
    }


def test_two_runs_that_share_a_log_folder_keep_their_events_apart(tmp_path):
    """The first one resumed after the second began: its events come back, the second's go to runs/."""
    logs = tmp_path / "logs"
    T.make_way_for_events(logs, "first")
    fill(logs, {"events.out.tfevents.1.a": "first"})
    T.make_way_for_events(logs, "first")  # resumed: nothing to move
    assert snapshot(logs) == {"events.out.tfevents.1.a": "first", ".run_id": "first"}
    T.make_way_for_events(logs, "second")
    fill(logs, {"events.out.tfevents.2.a": "second"})
    T.make_way_for_events(logs, "first")
    fill(logs, {"events.out.tfevents.3.a": "first again"})
    now = {"events.out.tfevents.1.a": "first", "events.out.tfevents.3.a": "first again", ".run_id": "first"}
    second = {"events.out.tfevents.2.a": "second", ".run_id": "second"}
    assert snapshot(logs) == {"runs": None, **now, **below("runs/20260102-030405-2", second)}


def test_what_somebody_else_put_into_a_replaced_run_stays(tmp_path, capsys):
    mine = dict.fromkeys(("notes.txt", "adapter_v1/model.bin", "checkpoint-best/x.pt", "tokenizer_notes.md"), "mine")
    fill(tmp_path / "run", {**FINISHED, "tokenizer.json": "{}", **mine})
    (tmp_path / "run/merged").mkdir()
    (tmp_path / "run/merged/tokenizer.json").symlink_to("../tokenizer.json")
    T.remove_run(tmp_path / "run")
    assert snapshot(tmp_path) == below("run", mine) | {"run": None}
    assert (
        "not being of the run that was replaced: adapter_v1, checkpoint-best, notes.txt, tokenizer_notes.md"
        in capsys.readouterr().out
    )
    fill(tmp_path / "run2", FINISHED)
    T.remove_run(tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


def test_a_mount_point_cannot_make_way(tmp_path, monkeypatch):
    fill(tmp_path / "out/run", FINISHED)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out/run")
    (problem,) = T.output_problems(settings(tmp_path))
    assert "mount point, which cannot be moved aside; name a folder in it" in problem
    monkeypatch.undo()
    assert T.output_problems(settings(tmp_path)) == []


def test_a_run_behind_a_symbolic_link_makes_way_too(tmp_path):
    fill(tmp_path / "disk", FINISHED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run").symlink_to(tmp_path / "disk")
    moved = T.make_way(settings(tmp_path, overwrite=True))
    assert list((tmp_path / "out/run").iterdir()) == [] and (moved / "README.md").read_text() == "card"


def test_a_folder_is_one_runs_alone(tmp_path):
    lock = T.lock_folder("output_dir", tmp_path / "out/run")
    with pytest.raises(T.InputError, match=f"OUTPUT_DIR .*another run, process {os.getpid()}, is writing to it"):
        T.lock_folder("output_dir", tmp_path / "out/run")
    lock.close()
    T.lock_folder("output_dir", tmp_path / "out/run").close()


@pytest.mark.parametrize(
    "inside",
    ["policy_model_path", "train_dataset_path", "prompt_embedding_path", "ds_config", "the working directory"],
)
def test_a_run_that_is_still_needed_does_not_make_way(tmp_path, monkeypatch, inside):
    fill(tmp_path / "out/run", {**FINISHED, "merged/config.json": "{}", "merged/pairs.jsonl": "{}"})
    args = settings(tmp_path, overwrite=True)
    assert T.output_problems(args) == []
    paths = {
        "policy_model_path": "out/run/merged",
        "train_dataset_path": "out/run/merged/pairs.jsonl",
        "prompt_embedding_path": "out/run/prompt_embeddings.pt",
        "ds_config": "out/run/merged/config.json",
    }
    if inside in paths:
        setattr(args, inside, str(tmp_path / paths[inside]))
    else:
        monkeypatch.chdir(tmp_path / "out/run")
    problem = T.output_problems(args)[0]
    assert "must make way" in problem and "lies in it" in problem


def recorded(args, devices) -> dict:
    """What a run with these settings notes."""
    pairs, _ = T.divide(args, {split: T.read_split(args, split) for split in args.sources})
    return T.recorded_settings(args, devices, pairs)


def resume_problems(args, devices) -> list[str]:
    return T.problems_of(T.require_same_settings, args, recorded(args, devices))[1]


def test_a_resumed_run_needs_the_same_settings_and_data(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    test = write_rows(tmp_path / "test.jsonl", ROWS[:2])
    args = settings(tmp_path, train_dataset_path=str(train), test_dataset_path=str(test))
    one_rank, two_ranks = T.resolve_devices("auto", 1, []), T.resolve_devices("auto", 2, [])
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/run_settings.json").write_text(json.dumps(recorded(args, one_rank)))
    assert resume_problems(args, one_rank) == []
    args.eval_steps, args.resume, args.gpu_nodes = 77, True, "localhost:0"  # these may differ
    (tmp_path / "renamed.jsonl").write_bytes(train.read_bytes())
    args.train_dataset_path = str(tmp_path / "renamed.jsonl")  # the content counts, not the name
    on_gpu = T.Devices("localhost:0", 1, on_gpu=True)
    assert "the interrupted run had DEVICE 'cpu', not 'gpu'; set it back" in resume_problems(args, on_gpu)[0]
    assert resume_problems(args, one_rank) == []
    args.beta = 0.3
    write_rows(tmp_path / "renamed.jsonl", ROWS[:-1])
    found = resume_problems(args, two_ranks)
    assert len(found) == 3 and "had BETA 0.05, not 0.3" in found[0]
    assert "had RANKS 1, not 2" in found[1] and "the train data has changed" in found[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"test_share": 0.5}, ["had TEST_SHARE 0.1, not 0.5", "the train data has", "the test data has"]),
        ({"train_dataset_path": "{}*2"}, ["the train data has"]),
        ({"seed": 1}, ["had SEED 42, not 1"]),
    ],
)
def test_a_resumed_run_needs_the_same_pairs_held_out(tmp_path, changes, said):
    path = str(write_rows(tmp_path / "train.jsonl", ROWS))
    args = settings(tmp_path, train_dataset_path=path)
    fill(tmp_path / "out/run", {"run_settings.json": json.dumps(recorded(args, ONE_RANK))})
    for name, value in changes.items():
        setattr(args, name, value.format(path) if isinstance(value, str) else value)
    found = resume_problems(args, ONE_RANK)
    assert len(found) == len(said) and all(phrase in line for phrase, line in zip(said, found, strict=True))


@pytest.mark.parametrize("content", ["", '{"a": ', "null", "[1]", "[]", "{}", '"x"', '{"content": 1}', "[" * 100_000])
def test_damaged_settings_of_an_interrupted_run_are_named(tmp_path, content):
    args = settings(tmp_path)
    fill(tmp_path / "out/run", {"run_settings.json": content})
    (problem,) = resume_problems(args, ONE_RANK)
    assert problem.startswith("OUTPUT_DIR (") and "run_settings.json in it is damaged" in problem


def test_a_link_in_the_output_folder_counts_as_lying_in_it(tmp_path):
    torch.save(torch.ones(3, 32), tmp_path / "soft.pt")
    args = settings(tmp_path, prompt_embedding_path=str(tmp_path / "out/run/link.pt"))
    fill(tmp_path / "out/run", FINISHED)
    (tmp_path / "out/run/link.pt").symlink_to(tmp_path / "soft.pt")
    (problem,) = T.output_problems(args)
    assert "link.pt lies in it" in problem


def test_a_soft_prompt_in_the_output_folder_stops_only_a_run_that_must_make_way(tmp_path):
    args = settings(tmp_path, prompt_embedding_path=str(tmp_path / "out/run/prompt_embeddings.pt"))
    fill(tmp_path / "out/run", FINISHED)
    (problem,) = T.output_problems(args)  # a finished run is moved aside: the path would no longer lead to it
    assert problem.startswith(f"OUTPUT_DIR (--output_dir) is {args.output_dir!r}: ")
    assert f"but {args.prompt_embedding_path} lies in it; name another folder" in problem
    args.prompt_embedding_path = str(tmp_path / "out/run-20260101-000000/prompt_embeddings.pt")
    assert T.output_problems(args) == []


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_resumed_run_needs_the_same_soft_prompt(tmp_path, value):
    data = {f"{split}_dataset_path": str(write_rows(tmp_path / split, ROWS)) for split in ("train", "test")}
    soft = tmp_path / "soft.pt"
    args = settings(tmp_path, training_mode="embedding", prompt_embedding_path=str(soft), **data)
    torch.save({"prompt_embeddings": torch.ones(3, 32)}, soft)
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/run_settings.json").write_text(json.dumps(recorded(args, ONE_RANK)))
    torch.save({"prompt_embeddings": torch.full((3, 32), value)}, soft)
    args.preference_text, args.ptuning_learning_rate = "Another.", 0.5  # no part in embedding mode
    found = resume_problems(args, ONE_RANK)
    assert len(found) == int(value != 1.0)
    assert all("the soft prompt has changed since the run was interrupted" in line for line in found)
    args = settings(tmp_path, training_mode="embedding", prompt_embedding_path=str(soft), **data)
    soft.rename(tmp_path / "renamed.pt")
    args.prompt_embedding_path = str(tmp_path / "renamed.pt")
    assert len(resume_problems(args, ONE_RANK)) == int(value != 1.0)  # the content counts, not the name
    args.training_mode, args.prompt_embedding_path = "text", ""
    (problem,) = resume_problems(args, ONE_RANK)
    assert "had TRAINING_MODE 'embedding', not 'text'" in problem


@pytest.mark.parametrize("changes", [PLAIN, OVERWRITE])
def test_what_is_not_a_run_is_never_touched(tmp_path, changes):
    fill(tmp_path / "out/run", {"notes.txt": "mine"})
    before = snapshot(tmp_path)
    T.make_way(settings(tmp_path, **changes))
    assert snapshot(tmp_path) == before


def test_folders_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "run", FINISHED)
    fill(tmp_path / "logs", EVENTS)
    args = T.ScriptArguments(output_dir="~/run", log_dir="~/logs")
    assert T.output_problems(args) == [] and T.output_problems(T.ScriptArguments(output_dir="~/logs")) != []
    make_way(args)
    assert snapshot(tmp_path) == {
        "run": None,
        "logs/.run_id": "new",
        **below("run-20260102-030405", FINISHED),
        **below("logs/runs/20260102-030405", EVENTS),
    }


# --- everything checked before anything is loaded


@pytest.fixture
def ready(tmp_path, tokenizer):
    """Flags of a run that could start: data, and a model without weights, which are not looked at before training."""
    make_model("llama", len(tokenizer)).config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {**ROWS[0], "chosen": "It depends."}])
    test = write_rows(tmp_path / "test.jsonl", ROWS[:2])
    return {
        "policy_model_path": str(tmp_path / "model"),
        "train_dataset_path": str(train),
        "test_dataset_path": str(test),
        "output_dir": str(tmp_path / "out" / "run"),
        "log_dir": str(tmp_path / "logs" / "run"),
        "precision": "fp32",
    }


def test_inputs_that_are_in_order(ready):
    devices, pairs, reports = T.check_inputs(T.ScriptArguments(**ready))
    assert devices.ranks >= 1
    assert {split: len(found) for split, found in pairs.items()} == {"train": 6, "test": 2}
    assert {split: (r.rows, r.usable) for split, r in reports.items()} == {"train": (7, 6), "test": (2, 2)}


def test_all_problems_of_files_and_devices_are_reported_together(ready, tmp_path):
    fill(tmp_path / "out/run", {"notes.txt": "mine"})
    write_rows(tmp_path / "train.jsonl", [ROWS[0], {"prompt": "a"}, {**ROWS[1], "rejected": None}])
    changes = {
        "policy_model_path": str(tmp_path / "no model"),
        "test_dataset_path": str(tmp_path / "none.jsonl"),
        "gpu_nodes": "localhost:99",
        "ds_config": "none.json",
    }
    before = snapshot(tmp_path)
    with pytest.raises(T.InputError) as caught:
        T.check_inputs(T.ScriptArguments(**{**ready, **changes}))
    lines = str(caught.value).splitlines()
    expected = [
        "POLICY_MODEL_PATH (",
        "OUTPUT_DIR (",
        "DS_CONFIG (",
        "GPU_NODES (",
        f"data file {tmp_path / 'train.jsonl'}, row 2: has no field 'chosen'",
        f"data file {tmp_path / 'train.jsonl'}, row 3: field 'rejected' is NoneType",
        f"data file {tmp_path / 'none.jsonl'} does not exist",
    ]
    assert len(lines) == len(expected)
    for start in expected:
        assert sum(line.startswith(f"- {start}") for line in lines) == 1, start
    assert snapshot(tmp_path) == before


def test_where_the_bundled_model_is_converted_to_is_looked_at_before(ready, tmp_path, monkeypatch):
    (tmp_path / "models").write_text("a file in the way")
    monkeypatch.setattr(T, "BUNDLED_MODEL_DIR", tmp_path / "models" / "Small")
    monkeypatch.setattr(T, "bundled_gguf", lambda: tmp_path / "model.gguf")
    with pytest.raises(T.InputError) as caught:
        T.check_inputs(T.ScriptArguments(**{**ready, "policy_model_path": ""}))
    assert caught.value.problems == [
        f"POLICY_MODEL_PATH (--policy_model_path) is '': {tmp_path / 'models'} is a file; the bundled model is "
        "converted into it: make room for it there, or name a model"
    ]


@pytest.mark.parametrize("local", [True, False])
def test_a_soft_prompt_that_only_the_models_size_tells_apart_can_be_planned_with(ready, tiny_run, tmp_path, local):
    """Two tensors without a known name: the model's 32 decides; a model of the hub is not asked before it is there."""
    soft = tmp_path / "soft.pt"
    torch.save({"mine": torch.ones(3, 32), "wider": torch.ones(5, 33)}, soft)
    model = tiny_run["POLICY_MODEL_PATH"] if local else "someone/some-model"
    changes = {"training_mode": "embedding", "prompt_embedding_path": str(soft), "policy_model_path": model}
    args = T.ScriptArguments(**{**ready, **changes})
    devices, pairs, reports = T.check_inputs(args)
    plan = T.describe_plan(args, devices, reports)
    assert f"{3 if local else 'the'} soft embeddings from {soft}" in plan
    assert T.recorded_settings(args, devices, pairs)["content"]["the soft prompt"]


@pytest.mark.parametrize(
    ("sizes", "local", "phrase"),
    [
        ((3, 32), True, None),
        ((3, 31), True, "holds float32 (3, 31), but the model's embeddings have 32 numbers, not 31"),
        ((3, 31), False, None),  # the model's size is not known before it is downloaded
        ((3, 4, 32), False, "holds float32 (3, 4, 32)"),
        (None, True, "there is no such file"),
    ],
)
def test_a_soft_prompt_is_checked_together_with_the_rest(ready, tiny_run, tmp_path, sizes, local, phrase):
    soft = tmp_path / "soft.pt"
    if sizes:
        torch.save(torch.ones(sizes), soft)
    model = tiny_run["POLICY_MODEL_PATH"] if local else "someone/some-model"
    changes = {"training_mode": "embedding", "prompt_embedding_path": str(soft), "policy_model_path": model}
    args = T.ScriptArguments(**{**ready, **changes, "gpu_nodes": "localhost:99", "test_dataset_path": "none.jsonl"})
    with pytest.raises(T.InputError) as caught:
        T.check_inputs(args)
    assert [problem.split(" ")[0] for problem in caught.value.problems[:2]] == ["GPU_NODES", "data"]
    found = caught.value.problems[2:]
    assert len(found) == (phrase is not None)
    assert phrase is None or (found[0].startswith("PROMPT_EMBEDDING_PATH (") and phrase in found[0])


def test_a_plan_writes_nothing(ready, tmp_path, capsys):
    before = snapshot(tmp_path)
    T.main([word for name, value in ready.items() for word in (f"--{name}", value)] + ["--plan", "true"])
    printed = capsys.readouterr()
    assert "6 pairs (dropped: 1 with identical answers (row 7))" in printed.err
    assert re.fullmatch(r"([A-Z_]+=.*\n)+", printed.out)
    assert snapshot(tmp_path) == before


# --- the plan as a person reads it

ONE_RANK = T.Devices("localhost:0", 1, on_gpu=False)
CPU = T.Devices("localhost:0,1", 2, on_gpu=False)
GPUS = T.Devices("localhost:0,1,2,3", 4, on_gpu=True)


def reports_of(train: int, test: int = 60):
    return {
        split: T.DataReport(Path(f"/data/{split}.jsonl"), rows=n) for split, n in (("train", train), ("test", test))
    }


def plan(devices=CPU, train=320, **changes) -> dict[str, str]:
    """Name → text of the plan's lines."""
    args = T.ScriptArguments(**{"precision": "fp32", **changes})
    lines = T.describe_plan(args, devices, reports_of(train)).splitlines()
    return {line[:19].strip(): line[20:] for line in lines}


def test_the_plan_says_what_the_run_will_do(tmp_path):
    args = settings(tmp_path)
    reports = reports_of(320)
    reports["train"].drop("with identical answers", 7)
    changes = {
        "output_dir": args.output_dir,
        "log_dir": args.log_dir,
        "preference_text": "Be kind.",
        "precision": "fp32",
    }
    text = T.describe_plan(T.ScriptArguments(policy_model_path="my/model", **changes), CPU, reports)
    lines = {line[:19].strip(): line[20:] for line in text.splitlines()}
    assert lines["mode"] == "text"
    assert lines["preference"] == "Be kind."
    assert lines["model"] == "my/model, of the hub: looked for when it is loaded"
    assert plan(policy_model_path=str(tmp_path))["model"] == str(tmp_path)
    assert lines["training data"] == "/data/train.jsonl, 319 pairs (dropped: 1 with identical answers (row 7))"
    assert lines["test data"] == "/data/test.jsonl, 60 pairs (dropped: none)"
    assert lines["pairs per update"] == "2 × 16, 4 in a forward"
    assert lines["updates"] == "10 (1 epoch(s))"  # 319 pairs, 32 an update
    assert lines["devices"].startswith("CPU, 2 rank(s) with ") and lines["devices"].endswith("float32")
    assert lines["output"] == args.output_dir
    assert lines["TensorBoard"] == args.log_dir
    assert (
        "β 0.05" in lines["loss"]
        and "α 0.1" in lines["loss"]
        and lines["trained"] == "LoRA, r 16, learning rate 0.0005"
    )
    assert "notice" not in lines


def test_the_plan_of_the_defaults():
    lines = plan()
    assert "SmolLM2-135M-Instruct" in lines["model"] and "Q4_1" in lines["model"]
    assert plan(alpha=0.0)["mode"] == "text, but ALPHA is 0: plain DPO"
    assert plan(preference_text="")["preference"].startswith("(empty")


PREFIXES = {  # mode → what guides, what is trained, the loss
    "text": ("Be kind.", "LoRA, r 8, learning rate 0.25", "sigmoid, β 0.05, α 0.3"),
    "embedding": ("7 soft embeddings from {}", "LoRA, r 8, learning rate 0.25", "sigmoid, β 0.05, α 0.3"),
    "ptuning": (
        "5 soft embeddings, to be trained; start: the tokens of 'Be kind.', cut or repeated",
        "the soft prompt, the model is frozen, learning rate 0.75",
        "sigmoid, β 0.05",
    ),
}
SET = {  # a value other than the default for every setting that some mode does not use
    "preference_text": "Be kind.",
    "num_virtual_tokens": 5,
    "prompt_init": "random",
    "ptuning_learning_rate": 0.75,
    "alpha": 0.3,
    "learning_rate": 0.25,
    "lora_r": 8,
    "lora_alpha": 9,
    "lora_dropout": 0.5,
    "lora_target_modules": "q_proj",
}
UNUSED = {  # mode → of them, those that have no part in it
    "text": ["num_virtual_tokens", "prompt_init", "ptuning_learning_rate"],
    "embedding": ["preference_text", "num_virtual_tokens", "prompt_init", "ptuning_learning_rate"],
    "ptuning": ["alpha", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"],
}


@pytest.fixture
def soft_path(tmp_path):
    torch.save(torch.ones(7, 32), tmp_path / "soft.pt")
    return str(tmp_path / "soft.pt")


def plan_of(mode: str, soft_path: str, **changes) -> dict[str, str]:
    path = {"prompt_embedding_path": soft_path, "policy_model_path": "a/model"} if mode == "embedding" else {}
    return plan(training_mode=mode, **path, **changes)


@pytest.mark.parametrize("mode", PREFIXES)
def test_the_plan_says_what_guides_and_what_is_trained(soft_path, mode):
    guides, trained, loss = PREFIXES[mode]
    lines = plan_of(mode, soft_path, **{**SET, "prompt_init": "text"})
    assert (lines["mode"], lines["preference"]) == (mode, guides.format(soft_path))
    assert (lines["trained"], lines["loss"]) == (trained, loss)
    assert plan_of(mode, soft_path, alpha=0.0)["mode"] == mode + ", but ALPHA is 0: plain DPO" * (mode != "ptuning")


def test_the_plan_says_that_a_soft_prompt_starts_at_random():
    lines = plan(training_mode="ptuning", prompt_init="random", preference_text="")
    assert lines["preference"] == "10 soft embeddings, to be trained; start: random tokens"


@pytest.mark.parametrize("mode", UNUSED)
def test_the_plan_names_what_was_set_and_plays_no_part(soft_path, mode):
    assert "not used" not in plan_of(mode, soft_path)
    said = {name: plan_of(mode, soft_path, **{name: value}).get("not used") for name, value in SET.items()}
    expected = {name: f"{name.upper()} (no part in {mode} mode)" for name in UNUSED[mode]}
    assert said == {**dict.fromkeys(SET), **expected}
    random_start = ["preference_text"] if mode == "ptuning" else []  # SET has PROMPT_INIT=random
    names = ", ".join(name.upper() for name in UNUSED[mode] + random_start)
    assert plan_of(mode, soft_path, **SET)["not used"] == f"{names} (no part in {mode} mode)"


def test_the_plan_names_gpus():
    lines = plan(GPUS, train=5120, gradient_accum_steps=128, pairs_per_forward=8, precision="bf16")
    assert lines["devices"] == "4 GPU(s), localhost:0,1,2,3, bfloat16"
    assert lines["pairs per update"] == "4 × 128, 8 in a forward"
    assert lines["updates"] == "10 (1 epoch(s))"


OUTPUT_LINES = [
    ("missing", PLAIN, ""),
    ("empty", PLAIN, ""),
    ("finished", PLAIN, " (the finished run in it is moved aside)"),
    ("finished", OVERWRITE, " (the finished run in it is replaced)"),
    ("interrupted", OVERWRITE, " (the unfinished run in it is replaced)"),
    ("nine is less than ten", RESUME, ", resumed from checkpoint-10"),
    (
        "interrupted in a later checkpoint",
        RESUME,
        ", resumed from checkpoint-5; checkpoint-10 is incomplete or damaged and skipped",
    ),
    (
        "interrupted in its first checkpoint",
        RESUME,
        ", begun again: no checkpoint in it is complete; checkpoint-5 is incomplete or damaged and skipped",
    ),
    ("started, nothing saved", RESUME, ", begun again: no checkpoint in it is complete"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), OUTPUT_LINES)
def test_the_plan_says_what_becomes_of_an_earlier_run(tmp_path, name, changes, expected):
    args = settings(tmp_path, **changes)
    fill_run(Path(args.output_dir), CONTENTS[name][0])
    lines = plan(output_dir=args.output_dir, log_dir=args.log_dir, **changes)
    assert lines["output"] == args.output_dir + expected


def updates_of(train, ranks, accumulated, epochs) -> int:
    """Updates that the Trainer makes: whole ones over the epochs, the last of an epoch with fewer pairs."""
    per_epoch = len(range(0, train, ranks * accumulated))
    return math.ceil(epochs * per_epoch)


PLANS = [
    (train, devices, accumulated, epochs)
    for train, devices, accumulated, epochs in itertools.product(
        (10, 11, 40, 99, 160, 320, 1000), (ONE_RANK, CPU, GPUS), (1, 2, 16, 100, 512), (0.5, 1.0, 2.0, 3.0)
    )
    if train * epochs >= 10 * devices.ranks  # ten updates are possible
]


def test_fewer_than_ten_updates_are_noticed_and_the_number_given_makes_ten():
    noticed = 0
    for train, devices, accumulated, epochs in PLANS:
        case = (train, devices.ranks, accumulated, epochs)
        changes = {"gradient_accum_steps": accumulated, "num_epochs": epochs, "pairs_per_forward": T.PAIRS_FOR_A_GPU}
        lines = plan(devices, train, **changes)
        updates = updates_of(train, devices.ranks, accumulated, epochs)
        assert lines["updates"].split(" ")[0] == str(updates), case
        assert ("notice" in lines) == (updates < 10), case
        if updates < 10:
            noticed += 1
            (number,) = re.findall(r"lower GRADIENT_ACCUM_STEPS to (\d+)", lines["notice"])
            assert 1 <= int(number) < accumulated, case
            assert updates_of(train, devices.ranks, int(number), epochs) >= 10, case
            assert f"only {updates} update" in lines["notice"] and "NUM_EPOCHS" in lines["notice"], case
    assert noticed > 50


def test_the_seed_of_the_adapters_own_run_is_noticed(tmp_path):
    """Its masks are those that the adapter was fitted under: it would seem better than its reference at the start."""
    args = {"adapter_path": str(tmp_path), "adapter_reference": "adapter"}
    assert not T.repeats_seed(T.ScriptArguments(**args)) and not T.repeats_seed(T.ScriptArguments())
    (tmp_path / T.RUN_SETTINGS).write_text(json.dumps({"seed": 7, "content": {}}))
    assert T.repeats_seed(T.ScriptArguments(**args, seed=7)) and not T.repeats_seed(T.ScriptArguments(**args, seed=8))


@pytest.mark.parametrize(
    ("devices", "pairs", "accumulated", "noticed"),
    [("gpu", 4, 16, True), ("gpu", 16, 64, False), ("gpu", 4, 8, False), ("cpu", 4, 64, False)],
)
def test_few_pairs_in_a_forward_are_noticed_on_a_gpu(devices, pairs, accumulated, noticed):
    sizes = {"pairs_per_forward": pairs, "gradient_accum_steps": accumulated}
    lines = plan({"gpu": GPUS, "cpu": CPU}[devices], 100_000, **sizes)
    assert (f"PAIRS_PER_FORWARD {pairs} may leave a GPU waiting" in lines.get("notice", "")) == noticed


@pytest.mark.parametrize(
    ("pairs", "prompts", "said"),
    [
        (1, 0, "1 test pair says little"),
        (6, 2, "anything from 0.19 to 0.81; raise TEST_SHARE"),
        (29, 0, "name more in TEST_DATASET_PATH"),
        (30, 0, None),
    ],
)
def test_few_test_pairs_are_noticed(pairs, prompts, said):
    reports = reports_of(320)
    reports["test"] = T.DataReport(Path("/data/test.jsonl"), rows=pairs, prompts=prompts)
    lines = T.describe_plan(T.ScriptArguments(precision="fp32"), CPU, reports).splitlines()
    notices = [line for line in lines if line.lstrip().startswith("notice")]
    assert len(notices) == (said is not None) and all(said in notice for notice in notices)


@pytest.mark.parametrize(("train", "accumulated"), [(5, 1), (9, 1), (9, 4)])
def test_where_no_accumulation_gives_ten_updates_the_notice_does_not_say_so(train, accumulated):
    notice = plan(ONE_RANK, train, gradient_accum_steps=accumulated)["notice"]
    assert "lower GRADIENT_ACCUM_STEPS" not in notice and "NUM_EPOCHS" in notice


# --- what the launcher reads


def read_by_the_launcher(text: str) -> dict[str, str]:
    """The lines as fast_train.sh's own loop reads them."""
    loop = r"""while IFS='=' read -r name value; do printf '%s\0%s\0' "$name" "$value"; done"""
    words = subprocess.run(["bash", "-c", loop], input=text + "\n", capture_output=True, text=True, check=True).stdout
    names_and_values = words.split("\0")[:-1]
    return dict(zip(names_and_values[::2], names_and_values[1::2], strict=True))


def test_what_the_launcher_reads_for_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(T, "CORES", 8)
    args = T.ScriptArguments(output_dir=f"{tmp_path}/a folder = $x", log_dir="./logs/run")
    found = read_by_the_launcher(T.launch_settings(args, CPU))
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "INCLUDE": "localhost:0,1",
        "DEVICE": "cpu",
        "OUTPUT": f"{tmp_path}/a folder = $x",
        "LOGS": "logs/run",
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "4",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # it is free


def test_what_the_launcher_reads_for_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = T.ScriptArguments(output_dir="~/run", log_dir="~/logs")
    found = read_by_the_launcher(T.launch_settings(args, GPUS))
    assert found.pop("MASTER_PORT").isdigit()
    assert found == {
        "INCLUDE": "localhost:0,1,2,3",
        "DEVICE": "gpu",
        "OUTPUT": f"{tmp_path}/run",
        "LOGS": f"{tmp_path}/logs",
    }
