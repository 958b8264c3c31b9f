"""Trainer: a whole run equals a plain PyTorch training loop, however its pairs are packed and spread over ranks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PREFERENCE, history, launch, output_of, series, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_forward import padded_logps

import train_with_preference_prompt as T

EXACT = {"LORA_DROPOUT": "0", "BETA": "0.1", "ALPHA": "0.5", "LEARNING_RATE": "0.01"}
EXACT |= {"NUM_EPOCHS": "3", "GRADIENT_ACCUM_STEPS": "8"}
PAIRS, UPDATE, EPOCHS = 12, 8, 3  # updates of 8 and 4 pairs in each epoch


def finished(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """The same training with 8 × 1, 3 × 3 (8 is no multiple), 2 × 4 and 1 × 8 pairs in a forward."""
    made = {}
    for pairs_per_forward in (1, 3, 4, 8):
        made[pairs_per_forward] = tmp_path_factory.mktemp(f"forward_{pairs_per_forward}")
        variables = {**tiny_run, **EXACT, "PAIRS_PER_FORWARD": str(pairs_per_forward)}
        finished(train(variables, made[pairs_per_forward]))
    return made


def adapter(cwd):
    return load_file(output_of(cwd) / "adapter_model.safetensors")


def assert_near(trained, other):
    """A whole matrix to 2e-4: Adam turns the rounding of an entry whose gradient is almost 0 into a step of its own."""
    assert (trained - other).norm() <= 2e-4 * other.norm()


def plain_loop(tiny_run, tokenizer):
    """Guided DPO as anyone would write it: padded batches, whole updates, torch's AdamW, gradients clipped to 1."""
    rows = [json.loads(line) for line in open(tiny_run["TRAIN_DATASET_PATH"], encoding="utf-8")]
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 300, 128)
    report = T.DataReport("memory")
    pairs = [tokenize(T.Pair(**row, row=0), report) for row in rows]
    transformers.set_seed(42)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_run["POLICY_MODEL_PATH"])
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    policy = get_peft_model(base, config).eval()
    with torch.no_grad(), policy.disable_adapter():
        reference = padded_logps(policy, pairs)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    updates, losses, norms = EPOCHS * math.ceil(PAIRS / UPDATE), [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        for start in range(0, PAIRS, UPDATE):
            chosen = order[start : start + UPDATE]
            batch = [pairs[i] for i in chosen]
            with torch.no_grad():
                teacher = padded_logps(policy, batch, "pref_prompt_ids").diff(dim=1)[:, 0].neg()
            margins = padded_logps(policy, batch).diff(dim=1)[:, 0].neg()
            ref_margins = reference[chosen].diff(dim=1)[:, 0].neg()
            dpo = torch.log1p(torch.exp(-0.1 * (margins - ref_margins)))
            loss = (dpo + 0.5 * torch.clamp(teacher - margins, min=0)).mean()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 - len(losses) / updates)
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
            optimizer.step()
            losses.append(loss.item())
    return losses, norms, policy


def test_a_run_equals_a_plain_training_loop(runs, tiny_run, tokenizer):
    losses, norms, policy = plain_loop(tiny_run, tokenizer)
    assert len(losses) == 6 and min(norms) < 1 < max(norms)  # updates with and without clipping
    torch.testing.assert_close(series(runs[4], "loss/train"), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(series(runs[4], "optim/grad_norm"), norms, rtol=1e-3, atol=1e-3)
    trained = {n.replace(".default", ""): p for n, p in policy.named_parameters() if p.requires_grad}
    saved = adapter(runs[4])
    assert saved.keys() == trained.keys()
    for name, tensor in saved.items():
        assert_near(tensor, trained[name].detach())


@pytest.mark.parametrize("pairs_per_forward", [1, 3, 8])
def test_pairs_per_forward_changes_no_update(runs, pairs_per_forward):
    for tag in ("loss/train", "loss/eval", "optim/grad_norm", "rewards_train/margin", "logps_train/pref_chosen"):
        torch.testing.assert_close(series(runs[pairs_per_forward], tag), series(runs[4], tag), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter(runs[pairs_per_forward]).items():
        assert_near(tensor, adapter(runs[4])[name])


def test_evaluations_at_the_start_every_eval_steps_and_at_the_end(runs):
    assert [logs["step"] for logs in history(runs[4]) if "loss/eval" in logs] == [0, 2, 4, 6]
    assert series(runs[4], "rewards_eval/accuracy")[0] == 0.0
    assert series(runs[4], "loss_components/dpo_loss_eval")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_learning_rate_falls_linearly(runs):
    expected = [0.01 * (1 - step / 6) for step in range(6)]
    assert series(runs[4], "optim/learning_rate") == pytest.approx(expected)


def test_checkpointed_activations_change_no_update(runs, tiny_run, tmp_path):
    finished(train({**tiny_run, **EXACT, "GRADIENT_CHECKPOINTING": "true"}, tmp_path))
    torch.testing.assert_close(series(tmp_path, "loss/train"), series(runs[4], "loss/train"), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif((T.os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_bf16_stays_near_fp32(runs, tiny_run, tmp_path):
    """The GPUs' default, here on the CPU: log-probabilities and losses still in fp32, from bf16 hidden states."""
    finished(train({**tiny_run, **EXACT, "PRECISION": "bf16", "LEARNING_RATE": "0.0001"}, tmp_path))
    assert (
        torch.load(output_of(tmp_path) / "pytorch_model.bin", weights_only=True)["model.norm.weight"].dtype
        == torch.bfloat16
    )
    start, exact = series(tmp_path, "loss/eval")[0], series(runs[4], "loss/eval")[0]
    assert start != exact and start == pytest.approx(exact, rel=0.1)
    assert series(tmp_path, "rewards_eval/margin")[0] == pytest.approx(0, abs=0.05)


def test_a_finished_training_resumed_while_saving_adds_no_update(tiny_run, tmp_path):
    variables = {**tiny_run, "NUM_EPOCHS": "0.5"}
    finished(train(variables, tmp_path))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    before = adapter(tmp_path)
    finished(train({**variables, "RESUME": "true"}, tmp_path))
    assert json.loads((output_of(tmp_path) / T.TRAINER_STATE).read_text())["global_step"] == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(tmp_path).items())


def test_two_ranks_equal_one(tiny_run, tmp_path):
    """11 pairs in updates of 10: the last one leaves a rank with nothing but a filler, as do the 5 test pairs."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    lines = Path(tiny_run["TRAIN_DATASET_PATH"]).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:11]), encoding="utf-8")
    variables = {**tiny_run, **EXACT, "TRAIN_DATASET_PATH": str(tmp_path / "train.jsonl")}
    finished(train({**variables, "GRADIENT_ACCUM_STEPS": "10"}, one))
    result = finished(launch({**variables, "GRADIENT_ACCUM_STEPS": "5", "CPU_RANKS": "2"}, cwd=two))
    assert "2 rank(s)" in result.stderr and len(series(one, "loss/train")) == 6
    for tag in ("loss/train", "loss/eval", "optim/grad_norm", "rewards_eval/accuracy", "logps_train/pref_chosen"):
        torch.testing.assert_close(series(two, tag), series(one, tag), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter(two).items():
        assert_near(tensor, adapter(one)[name])


def test_deepspeed_does_the_training(runs):
    """Its engine writes its own part of a checkpoint, with the ZeRO stage of ds_config.json."""
    (folder,) = (output_of(runs[4]) / "checkpoint-6").glob("global_step*")
    names = {path.name for path in folder.iterdir()}
    assert any("zero_pp_rank_0" in name and name.endswith("optim_states.pt") for name in names), names


RUN_TIME = ("throughput/", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "train_", T.PEAK_MEMORY)


def logged(cwd) -> list[dict]:
    """Everything a run logged but the time and the memory it took."""
    return [{tag: value for tag, value in logs.items() if not tag.startswith(RUN_TIME)} for logs in history(cwd)]


@pytest.fixture(scope="module")
def with_dropout(tiny_run, tmp_path_factory):
    """Settings with dropout, and a run of them."""
    variables = {**tiny_run, **EXACT, "LORA_DROPOUT": "0.3"}
    whole = tmp_path_factory.mktemp("whole")
    finished(train(variables, whole))
    return variables, whole


def metrics(cwd) -> list[dict]:
    """`metrics.jsonl`, without time and memory."""
    lines = [json.loads(line) for line in (output_of(cwd) / T.METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith(RUN_TIME)} for line in lines]


def assert_bit_equal(one, other):
    assert logged(one) == logged(other)
    assert metrics(one) == metrics(other)
    assert all(torch.equal(tensor, adapter(other)[name]) for name, tensor in adapter(one).items())


def test_a_resumed_run_equals_an_uninterrupted_one(runs, with_dropout, tmp_path):
    """Losses, learning rate, data order, metrics, random state and adapter, bit for bit."""
    variables, whole = with_dropout
    shutil.copytree(output_of(whole), output_of(tmp_path), symlinks=True)
    (output_of(tmp_path) / T.MODEL_CARD).unlink()  # as if it had been stopped while it saved after update 6
    (output_of(tmp_path) / "checkpoint-6" / T.CHECKPOINT_FILES).unlink()
    assert T.newest_checkpoint(output_of(tmp_path)).name == "checkpoint-4"
    finished(train({**variables, "RESUME": "true"}, tmp_path))
    assert_bit_equal(tmp_path, whole)
    assert series(tmp_path, "loss/train") != series(runs[4], "loss/train")  # dropout was there


def test_the_same_seed_gives_the_same_run_and_another_seed_another(with_dropout, tmp_path):
    variables, whole = with_dropout
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, "42"), (other, "43")):
        folder.mkdir()
        finished(train({**variables, "SEED": seed}, folder))
    assert_bit_equal(again, whole)
    assert series(other, "loss/train") != series(whole, "loss/train")


def test_alpha_enters_linearly(tiny_run, tmp_path):
    """The first update's loss and the loss of the evaluation before it; all start from the same weights."""
    losses = {}
    for alpha in ("0", "0.5", "1"):
        (tmp_path / alpha).mkdir()
        finished(train({**tiny_run, **EXACT, "ALPHA": alpha, "NUM_EPOCHS": "0.1"}, tmp_path / alpha))
        losses[alpha] = [series(tmp_path / alpha, tag)[0] for tag in ("loss/train", "loss/eval")]
    for none, half, full in zip(*losses.values(), strict=True):
        assert half == pytest.approx((none + full) / 2, rel=1e-6) and full > none


def test_an_empty_prefix_is_the_plain_prompt(tiny_run, tmp_path):
    """Guided training by nothing is plain DPO, bit for bit."""
    guided, plain = tmp_path / "guided", tmp_path / "plain"
    for folder, alpha in ((guided, "0.5"), (plain, "0")):
        folder.mkdir()
        finished(train({**tiny_run, **EXACT, "PREFERENCE_TEXT": "", "ALPHA": alpha}, folder))
    assert set(series(guided, "preference_metrics/pref_advantage_ratio_eval")) == {1.0}
    assert set(series(guided, "loss_components/aligned_loss")) == {0.0}
    assert all(torch.equal(tensor, adapter(plain)[name]) for name, tensor in adapter(guided).items())
