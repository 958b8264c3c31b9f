"""Time and memory of a guided update's passes alone: policy forward and backward, teacher forward.

    python tests/benchmark/passes.py --shape qwen2.5-1.5b --pairs 4 16

For work on the packed forward on a GPU. Random weights, LoRA on all linear layers with dropout, random pairs of about
350 tokens; neither engine nor optimizer. On a GPU FlashAttention over all trees takes turns with attention tree by
tree, the profiler says how long the GPU was busy and with what, and how many kernels were started.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "benchmark")]

from benchmark import SHAPES, peak_memory, synchronize  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

import train_with_preference_prompt as T  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WARM_UP, PROFILED, PREFIX = 3, 2, 30  # updates, updates, tokens


def policy_of(shape: str, dropout: float) -> torch.nn.Module:
    """As the engine holds it: everything in one dtype."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    with DEVICE:
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape], tie_word_embeddings=True), dtype=dtype)
    T.enable_packed_forward(model)
    if ON_GPU:
        T.fuse_norms(model)
    policy = T.add_adapter(model, T.ScriptArguments(lora_dropout=dropout)).to(dtype)
    T.speed_up(policy)
    return policy.train()


def rows_of(pairs: int, vocabulary: int) -> tuple[T.PackedRow, T.PackedRow]:
    """The same pairs, plain and with a prefix."""

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,)).tolist()

    lengths = [(random.randint(60, 140), random.randint(60, 180), random.randint(60, 180)) for _ in range(pairs)]
    answers = [(draw(chosen), draw(rejected)) for _, chosen, rejected in lengths]
    rows = (
        T.pack_row((draw(prompt + more), *pair) for (prompt, *_), pair in zip(lengths, answers, strict=True))
        for more in (0, PREFIX)
    )
    return tuple(row.to(DEVICE) for row in rows)


def passes(policy: torch.nn.Module, plain: T.PackedRow, prefixed: T.PackedRow) -> None:
    teacher = T.margins_of(T.teacher_logps(policy, prefixed))
    margins = T.margins_of(T.policy_logps(policy, plain))
    (torch.nn.functional.softplus(-0.05 * margins) + 0.1 * torch.relu(teacher - margins)).mean().backward()


def measure(step, updates: int) -> float:
    """Seconds, the median."""
    seconds = []
    for _ in range(WARM_UP + updates):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def show_profile(step, kernels: int) -> None:
    """How long the GPU is busy in an update, and with what."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            step()
        synchronize()
    events = profile.key_averages()
    on_gpu = sorted((e for e in events if e.device_type.name == "CUDA"), key=lambda e: -e.self_device_time_total)
    busy = sum(event.self_device_time_total for event in on_gpu) / PROFILED
    started = sum(event.count for event in events if event.key.startswith(("cudaLaunch", "cuLaunch"))) / PROFILED
    print(f"    the GPU is busy for {busy / 1000:.1f} ms, {started:.0f} kernels are started")
    for event in on_gpu[:kernels]:
        of_update = event.self_device_time_total / PROFILED / 1000
        print(f"    {of_update:8.2f} ms  {event.count / PROFILED:5.0f} × {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 16], help="pairs per forward")
    parser.add_argument("--lora_dropout", type=float, default=0.1)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=0, help="show so many of those that take longest")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    policy, has_flash = policy_of(args.shape, args.lora_dropout), T.has_flash_attention
    for pairs in args.pairs:
        rows, found = rows_of(pairs, SHAPES[args.shape]["vocab_size"]), {}
        for way in ("all trees at once", "tree by tree") if ON_GPU else ("tree by tree",):
            T.has_flash_attention = has_flash if way == "all trees at once" else lambda *states: False
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            found[way] = seconds = measure(lambda rows=rows: passes(policy, *rows), args.updates)
            print(
                f"{pairs} pairs, {rows[0].input_ids.numel()} and {rows[1].input_ids.numel()} tokens, {way}: "
                f"{1000 * seconds:.1f} ms, {pairs / seconds:.1f} pairs/s, peak {peak_memory() / 2**30:.2f} GiB",
                flush=True,
            )
            if ON_GPU:
                show_profile(lambda rows=rows: passes(policy, *rows), args.kernels)
            policy.zero_grad()
        if len(found) == 2:
            faster, slower = found.values()
            print(f"  all trees at once: {slower / faster:.2f} × the speed of tree by tree", flush=True)


if __name__ == "__main__":
    main()
