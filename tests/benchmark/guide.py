"""Measures what the README's guide says: the effect of each remedy on memory, speed and quality.

    python tests/benchmark/guide.py memory speed --train pairs.jsonl --test held_out.jsonl --json result.json
    python tests/benchmark/guide.py quality

Each remedy is one whole run of ./fast_train.sh, as a user would start it, that differs from the baseline in the
variables it names; without --train and --test on the bundled pairs. The baseline runs in the same go, once a round, and
what is printed beside a figure is its ratio to that of the round's baseline. Memory and speed need the machine for
themselves; quality does not depend on it.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
BASELINE = "as shipped"
# What the guide answers → the variables it tells to set; every run starts from the values that the launcher ships with.
REMEDIES = {
    "memory": (
        "PAIRS_PER_FORWARD=2",
        "PAIRS_PER_FORWARD=1",
        "GRADIENT_CHECKPOINTING=true",
        "MAX_LENGTH=150 MAX_PROMPT_LENGTH=64",
        "LORA_TARGET_MODULES=q_proj,v_proj",
        "LORA_DROPOUT=0",
        "LORA_R=4",
    ),
    "speed": (
        "PAIRS_PER_FORWARD=8",
        "ALPHA=0",
        "MAX_LENGTH=150 MAX_PROMPT_LENGTH=64",
        "LORA_TARGET_MODULES=q_proj,v_proj",
        "LORA_DROPOUT=0",
        "LORA_R=4",
    ),
    "quality": (
        "PRESET=conservative",
        "PRESET=aggressive",
        "BETA=0.01",
        "BETA=0.1",
        "BETA=0.5",
        "ALPHA=0",
        "ALPHA=0.2",
        "ALPHA=0.5",
        "LEARNING_RATE=1e-4",
        "LEARNING_RATE=1e-3",
        "NUM_EPOCHS=3",
    ),
}
SHORT = {"EVAL_STEPS": "0", "NUM_EPOCHS": "0.3"}  # of memory and speed: neither needs the whole run
# figure → (tag, which of its values); the first update is left out of the speed
FIGURES = {
    "peak GiB": ("peak_memory_gib", lambda values: values[-1]),
    "pairs/s": ("throughput/pairs_per_second", lambda values: statistics.median(values[1:] or values)),
    "accuracy": ("rewards_eval/accuracy", lambda values: values[-1]),
    "base margin": ("preference_metrics/base_margin_eval", lambda values: values[-1]),
    "ratio, start": ("preference_metrics/pref_advantage_ratio_eval", lambda values: values[0]),
    "ratio, end": ("preference_metrics/pref_advantage_ratio_eval", lambda values: values[-1]),
}
WITH_RATIO = ("peak GiB", "pairs/s")


def figures_of(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of a run from what it logged."""
    found = {}
    for figure, (tag, choose) in FIGURES.items():
        found[figure] = choose([entry[tag] for entry in history if tag in entry])
    return found


def run(remedy: str, variables: Mapping[str, str]) -> dict[str, float]:
    """The figures of one run of the launcher.

    Raises:
        SystemExit: it failed; what it said is shown.
    """
    changed = dict(word.split("=", 1) for word in remedy.split()) if remedy != BASELINE else {}
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUTPUT_DIR": f"{folder}/output", "LOG_DIR": f"{folder}/logs"}
        environment = {**os.environ, **variables, **changed, **places}
        command = [str(PROJECT / "fast_train.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{remedy}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        return figures_of(json.loads(Path(folder, "output", "trainer_state.json").read_text())["log_history"])


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {figure: statistics.median(of_round[figure] for of_round in rounds) for figure in rounds[0]}


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: one row a remedy; ratios are medians of each round's own."""
    lines = [f"| variables | {' | '.join(FIGURES)} |", f"|---|{'---|' * len(FIGURES)}"]
    for remedy, rounds in results.items():
        ratios = [{name: r[name] / b[name] for name in WITH_RATIO} for r, b in zip(rounds, results[BASELINE])]
        middle, ratio = medians(rounds), medians(ratios)
        cells = [
            f"{value:.2f} ({ratio[figure]:.2f} ×)" if figure in WITH_RATIO else f"{value:.3f}"
            for figure, value in middle.items()
        ]
        lines.append(f"| `{remedy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", choices=[*REMEDIES], help="what the guide answers")
    parser.add_argument("--train", default="", help="training pairs; empty: the bundled ones")
    parser.add_argument("--test", default="", help="held-out pairs; empty: the bundled ones")
    parser.add_argument("--rounds", type=int, default=1, help="how often each run is repeated, in turns")
    parser.add_argument("--remedies", nargs="*", default=[], help="these alone, e.g. 'LORA_R=4 LORA_ALPHA=8'")
    parser.add_argument("--json", default="", help="file for all figures")
    options = parser.parse_args()
    variables: dict[str, str] = {"TRAIN_DATASET_PATH": options.train, "TEST_DATASET_PATH": options.test}
    variables |= {} if "quality" in options.subjects else SHORT
    wanted = options.remedies or [remedy for subject in options.subjects for remedy in REMEDIES[subject]]
    results: dict[str, list[dict[str, Any]]] = {remedy: [] for remedy in (BASELINE, *wanted)}
    for number in range(options.rounds):
        for remedy in results:
            results[remedy].append(run(remedy, variables))
            print(f"round {number + 1}, {remedy}: {results[remedy][-1]}", flush=True)
    print(table(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
