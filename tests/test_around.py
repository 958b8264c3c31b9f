"""Around the updates: the self-checks pass on a sound run (test_trainer) and stop a broken one, which is shown here."""

import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PREFERENCE, PROJECT, ROWS, make_model, output_of, train, two_ranks
from test_forward import pack, soft_prompt_of, with_soft_prefix

import train_with_preference_prompt as T

# What is broken → the words with which the run must end. Each patch runs before T.main().
SABOTAGE = {
    "an adapter that does not start at zero": (
        """
        add = T.add_adapter
        def add_adapter(model, args):
            policy = add(model, args)
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            return policy
        T.add_adapter = add_adapter
        """,
        "the policy does not start as the reference",
    ),
    "base weights changed behind the adapter": (
        """
        add = T.add_adapter
        def add_adapter(model, args):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1.1)
            return add(model, args)
        T.add_adapter = add_adapter
        """,
        "the reference (adapter off) and of the base model differ",
    ),
    "an optimizer that does nothing": (
        "torch.optim.AdamW.step = lambda self, closure=None: None",
        "the first update changed no trainable parameter",
    ),
    "branches that see each other": (
        """
        T.lower_right_mask = lambda queries, key: torch.ones(queries, key.shape[2], dtype=torch.bool)
        """,
        "own forward pass differ by up to",
    ),
    "merged weights that were written wrongly": (
        """
        save = T.save_merged
        def save_merged(merged, folder):
            save(merged, folder)
            state = torch.load(folder / T.MERGED_WEIGHTS, weights_only=True)
            state["model.norm.weight"][0] += 1
            torch.save(state, folder / T.MERGED_WEIGHTS)
        T.save_merged = save_merged
        """,
        "differs from the trained model in 1 tensors: ['model.norm.weight']",
    ),
    "a soft prompt that the trained forward leaves out": (
        """
        sys.argv += ["--training_mode", "ptuning"]
        add = T.add_soft_prompt
        def add_soft_prompt(model, soft_prompt):
            T.model_inputs = lambda causal_lm, input_ids, soft_prompt: {"input_ids": input_ids.clamp(min=0)}
            return add(model, soft_prompt)
        T.add_soft_prompt = add_soft_prompt
        """,
        "the policy with the prefix and of the base model with it differ",
    ),
    "a soft prompt that PEFT opens otherwise": (
        """
        sys.argv += ["--training_mode", "ptuning"]
        open_adapter = T.PeftModel.from_pretrained
        def from_pretrained(*args, **options):
            policy = open_adapter(*args, **options)
            policy.prompt_encoder["default"].embedding.weight.data.mul_(1.5)
            return policy
        T.PeftModel.from_pretrained = from_pretrained
        """,
        "the adapter opened by PEFT and of the trained soft prompt differ",
    ),
}


SCRIPT = """
import sys, torch
sys.path.insert(0, {project!r})
import train_with_preference_prompt as T
{patch}
T.program()
"""


def sabotaged(patch: str, folder: Path) -> Path:
    """The program with a patch applied first."""
    script = folder / "sabotaged.py"
    script.write_text(SCRIPT.format(project=str(PROJECT), patch=textwrap.dedent(patch)))
    return script


@pytest.mark.parametrize("broken", SABOTAGE)
def test_a_broken_run_is_stopped(broken, tiny_run, tmp_path):
    patch, words = SABOTAGE[broken]
    result = train(tiny_run, tmp_path, sabotaged(patch, tmp_path))
    assert result.returncode == 1 and words in result.stderr, result.stderr[-2000:]
    assert result.stderr.count("error:\n") == 1
    assert not (output_of(tmp_path) / T.MODEL_CARD).exists()


# From the second update on the loss of one pair, or only its gradient, is not finite.
POISON = """
class Poison(torch.autograd.Function):
    @staticmethod
    def forward(context, loss, factor):
        context.save_for_backward(factor)
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.saved_tensors[0], None

score = T.PreferenceGuidedDPOTrainer.score
def poisoned(self, model, batch, guided):
    metrics = score(self, model, batch, guided)
    training = self.model.training or torch.is_grad_enabled()
    if self.state.global_step >= 1 and training == {training}:
        factor = torch.where(batch["indices"] == {place}, float("{value}"), 1.0)
        metrics["loss"] = Poison.apply(metrics["loss"], factor) if {gradient} else metrics["loss"] * factor
    return metrics
T.PreferenceGuidedDPOTrainer.score = poisoned
"""
# The rows of the tiny data are trained on in the order 7, 9, 2, 8, 1 | 3, 11, 12, 5, 4 | 6, 10 (seed 42).
NOT_FINITE = {
    "a loss": ({"training": True, "place": 2, "value": "nan", "gradient": False}, ["loss/train is nan", "row 3 of"]),
    "an infinite loss": (
        {"training": True, "place": 2, "value": "inf", "gradient": False},
        ["loss/train is inf", "row 3 of"],
    ),
    "a gradient": (
        {"training": True, "place": 11, "value": "nan", "gradient": True},
        ["optim/grad_norm is ", "row 12 of"],
    ),
    "an infinite gradient": (
        {"training": True, "place": 11, "value": "inf", "gradient": True},
        ["optim/grad_norm is ", "row 12 of"],
    ),
    "a test pair's loss": (
        {"training": False, "place": 4, "value": "nan", "gradient": False},
        ["loss/eval is nan", "row 5 of"],
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_number_that_is_not_finite_stops_the_run(case, tiny_run, tmp_path):
    """With the update, the pair's row, its file and the last good checkpoint; nothing broken is ever saved."""
    poison, words = NOT_FINITE[case]
    result = train({**tiny_run, "EVAL_STEPS": "1"}, tmp_path, sabotaged(POISON.format(**poison), tmp_path))
    assert result.returncode == 1 and result.stderr.count("error:\n") == 1 and "Traceback" not in result.stderr
    message = result.stderr.split("error:\n")[1]
    split, update = ("train", 2) if poison["training"] else ("test", 1)
    for phrase in (f"update {update}: ", *words, tiny_run[f"{split.upper()}_DATASET_PATH"], "lower LEARNING_RATE"):
        assert phrase in message, (phrase, message)
    if update == 2:
        assert f"the last good checkpoint is {output_of(tmp_path)}/checkpoint-1\n" in message
    assert [path.name for path in T.checkpoints(output_of(tmp_path))] == ["checkpoint-1"] * (update - 1)


def test_the_pairs_that_are_not_finite_are_found_on_every_rank(tiny_run, tmp_path):
    """Two ranks, the second update is rows 11, 12, 5, 4, 6, 10: the second rank has row 12, the first one names it."""
    cores = T.CORES
    if cores < 2:
        pytest.skip("two ranks need two cores")
    script = sabotaged(POISON.format(training=True, place=11, value="nan", gradient=False), tmp_path)
    variables = {**tiny_run, "GRADIENT_ACCUM_STEPS": "3", "REFERENCE_CACHE": "off"}
    (status, _, first), (other_status, _, second) = two_ranks(variables, tmp_path, script)
    assert (status, other_status) == (1, 1), first[-2000:] + second[-2000:]
    assert "loss/train is nan" in first and "it comes from row 12 of" in first and "error:" not in second


def test_a_reference_that_is_not_finite_names_the_row(tiny_run, tokenizer, tmp_path):
    """The embedding of a token that one training pair alone has is not a number."""
    model = make_model("qwen2", len(tokenizer))
    ids = [set(tokenizer(" ".join(row.values())).input_ids) for row in ROWS]
    only_in_4 = ids[3].difference(*ids[:3], *ids[4:], tokenizer(PREFERENCE + "Again: Tell me: ").input_ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[min(only_in_4)] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    variables = {**tiny_run, "POLICY_MODEL_PATH": str(tmp_path / "model"), "PAIRS_PER_FORWARD": "1"}
    result = train(variables, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    words = "the reference's log-probabilities are not finite for rows 4, 10 of"
    assert f"{words} {tiny_run['TRAIN_DATASET_PATH']}" in result.stderr


@pytest.mark.parametrize("condition", ["base", "pref"])
def test_packed_forward_check_allows_rounding_only(model, tokenized, condition):
    soft, pairs = soft_prompt_of(model), with_soft_prefix(tokenized)
    T.enable_packed_forward(model, soft)
    packed = {
        "base": T.teacher_logps(model, pack(pairs)),
        "pref": T.teacher_logps(model, pack(pairs, "pref_prompt_ids")),
    }
    T.check_packed_forward(model, pairs, packed, soft)
    with pytest.raises(T.SelfCheckError, match=f"packed pairs .{condition}. and of .*own forward pass differ"):
        T.check_packed_forward(model, pairs, packed | {condition: packed[condition] + 0.1}, soft)


class BeforeTraining(SimpleNamespace):
    """What `check_before_training` sees of a trainer, built as `build_policy` does it, with β 1."""

    score = T.PreferenceGuidedDPOTrainer.score

    def __init__(self, mode, causal_lm, tokenized):
        soft = None if mode == "text" else soft_prompt_of(causal_lm).requires_grad_(False)
        dataset = T.PairDataset(tokenized if mode == "text" else with_soft_prefix(tokenized))
        T.enable_packed_forward(causal_lm, soft)
        batch = T.first_batch(dataset, 4)
        base_logps = {condition: T.teacher_logps(causal_lm, batch[condition]) for condition in ("base", "pref")}
        settings = T.ScriptArguments(training_mode=mode, beta=1.0)
        policy = T.add_soft_prompt(causal_lm, soft) if mode == "ptuning" else T.add_adapter(causal_lm, settings)
        dataset.ref_logps["base"] = T.reference_logps(policy, T.first_batch(dataset, len(dataset))["base"])
        first = T.FirstScores(base_logps, base_logps)
        super().__init__(model=policy, soft_prompt=soft, train_dataset=dataset, first_scores=first)
        self.reference_weights = None
        self.settings, self.state, self._prepare_inputs = settings, SimpleNamespace(global_step=0), dict


def scale(parameter, factor):
    with torch.no_grad():
        parameter.mul_(factor)


def tilt_adapter(trainer):
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3e-5)


def without_soft(causal_lm, input_ids, soft_prompt):
    return {"input_ids": input_ids.clamp(min=0)}


PREFIXED, PLAIN = "the policy with the prefix and of the base model with it differ", "the reference pass and of the"
# (mode, what is broken) → (what breaks it, the words of the error)
BROKEN = {
    ("text", "a tilted adapter"): (lambda t, patch: tilt_adapter(t), "does not start as the reference"),
    ("embedding", "a tilted adapter"): (lambda t, patch: tilt_adapter(t), "does not start as the reference"),
    ("embedding", "another soft prompt"): (lambda t, patch: scale(t.soft_prompt.weight, 1.5), PREFIXED),
    ("embedding", "no soft prompt"): (lambda t, patch: patch.setattr(T, "model_inputs", without_soft), PREFIXED),
    ("ptuning", "another soft prompt"): (lambda t, patch: scale(t.soft_prompt.weight, 1.5), PREFIXED),
    ("ptuning", "no soft prompt"): (lambda t, patch: patch.setattr(T, "model_inputs", without_soft), PREFIXED),
    ("ptuning", "a frozen soft prompt"): (lambda t, patch: t.model.requires_grad_(False), "no parameter is trainable"),
    ("ptuning", "a changed reference"): (lambda t, patch: scale(t.train_dataset.ref_logps["base"], 1.1), PLAIN),
}


@pytest.mark.parametrize("mode", ["text", "embedding", "ptuning"])
def test_the_check_before_training_passes_a_sound_policy(mode, model, tokenized):
    T.check_before_training(BeforeTraining(mode, model, tokenized))


@pytest.mark.parametrize(("mode", "broken"), BROKEN)
def test_the_check_before_training_stops_a_broken_one(mode, broken, model, tokenized, monkeypatch):
    trainer = BeforeTraining(mode, model, tokenized)
    breaks, words = BROKEN[mode, broken]
    breaks(trainer, monkeypatch)
    with pytest.raises(T.SelfCheckError, match=words):
        T.check_before_training(trainer)


def test_peft_cannot_add_the_soft_prompt_a_second_time(model, tokenized):
    """With PEFT's own forward in front of the packed one the check fails loudly instead of scoring another prompt."""
    trainer = BeforeTraining("ptuning", model, tokenized)
    del trainer.model.forward  # that of PEFT's class is back
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        T.check_before_training(trainer)


def test_a_model_that_caps_its_logits_is_refused(model, tokenized):
    T.enable_packed_forward(model)
    text_forward = model.forward

    def capped(*args, **kwargs):
        output = text_forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 5) * 5
        return output

    model.forward = capped
    with pytest.raises(T.SelfCheckError, match="scales or caps its logits"):
        T.unpacked_logps(model, tokenized[0].prompt_ids, tokenized[0].chosen_ids)


def test_log_probabilities_that_are_not_numbers_are_not_close():
    with pytest.raises(T.SelfCheckError):
        T.require_close("a", torch.tensor([float("nan")]), "b", torch.tensor([1.0]), nats=1.0)


def test_the_first_batch_is_the_data_sets_beginning(tokenized):
    batch = T.first_batch(T.PairDataset(tokenized), 2)
    assert batch["indices"].tolist() == [0, 1] and batch["weights"].tolist() == [1.0, 1.0]
    assert len(T.first_batch(T.PairDataset(tokenized), 99)["indices"]) == len(tokenized)
