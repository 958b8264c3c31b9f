"""Security: no network, no shell, no code from files. test_prefix and test_bad_input have soft prompts and models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, ROWS, launch, output_of, series, train, write_rows

import train_with_preference_prompt as T

# Every Python process of the run loads this first; a call that leaves the machine is written down and refused.
GUARD = """
import os, socket, sys

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "local"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    with open({log!r}, "a") as log:
        print(event, host, file=log)
    at_home = ("local", "localhost", "127.0.0.1", "::1", "", "0.0.0.0", "::", socket.gethostname(), None)
    if (host.decode() if isinstance(host, bytes) else host) not in at_home:
        with open({escaped!r}, "a") as log:
            print(event, arguments, file=log)
        raise PermissionError("no network in this test")

sys.addaudithook(guard)
"""
HOSTILE = """a $(touch pwned) `touch pwned`; touch pwned & "touch pwned" 'touch pwned' | > pwned"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The environment that keeps all Python processes from the network, and the files with what they asked for."""
    folder = tmp_path_factory.mktemp("guard")
    calls, escaped = folder / "calls", folder / "escaped"
    (folder / "sitecustomize.py").write_text(GUARD.format(log=str(calls), escaped=str(escaped)))
    return {"PYTHONPATH": str(folder)}, calls, escaped


def test_the_guard_guards(guarded):
    environment, calls, escaped = guarded
    script = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    result = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True)
    assert result.returncode == 1 and b"no network in this test" in result.stderr
    assert "192.0.2.1" in escaped.read_text() and "192.0.2.1" in calls.read_text()
    escaped.unlink()


def test_a_whole_run_needs_no_network_and_starts_no_shell(tiny_run, guarded, tmp_path):
    """Text mode through the launcher; folders, files, texts and data are named like shell commands."""
    environment, calls, escaped = guarded
    home = tmp_path / HOSTILE
    home.mkdir()
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    shutil.copytree(tiny_run["POLICY_MODEL_PATH"], home / HOSTILE)
    write_rows(home / f"{HOSTILE}.jsonl", [{name: f"{text} {HOSTILE}" for name, text in row.items()} for row in ROWS])
    shutil.copy(tiny_run["TEST_DATASET_PATH"], home / f"test {HOSTILE}")
    variables = {
        **tiny_run,
        **environment,
        "POLICY_MODEL_PATH": str(home / HOSTILE),
        "TRAIN_DATASET_PATH": str(home / f"{HOSTILE}.jsonl"),
        "TEST_DATASET_PATH": str(home / f"test {HOSTILE}"),
        "PREFERENCE_TEXT": HOSTILE,
        "OUTPUT_DIR": f"./out {HOSTILE}",
        "LOG_DIR": f"./logs {HOSTILE}",
        "TMPDIR": str(temporary),
    }
    result = launch(variables, cwd=home)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (home / f"out {HOSTILE}" / T.MODEL_CARD).exists()
    assert [path for path in tmp_path.rglob("*") if path.name == "pwned"] == []
    assert "127.0.0.1" in calls.read_text() and not escaped.exists(), escaped.read_text()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("mode", ["ptuning", "embedding"])
def test_the_soft_prompt_modes_need_no_network(mode, tiny_run, guarded, tmp_path):
    environment, _, escaped = guarded
    (tmp_path / "sabotage.py").write_text(
        f"import sys; sys.path.insert(0, {environment['PYTHONPATH']!r}); import sitecustomize\n"
        f"exec(open({environment['PYTHONPATH'] + '/sitecustomize.py'!r}).read())\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\nimport train_with_preference_prompt as T\nT.program()\n"
    )
    torch.save(torch.randn(4, 32), tmp_path / "soft.pt")
    soft = {"PROMPT_EMBEDDING_PATH": str(tmp_path / "soft.pt")} if mode == "embedding" else {}
    result = train({**tiny_run, **soft, "TRAINING_MODE": mode}, tmp_path, tmp_path / "sabotage.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not escaped.exists(), escaped.read_text()


class RunsCode:
    """A pickle that makes a file when it is loaded by unpickling."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def stopped(tiny_run, tmp_path_factory):
    """The output of a run that can be resumed from its second update."""
    cwd = tmp_path_factory.mktemp("stopped")
    assert train(tiny_run, cwd).returncode == 0
    (output_of(cwd) / T.MODEL_CARD).unlink()
    shutil.rmtree(output_of(cwd) / "checkpoint-3")
    return output_of(cwd)


@pytest.mark.parametrize(
    "file",
    [
        "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step2/mp_rank_00_model_states.pt",
        "rng_state.pth",
        "scheduler.pt",
    ],
)
def test_code_in_a_checkpoint_is_not_run(file, stopped, tiny_run, tmp_path):
    checkpoint = shutil.copytree(stopped, output_of(tmp_path), symlinks=True) / "checkpoint-2"
    marker = tmp_path / "ran"
    torch.save({"module": RunsCode(marker)}, checkpoint / file)
    T.mark_complete(checkpoint)  # as whoever can write there could
    result = train({**tiny_run, "RESUME": "true"}, tmp_path)
    assert result.returncode == 1 and not marker.exists(), result.stderr[-2000:]
    assert (
        f"{checkpoint} cannot be read: it is damaged or asks to run code, which is refused. Remove it" in result.stderr
    )
    assert "Traceback" not in result.stderr
    torch.load(checkpoint / file, weights_only=False)
    assert marker.exists()  # it would have


def test_every_checkpoint_is_read_without_running_code(tiny_run, tmp_path):
    """In bf16 and with ZeRO-1 the engine saves other classes than in fp32 with ZeRO-2, which test_trainer resumes."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}))
    variables = {**tiny_run, "PRECISION": "bf16", "DS_CONFIG": str(tmp_path / "ds.json"), "NUM_EPOCHS": "0.8"}
    assert train(variables, tmp_path).returncode == 0
    losses = series(tmp_path, "loss/train")
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    result = train({**variables, "RESUME": "true"}, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert series(tmp_path, "loss/train") == losses


def test_nothing_in_the_module_runs_code_or_a_shell():
    source = (PROJECT / "train_with_preference_prompt.py").read_text(encoding="utf-8")
    calls = [line for line in source.splitlines() if "torch.load(" in line]
    assert len(calls) >= 3 and all("weights_only=True" in line for line in calls)
    for forbidden in ("weights_only=False", "trust_remote_code=True", "pickle.load", "eval(", "exec(", "os.system"):
        assert forbidden not in source.replace(".eval()", "").replace("training/eval(", "")
    for forbidden in ("import pickle", "os.popen", "shell=True", "Popen", "getoutput", "mktemp("):
        assert forbidden not in source
    # Programs are started in two places, both for several nodes: ssh, by a list of words, and pdsh's version.
    assert re.findall(r"subprocess\.(?!TimeoutExpired)\w+\(.*?[,)]", source) == [
        "subprocess.run(command,",
        'subprocess.run(["pdsh",',
    ]


def test_the_launcher_evaluates_no_text():
    source = (PROJECT / "fast_train.sh").read_text(encoding="utf-8")
    assert re.findall(r"(?:^|[;&|({]|\b(?:then|do|else))\s*(eval|source|\.)\s", source, re.M) == []
