"""Soft prompts over whole runs: P-tuning equals a plain loop, and embedding mode takes up what P-tuning has written."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PREFERENCE, PROJECT, make_model, output_of, series, train, two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from test_forward import pack, padded_logps, padded_soft_logps, with_soft_prefix
from test_logging import CONTRACT_EVAL, CONTRACT_TRAIN
from test_run import REMAINING_TAGS, events
from test_trainer import finished
from transformers import AutoModelForCausalLM

import train_with_preference_prompt as T

VIRTUAL, BETA, ALPHA, RATE = 6, 0.1, 0.5, 0.02
PAIRS, UPDATE, EPOCHS = 12, 8, 2  # updates of 8 and 4 pairs in each epoch
PTUNING = {
    "TRAINING_MODE": "ptuning",
    "NUM_VIRTUAL_TOKENS": str(VIRTUAL),
    "PTUNING_LEARNING_RATE": str(RATE),
    "GRADIENT_ACCUM_STEPS": str(UPDATE),
    "NUM_EPOCHS": str(EPOCHS),
    "BETA": str(BETA),
}
EMBEDDING = {
    "TRAINING_MODE": "embedding",
    "GRADIENT_ACCUM_STEPS": str(UPDATE),
    "LORA_DROPOUT": "0",
    "LEARNING_RATE": "0.01",
    "BETA": str(BETA),
    "ALPHA": str(ALPHA),
}
RATIO = "preference_metrics/pref_advantage_ratio_eval"
TRAJECTORY = ("loss/train", "loss/eval", "optim/grad_norm", "rewards_train/margin", RATIO)


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def base_files(talking_run):
    """What the base model's files were before any run of this module."""
    return digest(talking_run["POLICY_MODEL_PATH"])


@pytest.fixture(scope="module")
def tuned(talking_run, base_files, tmp_path_factory):
    """A finished P-tuning run (ds_config.json's ZeRO 2, fp32)."""
    cwd = tmp_path_factory.mktemp("tuned")
    finished(train({**talking_run, **PTUNING}, cwd))
    return cwd


@pytest.fixture(scope="module")
def embedding(tuned):
    """Embedding mode with the soft prompt of that run, as it stands."""
    return {**EMBEDDING, "PROMPT_EMBEDDING_PATH": str(output_of(tuned) / "prompt_embeddings.pt")}


@pytest.fixture(scope="module")
def distilled(tiny_run, embedding, tmp_path_factory):
    """A finished embedding run."""
    cwd = tmp_path_factory.mktemp("distilled")
    finished(train({**tiny_run, **embedding}, cwd))
    return cwd


def soft_prompt(cwd):
    return torch.load(output_of(cwd) / "prompt_embeddings.pt", weights_only=True)["prompt_embeddings"]


def base_model(tiny_run):
    return AutoModelForCausalLM.from_pretrained(tiny_run["POLICY_MODEL_PATH"])


def tokenized_pairs(tiny_run, tokenizer, split):
    rows = [json.loads(line) for line in open(tiny_run[f"{split}_DATASET_PATH"], encoding="utf-8")]
    tokenize, report = T.PairTokenizer(tokenizer, T.Prefix(), 300, 128), T.DataReport("memory")
    return [tokenize(T.Pair(**row, row=0), report) for row in rows]


def margins(logps):
    return logps[:, 0] - logps[:, 1]


# --- training


def plain_loop(tiny_run, tokenizer):
    """P-tuning as anyone would write it: padded rows, whole updates, torch's AdamW, gradients clipped to 1."""
    pairs, model = tokenized_pairs(tiny_run, tokenizer, "TRAIN"), base_model(tiny_run).requires_grad_(False)
    ids = tokenizer(PREFERENCE, add_special_tokens=False).input_ids
    soft = model.get_input_embeddings().weight[(ids * VIRTUAL)[:VIRTUAL]].clone().requires_grad_(True)
    reference = margins(padded_logps(model, pairs))
    optimizer = torch.optim.AdamW([soft], lr=RATE, weight_decay=0.0)
    updates, losses, norms = EPOCHS * math.ceil(PAIRS / UPDATE), [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        for start in range(0, PAIRS, UPDATE):
            chosen = order[start : start + UPDATE]
            prefixed = margins(padded_soft_logps(model, [pairs[i] for i in chosen], soft))
            loss = torch.log1p(torch.exp(-BETA * (prefixed - reference[chosen]))).mean()
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - len(losses) / updates)
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_([soft], 1.0).item())
            optimizer.step()
            losses.append(loss.item())
    return losses, norms, soft.detach()


def test_ptuning_equals_a_plain_training_loop(tuned, tiny_run, tokenizer):
    losses, norms, soft = plain_loop(tiny_run, tokenizer)
    assert len(losses) == 4 and min(norms) < 1 < max(norms)  # updates with and without clipping
    torch.testing.assert_close(series(tuned, "loss/train"), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(series(tuned, "optim/grad_norm"), norms, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(soft_prompt(tuned), soft, rtol=1e-3, atol=1e-4)
    assert series(tuned, "optim/learning_rate") == pytest.approx([RATE * (1 - step / 4) for step in range(4)])


def test_ptuning_leaves_the_plain_model_alone(tuned, talking_run, base_files):
    assert digest(talking_run["POLICY_MODEL_PATH"]) == base_files
    for tag in ("logps_eval/chosen", "logps_eval/rejected"):
        assert len(set(series(tuned, tag))) == 1
    assert len(set(series(tuned, "logps_eval/pref_chosen"))) == len(series(tuned, "logps_eval/pref_chosen")) == 3


def test_embedding_mode_starts_from_the_numbers_of_the_soft_prompt(distilled, tuned, tiny_run, tokenizer):
    """loss = ln 2 + α · mean relu(Δ_pref − Δ_base) before the first update; the ratio is P-tuning's last one."""
    pairs, model = tokenized_pairs(tiny_run, tokenizer, "TEST"), base_model(tiny_run)
    with torch.no_grad():
        advantage = margins(padded_soft_logps(model, pairs, soft_prompt(tuned))) - margins(padded_logps(model, pairs))
    expected = math.log(2) + ALPHA * advantage.clamp(min=0).mean().item()
    assert series(distilled, "loss/eval")[0] == pytest.approx(expected, rel=1e-4)
    assert series(distilled, RATIO)[0] == pytest.approx(advantage.mean().exp().item(), rel=1e-4)
    assert series(distilled, RATIO)[0] == pytest.approx(series(tuned, RATIO)[-1], rel=1e-5)
    assert series(tuned, RATIO)[0] != pytest.approx(series(tuned, RATIO)[-1], rel=1e-2)


def settings_of(mode, embedding):
    return PTUNING if mode == "ptuning" else embedding


def zero(stage, folder):
    """ds_config.json with another ZeRO stage."""
    config = json.loads((PROJECT / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    config["zero_optimization"]["stage"] = stage
    (folder / "zero.json").write_text(json.dumps(config))
    return {"DS_CONFIG": str(folder / "zero.json")}


@pytest.mark.parametrize("mode", ["ptuning", "embedding"])
def test_zero_1_and_checkpointed_activations_change_no_update(mode, tuned, distilled, tiny_run, embedding, tmp_path):
    changed = {**zero(1, tmp_path), "GRADIENT_CHECKPOINTING": "true"}
    finished(train({**tiny_run, **settings_of(mode, embedding), **changed}, tmp_path))
    whole = tuned if mode == "ptuning" else distilled
    for tag in TRAJECTORY:
        torch.testing.assert_close(series(tmp_path, tag), series(whole, tag), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(soft_prompt(tmp_path), soft_prompt(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["ptuning", "embedding"])
def test_bf16_stays_near_fp32(mode, tuned, distilled, tiny_run, embedding, tmp_path):
    finished(train({**tiny_run, **settings_of(mode, embedding), "PRECISION": "bf16"}, tmp_path))
    whole = tuned if mode == "ptuning" else distilled
    for tag in ("loss/train", "loss/eval"):
        assert series(tmp_path, tag) != series(whole, tag)
        assert series(tmp_path, tag) == pytest.approx(series(whole, tag), rel=0.05)
    assert soft_prompt(tmp_path).dtype == torch.float32
    if mode == "embedding":
        assert torch.equal(soft_prompt(tmp_path), soft_prompt(tuned))  # not even rounded


@pytest.mark.skipif((T.os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(("mode", "stage"), [("ptuning", 2), ("embedding", 1)])
def test_two_ranks_train_as_one(mode, stage, tuned, distilled, embedding, tiny_run, tmp_path):
    """The 5 test pairs leave a rank with nothing but a filler."""
    changed = {"GRADIENT_ACCUM_STEPS": str(UPDATE // 2), **zero(stage, tmp_path)}
    for status, _, error in two_ranks({**tiny_run, **settings_of(mode, embedding), **changed}, tmp_path):
        assert status == 0, error[-3000:]
    whole = tuned if mode == "ptuning" else distilled
    for tag in TRAJECTORY:
        torch.testing.assert_close(series(tmp_path, tag), series(whole, tag), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft_prompt(tmp_path), soft_prompt(whole), rtol=1e-3, atol=1e-4)


def test_resumed_ptuning_gives_the_losses_of_an_uninterrupted_one(tuned, talking_run, tmp_path):
    shutil.copytree(output_of(tuned), output_of(tmp_path))
    for name in (T.MODEL_CARD, "prompt_embeddings.pt", "checkpoint-4/" + T.TRAINER_STATE):  # as if stopped before 4
        (output_of(tmp_path) / name).unlink()
    assert T.newest_checkpoint(output_of(tmp_path)).name == "checkpoint-2"
    finished(train({**talking_run, **PTUNING, "RESUME": "true"}, tmp_path))
    for tag in TRAJECTORY:
        assert series(tmp_path, tag) == series(tuned, tag)
    assert torch.equal(soft_prompt(tmp_path), soft_prompt(tuned))
    assert samples(tmp_path) == samples(tuned)


# --- what P-tuning leaves


def samples(cwd):
    """Of each prompt the two rows of sample answers: plain, and with the prefix."""
    (text,) = series(cwd, T.SAMPLES_TAG)
    rows = re.findall(r"^\| (?:plain|with the prefix), before .*\n\|.*\n\| (.*) \|$", text, re.M)
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_ptuning_writes_an_adapter_and_a_soft_prompt_and_no_merged_weights(tuned):
    folder = output_of(tuned)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "prompt_embeddings.pt"} <= names
    assert {"training_args.bin", "tokenizer.json", "trainer_state.json", "README.md", "run_settings.json"} <= names
    assert not names & {"pytorch_model.bin", "model.safetensors", "merged"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", VIRTUAL)
    (saved,) = load_file(folder / "adapter_model.safetensors").values()
    assert torch.equal(saved, soft_prompt(tuned)) and saved.shape == (VIRTUAL, 32)


def peft_logps(model, pairs):
    """(P, 2) by PEFT's own forward on plain prompts; its logits begin with those of the soft prompt."""
    logps = []
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            logits = model(input_ids=torch.tensor([pair.prompt_ids + ids])).logits[0, -len(ids) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())
    return torch.stack(logps).view(-1, 2)


def test_peft_scores_as_the_packed_forward_does(tuned, tiny_run, tokenizer):
    pairs, soft = tokenized_pairs(tiny_run, tokenizer, "TEST"), torch.nn.Embedding.from_pretrained(soft_prompt(tuned))
    packed_model = T.enable_packed_forward(base_model(tiny_run), soft)
    packed = T.teacher_logps(packed_model, pack(with_soft_prefix(pairs, VIRTUAL), "pref_prompt_ids"))
    opened = PeftModel.from_pretrained(base_model(tiny_run), output_of(tuned)).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft_logps(opened, pairs), packed, rtol=1e-5, atol=1e-4)
    for place, answer in enumerate(("chosen", "rejected")):
        logged = series(tuned, f"logps_eval/pref_{answer}")[-1]
        assert packed[:, place].mean().item() == pytest.approx(logged, rel=1e-5)
        assert packed[:, place].mean().item() != pytest.approx(series(tuned, f"logps_eval/{answer}")[-1], rel=1e-3)


def test_peft_generates_the_sample_answers(tuned, talking_run, tokenizer):
    opened = PeftModel.from_pretrained(base_model(talking_run), output_of(tuned)).eval()
    rows = samples(tuned)
    for pair, row in zip(tokenized_pairs(talking_run, tokenizer, "TEST"), rows, strict=False):
        ids, answers = torch.tensor([pair.prompt_ids]), {}
        for model in (opened, opened.get_base_model()):
            made = model.generate(input_ids=ids, max_new_tokens=T.SAMPLE_TOKENS, do_sample=False, pad_token_id=2)
            text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            answers[model] = T.table_cell(text)
        assert row[0].endswith(f" | {answers[opened.get_base_model()]}") and row[1].endswith(f" | {answers[opened]}")
        assert answers[opened] != answers[opened.get_base_model()]
    assert len(rows) == T.SAMPLE_PROMPTS


def test_ptuning_writes_the_tags_of_every_run(tuned):
    accumulator = events(tuned / "logs" / "Preference_Guided_DPO")
    assert set(accumulator.Tags()["scalars"]) == CONTRACT_TRAIN | CONTRACT_EVAL | REMAINING_TAGS
    values = [e.value for tag in accumulator.Tags()["scalars"] for e in accumulator.Scalars(tag)]
    assert all(map(math.isfinite, values))


# --- what embedding mode leaves


def test_the_soft_prompt_is_never_changed_by_embedding_mode(distilled, tuned):
    assert torch.equal(soft_prompt(distilled), soft_prompt(tuned))
    folder = output_of(distilled)
    assert not (folder / "merged" / "prompt_embeddings.pt").exists()
    assert {"config.json", "pytorch_model.bin"} <= {path.name for path in (folder / "merged").iterdir()}


@pytest.mark.parametrize("saved", ["merged", "adapter"])
def test_the_distilled_policy_needs_no_prefix(distilled, tiny_run, tokenizer, saved):
    pairs, folder = tokenized_pairs(tiny_run, tokenizer, "TEST"), output_of(distilled)
    if saved == "merged":
        policy = AutoModelForCausalLM.from_pretrained(folder / "merged")
    else:
        policy = PeftModel.from_pretrained(base_model(tiny_run), folder)
    with torch.no_grad():
        scored = padded_logps(policy.eval(), pairs)
    for place, answer in enumerate(("chosen", "rejected")):
        values = series(distilled, f"logps_eval/{answer}")
        assert scored[:, place].mean().item() == pytest.approx(values[-1], rel=1e-4)
        assert values[0] != pytest.approx(values[-1], rel=1e-2)


def test_the_model_cards_name_the_settings_that_had_a_part(tuned, distilled):
    rows = [
        {line.split(" | ")[0] for line in (output_of(cwd) / "README.md").read_text().splitlines()}
        for cwd in (tuned, distilled)
    ]
    for name, has_part in {"lora_r": (0, 1), "alpha": (0, 1), "ptuning_learning_rate": (1, 0), "beta": (1, 1)}.items():
        assert tuple(f"| {name}" in found for found in rows) == has_part, name
    for cwd in (tuned, distilled):
        assert f"| embeddings of the soft prompt | {VIRTUAL} |" in (output_of(cwd) / "README.md").read_text()


# --- where P-tuning starts


def start(tokenizer, seed=0, **settings):
    model = make_model("llama", len(tokenizer))
    ids = T.initial_ids(T.ScriptArguments(training_mode="ptuning", seed=seed, **settings), tokenizer, model.config)
    return T.soft_prompt_from(model, ids).weight, model.get_input_embeddings().weight


@pytest.mark.parametrize("size", [1, 3, 50])
def test_it_starts_from_the_texts_tokens_cut_or_tiled(tokenizer, size):
    ids = tokenizer(PREFERENCE, add_special_tokens=False).input_ids
    assert 3 < len(ids) < 50
    soft, tokens = start(tokenizer, preference_text=PREFERENCE, num_virtual_tokens=size)
    assert soft.shape == (size, 32) and soft.dtype == torch.float32
    assert all(torch.equal(soft[k], tokens[ids[k % len(ids)]]) for k in range(size))
    soft[0] += 1  # a copy: the model's own table stays
    assert not torch.equal(soft[0], tokens[ids[0]])


def test_a_random_start_is_of_tokens_and_repeats_with_the_seed(tokenizer):
    settings = dict(prompt_init="random", preference_text="", num_virtual_tokens=8)
    (first, tokens), (again, _), (other, _) = (start(tokenizer, seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all((row == tokens).all(dim=1).any() for row in first)


def test_a_text_of_no_tokens_is_refused(tokenizer):
    with pytest.raises(T.InputError, match="PREFERENCE_TEXT .*makes no token of it"):
        start(tokenizer, preference_text="")
