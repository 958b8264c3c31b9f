"""Sizes on paper: what the formulas say beside what models, forwards and runs really hold."""

import importlib.util
import itertools
import json

import pytest
import torch
from conftest import PROJECT
from test_layers import kept_by
from transformers import AutoModelForCausalLM, Qwen2Config

import train_with_preference_prompt as T

spec = importlib.util.spec_from_file_location("sizes", PROJECT / "tests" / "benchmark" / "sizes.py")
sizes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sizes)

SMOLLM2 = sizes.Shape(576, 1536, 30, 9, 3, 64, 49_152, tied=True)
SMALL = sizes.Shape(256, 640, 3, 8, 2, 32, 1000, tied=True)
PAIRS = [(60, 40, 30), (50, 20, 45)]
RANK = 8


def model_of(shape, device="cpu", dtype=torch.float32):
    """A Qwen2 model of a shape."""
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def policy_of(shape, rank, dropout, fused=True, **options):
    args = T.ScriptArguments(lora_r=rank, lora_dropout=dropout)
    policy = T.add_adapter(T.enable_packed_forward(model_of(shape, **options)), args)
    if fused:
        T.speed_up(policy)
    return policy.train()


@pytest.mark.parametrize(("base", "published"), [("0.5B", 494_032_768), ("7B", 7_615_616_512), ("72B", 72_706_203_648)])
def test_parameters_are_those_of_the_published_models(base, published):
    """All but the norms and the biases of q, k and v, which are the rest."""
    shape = sizes.BASES[base]
    keys = 2 * shape.key_heads * shape.head_size
    rest = shape.layers * (2 * shape.hidden + shape.heads * shape.head_size + keys) + shape.hidden
    assert shape.layer_weights + shape.embedding_weights + rest == published


def test_the_adapters_parameters_are_pefts():
    for shape in (SMALL, sizes.BASES["0.5B"]):
        policy = policy_of(shape, 16, 0.1, device="meta")
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        assert shape.adapter_weights(16) == trained
        state = {name: sizes.memory(shape, sizes.Work(), "bf16", 0, 1)[name] for name in ("gradients", "optimizer")}
        zero = json.loads((PROJECT / "ds_config.json").read_text())["zero_optimization"]
        assert sum(state.values()) == T.engine_bytes(policy, zero)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_a_layer_keeps_is_what_a_forward_keeps(dtype, size, dropout, fused):
    """Two layers more keep so much more; what the head and the embeddings keep is the same in both."""
    held, row = [], T.pack_row([tuple(list(range(length)) for length in pair) for pair in PAIRS])
    for layers in (1, 3):
        policy = policy_of(sizes.replace(SMALL, layers=layers), RANK, dropout, fused, dtype=dtype)
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(dtype)  # as the engine holds the adapter
        held.append(kept_by(policy, lambda policy=policy: T.policy_logps(policy, row))[1])
    measured = (held[1] - held[0]) / 2
    expected = sizes.kept_by_a_layer(SMALL, PAIRS, RANK, dropout > 0, size, fused, "cpu")
    assert expected == pytest.approx(measured, rel=0.01)
    other = sizes.kept_by_a_layer(SMALL, PAIRS, RANK, dropout == 0, size, fused, "cpu")
    assert other != pytest.approx(measured, rel=0.05)


# Peak GiB of runs with the bundled model, fp32, on a CPU (README, Guide), and the pairs of their largest forward.
LIBRARIES = 0.72 * sizes.GIB  # what a process takes beside the model; imported alone they have 0.49
HOLES = 1.15  # what the heap holds for activations, in terms of those that there are at the same time
ANSWERS = ((56, 191, 244), (56, 117, 244), (128, 85, 100), (65, 16, 11))
EIGHT = ((56, 191, 244),) * 2 + (
    (56, 191, 181),
    (56, 117, 244),
    (128, 85, 100),
    (44, 73, 63),
    (76, 20, 21),
    (65, 16, 11),
)
RUNS = {
    "as shipped": (2.97, {"measured": ANSWERS}),
    "PAIRS_PER_FORWARD=1": (1.93, {"measured": ((56, 244, 244),)}),
    "PAIRS_PER_FORWARD=8": (4.81, {"measured": EIGHT}),
    "GRADIENT_CHECKPOINTING=true": (1.82, {"measured": ANSWERS, "checkpointing": True}),
}


@pytest.mark.parametrize("run", RUNS)
def test_the_whole_is_what_a_run_was_measured_to_take(run):
    measured, settings = RUNS[run]
    parts = sizes.memory(SMOLLM2, sizes.Work(**settings), "fp32", 2, 1, "cpu")
    needed = sum(parts.values()) + (HOLES - 1) * parts["activations"] + LIBRARIES
    assert needed / sizes.GIB == pytest.approx(measured, rel=0.1)


# Passes of a guided update measured on an H100 with random weights of Qwen2.5-1.5B's sizes in bf16 and dropout, 30 tokens
# of prefix, without engine and optimizer, 2026-11-27 (README, On a GPU): the pairs' tokens, seconds, of which the GPU was
# busy, and peak GiB.
FOUR = ((109, 157, 173), (113, 65, 93), (125, 122, 111), (98, 121, 105))
SIXTEEN = (
    *((134, 174, 176), (87, 124, 77), (96, 77, 156), (72, 139, 162), (92, 176, 128), (137, 175, 78), (99, 72, 153)),
    *((69, 175, 168), (102, 120, 131), (72, 105, 115), (100, 138, 141), (86, 130, 121), (116, 170, 126)),
    *((93, 67, 163), (130, 177, 61), (71, 152, 167)),
)
ON_H100 = {"4 pairs": (FOUR, 0.2397, 0.0533, 6.60), "16 pairs": (SIXTEEN, 0.2337, 0.1882, 15.35)}


@pytest.mark.parametrize("name", ON_H100)
def test_a_gpus_memory_and_time_are_as_measured(name):
    pairs, seconds, busy, peak = ON_H100[name]
    shape, work = sizes.BASES["1.5B"], sizes.Work(measured=pairs, prefix=30)
    parts = sizes.memory(shape, work, "bf16", 0, 1)
    gradients = 2 * shape.adapter_weights(work.lora_r)  # in bf16
    needed = parts["weights"] + parts["adapter"] + parts["activations"] + gradients
    assert needed / sizes.GIB == pytest.approx(peak, rel=0.1)
    # Where the GPU is busy for most of the time it is not the arithmetic of the page's slower GPUs that is compared.
    fast = sizes.Hardware(80e9, 989e12, 1, 1)
    assert len(pairs) / sizes.pairs_per_second(shape, work, "bf16", 2, 1, fast) == pytest.approx(seconds, rel=0.1)
    trunk, chosen, rejected = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
    answer = (chosen + rejected) / 2
    mean = sizes.Work(max_length=trunk + answer, max_prompt_length=trunk, prefix=30)
    assert len(pairs) * sizes.flops_per_pair(shape, mean) / busy == pytest.approx(
        {4: 244e12, 16: 288e12}[len(pairs)], rel=0.03
    )


@pytest.mark.parametrize(("settings", "measured"), [({"checkpointing": True}, 0.75), ({"guided": False}, 1.36)])
def test_speed_changes_with_the_arithmetic(settings, measured):
    """The README's factors: GRADIENT_CHECKPOINTING=true and ALPHA=0."""
    ratio = sizes.flops_per_pair(SMOLLM2, sizes.Work()) / sizes.flops_per_pair(SMOLLM2, sizes.Work(**settings))
    assert ratio == pytest.approx(measured, rel=0.1)


def test_more_gpus_and_higher_stages_never_need_more():
    for shape, precision in itertools.product(sizes.BASES.values(), ("bf16", "fp32")):
        for gpus in (2, 8, 64):
            of_stage = [sum(sizes.memory(shape, sizes.Work(), precision, stage, gpus).values()) for stage in range(3)]
            assert of_stage == sorted(of_stage, reverse=True)
    parts = [sizes.memory(sizes.BASES["72B"], sizes.Work(), "bf16", 3, gpus)["weights"] for gpus in (1, 8)]
    assert parts[0] == 8 * parts[1]


def test_a_choice_fits_and_nothing_faster_does():
    for name, kind in sizes.HARDWARE.items():
        for shape, gpus in itertools.product(sizes.BASES.values(), sizes.COUNTS[name]):
            choice = sizes.fastest(shape, sizes.Work(), gpus, kind)
            for variant, (precision, stage) in itertools.product(sizes.variants(sizes.Work()), sizes.WAYS):
                needed = sum(sizes.memory(shape, variant, precision, stage, gpus).values()) + sizes.RUNTIME_BYTES
                fits = needed <= kind.memory and (stage < 3 or gpus > 1)
                speed = sizes.pairs_per_second(shape, variant, precision, stage, gpus, kind)
                assert not fits or (choice is not None and speed <= choice.speed)
            assert choice is None or choice.bytes <= kind.memory


def test_the_page_is_what_the_function_gives():
    """`python tests/benchmark/sizes.py > docs/sizes.md` after a change."""
    assert (PROJECT / "docs" / "sizes.md").read_text(encoding="utf-8") == sizes.page()
