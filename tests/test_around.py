"""Around the updates: the self-checks pass on a sound run (test_trainer) and stop a broken one, which is shown here."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, output_of, train
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
try:
    T.main()
except T.SelfCheckError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.mark.parametrize("broken", SABOTAGE)
def test_a_broken_run_is_stopped(broken, tiny_run, tmp_path, monkeypatch):
    patch, words = SABOTAGE[broken]
    script = tmp_path / "sabotaged.py"
    script.write_text(SCRIPT.format(project=str(PROJECT), patch=textwrap.dedent(patch)))
    run = subprocess.run

    def run_sabotaged(command, **options):
        return run([sys.executable, str(script), *command[2:]], **options)

    monkeypatch.setattr(subprocess, "run", run_sabotaged)
    result = train(tiny_run, tmp_path)
    assert result.returncode == 1 and words in result.stderr, result.stderr[-2000:]
    assert not (output_of(tmp_path) / T.MODEL_CARD).exists()


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
        dataset.ref_logps = T.reference_logps(policy, T.first_batch(dataset, len(dataset))["base"])
        super().__init__(model=policy, soft_prompt=soft, train_dataset=dataset, base_logps=base_logps)
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
    ("ptuning", "a changed reference"): (lambda t, patch: scale(t.train_dataset.ref_logps, 1.1), PLAIN),
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
