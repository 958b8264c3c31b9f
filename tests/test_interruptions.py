"""Interruptions: signals, killed ranks and full disks end a run at once and lose nothing; resumed runs end the same."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import PROJECT, history, launch, output_of, own_python_first, series, start, train
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_around import sabotaged
from test_trainer import RUN_TIME, assert_bit_equal, finished
from torch.utils.cpp_extension import _get_build_directory

import train_with_preference_prompt as T

RANKS = min(2, T.CORES)


SETTINGS = {"LORA_DROPOUT": "0.3", "EVAL_STEPS": "1", "LEARNING_RATE": "0.002"}  # evaluate and save after each update


def uninterrupted_run(variables, epochs: int, factory):
    """The settings of a run of three updates an epoch, and where such a run went to its end."""
    variables, cwd = {**variables, **SETTINGS, "NUM_EPOCHS": str(epochs)}, factory.mktemp("whole")
    finished(train(variables, cwd))
    return variables, cwd


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    return uninterrupted_run(tiny_run, 10, tmp_path_factory)


@pytest.fixture(scope="module")
def brief(tiny_run, tmp_path_factory):
    return uninterrupted_run(tiny_run, 4, tmp_path_factory)


def resumed(variables, cwd):
    """The variables of the next start: a run that has left its settings is resumed."""
    return {**variables, "RESUME": str((output_of(cwd) / T.RUN_SETTINGS).exists()).lower()}


def curves(cwd) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: every tag's steps and values, from all event files together."""
    accumulator = EventAccumulator(str(cwd / "logs" / "Preference_Guided_DPO"))
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith(RUN_TIME)]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def until(ready, seconds: float, alive=lambda: True) -> bool:
    """Waits until something is so, at most so long."""
    deadline = time.monotonic() + seconds
    while not (so := ready()) and time.monotonic() < deadline and alive():
        time.sleep(0.005)
    return so or ready()  # not asked again where it was so: a file that is there may be gone the moment after


def another_checkpoint(cwd, complete=False):
    """Says whether something has been written since into the newest checkpoint, or that it is complete."""
    since = time.time_ns()

    def ready() -> bool:
        with contextlib.suppress(FileNotFoundError, IndexError):  # an incomplete one is removed and begun anew
            newest = T.checkpoints(output_of(cwd))[-1]
            files = [newest / T.CHECKPOINT_FILES] if complete else newest.rglob("*.*")
            return any(file.stat().st_mtime_ns > since for file in files)
        return False

    return ready


# --- killed at random points


def test_twenty_kills_at_random_points_change_nothing(whole, tmp_path):
    """Killed while it starts, trains, evaluates or saves, and resumed each time: the same run, bit for bit."""
    variables, uninterrupted = whole
    randomly, kills, restarts = random.Random(4), 0, []
    while kills < 20:
        moment = randomly.choice(["starting", "saving", "saving", "training", "training", "training"])
        another = another_checkpoint(tmp_path, complete=moment == "training")
        restarts.append(T.newest_checkpoint(output_of(tmp_path)))
        run = start(resumed(variables, tmp_path), tmp_path)
        if moment == "starting":  # so that no kill takes more than about two updates, and the run outlasts them all
            until(another, randomly.uniform(0, 3))
        else:  # while it writes another checkpoint, or after it has
            assert until(another, 200), run.stderr.read_text()[-3000:]
            time.sleep(randomly.uniform(0, 0.1))
        run.kill(randomly.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        result = run.wait()
        assert result.returncode in (-9, -15, -2, 130), result.stderr[-2000:]
        kills += 1
    reached = [int(path.name.split("-")[1]) if path else 0 for path in restarts]
    assert reached == sorted(reached) and 5 < reached[-1] < 30  # never back, and all kills came before the end
    finished(train(resumed(variables, tmp_path), tmp_path))
    assert_bit_equal(tmp_path, uninterrupted)
    assert curves(tmp_path) == curves(uninterrupted)


def test_a_resumed_run_does_not_accept_other_settings(brief, tmp_path):
    """Every difference is listed; the run is left as it was."""
    variables, uninterrupted = brief
    shutil.copytree(uninterrupted / "model_output", tmp_path / "model_output")
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    changed = {
        **variables,
        "RESUME": "true",
        "BETA": "0.2",
        "SEED": "1",
        "TRAIN_DATASET_PATH": variables["TEST_DATASET_PATH"],
    }
    result = train(changed, tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = [line for line in result.stderr.split("error:\n")[1].splitlines() if line.startswith("- ")]
    words = ("BETA 0.05, not 0.2", "SEED 42, not 1", "the train data has changed")
    assert len(lines) == 3 and all(any(phrase in line for line in lines) for phrase in words), lines
    assert all(
        "RESUME is true, but" in line and "OVERWRITE=true and RESUME=false to start anew" in line for line in lines
    )


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_template(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text("Hello. " + template.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_weights, "the base model has changed"), (change_template, "what the tokenizer makes has changed")],
)
def test_a_resumed_run_does_not_accept_another_model(change, named, tiny_run, tmp_path):
    """The folder has its name still; only its content is another."""
    shutil.copytree(tiny_run["POLICY_MODEL_PATH"], tmp_path / "model")
    variables = {**tiny_run, "POLICY_MODEL_PATH": str(tmp_path / "model"), "NUM_EPOCHS": "0.5"}
    finished(train(variables, tmp_path))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    before = {path: path.read_bytes() for path in output_of(tmp_path).rglob("*") if path.is_file()}
    change(tmp_path / "model")
    result = train({**variables, "RESUME": "true"}, tmp_path)
    assert result.returncode == 2 and named in result.stderr and "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_checkpoint_is_not_resumed_from(tiny_run, tmp_path):
    """One bit of the optimizer's state, which would change the run without a word."""
    finished(train(tiny_run, tmp_path))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    (state,) = (output_of(tmp_path) / "checkpoint-3").rglob("*optim_states.pt")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert T.newest_checkpoint(output_of(tmp_path)).name == "checkpoint-2"
    finished(train({**tiny_run, "RESUME": "true"}, tmp_path))


def test_a_resumed_run_evaluates_as_often_as_it_now_says(brief, tmp_path):
    """EVAL_STEPS is free, and changes nothing else: an evaluation draws no random number."""
    variables, uninterrupted = brief
    finished(train({**variables, "EVAL_STEPS": "4"}, tmp_path))
    assert [logs["step"] for logs in history(tmp_path) if "loss/eval" in logs] == [0, 4, 8, 12]
    assert series(tmp_path, "loss/train") == series(uninterrupted, "loss/train")
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    (output_of(tmp_path) / "checkpoint-12" / T.CHECKPOINT_FILES).unlink()
    finished(train({**variables, "EVAL_STEPS": "2", "RESUME": "true"}, tmp_path))
    assert [logs["step"] for logs in history(tmp_path) if "loss/eval" in logs] == [0, 4, 8, 10, 12]
    assert series(tmp_path, "loss/train") == series(uninterrupted, "loss/train")


def test_a_compilation_that_was_killed_does_not_stop_the_next_start(tiny_run, tmp_path):
    """PyTorch's own guard, a file, would be waited for by every later start, for ever."""
    variables, own = {**tiny_run, "NUM_EPOCHS": "0.1"}, tmp_path / "extensions"  # other tests take the shared one
    finished(train(variables, tmp_path))  # it is compiled by now
    compiled = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    left = shutil.copytree(compiled, own / compiled.name) / "lock"
    with left.open("w"):
        assert T.is_open(left)  # as while another program compiles
    assert not T.is_open(left)
    program = sabotaged(f"import os; os.environ['TORCH_EXTENSIONS_DIR'] = {str(own)!r}", tmp_path)
    finished(start(variables, tmp_path, program).wait(timeout=60))
    assert not left.exists()


def test_ninja_is_found_where_the_environment_is_not_active(tiny_run, tmp_path):
    """DeepSpeed brings it, beside its Python; a folder of the search path that has another one does not count."""
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ninja").chmod(0o755)
    program = sabotaged(f"import os; os.environ['PATH'] = {str(tmp_path)!r} + ':' + os.environ['PATH']", tmp_path)
    finished(train({**tiny_run, "NUM_EPOCHS": "0.1"}, tmp_path, program))


# --- signals to the launcher


def heed_signals() -> None:
    """What runs in the background or under nohup ignores some, and so would its children."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Launcher:
    """./fast_train.sh in the background, with what it prints and every process it has started."""

    def __init__(self, variables, cwd, script=PROJECT / "fast_train.sh"):
        self.log = cwd / "log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", str(script)],
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=heed_signals,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Leaves nothing behind where the test has failed."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, ready) -> None:
        assert until(ready, 240, lambda: self.process.poll() is None), self.said()[-3000:]
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def processes(self, name: str) -> list[psutil.Process]:
        found = [p for p in self.started if p.is_running() and any(word.endswith(name) for word in p.cmdline())]
        return [p for p in found if "-u" in p.cmdline()]

    def ends(self) -> int:
        """The exit status; nothing that was started may be left, neither process nor shared memory."""
        status = self.process.wait(timeout=20)
        assert [p for p in self.started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        for port in re.findall(r"--master_port=(\d+)", self.said()):
            assert list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")) == []
        return status


# when → (what shows it, in the log or the output folder; the signal; its exit status; whether a run has begun)
MOMENTS = {
    "checking": (lambda said, output: "checking settings" in said, signal.SIGINT, 130, False),
    "starting the ranks": (lambda said, output: "command:" in said, signal.SIGTERM, 143, False),
    "scoring the reference": (lambda said, output: "reference, train data" in said, signal.SIGHUP, 129, True),
    "training": (lambda said, output: "accuracy=" in said, signal.SIGINT, 130, True),
    "evaluating": (lambda said, output: said.count("held-out loss") == 3, signal.SIGHUP, 129, True),
    "saving": (lambda said, output: (output / "checkpoint-2" / "global_step2").exists(), signal.SIGTERM, 143, True),
}


ALSO = ("scoring the reference", "evaluating", "saving")  # much like training


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m in ALSO)) for m in MOMENTS])
def test_a_signal_ends_every_rank_at_once(moment, tiny_run, tmp_path):
    shows, sent, status, resumable = MOMENTS[moment]
    ranks = RANKS if moment in ("training", "saving") else 1  # the others end in the same way, and start sooner
    variables = {**tiny_run, "NUM_EPOCHS": "100000", "EVAL_STEPS": "1", "CPU_RANKS": str(ranks)}
    with Launcher(variables, tmp_path) as launcher:
        launcher.wait_for(lambda: shows(launcher.said(), output_of(tmp_path)))
        if moment in ("training", "evaluating", "saving"):
            assert len(launcher.processes("train_with_preference_prompt.py")) >= ranks
        launcher.process.send_signal(sent)
        assert launcher.ends() == status
    said, name = launcher.said(), sent.name
    assert f"stopped by {name}" in said and ("RESUME=true continues" in said) == resumable, said[-2000:]
    assert (output_of(tmp_path) / T.RUN_SETTINGS).exists() == resumable
    if moment == "saving":
        assert T.newest_checkpoint(output_of(tmp_path)) is not None  # the first one, if the second was cut short


def test_a_signal_while_the_model_is_converted_leaves_no_half_model(tiny_run, bundled_model, tmp_path):
    """In a copy of the project, where the bundled model has not been converted yet."""
    for name in ("fast_train.sh", "train_with_preference_prompt.py", "ds_config.json", *T.BUNDLED_DATA):
        if (PROJECT / name).is_file():
            shutil.copy(PROJECT / name, tmp_path / name)
    for name in ("requirements.txt", "requirements-bundled.txt"):
        shutil.copy(PROJECT / name, tmp_path / name)
    variables = {**tiny_run, "POLICY_MODEL_PATH": "", "PATH": own_python_first()}
    with Launcher(variables, tmp_path, tmp_path / "fast_train.sh") as launcher:
        launcher.wait_for(lambda: "converting the bundled model" in launcher.said())
        time.sleep(random.Random(0).uniform(0, 8))
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.ends() == 143
    assert not (tmp_path / "models" / "SmolLM2-135M-Instruct").exists()


@pytest.mark.skipif(RANKS < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(
    "killed", ["train_with_preference_prompt.py", pytest.param("deepspeed.launcher.launch", marks=pytest.mark.slow)]
)
def test_a_killed_process_ends_the_others(killed, tiny_run, tmp_path):
    """A rank, or DeepSpeed's own launcher, whose death it would pass on as success."""
    variables = {**tiny_run, "NUM_EPOCHS": "100000", "EVAL_STEPS": "1", "CPU_RANKS": "2"}
    with Launcher(variables, tmp_path) as launcher:
        launcher.wait_for(lambda: "update 2: held-out loss" in launcher.said())
        launcher.processes(killed)[-1].kill()
        assert launcher.ends() not in (0, 2)
    assert re.search("(training stopped with|training ended without).*; RESUME=true continues", launcher.said())
    assert T.newest_checkpoint(output_of(tmp_path)) is not None


# --- a disk that takes no more


def small_disk(folder: Path, kib: int) -> None:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can make a small file system; the limits on a file's size below need no root")


@pytest.mark.parametrize("kib", [250, 500, 950, 1150])
def test_a_full_disk_loses_no_checkpoint(kib, brief, tmp_path):
    """From too little for one checkpoint to too little for the merged model; with room made, the run ends the same."""
    variables, uninterrupted = brief
    disk = tmp_path / "disk"
    small_disk(disk, kib)
    try:
        variables = {**variables, "LOG_DIR": str(tmp_path / "logs" / "Preference_Guided_DPO")}
        result = train({**variables, "OUTPUT_DIR": str(disk / "run")}, tmp_path)
        assert result.returncode == 1, result.stderr[-2000:]
        message = result.stderr.split("error:\n")[-1]
        assert f"{disk}/run" in message.split(" cannot be written: ")[0] and "0 MiB are free there" in message
        assert "Traceback" not in result.stderr and "RESUME=true" in message
        newest = T.newest_checkpoint(disk / "run")
        assert (f"{newest} is complete" if newest else "no checkpoint is complete yet") in message
        assert newest is not None or kib < 600
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        finished(train({**variables, "OUTPUT_DIR": str(disk / "run"), "RESUME": "true"}, tmp_path))
        shutil.copytree(disk / "run", output_of(tmp_path), symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert_bit_equal(tmp_path, uninterrupted)


# what cannot be written → what makes it so, and the words of the error
UNWRITABLE = {
    "a checkpoint's file grows too large": (
        """
        import resource
        save = T.Trainer._save_checkpoint
        def _save_checkpoint(self, *args):
            if self.state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            save(self, *args)
        T.Trainer._save_checkpoint = _save_checkpoint
        """,
        "checkpoint-2 cannot be written: ",
        True,
    ),
    "a checkpoint's place is taken": (
        """
        save = T.Trainer._save_checkpoint
        def _save_checkpoint(self, *args):
            if self.state.global_step == 2:
                open(self.args.output_dir + "/checkpoint-2", "w").close()
            save(self, *args)
        T.Trainer._save_checkpoint = _save_checkpoint
        """,
        "checkpoint-2 cannot be written: [Errno 17] File exists",
        True,
    ),
    "the output folder is gone when the run is saved": (
        """
        import os
        save = T.save_run
        def save_run(trainer, folder, reports):
            os.rename(folder, str(folder) + "-elsewhere")
            open(folder, "w").close()
            save(trainer, folder, reports)
        T.save_run = save_run
        """,
        "Preference_Guided_DPO cannot be written: [Errno 20] Not a directory",
        False,
    ),
    "the events' file grows too large": (
        """
        import resource
        log = T.TagCallback.on_log
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step == 2 and "loss/train" in logs:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the output of this test is shorter
                self.tb_writer.add_text("long", "x" * 50_000, 2)
            log(self, args, state, control, logs=logs, **kwargs)
        T.TagCallback.on_log = on_log
        """,
        "logs/Preference_Guided_DPO cannot be written: [Errno 27] File too large",
        True,
    ),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_cannot_be_written_is_named_and_nothing_is_lost(what, tiny_run, tmp_path):
    patch, words, resumable = UNWRITABLE[what]
    result = train({**tiny_run, "EVAL_STEPS": "1"}, tmp_path, sabotaged(patch, tmp_path))
    assert result.returncode == 1 and result.stderr.count("error:\n") == 1, result.stderr[-2000:]
    assert words in result.stderr.split("error:\n")[1]
    assert not (output_of(tmp_path) / T.MODEL_CARD).exists()
    if resumable:
        assert f"{output_of(tmp_path)}/checkpoint-1 is complete, from which RESUME=true continues" in result.stderr
        assert T.newest_checkpoint(output_of(tmp_path)) == output_of(tmp_path) / "checkpoint-1"


@pytest.mark.slow
def test_the_launcher_killed_at_random_points(tiny_run, tmp_path):
    """Twenty more through ./fast_train.sh with two ranks, by signals to the launcher and to single ranks."""
    # Each kill takes up to five updates, and the run outlasts them all.
    variables = {**tiny_run, **SETTINGS, "NUM_EPOCHS": "100", "CPU_RANKS": str(RANKS)}
    randomly = random.Random(5)
    uninterrupted, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (uninterrupted, cut):
        folder.mkdir()
    finished(launch(variables, cwd=uninterrupted))
    for _ in range(20):
        launcher = Launcher(resumed(variables, cut), cut)
        launcher.wait_for(another_checkpoint(cut))
        time.sleep(randomly.uniform(0, 0.5))
        sent = randomly.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
        if sent == signal.SIGKILL:
            randomly.choice(launcher.processes("train_with_preference_prompt.py")).kill()
        else:
            launcher.process.send_signal(sent)
        assert launcher.ends() != 0
    finished(launch(resumed(variables, cut), cwd=cut))
    assert_bit_equal(cut, uninterrupted)
    assert curves(cut) == curves(uninterrupted)
