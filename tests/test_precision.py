"""Precision: what PRECISION means on which device; in fp16 the loss scaler leaves updates out, which is said and counted."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import history, output_of, parse, series, train
from test_around import sabotaged
from test_plan import GPUS, plan
from test_trainer import adapter, finished

import train_with_preference_prompt as T

# PyTorch computes in fp16 on every CPU; DeepSpeed only trains on those that multiply in it. The loss scale begins where
# gradients overflow, and goes down at each overflow instead of at every second one.
FP16 = """
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
CPU_Accelerator.is_fp16_supported = lambda self: True
from deepspeed.runtime.zero import stage_1_and_2
def scaler(dtype, make=stage_1_and_2.CreateLossScaler, **options):
    made = make(dtype=dtype, **options)
    made.cur_scale, made.delayed_shift, made.cur_hysteresis = {scale}, 1, 1
    return made
stage_1_and_2.CreateLossScaler = scaler
"""
# The loss stays as it is; its gradient is beyond fp16 even where nothing scales it.
STEEP = """
share = T.PreferenceGuidedDPOTrainer.compute_loss
def compute_loss(self, *arguments, **options):
    loss = share(self, *arguments, **options)
    return loss + (loss - loss.detach()) * 1e7
T.PreferenceGuidedDPOTrainer.compute_loss = compute_loss
"""
SETTINGS = {"PRECISION": "fp16", "NUM_EPOCHS": "2", "LORA_DROPOUT": "0"}  # six updates
NOTICE = (
    "notice: update {} was left out, as a gradient overflowed fp16: its pairs taught nothing, and the learning rate "
    "stays; the loss scale, which follows the gradients, is now {}"
)


def updates(cwd):
    return [logs for logs in history(cwd) if "loss/train" in logs]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return sabotaged(FP16.format(scale=2.0**20), tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def run(tiny_run, program, tmp_path_factory):
    """A run in fp16 whose first updates overflow; its output and what it printed."""
    cwd = tmp_path_factory.mktemp("fp16")
    return cwd, finished(train({**tiny_run, **SETTINGS}, cwd, program))


def test_updates_that_overflow_are_left_out_and_said(run):
    cwd, result = run
    left_out = [logs for logs in updates(cwd) if T.LEFT_OUT in logs]
    taken = [logs for logs in updates(cwd) if T.LEFT_OUT not in logs]
    assert left_out and taken and left_out[0]["step"] == 1 and len(updates(cwd)) == 6
    for number, logs in enumerate(left_out, start=1):
        assert logs[T.LEFT_OUT] == 2.0 ** (20 - number) and logs[T.GRAD_NORM_TAG] == math.inf
        assert NOTICE.format(logs["step"], f"{logs[T.LEFT_OUT]:g}") in result.stdout
    assert all(math.isfinite(logs[T.GRAD_NORM_TAG]) for logs in taken)
    assert result.stdout.count("was left out") == len(left_out)
    said = f", {len(left_out)} of them left out as gradients overflowed fp16"
    assert f"updates      6, 24 pairs{said}\n" in result.stdout
    assert f"| updates | 6, 24 pairs{said} |" in (output_of(cwd) / T.MODEL_CARD).read_text()
    lines = map(json.loads, (output_of(cwd) / T.METRICS_FILE).read_text().splitlines())
    norms = {line["update"]: line[T.GRAD_NORM_TAG] for line in lines if T.GRAD_NORM_TAG in line}
    assert [update for update, norm in norms.items() if norm is None] == [logs["step"] for logs in left_out]


def test_the_learning_rate_waits_for_updates_that_are_taken(run):
    """Linear from 5e-4 to 0 over six updates: each is made with the rate of those taken before it."""
    taken = 0
    for logs in updates(run[0]):
        assert logs[T.LEARNING_RATE_TAG] == pytest.approx(5e-4 * (1 - taken / 6), rel=1e-12)
        taken += T.LEFT_OUT not in logs
    assert 0 < taken < 6


def test_an_update_that_is_left_out_changes_nothing(run):
    """The first two see the same weights: their pairs' rewards are 0 until one is taken."""
    margins, taken = series(run[0], "rewards_train/margin"), [T.LEFT_OUT not in logs for logs in updates(run[0])]
    first = taken.index(True)
    assert margins[: first + 1] == [0.0] * (first + 1)
    assert all(margin != 0 for margin in margins[first + 1 :])


def test_what_is_saved_is_in_fp16(run):
    weights = torch.load(output_of(run[0]) / T.MERGED_WEIGHTS, weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((output_of(run[0]) / "config.json").read_text())["dtype"] == "float16"
    assert "float16 |" in (output_of(run[0]) / T.MODEL_CARD).read_text()


def test_a_resumed_run_goes_on_with_its_loss_scale(run, tiny_run, program, tmp_path):
    cwd, _ = run
    resumed = shutil.copytree(output_of(cwd), output_of(tmp_path), symlinks=True)
    (resumed / T.MODEL_CARD).unlink()
    shutil.rmtree(resumed / "checkpoint-6")
    finished(train({**tiny_run, **SETTINGS, "RESUME": "true"}, tmp_path, program))
    kept = ("step", "loss/train", T.GRAD_NORM_TAG, T.LEARNING_RATE_TAG, T.LEFT_OUT)
    one, other = ([{name: logs.get(name) for name in kept} for logs in updates(folder)] for folder in (cwd, tmp_path))
    assert one == other
    assert all(torch.equal(tensor, adapter(cwd)[name]) for name, tensor in adapter(tmp_path).items())


def test_the_same_training_as_in_fp32(run, tiny_run, tmp_path):
    """Over the same pairs before the first update that is taken: to fp16's rounding, and not to more digits."""
    finished(train({**tiny_run, **SETTINGS, "PRECISION": "fp32", "NUM_EPOCHS": "0.4"}, tmp_path))
    half, full = updates(run[0])[0], updates(tmp_path)[0]
    for tag in ("loss/train", "logps_train/chosen", "logps_train/pref_rejected", "preference_metrics/base_margin"):
        assert half[tag] == pytest.approx(full[tag], rel=1e-2) and half[tag] != full[tag]


def test_an_evaluation_gives_what_the_run_gave(run, tiny_run, tmp_path):
    """No engine, so that every CPU does: nothing is patched here."""
    results = tmp_path / "results.json"
    data = {name: tiny_run[name] for name in ("POLICY_MODEL_PATH", "TEST_DATASET_PATH", "PREFERENCE_TEXT")}
    variables = {**data, "ADAPTER_PATH": str(output_of(run[0])), "PAIRS_PER_FORWARD": tiny_run["PAIRS_PER_FORWARD"]}
    variables |= {"PRECISION": "fp16", "EVALUATE_ONLY": "true", "EVALUATION_FILE": str(results)}
    finished(train(variables, tmp_path))
    found = json.loads(results.read_text())["metrics"]
    last = [logs for logs in history(run[0]) if "loss/eval" in logs][-1]
    for tag in ("rewards_eval/margin", "logps_eval/chosen", "preference_metrics/base_margin_eval"):
        assert found[tag] == pytest.approx(last[tag], rel=1e-6)


def test_gradients_that_overflow_without_any_scale_end_the_run(tiny_run, tmp_path):
    result = train({**tiny_run, **SETTINGS}, tmp_path, sabotaged(FP16.format(scale=4.0) + STEEP, tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert NOTICE.format(1, 2) in result.stdout
    assert "update 2: optim/grad_norm is inf; no pair alone gives it." in result.stderr
    assert "or set PRECISION=bf16 or fp32" in result.stderr


# --- what needs no run

MEANING = {  # PRECISION → on a GPU with bf16, on one without, on the CPU
    "auto": (torch.bfloat16, torch.float32, torch.float32),
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "fp32": (torch.float32,) * 3,
}


@pytest.mark.parametrize("precision", MEANING)
def test_what_precision_means(precision, monkeypatch):
    found = []
    for on_gpu, bf16 in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        found.append(T.precision_dtype(precision, on_gpu))
    assert tuple(found) == MEANING[precision]


def test_the_gpu_that_was_chosen_decides(monkeypatch, tiny_run):
    """Not the first one of the machine, which may be older: in the plan and an evaluation; a rank sees its own alone."""
    taken = []
    monkeypatch.setattr(T, "available_gpus", lambda: [0, 2, 3])
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    args = parse([f"--{name.lower()}={value}" for name, value in {**tiny_run, "GPU_NODES": "localhost:2,3"}.items()])
    T.check_inputs(args)
    monkeypatch.setenv("RANK", "0")
    T.check_inputs(args)
    assert taken == [torch.device("cuda", 1)]


def test_a_rank_on_the_cpu_sees_no_gpu(monkeypatch):
    """DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for it all the same."""
    seen = []
    monkeypatch.setattr(T, "main", lambda argv: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(sys, "argv", ["module"])
    monkeypatch.setattr(os, "environ", {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"})
    T.program()
    assert seen == [""]


def test_the_plan_says_what_auto_is_not(monkeypatch):
    """On a GPU without bf16: fp16 may not hold what the model computes, so it is the user's choice."""
    notices = []
    for bf16 in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        notices += [
            plan(GPUS, precision=precision, gradient_accum_steps=1).get("notice", "") for precision in ("auto", "fp16")
        ]
    assert [("fp16 is faster" in notice) for notice in notices] == [True, False, False, False]


@pytest.mark.parametrize(
    ("trains", "evaluate_only", "refused"), [(False, False, 1), (True, False, 0), (False, True, 0)]
)
def test_where_deepspeed_does_not_train_in_fp16_it_is_refused(trains, evaluate_only, refused, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: trains)
    args = T.ScriptArguments(precision="fp16", evaluate_only=evaluate_only)
    problems = T.device_problems(args, GPUS)
    assert len(problems) == refused and all("this GPU is older; set it to auto or fp32" in line for line in problems)
    assert T.device_problems(T.ScriptArguments(precision="bf16"), GPUS) == []


@pytest.mark.parametrize(
    ("logs", "ends"),
    [
        ({"loss/train": 0.7, "optim/grad_norm": math.inf, T.LEFT_OUT: 2.0}, False),
        ({"loss/train": 0.7, "optim/grad_norm": math.inf, T.LEFT_OUT: 1.0}, True),
        ({"loss/train": math.nan, "optim/grad_norm": math.inf, T.LEFT_OUT: 2.0}, True),
        ({"loss/train": 0.7, "optim/grad_norm": math.inf}, True),
        ({"loss/train": 0.7, "optim/grad_norm": 1.0}, False),
        ({"loss/eval": math.nan}, True),
    ],
)
def test_which_updates_end_a_run(logs, ends, monkeypatch):
    monkeypatch.setattr(T, "broken_pairs", lambda *arguments: [])
    trainer = SimpleNamespace(
        **{"train_dataset": [1], "eval_dataset": [1], "update_indices": [0]},
        args=SimpleNamespace(process_index=0, world_size=1, fp16=True),
        state=SimpleNamespace(global_step=4),
        settings=SimpleNamespace(output_path=Path("none")),
    )
    if not ends:
        return T.require_finite(trainer, logs)
    with pytest.raises(T.RunError, match="update 4: .* is (inf|nan)"):
        T.require_finite(trainer, logs)


def test_half_the_memory_is_named_where_it_helps(monkeypatch):
    def named(device, bf16, **settings):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        return T.memory_problem(T.ScriptArguments(**settings), "it", torch.device(device))

    assert 'PRECISION (now "fp32"): bf16;' in named("cuda", True, precision="fp32")
    assert 'PRECISION (now "auto"): fp16;' in named("cuda", False)
    assert "PRECISION" not in named("cuda", True) and "PRECISION" not in named("cpu", False, precision="fp32")
    assert "LOAD_IN_4BIT (now false): true;" in named("cuda", True) and "LOAD_IN_4BIT" not in named("cpu", True)
    assert "LOAD_IN_4BIT" not in named("cuda", True, load_in_4bit=True)


def test_rounding_of_each_precision():
    """fp32 has 23 bits behind the point, fp16 10 and bf16 7: an eighth of bf16's error in fp16."""
    pairs = [SimpleNamespace(chosen_ids=[1] * 3, rejected_ids=[1] * 5)]
    half, brain = T.rounding(torch.float16, pairs), T.rounding(torch.bfloat16, pairs)
    assert brain / half == torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps == 8
    assert brain == 0.5 and T.rounding(torch.float32, pairs) == pytest.approx(5e-3)
