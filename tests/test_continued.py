"""Continuing from an adapter: both references by hand, resumed runs, what is refused, and adapters that PEFT made."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import PREFERENCE, make_model, output_of, parse, series, train
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_forward import pack, padded_logps
from test_soft_prompt import base_model, margins
from test_trainer import assert_bit_equal, finished

import train_with_preference_prompt as T

BETA, ALPHA = 0.1, 0.5
SETTINGS = {"BETA": str(BETA), "ALPHA": str(ALPHA), "LEARNING_RATE": "0.01", "LORA_DROPOUT": "0.3"}
FIRST = {
    **SETTINGS,
    "LORA_R": "3",
    "LORA_ALPHA": "9",
    "LORA_TARGET_MODULES": "q_proj,v_proj,down_proj",
    "EVAL_STEPS": "0",
}
REFERENCES = ("base", "adapter")


@pytest.fixture(scope="module")
def first(tiny_run, tmp_path_factory):
    """The folder of a finished run with a small adapter."""
    cwd = tmp_path_factory.mktemp("first")
    finished(train({**tiny_run, **FIRST}, cwd))
    return output_of(cwd)


@pytest.fixture(scope="module")
def continued(tiny_run, first, tmp_path_factory):
    """Reference → the folder of a run that continued with it and the variables it had."""
    made = {}
    for reference in REFERENCES:
        cwd = tmp_path_factory.mktemp(reference)
        variables = {**tiny_run, **SETTINGS, "ADAPTER_PATH": str(first), "ADAPTER_REFERENCE": reference}
        made[reference] = (cwd, variables, finished(train(variables, cwd)))
    return made


@pytest.fixture(scope="module")
def scores(tiny_run, tokenizer, first, continued):
    """(model, condition) → log-probabilities (P, 2) of the test pairs, the ordinary way, by PEFT's own forward."""
    rows = [json.loads(line) for line in open(tiny_run["TEST_DATASET_PATH"], encoding="utf-8")]
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 300, 128)
    pairs = [tokenize(T.Pair(**row, row=0), T.DataReport("memory")) for row in rows]
    folders = {"base": None, "first": first} | {f"after {name}": output_of(continued[name][0]) for name in REFERENCES}
    found = {}
    for name, folder in folders.items():
        model = base_model(tiny_run) if folder is None else PeftModel.from_pretrained(base_model(tiny_run), folder)
        with torch.no_grad():
            for condition in ("prompt_ids", "pref_prompt_ids"):
                found[name, condition] = padded_logps(model.eval(), pairs, condition)
    return found


def evaluated(scores, policy: str, reference: str) -> dict[str, float]:
    """The held-out metrics from their definitions."""
    plain, prefixed = (scores[policy, condition] for condition in ("prompt_ids", "pref_prompt_ids"))
    rewards = BETA * (plain - scores[reference, "prompt_ids"])
    aligned = torch.clamp(margins(prefixed) - margins(plain), min=0)
    dpo = torch.log1p(torch.exp(-margins(rewards)))
    return {
        "loss/eval": (dpo + ALPHA * aligned).mean().item(),
        "loss_components/dpo_loss_eval": dpo.mean().item(),
        "rewards_eval/chosen": rewards[:, 0].mean().item(),
        "rewards_eval/margin": margins(rewards).mean().item(),
        "preference_metrics/pref_advantage_ratio_eval": (margins(prefixed) - margins(plain)).mean().exp().item(),
    }


@pytest.mark.parametrize("reference", REFERENCES)
def test_losses_and_rewards_by_hand(reference, continued, scores):
    """Before the first update the policy is the first run's; the reference is the base model, or the first run's."""
    cwd = continued[reference][0]
    of_reference = {"base": "base", "adapter": "first"}[reference]
    for place, policy in ((0, "first"), (-1, f"after {reference}")):
        for tag, value in evaluated(scores, policy, of_reference).items():
            assert series(cwd, tag)[place] == pytest.approx(value, rel=1e-4, abs=2e-5), (place, tag)
    assert (series(cwd, "loss_components/dpo_loss_eval")[0] == pytest.approx(math.log(2), abs=1e-6)) == (
        reference == "adapter"
    )


def test_the_two_references_teach_differently(continued):
    weights = [load_file(output_of(continued[name][0]) / "adapter_model.safetensors") for name in REFERENCES]
    assert weights[0].keys() == weights[1].keys()
    assert any((weights[0][name] - weights[1][name]).abs().max() > 1e-4 for name in weights[0])
    first_updates = [series(continued[name][0], "loss/train")[0] for name in REFERENCES]
    assert first_updates[0] != pytest.approx(first_updates[1], rel=1e-3)


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_is_saved_is_the_continued_adapter(reference, continued, first, tiny_run):
    """Its shape is the first one's, the dropout this run's; merged weights = base + adapter (the run itself checks)."""
    folder = output_of(continued[reference][0])
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (first, folder))
    for name in ("r", "lora_alpha"):
        assert after[name] == before[name] == int(FIRST[f"LORA_{name.split('_')[-1].upper()}"])
    assert sorted(after["target_modules"]) == sorted(before["target_modules"]) and after["lora_dropout"] == 0.3
    base = load_file(f"{tiny_run['POLICY_MODEL_PATH']}/model.safetensors")
    adapter, merged = load_file(folder / "adapter_model.safetensors"), torch.load(folder / "pytorch_model.bin")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 9 / 3 * b @ a)


@pytest.mark.parametrize("reference", REFERENCES)
def test_before_in_the_samples_is_the_model_at_the_start(reference, continued, tiny_run, first, tokenizer):
    """The first run's answers, not the base model's."""
    (table,) = series(continued[reference][0], T.SAMPLES_TAG)
    question = [{"role": "user", "content": json.loads(open(tiny_run["TEST_DATASET_PATH"]).readline())["prompt"]}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    models = {"base": base_model(tiny_run), "first": PeftModel.from_pretrained(base_model(tiny_run), first)}
    shown = {}
    for name, model in models.items():
        options = {"max_new_tokens": T.SAMPLE_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        answer = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        shown[name] = T.table_cell(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)) in table
    assert shown == {"base": False, "first": True}


@pytest.mark.parametrize("reference", ["adapter"])
def test_a_resumed_run_equals_the_uninterrupted_one(reference, continued, tmp_path):
    """Without a cache the reference is scored again, with the adapter as it was and not as the checkpoint has it."""
    whole, variables, _ = continued[reference]
    shutil.copytree(output_of(whole), output_of(tmp_path))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    (output_of(tmp_path) / "checkpoint-3" / T.CHECKPOINT_FILES).unlink()
    said = finished(train({**variables, "RESUME": "true"}, tmp_path)).stdout
    assert "train data: 12 computed, not kept" in said
    assert_bit_equal(tmp_path, whole)


def test_a_changed_adapter_is_not_resumed(continued, first, tmp_path):
    whole, variables, _ = continued["adapter"]
    shutil.copytree(output_of(whole), output_of(tmp_path))
    shutil.copytree(first, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    moved = {**variables, "RESUME": "true", "ADAPTER_PATH": str(tmp_path / "adapter")}
    assert train({**moved, "PLAN": "true"}, tmp_path).returncode == 0  # elsewhere, but the same
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    refused = train({**moved, "PLAN": "true"}, tmp_path)
    assert refused.returncode == 2 and "the adapter of ADAPTER_PATH has changed since the run was" in refused.stderr


@pytest.mark.parametrize(
    ("reference", "words"), [("base", "the base model, adapter off; "), ("adapter", "as it is at the start; ")]
)
def test_the_plan_says_which_reference(reference, words, first, tiny_run):
    args = T.ScriptArguments(
        adapter_path=str(first), adapter_reference=reference, policy_model_path=tiny_run["POLICY_MODEL_PATH"], lora_r=7
    )
    report = T.DataReport(first, rows=500)
    lines = T.describe_plan(args, T.Devices("localhost:0", 1, False), {"train": report, "test": report}).splitlines()
    found = {line[:19].strip(): line[20:] for line in lines}
    assert words in found["reference"]
    assert found["trained"] == f"the LoRA adapter in {first} (r 3, α 9), learning rate 0.0005"
    assert found["not used"].startswith("LORA_R (")
    elsewhere = T.describe_adapter(T.dataclasses.replace(args, policy_model_path="other"))
    assert f"it was made for {tiny_run['POLICY_MODEL_PATH']}: be sure that it is this one" in elsewhere


def test_the_run_that_must_make_way_may_not_hold_the_adapter(first):
    args = T.ScriptArguments(output_dir=str(first), adapter_path=str(first), log_dir=str(first.parent / "logs"))
    (problem,) = T.output_problems(args)
    assert f"the run in it must make way, but {first} lies in it" in problem


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter_path=a"], "ADAPTER_REFERENCE (--adapter_reference) is '', but ADAPTER_PATH is set: say what"),
        (["--adapter_reference=base"], "ADAPTER_REFERENCE (--adapter_reference) is 'base', but ADAPTER_PATH is empty"),
        (
            ["--adapter_path=a", "--training_mode=ptuning"],
            "ADAPTER_PATH (--adapter_path) is 'a': TRAINING_MODE=ptuning",
        ),
    ],
)
def test_settings_that_do_not_go_together(flags, words):
    with pytest.raises(T.InputError) as caught:
        parse(flags)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"- {words}")


# --- the checks before training


def before_training(reference, causal_lm, tokenized):
    """What `check_before_training` sees of a trainer that continues from an adapter, with β 1."""
    dataset = T.PairDataset(tokenized)
    T.enable_packed_forward(causal_lm)
    rows = {condition: T.first_batch(dataset, 4)[condition] for condition in ("base", "pref")}
    base_logps = {condition: T.teacher_logps(causal_lm, row) for condition, row in rows.items()}
    policy = T.add_adapter(causal_lm, T.ScriptArguments(lora_dropout=0.5))
    torch.manual_seed(0)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    weights = start if reference == "adapter" else None
    dataset.ref_logps["base"] = T.reference_logps(policy, T.first_batch(dataset, len(dataset))["base"], weights)
    first = T.FirstScores(base_logps, {condition: T.teacher_logps(policy, row) for condition, row in rows.items()})
    trainer = SimpleNamespace(model=policy, soft_prompt=None, train_dataset=dataset, first_scores=first)
    trainer.settings = T.ScriptArguments(adapter_path="a", adapter_reference=reference, beta=1.0)
    trainer.state, trainer._prepare_inputs, trainer.reference_weights = SimpleNamespace(global_step=0), dict, weights
    trainer.score = lambda *arguments, **options: T.PreferenceGuidedDPOTrainer.score(trainer, *arguments, **options)
    return trainer


def scaled(parameters, part):
    with torch.no_grad():
        for name, parameter in parameters:
            if part in name:
                parameter.mul_(1.2)


BROKEN = {  # (reference, what is broken) → (what breaks it, words of the error)
    ("base", "nothing"): (lambda t: None, None),
    ("adapter", "nothing"): (lambda t: None, None),
    ("base", "policy"): (
        lambda t: scaled(t.model.named_parameters(), "lora_B"),
        "the policy and of the model with the",
    ),
    ("adapter", "policy"): (lambda t: scaled(t.model.named_parameters(), "lora_B"), "does not start as the reference"),
    ("base", "base model"): (
        lambda t: scaled(t.model.named_parameters(), "base_layer"),
        "the reference (adapter off) and of the base model differ",
    ),
    ("adapter", "reference"): (
        lambda t: scaled(t.reference_weights.items(), "lora_B"),
        "the reference (the adapter as it was) and of the model with the adapter differ",
    ),
}


@pytest.mark.parametrize(("reference", "broken"), BROKEN)
def test_the_checks_before_training(reference, broken, tokenizer, tokenized):
    trainer = before_training(reference, make_model("llama", len(tokenizer)), tokenized)
    breaks, words = BROKEN[reference, broken]
    breaks(trainer)
    if words is None:
        return T.check_before_training(trainer)
    with pytest.raises(T.SelfCheckError, match=re.escape(words)):
        T.check_before_training(trainer)


# --- adapters that PEFT made


def peft_adapter(folder, tokenizer, binary=False, dtype=torch.float32, kind="llama", **settings):
    """Saves an adapter of two layers with matrices that are not 0, and gives the model with it."""
    base = make_model(kind, len(tokenizer))
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "o_proj"], **settings}
    policy = get_peft_model(base, LoraConfig(**options))
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype)
    policy.save_pretrained(folder, safe_serialization=not binary)
    return policy.eval()


def opened(folder, tokenizer, kind="llama"):
    args = T.ScriptArguments(adapter_path=str(folder), adapter_reference="base", lora_dropout=0.0)
    T.add_adapter(T.lay_out(make_model(kind, len(tokenizer)).config), args)  # what the plan does
    return T.add_adapter(make_model(kind, len(tokenizer)), args)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "task_type": "CAUSAL_LM"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"target_modules": r".*layers\.0\..*(k|v)_proj"},
        {"binary": True, "dtype": torch.bfloat16},
    ],
)
def test_adapters_that_peft_made_score_as_in_peft(settings, tokenizer, tokenized, tmp_path):
    made = peft_adapter(tmp_path, tokenizer, **settings)
    expected = padded_logps(made.float(), tokenized)
    policy = opened(tmp_path, tokenizer)
    T.enable_packed_forward(policy.get_base_model())
    T.speed_up(policy)
    torch.testing.assert_close(T.teacher_logps(policy, pack(tokenized)), expected, rtol=1e-5, atol=1e-4)
    off = T.reference_logps(policy, pack(tokenized))
    assert (off - expected).abs().max() > 0.1
    start = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in start:
            dict(policy.named_parameters())[name].add_(0.05)
    changed = T.teacher_logps(policy, pack(tokenized))
    torch.testing.assert_close(T.reference_logps(policy, pack(tokenized), start), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(T.teacher_logps(policy, pack(tokenized)), changed) and not torch.equal(changed, expected)


def test_an_adapters_identity_is_its_files_matrices_and_scaling(tokenizer, tmp_path):
    """The cache of a reference must not serve another one."""
    variants = {"a": {}, "same": {}, "alpha": {"lora_alpha": 7}, "rslora": {"use_rslora": True}}
    found = {}
    for name, settings in variants.items():
        peft_adapter(tmp_path / name, tokenizer, **settings)
        found[name] = T.files_digest(*T.adapter_files(str(tmp_path / name)))
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file({name: value + 1e-6 for name, value in state.items()}, tmp_path / "a/adapter_model.safetensors")
    found["matrices"] = T.files_digest(*T.adapter_files(str(tmp_path / "a")))
    assert found["a"] == found["same"] and len(set(found.values())) == 4


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_matrices(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def renamed(state, old, new):
    return {name.replace(old, new): value.clone() for name, value in state.items()}


class Code:
    def __reduce__(self):
        return (eval, ("1",))


def with_code(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": Code()}, folder / "adapter_model.bin")


def with_poison(state):
    name = next(iter(state))
    return {**state, name: state[name] * math.nan}


REFUSED = {  # what is done to a good adapter → words of the error
    "no folder": (lambda f: shutil.rmtree(f), "there is no such folder; name the local folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is no folder; name the local folder"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "that folder has no adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "it has use_dora True, which cannot be continued here"),
    "biases": (lambda f: edit_config(f, bias="all"), "it has bias 'all', which cannot be continued here"),
    "whole modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "it has modules_to_save ['lm_head']"),
    "a newer PEFT's setting": (lambda f: edit_config(f, use_xlora=3), "it has use_xlora 3, which cannot be"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "its init_lora_weights is 'pissa', which changed"),
    "a classifier": (lambda f: edit_config(f, task_type="SEQ_CLS"), "it was trained for the task 'SEQ_CLS'"),
    "a soft prompt": (lambda f: edit_config(f, peft_type="PROMPT_TUNING"), "name it in PROMPT_EMBEDDING_PATH with"),
    "another kind": (
        lambda f: edit_config(f, peft_type="IA3"),
        "it is a 'IA3' adapter, and only LoRA can be continued",
    ),
    "no rank": (lambda f: edit_config(f, r=-1), "its configuration (r -1"),
    "a word for the rank": (lambda f: edit_config(f, r="x"), "ADAPTER_PATH"),
    "unknown layers": (lambda f: edit_config(f, target_modules=["none"]), "target_modules"),
    "another rank": (
        lambda f: edit_config(f, r=5),
        "it has other sizes than the model: base_model.model.model.layers.0",
    ),
    "a layer less": (lambda f: edit_matrices(f, lambda s: dict(list(s.items())[2:])), "it lacks base_model.model"),
    "a layer more": (
        lambda f: edit_matrices(f, lambda s: s | renamed(s, "layers.1", "layers.9")),
        "it holds what the model has no place for: base_model.model.model.layers.9",
    ),
    "embeddings": (
        lambda f: edit_matrices(f, lambda s: {**s, "base_model.model.lm_head.weight": torch.ones(3, 3)}),
        "it holds base_model.model.lm_head.weight, no LoRA matrix of a linear layer",
    ),
    "numbers that are none": (lambda f: edit_matrices(f, with_poison), "no finite floating-point matrix"),
    "code": (with_code, "it asks to run 'eval', which is refused"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"xyz"), "is not a file of tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_cannot_be_continued_is_refused_before_weights_load(what, tokenizer, tmp_path):
    folder = tmp_path / "adapter"
    peft_adapter(folder, tokenizer)
    change, words = REFUSED[what]
    change(folder)
    args = T.ScriptArguments(adapter_path=str(folder), adapter_reference="base")
    with pytest.raises(T.InputError) as caught:
        T.add_adapter(T.lay_out(make_model("llama", len(tokenizer)).config), args)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"- ADAPTER_PATH (--adapter_path) is {str(folder)!r}: ") and words in line, line


def test_an_adapter_of_tied_output_embeddings_is_refused(tokenizer, tmp_path):
    for kind, tied in (("qwen2", False), ("llama", True)):
        peft_adapter(tmp_path / kind, tokenizer, kind=kind, target_modules=["q_proj", "lm_head"])
        edit_matrices(tmp_path / kind, lambda s: {name: value for name, value in s.items() if "lora_" in name})
        if tied:
            with pytest.raises(T.InputError, match="it adapts embeddings that this model shares"):
                opened(tmp_path / kind, tokenizer, kind)
        else:
            opened(tmp_path / kind, tokenizer, kind)


def test_what_peft_itself_calls_ia3_is_refused(tokenizer, tmp_path):
    get_peft_model(make_model("llama", len(tokenizer)), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(T.InputError, match="it is a 'IA3' adapter"):
        opened(tmp_path, tokenizer)
