"""Trainer: a whole run equals a plain PyTorch training loop, however its pairs are packed and spread over ranks."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PREFERENCE, history, launch, output_of, series, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_forward import padded_logps

import train_with_preference_prompt as T

EXACT = {"LORA_DROPOUT": "0", "NUM_EPOCHS": "2", "BETA": "0.1", "ALPHA": "0.5", "LEARNING_RATE": "0.01"}
PAIRS, UPDATE = 12, 5  # updates of 5, 5 and 2 pairs in each epoch


def finished(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """The same training with 1, 2 and 5 pairs in a forward."""
    made = {}
    for pairs_per_forward in (1, 2, 5):
        made[pairs_per_forward] = tmp_path_factory.mktemp(f"forward_{pairs_per_forward}")
        variables = {**tiny_run, **EXACT, "PAIRS_PER_FORWARD": str(pairs_per_forward)}
        finished(train(variables, made[pairs_per_forward]))
    return made


def adapter(cwd):
    return load_file(output_of(cwd) / "adapter_model.safetensors")


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
    updates, losses, norms = 2 * math.ceil(PAIRS / UPDATE), [], []
    for epoch in range(2):
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
    torch.testing.assert_close(series(runs[2], "loss/train"), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(series(runs[2], "optim/grad_norm"), norms, rtol=1e-3, atol=1e-3)
    trained = {n.replace(".default", ""): p for n, p in policy.named_parameters() if p.requires_grad}
    saved = adapter(runs[2])
    assert saved.keys() == trained.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, trained[name].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairs_per_forward", [1, 5])
def test_pairs_per_forward_changes_no_update(runs, pairs_per_forward):
    for tag in ("loss/train", "loss/eval", "optim/grad_norm", "rewards_train/margin"):
        torch.testing.assert_close(series(runs[pairs_per_forward], tag), series(runs[2], tag), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter(runs[pairs_per_forward]).items():
        torch.testing.assert_close(tensor, adapter(runs[2])[name], rtol=1e-3, atol=1e-4)


def test_evaluations_at_the_start_every_eval_steps_and_at_the_end(runs):
    assert [logs["step"] for logs in history(runs[2]) if "loss/eval" in logs] == [0, 2, 4, 6]
    assert series(runs[2], "rewards_eval/accuracy")[0] == 0.0
    assert series(runs[2], "loss_components/dpo_loss_eval")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_learning_rate_falls_linearly(runs):
    expected = [0.01 * (1 - step / 6) for step in range(6)]
    assert series(runs[2], "optim/learning_rate") == pytest.approx(expected)


def test_checkpointed_activations_change_no_update(runs, tiny_run, tmp_path):
    finished(train({**tiny_run, **EXACT, "GRADIENT_CHECKPOINTING": "true"}, tmp_path))
    torch.testing.assert_close(series(tmp_path, "loss/train"), series(runs[2], "loss/train"), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif((T.os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_bf16_stays_near_fp32(runs, tiny_run, tmp_path):
    """The GPUs' default, here on the CPU: log-probabilities and losses still in fp32, from bf16 hidden states."""
    finished(train({**tiny_run, **EXACT, "PRECISION": "bf16", "LEARNING_RATE": "0.0001"}, tmp_path))
    assert (
        torch.load(output_of(tmp_path) / "pytorch_model.bin", weights_only=True)["model.norm.weight"].dtype
        == torch.bfloat16
    )
    start, exact = series(tmp_path, "loss/eval")[0], series(runs[2], "loss/eval")[0]
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
    assert "2 rank(s)" in result.stderr and len(series(one, "loss/train")) == 4
    for tag in ("loss/train", "loss/eval", "optim/grad_norm", "rewards_eval/accuracy", "logps_train/pref_chosen"):
        torch.testing.assert_close(series(two, tag), series(one, tag), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter(two).items():
        torch.testing.assert_close(tensor, adapter(one)[name], rtol=1e-3, atol=1e-4)


def test_deepspeed_does_the_training(runs):
    """Its engine writes its own part of a checkpoint, with the ZeRO stage of ds_config.json."""
    (folder,) = (output_of(runs[2]) / "checkpoint-6").glob("global_step*")
    names = {path.name for path in folder.iterdir()}
    assert any("zero_pp_rank_0" in name and name.endswith("optim_states.pt") for name in names), names


def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(runs, tiny_run, tmp_path):
    """With dropout on: data order, learning rate and random state must all continue."""
    variables = {**tiny_run, **EXACT, "LORA_DROPOUT": "0.3"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
        finished(train(variables, folder))
    for name in (T.MODEL_CARD, "checkpoint-6/" + T.TRAINER_STATE):  # as if it had been stopped after update 4
        (output_of(resumed) / name).unlink()
    assert T.newest_checkpoint(output_of(resumed)).name == "checkpoint-4"
    finished(train({**variables, "RESUME": "true"}, resumed))
    assert series(resumed, "loss/train") == series(whole, "loss/train")
    assert series(resumed, "loss/train") != series(runs[2], "loss/train")  # dropout was there
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(resumed).items())
