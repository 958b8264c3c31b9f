"""Memory: the longest batch is probed without a trace; what does not fit is lowered by all ranks, or is an error."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PREFERENCE, history, make_model, output_of, series, train, two_ranks
from test_around import sabotaged
from test_layers import kept_by
from test_trainer import EXACT, adapter, assert_bit_equal, finished

import train_with_preference_prompt as T

# A forward pass with gradients over a row of more tokens than this runs out of memory; on one rank or all.
LIMITED = """
import os
packed_logps = T.packed_logps
def limited(causal_lm, row, soft_prompt=None):
    if torch.is_grad_enabled() and row.input_ids.numel() > {tokens} and os.environ["RANK"] in "{ranks}":
        raise {error}
    return packed_logps(causal_lm, row, soft_prompt)
T.packed_logps = limited

begin = T.RunCallback.on_train_begin
def on_train_begin(self, *arguments, **options):
    print("the engine accumulates", self.trainer.model_wrapped.gradient_accumulation_steps())
    begin(self, *arguments, **options)
T.RunCallback.on_train_begin = on_train_begin
"""
ON_GPU = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")'
ON_CPU = 'RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can\'t allocate memory")'
LOWERED = "PAIRS_PER_FORWARD lowered from 4 to {}: the longest batch did not fit into memory; the update stays the same"
SETTINGS = {**EXACT, "LORA_DROPOUT": "0.3", "PAIRS_PER_FORWARD": "4"}


def limit(folder, tokens, error=ON_GPU, ranks="01"):
    return sabotaged(LIMITED.format(tokens=tokens, error=error, ranks=ranks), folder)


@pytest.fixture(scope="module")
def dataset(tiny_run, tokenizer):
    pairs, report = T.read_pairs(Path(tiny_run["TRAIN_DATASET_PATH"]))
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 300, 128)
    return T.PairDataset(T.tokenize_pairs(pairs, report, tokenize))


@pytest.fixture(scope="module")
def lengths(dataset):
    """Tokens of the training pairs' plain trees, longest first: prompt once, answers without their last token."""
    return sorted((len(p.prompt_ids + p.chosen_ids + p.rejected_ids) - 2 for p in dataset.pairs), reverse=True)


@pytest.fixture(scope="module")
def longest_row(dataset):
    return max(dataset.pairs, key=lambda p: len(p.prompt_ids + p.chosen_ids + p.rejected_ids)).source.row


@pytest.fixture(scope="module")
def unlimited(tiny_run, tmp_path_factory):
    """The same training with 4, 2 and 1 pairs in a forward, all of which fit."""
    made = {}
    for pairs in (4, 2, 1):
        made[pairs] = tmp_path_factory.mktemp(f"unlimited_{pairs}")
        result = finished(train({**tiny_run, **SETTINGS, "PAIRS_PER_FORWARD": str(pairs)}, made[pairs]))
        assert "lowered" not in result.stdout
    return made


def policy_and_batch(tokenizer, tokenized, **settings):
    args = T.ScriptArguments(**settings)
    policy = T.add_adapter(T.enable_packed_forward(make_model("llama", len(tokenizer))), args)
    return args, policy, T.PairDataset(tokenized)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("epochs", [0.1, 3])
def test_the_largest_forward_is_that_of_the_run(epochs, ranks, tokenized):
    args = T.ScriptArguments(num_epochs=epochs, gradient_accum_steps=2, pairs_per_forward=2, seed=3)
    dataset, tokens = T.PairDataset(tokenized), {}
    for rank in range(ranks):
        loader = T.PairLoader(dataset, T.PairSampler(dataset.lengths, 2, 2, rank, ranks, seed=3))
        for epoch in range(math.ceil(epochs)):
            loader.set_epoch(epoch)
            for batch in loader:
                if batch["weights"].all():
                    tokens[tuple(batch["indices"].tolist())] = batch["pref"].input_ids.numel()
    assert tokens[tuple(T.largest_forward(args, dataset, ranks))] == max(tokens.values())
    assert len(set(tokens.values())) > 1


def test_what_was_set_is_halved(tokenizer, tokenized, monkeypatch):
    """Not the number of pairs in the largest forward, which may have the fewest."""
    args, policy, dataset = policy_and_batch(tokenizer, tokenized, pairs_per_forward=5)
    tried, devices = [], {"world_size": 1, "device": torch.device("cpu"), "process_index": 0}
    hf_args = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config={}), **devices)
    monkeypatch.setattr(T, "largest_forward", lambda args, *others: tried.append(args.pairs_per_forward) or [0, 1])
    monkeypatch.setattr(T, "within_memory", lambda device, step: (False, None))
    with pytest.raises(T.InputError, match="one pair does not fit"):
        T.fitting_settings(args, hf_args, policy, dataset)
    assert tried == [5, 2, 1]


def test_a_million_epochs_are_not_all_dealt(tokenized):
    args = T.ScriptArguments(num_epochs=10**6, gradient_accum_steps=6, pairs_per_forward=6)
    assert len(T.largest_forward(args, T.PairDataset(tokenized * 1000), 1)) == 6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_probe_leaves_no_trace(checkpointing, tokenizer, tokenized):
    args, policy, dataset = policy_and_batch(
        tokenizer, tokenized, lora_dropout=0.5, gradient_checkpointing=checkpointing
    )
    policy.to(torch.float32).train()
    policy.get_base_model().eval()  # a mixture of modes
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    modes, random_state, seen = [m.training for m in policy.modules()], torch.get_rng_state(), []
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_: seen.append(module.training))
    T.probe(args, policy, [dataset[0, 1.0], dataset[1, 1.0]], reserved=0)
    assert True in seen and False in seen  # dropout in the policy's pass, none in the teacher's
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in policy.modules()] == modes and len(set(modes)) == 2
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    with torch.enable_grad():  # the random state did move inside
        policy.train()
        T.policy_logps(policy, T.first_batch(dataset, 2)["base"])
    assert not torch.equal(torch.get_rng_state(), random_state)


def test_a_probe_recomputes_what_the_run_will(tokenizer, tokenized):
    args, policy, dataset = policy_and_batch(tokenizer, tokenized, gradient_checkpointing=True)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with T.as_in_training(args, policy, reserved=0) as found:
        assert list(map(id, found)) == list(map(id, trained))
        assert policy.get_base_model().is_activation_checkpointing


@pytest.mark.parametrize("mode", ["text", "ptuning"])
def test_what_is_trained_has_the_models_dtype(mode, tokenizer, tokenized):
    """As DeepSpeed's engines will have it; PEFT keeps an adapter in fp32 beside a bf16 model."""
    start = tokenized[0].prompt_ids[:3] if mode == "ptuning" else None
    pairs = [T.dataclasses.replace(pair, pref_prompt_ids=[-1, -2, -3, *pair.prompt_ids]) for pair in tokenized]
    args, model = T.ScriptArguments(training_mode=mode), make_model("llama", len(tokenizer)).bfloat16()
    dataset = T.PairDataset(pairs if mode == "ptuning" else tokenized)
    policy, _, _ = T.build_policy(args, model, start, dataset)
    assert {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad} == {torch.bfloat16}


def test_bytes_that_deepspeed_will_take(tokenizer, tokenized):
    _, policy, _ = policy_and_batch(tokenizer, tokenized)
    states = 16 * sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert states > 0 and T.engine_bytes(policy, {}) == states + 4 * 500_000_000
    assert T.engine_bytes(policy, {"reduce_bucket_size": 100, "overlap_comm": True}) == states + 2 * 400
    assert T.engine_bytes(policy, {"reduce_bucket_size": "auto"}) == states + 4 * 32 * 32


def test_a_run_with_a_probe_equals_one_without(tiny_run, unlimited, tmp_path):
    program = sabotaged("T.probe = lambda *arguments: None", tmp_path)
    finished(train({**tiny_run, **SETTINGS}, tmp_path, program))
    assert_bit_equal(tmp_path, unlimited[4])


def test_one_probe_when_it_fits(tiny_run, tmp_path):
    program = sabotaged(
        """
        probe = T.probe
        def counted(args, policy, pairs, reserved):
            print("probed", len(pairs), "pairs")
            return probe(args, policy, pairs, reserved)
        T.probe = counted
        """,
        tmp_path,
    )
    variables = {**tiny_run, "NUM_EPOCHS": "0.1", "PAIRS_PER_FORWARD": "64", "GRADIENT_ACCUM_STEPS": "5"}
    result = finished(train(variables, tmp_path, program))
    assert re.findall(r"probed (\d+) pairs", result.stdout) == ["5"]  # an update has no more
    assert "lowered" not in result.stdout


@pytest.mark.parametrize(("fitting", "error"), [(2, ON_GPU), (1, ON_GPU), (2, ON_CPU)])
def test_pairs_per_forward_is_lowered(fitting, error, tiny_run, unlimited, lengths, tmp_path):
    """Losses, gradients, adapter and DeepSpeed's accumulation are those of a run that was started like that."""
    result = finished(train({**tiny_run, **SETTINGS}, tmp_path, limit(tmp_path, sum(lengths[:fitting]), error)))
    assert result.stdout.count(LOWERED.format(fitting)) == 1
    assert_bit_equal(tmp_path, unlimited[fitting])
    assert series(tmp_path, "loss/train") != series(unlimited[4], "loss/train")  # dropout depends on the packing
    recorded = json.loads((output_of(tmp_path) / T.RUN_SETTINGS).read_text())
    assert recorded["pairs_per_forward"] == 4  # what the user set
    assert f"the engine accumulates {8 // fitting}\n" in result.stdout
    trained_with = torch.load(output_of(tmp_path) / "training_args.bin", weights_only=False)
    assert trained_with.gradient_accumulation_steps == 8 // fitting


def test_a_resumed_run_is_lowered_again(tiny_run, unlimited, lengths, tmp_path):
    variables, program = {**tiny_run, **SETTINGS}, limit(tmp_path, sum(lengths[:2]))
    finished(train(variables, tmp_path, program))
    (output_of(tmp_path) / T.MODEL_CARD).unlink()
    (output_of(tmp_path) / "checkpoint-6" / T.CHECKPOINT_FILES).unlink()
    result = finished(train({**variables, "RESUME": "true"}, tmp_path, program))
    assert result.stdout.count(LOWERED.format(2)) == 1
    assert_bit_equal(tmp_path, unlimited[2])


def test_one_pair_that_does_not_fit_is_an_error(tiny_run, lengths, longest_row, tmp_path):
    """Nothing is moved or written: an earlier run stays where and as it is."""
    variables = {**tiny_run, "NUM_EPOCHS": "0.1"}
    finished(train(variables, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "sabotaged.py"}
    result = train(variables, tmp_path, limit(tmp_path, lengths[0] - 1))
    assert result.returncode == 2 and result.stderr.count("error:\n") == 1, result.stderr[-2000:]
    said = result.stderr.split("error:\n")[1]
    assert f"- one pair does not fit into memory: row {longest_row} of {tiny_run['TRAIN_DATASET_PATH']}, " in said
    named = re.findall(r"([A-Z_0-9]{6,}) \(now (.*?)\): ", said)
    assert named == [
        ("GRADIENT_CHECKPOINTING", "false"),
        ("MAX_LENGTH", "300"),
        ("POLICY_MODEL_PATH", f'"{tiny_run["POLICY_MODEL_PATH"]}"'),
        ("LORA_TARGET_MODULES", '"all-linear"'),
        ("LORA_DROPOUT", "0.1"),
        ("LORA_R", "16"),
    ]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "sabotaged.py"}
    assert {path: after.get(path) for path in before if path.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }
    assert not [path for path in after.keys() - before.keys() if path.is_file()]


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True, "lora_dropout": 0.0}, {"training_mode": "ptuning"}]
)
def test_only_what_helps_is_named(settings):
    args = T.ScriptArguments(**settings)
    named = re.findall(r"([A-Z_0-9]{6,}) \(now", T.memory_problem(args, "row 7", torch.device("cpu")))
    assert ("GRADIENT_CHECKPOINTING" in named) == (not args.gradient_checkpointing)
    assert ("NUM_VIRTUAL_TOKENS" in named) == args.trains_prefix and ("LORA_R" in named) != args.trains_prefix
    assert "LORA_DROPOUT" not in named and "PRECISION" not in named  # on the CPU bf16 is not to be recommended


def test_what_is_named_first_saves_most(tokenizer, tokenized):
    """Bytes that a forward pass keeps for the backward pass, model weights not counted."""

    def kept(**settings):
        args, policy, dataset = policy_and_batch(tokenizer, tokenized, **settings)
        T.speed_up(policy)  # as in a run
        row = T.first_batch(dataset, 4)["base"]
        with T.as_in_training(args, policy, 0):
            logps, size = kept_by(policy, lambda: T.policy_logps(policy, row))
        assert logps.requires_grad
        return size

    changes = ({"gradient_checkpointing": True}, {"lora_target_modules": "q_proj,v_proj"}, {"lora_dropout": 0.0})
    sizes = [kept(**change) for change in (*changes, {"lora_r": 15}, {})]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5


def test_another_error_is_no_lack_of_memory(tiny_run, lengths, tmp_path):
    error = 'RuntimeError("mat1 and mat2 shapes cannot be multiplied (memory layout)")'
    result = train({**tiny_run, **SETTINGS}, tmp_path, limit(tmp_path, lengths[0] - 1, error))
    assert result.returncode == 1 and "mat1 and mat2 shapes" in result.stderr and "Traceback" in result.stderr
    assert "lowered" not in result.stdout and not output_of(tmp_path).exists()


def test_what_says_otherwise_that_memory_is_out_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert T.is_out_of_memory(caught.value)
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert T.is_out_of_memory(cublas) and T.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert T.is_out_of_memory(torch.OutOfMemoryError("")) and not T.is_out_of_memory(RuntimeError("memory"))


@pytest.mark.skipif(T.CORES < 2, reason="two ranks need two cores")
def test_two_ranks_lower_together(tiny_run, lengths, tmp_path):
    """Only the second runs out of memory."""
    limited, lower = tmp_path / "limited", tmp_path / "lower"
    variables = {**tiny_run, **EXACT, "GRADIENT_ACCUM_STEPS": "4", "PAIRS_PER_FORWARD": "4"}
    for folder in (limited, lower):
        folder.mkdir()
    assert [status for status, _, _ in two_ranks({**variables, "PAIRS_PER_FORWARD": "2"}, lower)] == [0, 0]
    program = limit(tmp_path, sum(lengths[:2]), ranks="1")
    (first, out, error), (second, other_out, other_error) = two_ranks(variables, limited, program)
    assert (first, second) == (0, 0), error[-2000:] + other_error[-2000:]
    assert out.count(LOWERED.format(2)) == 1 and "lowered" not in other_out
    assert all("the engine accumulates 2\n" in text for text in (out, other_out))
    assert series(limited, "loss/train") == series(lower, "loss/train")
    assert all(torch.equal(tensor, adapter(lower)[name]) for name, tensor in adapter(limited).items())
    assert "GiB (the rank that needed most)" in out


@pytest.mark.skipif(T.CORES < 2, reason="two ranks need two cores")
def test_two_ranks_give_up_together(tiny_run, tmp_path):
    program = limit(tmp_path, 1, ranks="1")
    (first, _, error), (second, _, other_error) = two_ranks(tiny_run, tmp_path, program)
    assert (first, second) == (2, 2) and "one pair does not fit" in error and "error:" not in other_error
    assert not output_of(tmp_path).exists()


def test_a_model_that_does_not_fit_is_an_error(tiny_run, tmp_path):
    """The base model's own scores come before the probe, without gradients."""
    program = sabotaged(
        f"""
        def check_packed_forward(*arguments):
            raise {ON_GPU}
        T.check_packed_forward = check_packed_forward
        """,
        tmp_path,
    )
    result = train(tiny_run, tmp_path, program)
    assert result.returncode == 2 and not output_of(tmp_path).exists()
    said = result.stderr.split("error:\n")[1]
    assert said.startswith("- the model does not fit into memory.")
    assert re.findall(r"([A-Z_0-9]{6,}) \(now", said) == ["POLICY_MODEL_PATH", "MAX_LENGTH"]


@pytest.mark.parametrize("mode", ["ptuning", "embedding"])
def test_soft_prompts_are_lowered_too(mode, tiny_run, lengths, tmp_path):
    """In P-tuning the prefix is part of the rows that keep gradients, in embedding mode it is not."""
    torch.save(torch.randn(7, 32), tmp_path / "soft.pt")
    variables = {**tiny_run, **SETTINGS, "TRAINING_MODE": mode, "NUM_VIRTUAL_TOKENS": "7"}
    if mode == "embedding":
        variables |= {"PROMPT_EMBEDDING_PATH": str(tmp_path / "soft.pt")}
    limited, lower = tmp_path / "limited", tmp_path / "lower"
    for folder in (limited, lower):
        folder.mkdir()
    finished(train({**variables, "PAIRS_PER_FORWARD": "2"}, lower))
    tokens = sum(lengths[:2]) + (2 * 7 if mode == "ptuning" else 0)
    result = finished(train(variables, limited, limit(tmp_path, tokens)))
    assert LOWERED.format(2) in result.stdout
    assert_bit_equal(limited, lower)


def test_peak_memory_is_shown_and_kept(unlimited, tiny_run, tmp_path):
    result = finished(train({**tiny_run, "NUM_EPOCHS": "0.1"}, tmp_path))
    (peak,) = [logs[T.PEAK_MEMORY] for logs in history(tmp_path) if T.PEAK_MEMORY in logs]
    weights = (Path(tiny_run["POLICY_MODEL_PATH"]) / "model.safetensors").stat().st_size
    assert max(weights, 50 * 2**20) < peak * 2**30 < 64 * 2**30
    assert f"peak memory  {peak:.2f} GiB\n" in result.stdout
    assert f"| peak memory | {peak:.2f} GiB |" in (output_of(tmp_path) / T.MODEL_CARD).read_text()


def test_the_peak_before_a_resumed_run_began_counts():
    now = T.peak_memory(torch.device("cpu"))
    logged = [{"loss/eval": 99.0}, {T.PEAK_MEMORY_TAG: now + 7}, {T.PEAK_MEMORY_TAG: now + 2}]
    assert T.peak_memory(torch.device("cpu"), logged) == now + 7
    assert now <= T.peak_memory(torch.device("cpu"), [{T.PEAK_MEMORY_TAG: 0.001}]) < now + 1


def test_peak_memory_sees_what_was_held(tmp_path):
    before = T.peak_memory(torch.device("cpu"))
    torch.ones(int((before + 0.25) * 2**28)).sum()  # so many GiB in fp32
    assert T.peak_memory(torch.device("cpu")) > before + 0.2
