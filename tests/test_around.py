"""Around the updates: the self-checks pass on a sound run (test_trainer) and stop a broken one, which is shown here."""

import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import PROJECT, output_of, train
from test_forward import pack

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


def test_packed_forward_check_allows_rounding_only(model, tokenized):
    T.enable_packed_forward(model)
    packed = T.teacher_logps(model, pack(tokenized))
    T.check_packed_forward(model, tokenized, packed)
    with pytest.raises(T.SelfCheckError, match="own forward pass"):
        T.check_packed_forward(model, tokenized, packed + 0.1)


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
