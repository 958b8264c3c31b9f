"""What a base model needs, on paper: memory per GPU and pairs per second, before anything is rented.

    python tests/benchmark/sizes.py > docs/sizes.md

Memory is a sum of tensors whose sizes follow from the model's shape and the settings; tests/test_sizes.py compares it
with what real runs hold. Speed is arithmetic divided by what the hardware is assumed to reach.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

GIB = 2**30
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 keeps gathered for their next use, DeepSpeed's default
BUCKET_BYTES = 4 * 20_000_000  # DeepSpeed's bucket of fp32 gradients, as ds_config.json sizes it


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP, as its configuration has it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear maps of a layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return attention + [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]

    @property
    def layer_weights(self) -> int:
        """Parameters of all layers' linear maps."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def embedding_weights(self) -> int:
        """Parameters of the embeddings and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_weights(self, rank: int) -> int:
        """Parameters of LoRA on all linear maps of the layers."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


# Qwen2.5, as published with the models (config.json).
BASES = {
    "0.5B": Shape(896, 4864, 24, 14, 2, 64, 151_936, tied=True),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 128, 151_936, tied=True),
    "3B": Shape(2048, 11_008, 36, 16, 2, 128, 151_936, tied=True),
    "7B": Shape(3584, 18_944, 28, 28, 4, 128, 152_064, tied=False),
    "14B": Shape(5120, 13_824, 48, 40, 8, 128, 152_064, tied=False),
    "32B": Shape(5120, 27_648, 64, 40, 8, 128, 152_064, tied=False),
    "72B": Shape(8192, 29_568, 80, 64, 8, 128, 152_064, tied=False),
}


@dataclass(frozen=True)
class Work:
    """The settings that memory and speed depend on, and what a pair has: the longest that MAX_LENGTH lets through."""

    max_length: int = 300
    max_prompt_length: int = 128
    prefix: int = 20
    pairs_per_forward: int = 4
    lora_r: int = 16
    dropout: bool = True
    checkpointing: bool = False
    guided: bool = True  # ALPHA above 0
    measured: tuple[tuple[int, int, int], ...] = ()  # the pairs of a forward, where they are known

    @property
    def answer(self) -> int:
        return self.max_length - self.max_prompt_length

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(trunk, chosen, rejected) in tokens of the pairs of a forward."""
        return list(self.measured) or [(self.max_prompt_length, self.answer, self.answer)] * self.pairs_per_forward


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight in the layers and in the embeddings, of an activation, and the share of the GPU's peak reached."""

    layer: float
    embedding: float
    activation: int
    efficiency: float


# NF4 with double quantisation: 4 + 0.127 bits (arXiv 2305.14314, section 3). The efficiencies are assumptions.
PRECISIONS = {
    "bf16": Precision(2, 2, 2, 0.40),
    "fp32": Precision(4, 4, 4, 0.40),
    "4-bit": Precision(4.127 / 8, 2, 2, 0.30),
}


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU: memory in bytes, dense bf16 FLOP/s, bytes/s to a GPU of the same machine and of another one."""

    memory: float
    flops: float
    within: float
    between: float
    in_a_machine: int = 8


HARDWARE = {
    "24 GB": Hardware(24e9, 165e12, 25e9, 3e9),
    "80 GB": Hardware(80e9, 312e12, 300e9, 25e9),
}
# What the processor takes to start the kernels of a layer in a guided forward, however few tokens it has: measured
# beside an H100, for the sizes of Qwen2.5-1.5B, before layers were computed in fewer steps, which took a quarter less on
# a CPU.
STARTING_SECONDS = 0.24 / 28
RUNTIME_BYTES = 1.5e9  # CUDA context, NCCL's buffers, fragmentation: an assumption
HEAD_CHUNK = {"cpu": 128, "cuda": 1024}  # scored tokens whose logits exist at a time


def kept_by_a_layer(
    shape: Shape,
    pairs: list[tuple[int, int, int]],
    rank: int,
    dropout: bool,
    size: int,
    fused: bool = True,
    device: str = "cuda",
) -> int:
    """Bytes of activations that one decoder layer keeps for the backward pass of a packed row.

    Args:
        pairs: (trunk, chosen, rejected) in tokens; an answer's last token is predicted and never read.
        size: bytes of an activation.
        fused: whether LoRA layers (and, on a GPU, norms) are computed in this project's way, or as in PEFT (ZeRO-3).
    """
    on_gpu = device == "cuda"
    tokens = sum(trunk + chosen + rejected - 2 for trunk, chosen, rejected in pairs)
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    if fused:  # what o reads, gate and up
        adapted = size * (queries + 2 * shape.intermediate)
        # What the norms read, of which what is behind them is made again; a CPU's norms keep it in fp32, too.
        norms = 2 * shape.hidden * (size if on_gpu or size == 4 else size + 4)
        # every input's mask, down's too: a byte, on a CPU 16 bits
        noise = (1 if on_gpu else 2) * (2 * shape.hidden + queries + shape.intermediate)
    else:  # each layer's input, once where there is no dropout; gate, its activation and up
        inputs = 5 * shape.hidden + queries + shape.intermediate if dropout else 2 * shape.hidden + queries
        adapted = size * (inputs + (3 if dropout else 4) * shape.intermediate)
        noise = (1 if on_gpu else size) * (5 * shape.hidden + queries + shape.intermediate)
        norms = 2 * shape.hidden * 4  # their inputs, in fp32
    a_token = adapted + size * (2 * queries + 2 * keys + 7 * rank) + norms
    branches = 0
    for trunk, _, rejected in pairs:
        if on_gpu and size == 2:  # FlashAttention: the trunk's keys and values once more
            branches += size * trunk * 2 * keys
        else:  # keys and values of all that the branch sees, for all heads, and the mask
            branches += size * (trunk + rejected - 1) * (2 * queries + rejected - 1)
    return tokens * (a_token + noise * dropout) + branches


def activations(shape: Shape, work: Work, size: int, fused: bool = True, device: str = "cuda") -> int:
    """Bytes that a training forward holds at its peak, the backward pass's first steps included."""
    tokens = sum(map(sum, work.pairs))
    scored = sum(chosen + rejected for _, chosen, rejected in work.pairs)
    layer = kept_by_a_layer(shape, work.pairs, work.lora_r, work.dropout, size, fused, device)
    layers = layer + shape.layers * tokens * shape.hidden * size if work.checkpointing else shape.layers * layer
    # A chunk's logits, in fp32, as log-probabilities and as the product's operand; the gradients of the scored states.
    head = min(HEAD_CHUNK[device], scored) * shape.vocabulary * (2 * size + 2 * 4) + scored * shape.hidden * size
    return layers + head


def memory(
    shape: Shape, work: Work, precision: str, stage: int, gpus: int, device: str = "cuda"
) -> Mapping[str, float]:
    """Bytes on each GPU by what takes them.

    Args:
        stage: of ZeRO: what is divided among the GPUs, nothing (0), the optimizer's state (1), gradients (2), weights (3).
    """
    kind = PRECISIONS[precision]
    weights = shape.layer_weights * kind.layer + shape.embedding_weights * kind.embedding
    adapter = shape.adapter_weights(work.lora_r)
    gathered = 0.0
    if stage == 3 and gpus > 1:
        held = max(LIVE_PARAMETERS, 2 * shape.layer_weights // shape.layers) + shape.vocabulary * shape.hidden
        gathered = min(held, shape.layer_weights + shape.embedding_weights) * kind.embedding
        weights /= gpus
    return {
        "weights": weights,
        "gathered": gathered,
        "adapter": adapter * kind.activation / (gpus if stage == 3 else 1),
        "gradients": 4 * adapter / (gpus if stage >= 2 else 1) + BUCKET_BYTES,
        "optimizer": 12 * adapter / (gpus if stage >= 1 else 1),  # master copy and two moments in fp32
        "activations": activations(shape, work, kind.activation, stage < 3, device),
    }


def flops_per_pair(shape: Shape, work: Work) -> float:
    """Floating-point operations of a guided pair: policy forward and backward, teacher forward; 2 a weight and token.

    The weights are frozen, so that the backward pass is one product, not two. The reference's single pass over the data
    set, kept in a cache, does not count.
    """
    plain = work.max_prompt_length + 2 * work.answer
    policy, teacher = (3 if work.checkpointing else 2) * plain, (plain + work.prefix) * work.guided
    layers = 2 * shape.layer_weights * (policy + teacher)
    head = 2 * shape.vocabulary * shape.hidden * 2 * work.answer * (2 + work.guided)  # the gradient of its input, too
    adapter = 2 * shape.adapter_weights(work.lora_r) * (3 * plain + teacher)
    length = work.max_prompt_length + work.answer
    attention = 4 * shape.layers * shape.heads * shape.head_size * (length**2 / 2 + work.answer * length)
    return layers + head + adapter + attention * (3 + work.guided)


def pairs_per_second(shape: Shape, work: Work, precision: str, stage: int, gpus: int, kind: Hardware) -> float:
    """Pairs per second of all GPUs together: by arithmetic or, where it takes longer, by what keeps a GPU waiting.

    That is the processor, which starts the kernels, or the network, where ZeRO-3 gathers the weights.
    """
    peak = kind.flops / (8 if precision == "fp32" else 1)  # without TF32
    compute = len(work.pairs) * flops_per_pair(shape, work) / (peak * PRECISIONS[precision].efficiency)
    gather = 0.0
    if stage == 3 and gpus > 1:  # for the policy's forward and backward pass and for the teacher's
        size = (shape.layer_weights + shape.embedding_weights) * PRECISIONS[precision].embedding
        bandwidth = kind.within if gpus <= kind.in_a_machine else kind.between
        gather = (4 if work.checkpointing else 3) * size * (gpus - 1) / gpus / bandwidth
    starting = STARTING_SECONDS * shape.layers * ((3 if work.checkpointing else 2) + work.guided) / 3
    return gpus * len(work.pairs) / max(compute, gather, starting)


def variants(work: Work) -> Iterator[Work]:
    """The same work with less and less memory."""
    for checkpointing in (False, True):
        for pairs in (4 * work.pairs_per_forward, work.pairs_per_forward, 1):
            yield replace(work, checkpointing=checkpointing, pairs_per_forward=pairs)


@dataclass(frozen=True)
class Choice:
    """A way in which a run fits."""

    stage: int
    precision: str
    work: Work
    bytes: float
    speed: float


def best(shape: Shape, work: Work, gpus: int, kind: Hardware, precision: str, stage: int) -> Choice | None:
    """The fastest variant that fits on each of these GPUs; None where none does."""
    choices = []
    for variant in variants(work):
        needed = sum(memory(shape, variant, precision, stage, gpus).values()) + RUNTIME_BYTES
        if needed <= kind.memory:
            speed = pairs_per_second(shape, variant, precision, stage, gpus, kind)
            choices.append(Choice(stage, precision, variant, needed, speed))
    return max(choices, key=lambda choice: choice.speed, default=None)


# The hardware that the launcher's comments have settings for: kind of GPU, how many, pairs per update and GPU, the rest.
SETTINGS = {
    "4 × 24 GB, `GRADIENT_ACCUM_STEPS=512 MAX_LENGTH=300 LORA_R=16`": (
        "24 GB",
        4,
        512,
        Work(max_length=300, lora_r=16),
    ),
    "8 × 80 GB, `GRADIENT_ACCUM_STEPS=256 MAX_LENGTH=512 LORA_R=32`": (
        "80 GB",
        8,
        256,
        Work(max_length=512, lora_r=32),
    ),
}
WAYS = (("bf16", 2), ("bf16", 3), ("4-bit", 2))  # that a run can be made to fit, simplest first
COUNTS = {"24 GB": (1, 2, 4, 8), "80 GB": (1, 2, 4, 8, 16, 32, 64)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def gib(size: float) -> str:
    """Bytes as GiB, with a place after the point below 10."""
    return f"{size / GIB:.1f}" if size < 10 * GIB else f"{size / GIB:.0f}"


def digits(value: float) -> str:
    """A number with three digits that count."""
    return f"{float(f'{value:.3g}'):,.10g}"


def memory_table(work: Work) -> str:
    """GiB per GPU by base, precision, ZeRO stage and number of GPUs; with recomputed activations after the stroke."""
    columns = [("fp32", 0, 1), ("bf16", 0, 1), ("bf16", 2, 8), ("bf16", 2, 64), ("bf16", 3, 8), ("bf16", 3, 64)]
    columns += [("4-bit", 2, 1), ("4-bit", 2, 8)]
    rows = []
    for name, shape in BASES.items():
        cells = []
        for precision, stage, gpus in columns:
            needed = (
                RUNTIME_BYTES + sum(memory(shape, variant, precision, stage, gpus).values())
                for variant in (work, replace(work, checkpointing=True))
            )
            cells.append(" / ".join(map(gib, needed)))
        rows.append([name, *cells])
    header = [f"{precision}, ZeRO-{stage}, {gpus} GPU{'s' * (gpus > 1)}" for precision, stage, gpus in columns]
    return table(["base", *header], rows)


def described(choice: Choice) -> str:
    """How a run fits, in the variables to set beside the defaults."""
    words = [f"ZeRO-{choice.stage}"] if choice.precision == "bf16" else [f"{choice.precision}, ZeRO-{choice.stage}"]
    if choice.work.checkpointing:
        words.append("checkpointing")
    if (pairs := choice.work.pairs_per_forward) != Work.pairs_per_forward:
        words.append(f"{pairs} pair{'s' * (pairs > 1)} a forward")
    return ", ".join(words)


def fastest(shape: Shape, work: Work, gpus: int, kind: Hardware) -> Choice | None:
    """The fastest of all ways that fit."""
    found = (best(shape, work, gpus, kind, precision, stage) for precision, stage in WAYS if stage < 3 or gpus > 1)
    return max(filter(None, found), key=lambda choice: choice.speed, default=None)


def speed_table(name: str, work: Work) -> str:
    """Pairs per second by base and number of GPUs of a kind, and how such a run fits."""
    rows = []
    for base, shape in BASES.items():
        choices = [fastest(shape, work, gpus, HARDWARE[name]) for gpus in COUNTS[name]]
        rows.append([base, *(f"{digits(c.speed)} ({described(c)})" if c else "does not fit" for c in choices)])
    return table(["base", *(f"{gpus} × {name}" for gpus in COUNTS[name])], rows)


def settings_table(name: str, gpus: int, accumulated: int, work: Work) -> str:
    """What one of `SETTINGS` needs and gives for each base."""
    rows = []
    for base, shape in BASES.items():
        choice = fastest(shape, work, gpus, HARDWARE[name])
        if choice is None:
            rows.append([base, "does not fit", "", "", ""])
        else:
            minutes = gpus * accumulated / choice.speed / 60
            rows.append([base, described(choice), gib(choice.bytes), digits(choice.speed), f"{minutes:.2g}"])
    return table(["base", "fastest way that fits", "GiB per GPU", "pairs/s", "minutes per update"], rows)


def page() -> str:
    """docs/sizes.md."""
    usual = Work()
    gpus = "; ".join(
        f"{name} with {kind.flops / 1e12:g} TFLOP/s and {kind.within / 1e9:g} GB/s to the next"
        + (f" ({kind.between / 1e9:g} GB/s on another machine)" if max(COUNTS[name]) > kind.in_a_machine else "")
        for name, kind in HARDWARE.items()
    )
    parts = [
        "# Sizes on paper",
        "Which GPUs a base model needs, to choose before renting. Everything on this page is computed, by\n"
        "`python tests/benchmark/sizes.py`. The bases have the shapes of Qwen2.5.",
        "**Memory** is the sum of weights, adapter (LoRA on all linear layers), gradients, AdamW's state, DeepSpeed's\n"
        "bucket, kept activations and a chunk of logits, for pairs as long as `MAX_LENGTH` lets them be, "
        f"{usual.pairs_per_forward} in a forward, with\n"
        f"dropout. The tests compare the activations with those of real forwards (within 1 %) and the whole with runs\n"
        f"measured on a CPU (within 10 %, with 15 % of the activations for holes in the heap) and passes measured on an H100 (within 10 %). An assumption is what CUDA, NCCL and fragmentation take: {RUNTIME_BYTES / 1e9:g} GB.",
        "**Speed** is the arithmetic of a guided pair (policy forward and backward, teacher forward; the reference comes\n"
        "from its cache) divided by a share of the peak that is assumed: "
        + ", ".join(f"{kind.efficiency:.0%} in {name}" for name, kind in PRECISIONS.items() if name != "fp32")
        + f"; or,\nwhere that is longer, the time in which the processor starts the kernels ({1000 * STARTING_SECONDS:.1f} ms a layer, as measured beside\n"
        "an H100, which a faster processor needs less of) or, with ZeRO-3, that to gather the weights.\n"
        f"GPUs: {gpus}.\n"
        "Take it as right within a factor of two: `tests/benchmark/benchmark.py` measures yours. The H100 reached 244 TFLOP/s\n"
        "with 4 pairs a forward and 288 with 16, while it was busy; other GPUs were not at hand.",
        "## The settings of the launcher's comments",
        *(f"### {title}\n\n{settings_table(*setting)}" for title, setting in SETTINGS.items()),
        f"## Pairs per second, `MAX_LENGTH={usual.max_length}`, `LORA_R={usual.lora_r}`",
        "The fastest way that fits: bf16 unless 4-bit is named; `checkpointing` is `GRADIENT_CHECKPOINTING=true`, "
        "`1 pair a\nforward` is `PAIRS_PER_FORWARD=1` (otherwise the default, 4), `4-bit` is `LOAD_IN_4BIT=true`, `ZeRO-3` is `ZERO_STAGE=3`, and ZeRO-2 the default.\n"
        "Shorter pairs are faster. Across machines 4-bit may be faster than to gather a divided base. Where nothing fits,\n"
        "`ZERO_STAGE=3 OFFLOAD=parameters` may still, slowly: that is not computed here.",
        *(speed_table(name, usual) for name in HARDWARE),
        "## Memory per GPU in GiB",
        f"With `MAX_LENGTH={usual.max_length}`, `LORA_R={usual.lora_r}`, {usual.pairs_per_forward} pairs in a forward; "
        "after the stroke with `GRADIENT_CHECKPOINTING=true`.\nZeRO-1 needs between ZeRO-0 and ZeRO-2: what they divide, "
        "the adapter's optimizer and gradients, is small beside the base.",
        memory_table(usual),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
