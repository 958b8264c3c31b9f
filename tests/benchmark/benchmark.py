"""Speed and memory of this trainer beside TRL's `DPOTrainer` and a padded computation, on the same work.

    python tests/benchmark/benchmark.py --data pairs.jsonl --json result.json
    python tests/benchmark/benchmark.py --data pairs.jsonl --growth

Every side trains the same model with the same LoRA settings on the same pairs, each alone and in a process of its own
(so that its peak memory is its own); they take turns, and all of it is repeated. What is printed are medians over the
updates, and ratios between sides that are the medians of each update's own.

    trl               TRL's DPOTrainer, the reference computed in each step
    trl_precomputed   the same with its log-probabilities of the reference computed before
    padded_guided     guided DPO as a plain implementation would write it: padded, full logits, 8 forwards
    plain             ours with ALPHA=0, the reference computed in each step
    plain_cached      ours with ALPHA=0
    guided            ours

With --growth, only TRL's and ours, guided: how time and memory grow with pairs per forward, answer length (both answers
near max_length) and vocabulary.
"""

import argparse
import itertools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

SIDES = ("trl", "trl_precomputed", "padded_guided", "plain", "plain_cached", "guided")
OURS = {"plain": 0.0, "plain_cached": 0.0, "guided": 0.1}  # side → ALPHA
BETA, LEARNING_RATE, LORA_ALPHA_PER_R = 0.1, 1e-4, 2
WARM_UP = 1  # updates that do not count
# Sizes of models for runs without weights; what is not named is as in the configuration's class.
SHAPES = {
    "qwen2.5-1.5b": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        rope_theta=1e6,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
    ),
}
# So narrow that an update's time is what its steps cost beside arithmetic.
SHAPES["thin"] = SHAPES["tiny"] | {"num_hidden_layers": SHAPES["qwen2.5-1.5b"]["num_hidden_layers"]}


# --- work: model, pairs


def make_model(shape: str, rows: Sequence[dict[str, str]], folder: Path) -> None:
    """A model folder with random weights and a tokenizer trained on the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, ends = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(32000, SHAPES[shape]["vocab_size"]), special_tokens=ends, initial_alphabet=alphabet
    )
    core.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, eos_token_id=2, bos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def widen_vocabulary(model: str, size: int, folder: Path) -> str:
    """A folder with a model of the same sizes, but random weights and more tokens, which no text uses."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    if size < len(tokenizer):
        raise SystemExit(f"--growth vocab_size={size}: the tokenizer of {model} has {len(tokenizer)} tokens")
    config.vocab_size = size
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The pairs that ours and TRL both train on: different, not empty."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    return [row for row in rows if all(text.strip() for text in row.values()) and row["chosen"] != row["rejected"]]


def lengthen(rows: list[dict[str, str]], tokenizer, max_length: int) -> list[dict[str, str]]:
    """Pairs with a prompt of a third and answers of the rest of `max_length` tokens, from the texts of the rows."""

    def texts(name: str, tokens: int) -> Iterator[str]:
        ids = tokenizer(" ".join(row[name] for row in rows), add_special_tokens=False).input_ids
        for start in range(0, len(ids) - tokens, tokens):
            yield tokenizer.decode(ids[start : start + tokens])

    template = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True))
    prompt, answer = max_length // 3 - template, max_length - max_length // 3 - 8
    parts = zip(texts("prompt", max(1, prompt)), texts("chosen", answer), texts("rejected", answer), strict=False)
    return [dict(zip(("prompt", "chosen", "rejected"), part, strict=True)) for part in parts]


def choose_rows(rows: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """A random sample, repeated where there are fewer."""
    order = random.Random(0).sample(rows, len(rows))
    return (order * math.ceil(number / len(order)))[:number]


def tokenized_pairs(work: dict[str, Any]) -> list:
    """The training pairs as ours and the padded side see them."""
    from transformers import AutoTokenizer

    import train_with_preference_prompt as T

    path, prefix = Path(work["train"]), T.Prefix(T.ScriptArguments().preference_text)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenize = T.PairTokenizer(tokenizer, prefix, work["max_length"], work["max_length"] - 1)
    return T.tokenize_pairs(T.read_pairs(path)[0], T.DataReport(path), tokenize)


# --- one side, in its own process


class Turns:
    """The worker's end of the line: waits for its turn, then says how long the update took and the memory so far."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what the libraries print is no answer

    def wait(self) -> None:
        print(json.dumps({"ready": True}), file=self.answers)
        if not sys.stdin.readline():
            os._exit(0)  # the last turn is over
        synchronize()
        self.start = time.perf_counter()

    def done(self) -> None:
        synchronize()
        seconds = time.perf_counter() - self.start
        print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory()}), file=self.answers)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else the resident set of the process at its largest."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def turn_callback(turns: Turns):
    """Makes a Trainer take turns: one update each."""
    from transformers import TrainerCallback

    class TurnCallback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.wait()

        def on_step_end(self, args, state, control, **kwargs):
            turns.done()

    return TurnCallback()


def run_ours(side: str, work: dict[str, Any], turns: Turns) -> None:
    """The program itself, as DeepSpeed's launcher would start its only rank, with the pairs in the file's order."""
    import torch

    import train_with_preference_prompt as T

    class Trainer(T.PreferenceGuidedDPOTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.add_callback(turn_callback(turns))

        def get_train_dataloader(self):
            return self.pair_loader(self.train_dataset, self.settings.gradient_accum_steps)

        def score(self, model, batch, guided):
            if side == "plain" and torch.is_grad_enabled():
                batch = batch | {"ref_logps": T.reference_logps(self.model, batch["base"])}
            return super().score(model, batch, guided)

    T.PreferenceGuidedDPOTrainer = Trainer
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_SIZE": "1"}
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    flags = {
        "policy_model_path": work["model"],
        "train_dataset_path": work["train"],
        "test_dataset_path": work["test"],
        "output_dir": f"{work['folder']}/{side}-{os.getpid()}",
        "log_dir": f"{work['folder']}/{side}-{os.getpid()}-logs",
        "reference_cache": f"{work['folder']}/cache",
        "alpha": OURS[side],
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "max_length": work["max_length"],
        "max_prompt_length": work["max_length"] - 1,
        "lora_r": work["lora_r"],
        "lora_alpha": LORA_ALPHA_PER_R * work["lora_r"],
        "lora_dropout": work["lora_dropout"],
        "gradient_accum_steps": work["pairs"],
        "pairs_per_forward": work["pairs"],
        "eval_steps": 0,
    }
    T.main([f"--{name}={value}" for name, value in flags.items()])


def lora_config(work: dict[str, Any]):
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=work["lora_r"],
        lora_alpha=LORA_ALPHA_PER_R * work["lora_r"],
        lora_dropout=work["lora_dropout"],
        target_modules="all-linear",
    )


def run_trl(side: str, work: dict[str, Any], turns: Turns) -> None:
    """TRL's trainer at its fastest here: no recomputed activations; padding-free batches are switched off in it."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    on_gpu = torch.cuda.is_available()
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [
        {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        for row in read_rows(Path(work["train"]))
    ]
    config = trl.DPOConfig(
        output_dir=f"{work['folder']}/{side}",
        beta=BETA,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=work["pairs"],
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_length=work["max_length"],
        precompute_ref_log_probs=side == "trl_precomputed",
        gradient_checkpointing=False,
        disable_dropout=False,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
    )
    trainer = trl.DPOTrainer(
        model=work["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        peft_config=lora_config(work),
        callbacks=[turn_callback(turns)],
    )
    trainer.train()


def run_padded(side: str, work: dict[str, Any], turns: Turns) -> None:
    """Guided DPO without packing: every answer behind its prompt in a padded row, the logits of all positions."""
    import torch
    from peft import get_peft_model
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pairs = tokenized_pairs(work)
    base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype).to(device)
    policy = get_peft_model(base, lora_config(work)).train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def logps(prompts, answers):
        """(P,) of the answers behind their prompts."""
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        scored = [
            [0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)
        ]
        logits = policy(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        per_token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (per_token * torch.tensor(scored, device=device)[:, 1:]).sum(1)

    for start in range(0, len(pairs), work["pairs"]):
        batch = pairs[start : start + work["pairs"]]
        chosen, rejected = [p.chosen_ids for p in batch], [p.rejected_ids for p in batch]
        plain, prefixed = [p.prompt_ids for p in batch], [p.pref_prompt_ids for p in batch]
        turns.wait()
        with torch.no_grad(), policy.disable_adapter():
            ref_margins = logps(plain, chosen) - logps(plain, rejected)
            ref_pref_margins = logps(prefixed, chosen) - logps(prefixed, rejected)
        with torch.no_grad():
            pref_margins = logps(prefixed, chosen) - logps(prefixed, rejected)
        margins = logps(plain, chosen) - logps(plain, rejected)
        loss = F.softplus(-BETA * (margins - ref_margins)) + OURS["guided"] * F.relu(pref_margins - margins)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        (loss.mean() + 0 * ref_pref_margins.mean()).item()
        turns.done()


RUNNERS: dict[str, Callable[[str, dict[str, Any], Turns], None]] = {
    "trl": run_trl,
    "trl_precomputed": run_trl,
    "padded_guided": run_padded,
    "plain": run_ours,
    "plain_cached": run_ours,
    "guided": run_ours,
}


# --- the machine's limit


def matrix_rate() -> float:
    """FLOP/s of a large matrix product in the precision of the training."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, device = (8192, "cuda") if on_gpu else (2048, "cpu")
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in "ab")
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def run_rate(side: str, work: dict[str, Any], turns: Turns) -> None:
    """A turn of nothing but matrix products, after which their rate is said."""
    while True:
        turns.wait()
        print(json.dumps({"flops_per_second": matrix_rate()}), file=turns.answers)


RUNNERS["rate"] = run_rate


def needed_flops(work: dict[str, Any]) -> list[float]:
    """Of each update, the floating-point operations that a guided update cannot do without.

    Each token of a pair's tree goes once through the decoder's linear layers, forward and (their weights being frozen)
    backward to its input, with the prefix forward only; LoRA's matrices besides, with their own gradient; attention
    along each path; and the scored tokens through the head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(work["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linear)
    lora = sum(work["lora_r"] * (module.in_features + module.out_features) for module in linear)
    head = config.hidden_size * config.vocab_size
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * head_size

    def of_tree(prompt: int, chosen: int, rejected: int, trained: bool) -> float:
        """Forward, and where it is trained backward: attention needs twice its forward, frozen weights once."""
        path, branch = prompt + chosen - 1, rejected - 1
        seen = path * (path + 1) / 2 + branch * prompt + branch * (branch + 1) / 2
        through_weights = 2 * weights * (path + branch) + 2 * head * (chosen + rejected)
        passes = (2, 3, 3) if trained else (1, 1, 1)
        parts = (through_weights, 4 * attention * seen, 2 * lora * (path + branch))
        return sum(number * part for number, part in zip(passes, parts, strict=True))

    flops = []
    for pair in tokenized_pairs(work):
        answers = len(pair.chosen_ids), len(pair.rejected_ids)
        teacher = of_tree(len(pair.pref_prompt_ids), *answers, trained=False)
        flops.append(of_tree(len(pair.prompt_ids), *answers, trained=True) + teacher)
    size = work["pairs"]
    return [sum(flops[start : start + size]) for start in range(0, len(flops), size)]


def tokens_of(work: dict[str, Any]) -> int:
    """Tokens of all plain prompts and answers, each prompt counted once."""
    return sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in tokenized_pairs(work))


# --- the sides in turn


class Worker:
    """One side's process."""

    def __init__(self, side: str, work: dict[str, Any]):
        command = [sys.executable, __file__, "--worker", side, "--work", json.dumps(work)]
        self.side, self.log, self.is_ready = side, Path(work["folder"], f"{side}.log"), False
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w")}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def answer(self, *names: str) -> dict[str, float]:
        """The next line that has these names."""
        for line in self.process.stdout:
            said = json.loads(line)
            if set(names) <= said.keys():
                return said
        raise RuntimeError(f"{self.side} ended early:\n{self.log.read_text(errors='replace')[-3000:]}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        """Until it is ready for its next turn."""
        if not self.is_ready:
            self.answer("ready")
        self.is_ready = True

    def turn(self, *names: str) -> dict[str, float]:
        """Waits until it is ready, lets it go, and returns what it says of these."""
        self.wait()
        self.is_ready = False
        print("go", file=self.process.stdin)
        return self.answer(*names)


def measure(
    work: dict[str, Any], rounds: int, repeats: int, sides: Sequence[str], together: bool = False
) -> dict[str, Any]:
    """Medians over the updates: side → pairs and tokens per second and peak memory.

    Args:
        together: whether all sides get ready at the same time, before the first turn.
    """
    seconds, peaks = {side: [] for side in sides}, dict.fromkeys(sides, 0)
    for _ in range(repeats):
        ahead = {side: Worker(side, work) for side in sides if together}
        for worker in ahead.values():
            worker.wait()
        for side in sides:
            with ahead.get(side) or Worker(side, work) as worker:
                said = [worker.turn("seconds", "peak_memory_bytes") for _ in range(WARM_UP + rounds)]
            seconds[side] += [update["seconds"] for update in said[WARM_UP:]]
            peaks[side] = max(peaks[side], said[-1]["peak_memory_bytes"])
            times = ", ".join(f"{update['seconds']:.2f}" for update in said)
            print(f"{side}: {times} s", file=sys.stderr, flush=True)
    tokens = tokens_of(work) / (WARM_UP + rounds)
    return {
        side: {
            "pairs_per_second": work["pairs"] / statistics.median(seconds[side]),
            "tokens_per_second": tokens / statistics.median(seconds[side]),
            "peak_memory_bytes": peaks[side],
            "seconds": seconds[side],
        }
        for side in sides
    }


def measure_limit(work: dict[str, Any], seconds: Sequence[float]) -> dict[str, float]:
    """The rate of large matrix products, and which share of it the guided updates of these seconds make use of."""
    with Worker("rate", work) as worker:
        rate = statistics.median(worker.turn("flops_per_second")["flops_per_second"] for _ in range(5))
    needed = itertools.cycle(needed_flops(work)[WARM_UP:])  # the same updates in each turn
    shares = [flops / rate / spent for flops, spent in zip(needed, seconds, strict=False)]
    return {"flops_per_second": rate, "limit_share": statistics.median(shares)}


def ratios(result: dict[str, Any], of: str, to: str) -> tuple[float, float]:
    """How many times faster, in the median over the updates, and the share of the memory."""
    pairs = zip(result[of]["seconds"], result[to]["seconds"], strict=True)
    speed = statistics.median(other / own for own, other in pairs)
    return speed, result[of]["peak_memory_bytes"] / result[to]["peak_memory_bytes"]


# What is varied → its values.
GROWTH = {"pairs": [1, 2, 4, 8], "max_length": [150, 300, 600], "vocab_size": [49152, 100_000, 152_000]}
GROWTH_SIDES = ("trl", "guided")


def measure_growth(args: argparse.Namespace, folder: Path, varied: dict[str, list[int]]) -> dict[str, dict[int, Any]]:
    """Name → value → the measurement of the sides with it; `max_length` with answers of that length."""
    results: dict[str, dict[int, Any]] = {}
    for name, values in varied.items():
        print(f"\n{name:<12} {'side':<8} {'s/pair':>8} {'peak memory':>12}", flush=True)
        for value in values:
            (place := folder / f"{name}-{value}").mkdir()
            work = prepare(args, place, {name: value, "long": args.long or name == "max_length"})
            result = measure(work, args.rounds, args.repeats, GROWTH_SIDES)
            results.setdefault(name, {})[value] = result
            for side in GROWTH_SIDES:
                of = result[side]
                memory = f"{of['peak_memory_bytes'] / 2**20:,.0f} MiB"
                print(f"{value:<12} {side:<8} {1 / of['pairs_per_second']:>8.2f} {memory:>12}", flush=True)
    return results


def varied(text: str) -> tuple[str, list[int]]:
    """NAME=VALUE,VALUE,…"""
    name, _, values = text.partition("=")
    if name not in GROWTH:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {', '.join(GROWTH)}, = and values")
    return name, [int(value) for value in values.split(",")] if values else GROWTH[name]


COMPARISONS = [
    ("plain", "trl"),
    ("plain_cached", "trl_precomputed"),
    ("guided", "trl"),
    ("guided", "padded_guided"),
]


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}\n  {'side':<16} {'pairs/s':>9} {'tokens/s':>9} {'peak memory':>12}")
    for side in [side for side in SIDES if side in result]:
        of = result[side]
        memory = f"{of['peak_memory_bytes'] / 2**20:,.0f} MiB"
        print(f"  {side:<16} {of['pairs_per_second']:>9.3f} {of['tokens_per_second']:>9.0f} {memory:>12}")
    for of, to in COMPARISONS:
        if of in result and to in result:
            speed, memory = ratios(result, of, to)
            print(f"  {of} : {to} = {speed:.2f} × the pairs per second, {memory:.2f} × the peak memory")
    if "limit_share" in result:
        rate = result["flops_per_second"] / 1e9
        print(f"  guided reaches {result['limit_share']:.0%} of the limit (matrix products: {rate:,.0f} GFLOP/s)")
    sys.stdout.flush()


def prepare(args: argparse.Namespace, folder: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What all sides work on: model and data in files, and the settings."""
    from transformers import AutoTokenizer

    import train_with_preference_prompt as T

    given = vars(args) | (changes or {})
    rows = read_rows(args.data)
    model = T.resolve_model_path(args.model) if not args.shape else str(folder / "model")
    if args.shape and not (folder / "model").exists():
        make_model(args.shape, rows, folder / "model")
    if given.get("vocab_size"):
        model = widen_vocabulary(model, given["vocab_size"], folder / "wide")
    if given["long"]:
        rows = lengthen(rows, AutoTokenizer.from_pretrained(model), given["max_length"])
    rows = choose_rows(rows, (WARM_UP + args.rounds) * given["pairs"])
    for name, part in (("train", rows), ("test", rows[:1])):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    names = ("pairs", "max_length", "lora_r", "lora_dropout")
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return {name: given[name] for name in names} | files | {"model": model, "folder": str(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PROJECT / "data" / "train.jsonl", help="pairs, JSON lines")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--model", default="", help="model folder; empty: the bundled model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of these sizes instead of a model")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per forward and per update")
    parser.add_argument("--max_length", type=int, default=300)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=4, help="updates that count, each time a side has its turn")
    parser.add_argument("--repeats", type=int, default=2, help="how many turns each side has")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--together", action="store_true", help="load all sides at once, where memory holds them all")
    parser.add_argument("--long", action="store_true", help="answers near max_length behind prompts of a third of it")
    growth = f"instead: TRL and ours by {', '.join(GROWTH)}"
    parser.add_argument("--growth", type=varied, nargs="*", metavar="NAME=VALUE,…", help=growth)
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        RUNNERS[args.worker](args.worker, args.work, Turns())
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if args.growth is not None:
            result = measure_growth(args, Path(folder), dict(args.growth) or GROWTH)
        else:
            result = measure(work := prepare(args, Path(folder)), args.rounds, args.repeats, args.sides, args.together)
            if "guided" in args.sides:
                result |= measure_limit(work, result["guided"]["seconds"])
            kind = "long answers" if args.long else args.data.name
            show(f"{kind}, {args.pairs} pairs per forward, MAX_LENGTH {args.max_length}, LoRA r {args.lora_r}", result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
