"""Logging: metrics are exact means over pairs; tags, layout and compared settings are those of the contract."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train_with_preference_prompt as T

CONTRACT_TRAIN = {
    "loss/train",
    "loss_components/dpo_loss",
    "loss_components/aligned_loss",
    *(f"rewards_train/{name}" for name in ("accuracy", "pref_accuracy", "chosen", "rejected", "margin")),
    *(f"preference_metrics/{n}" for n in ("pref_advantage_ratio", "pref_margin", "base_margin", "active_fraction")),
    *(f"logps_train/{name}" for name in ("chosen", "rejected", "pref_chosen", "pref_rejected")),
}
CONTRACT_EVAL = {
    "loss/eval",
    "loss_components/dpo_loss_eval",
    "loss_components/aligned_loss_eval",
    *(f"rewards_eval/{name}" for name in ("accuracy", "pref_accuracy", "chosen", "rejected", "margin")),
    *(
        f"preference_metrics/{n}_eval"
        for n in ("pref_advantage_ratio", "pref_margin", "base_margin", "active_fraction")
    ),
    *(f"logps_eval/{name}" for name in ("chosen", "rejected", "pref_chosen", "pref_rejected")),
}


def test_tags_are_those_of_the_contract():
    assert {tags[0] for tags in T.TAGS.values()} == CONTRACT_TRAIN
    assert {tags[1] for tags in T.TAGS.values()} == CONTRACT_EVAL
    assert {T.LEARNING_RATE_TAG, T.GRAD_NORM_TAG} == {"optim/learning_rate", "optim/grad_norm"}
    throughput = {T.PAIRS_PER_SECOND_TAG, T.TOKENS_PER_SECOND_TAG, T.PEAK_MEMORY_TAG}
    names = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")
    assert throughput == {f"throughput/{name}" for name in names}


def test_every_metric_of_the_loss_has_a_tag():
    logps = torch.zeros(1, 2)
    metrics = T.preference_guided_loss(logps, logps, logps, None, beta=0.1, alpha=0.1)
    sums = T.MetricSums()
    sums.add(metrics, torch.ones(1))
    means, *_ = sums.means()
    assert set(T.tagged(means, split=0)) == CONTRACT_TRAIN and set(T.tagged(means, split=1)) == CONTRACT_EVAL


def test_means_cover_batches_of_unequal_size_and_skip_fillers():
    sums = T.MetricSums()
    sums.add({"loss": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([1.0, 1.0, 1.0]), tokens=30)
    sums.add({"loss": torch.tensor([10.0, 99.0])}, torch.tensor([1.0, 0.0]), tokens=7)
    means, pairs, tokens, held = sums.means(0.1)
    assert means == {"loss": (1 + 2 + 3 + 10) / 4} and (pairs, tokens, held) == (4, 37, 0.1)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_sum_over_three_ranks_gives_means_and_the_largest_memory(rank, monkeypatch):
    """Losses 1; 2 and 3; 4 and 12, 10 tokens a pair, and 0.5, 0.75 and 0.7 GiB: the others' share is added in its place."""
    losses, held, calls = [[1.0], [2.0, 3.0], [4.0, 12.0]], [0.5, 0.75, 0.7], []

    def all_reduce(totals):
        calls.append(totals.clone())
        for other in {0, 1, 2} - {rank}:
            size, slots = len(losses[other]), [held[r] if r == other else 0.0 for r in range(3)]
            totals += torch.tensor([sum(losses[other]), size, 10 * size, *slots], dtype=torch.float64)

    for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": 3}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    sums, mine = T.MetricSums(), torch.tensor(losses[rank])
    sums.add({"loss": mine}, torch.ones(len(mine)), tokens=10 * len(mine))
    assert sums.means(held[rank]) == ({"loss": 22 / 5}, 5, 50, 0.75) and len(calls) == 1


@pytest.mark.parametrize(("advantages", "expected"), [([1.0, 3.0], math.exp(2)), ([0.0], 1.0), ([2000.0], math.inf)])
def test_advantage_ratio_is_a_geometric_mean(advantages, expected):
    sums = T.MetricSums()
    sums.add({"pref_advantage": torch.tensor(advantages)}, torch.ones(len(advantages)))
    means, *_ = sums.means()
    assert means == {"pref_advantage_ratio": pytest.approx(expected)}


def test_metrics_carry_no_graph():
    sums = T.MetricSums()
    sums.add({"loss": torch.ones(2, requires_grad=True) * 2}, torch.ones(2))
    assert not sums.sums.requires_grad


def test_table_cells_survive_markdown():
    cell = T.table_cell(" a|b\n<i>&amp; ")
    assert cell == "a\\|b<br>&lt;i>&amp;amp;"
    assert T.table(("x", "y"), [(1, "a|b")]) == "| x | y |\n| --- | --- |\n| 1 | a\\|b |"


# --- the custom layout and the HParams tab


def test_the_layout_shows_each_tag_once_training_beside_test():
    """TensorBoard takes an entry for a regular expression at a tag's beginning: `…/dpo_loss` alone would match two."""
    known = CONTRACT_TRAIN | CONTRACT_EVAL | {T.LEARNING_RATE_TAG, T.GRAD_NORM_TAG, T.PEAK_MEMORY_TAG}
    known |= {T.PAIRS_PER_SECOND_TAG, T.TOKENS_PER_SECOND_TAG}
    shown = []
    for charts in T.custom_layout().values():
        for kind, patterns in charts.values():
            tags = [[tag for tag in sorted(known) if re.match(pattern, tag)] for pattern in patterns]
            assert kind == "Multiline" and all(len(found) == 1 for found in tags), tags
            pair = tuple(tag for found in tags for tag in found)
            assert pair in T.TAGS.values() or (len(pair) == 1 and pair[0] not in CONTRACT_TRAIN), pair
            shown += pair
    assert len(shown) == len(set(shown))
    assert known - set(shown) == {tag for tag in known if tag.startswith("logps_")}


def test_a_pattern_without_its_end_would_match_both_sets():
    """The negative control."""
    assert re.match("loss_components/dpo_loss", "loss_components/dpo_loss_eval")
    assert not re.match("loss_components/dpo_loss$", "loss_components/dpo_loss_eval")


def experiment(args):
    content = T.compared(T.hyperparameters(args)).value[0].metadata.plugin_data.content
    return HParamsPluginData.FromString(content).experiment


def test_runs_of_every_mode_name_the_same_columns():
    """TensorBoard takes them from one run, whichever it finds first."""
    columns = [
        [(column.name, column.type) for column in experiment(T.ScriptArguments(training_mode=mode)).hparam_infos]
        for mode in T.NOT_USED
    ]
    assert columns[0] == columns[1] == columns[2]
    assert {"training_mode", "beta", "alpha", "learning_rate", "ptuning_learning_rate"} <= {
        name for name, _ in columns[0]
    }


def test_the_columns_that_come_first():
    found = experiment(T.ScriptArguments())
    assert {column.name for column in found.hparam_infos if column.differs} == set(T.COMPARED_SETTINGS)
    metrics = {column.name.tag: column.display_name for column in found.metric_infos}
    assert metrics == {T.TAGS[name][1]: name for name in T.COMPARED_METRICS} and len(metrics) == 5


# --- metrics.jsonl


def logged(step, **values):
    return {**{name.replace("__", "/"): value for name, value in values.items()}, "epoch": step / 4, "step": step}


def test_a_line_has_the_tags_and_their_numbers():
    logs = logged(3, loss__train=0.1 + 0.2, a__ratio=math.inf, pairs=5, eval_runtime=1.0) | {
        T.SAMPLES_TAG: "| prompt |"
    }
    line = T.metrics_line(3, logs)
    assert line == '{"update": 3, "epoch": 0.75, "a/ratio": null, "loss/train": 0.30000000000000004}\n'
    assert T.metrics_line(3, logged(3, peak_memory_gib=1.0)) == ""


def test_the_file_grows_with_the_run_and_is_cut_where_one_resumes(tmp_path):
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(is_world_process_zero=True, log_history=[])
    path, other = tmp_path / T.METRICS_FILE, SimpleNamespace(is_world_process_zero=False, log_history=[])

    def updates():
        return [json.loads(line)["update"] for line in path.read_text(encoding="utf-8").splitlines()]

    path.write_text("of an earlier run")
    callback = T.MetricsFileCallback(tmp_path)
    callback.on_train_begin(args, state, None)
    for state.global_step in (1, 2, 3):
        callback.on_log(args, state, None, logs=logged(state.global_step, loss__train=1.0))
        assert updates() == list(range(1, state.global_step + 1))  # at once
    path.write_text(path.read_text() + '{"update": 4, "epo')  # killed while it wrote
    state.log_history = [logged(step, loss__train=1.0) for step in (1, 2)]
    T.MetricsFileCallback(tmp_path).on_train_begin(args, state, None)
    assert updates() == [1, 2]
    T.MetricsFileCallback(tmp_path).on_train_begin(args, other, None)
    T.MetricsFileCallback(tmp_path).on_log(args, other, None, logs=logged(9, loss__train=1.0))
    assert updates() == [1, 2]  # one rank alone writes


def test_metrics_that_cannot_be_written_end_the_run_with_a_reason(tmp_path):
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    with pytest.raises(T.RankError, match="gone cannot be written: .*No such file"):
        T.MetricsFileCallback(tmp_path / "gone").on_log(None, state, None, logs=logged(1, loss__train=1.0))


# --- the summary at the end

HISTORY = [
    {**logged(0), "loss/eval": 0.9344, "rewards_eval/accuracy": 0.0, T.TAGS["base_margin"][1]: -17.7111},
    {**logged(1), "loss/train": 0.9, T.UPDATE_PAIRS: 16, T.PAIRS_PER_SECOND_TAG: 4.0, T.TOKENS_PER_SECOND_TAG: 100.0},
    {**logged(2), "loss/train": 0.5, T.UPDATE_PAIRS: 4, T.PAIRS_PER_SECOND_TAG: 2.0, T.TOKENS_PER_SECOND_TAG: 80.0},
    {**logged(2), "loss/eval": 0.6439, "rewards_eval/accuracy": 0.91666, T.TAGS["base_margin"][1]: 1.5e-5},
]


def test_the_table_has_start_and_end_of_each_metric():
    lines = T.metrics_table(HISTORY).splitlines()
    assert lines[0].split() == ["held-out", "training"] and lines[1].split() == ["start", "end"] * 2
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["loss"] == ["0.9344", "0.6439", "0.9000", "0.5000"]
    assert rows["accuracy"] == ["0.0000", "0.9167", "-", "-"]
    assert rows["base_margin"] == ["-17.7111", "1.5e-05", "-", "-"]
    assert len({len(line) for line in lines[1:]}) == 1 and len(lines) < 18
    assert not {name for name in rows if name not in T.TAGS} and {"pref_accuracy", "pref_advantage_ratio"} <= set(rows)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.0000"),
        (-3.58e-8, "-3.6e-08"),
        (-99.5, "-99.5000"),
        (-177.1111, "-177.11"),
        (12345.6789, "12345.68"),
        (-12345.6789, "-1.2e+04"),
        (math.nan, "nan"),
        (None, "-"),
    ],
)
def test_a_figure_fits_its_column(value, shown):
    assert T.figure_of(value) == shown and len(shown) <= 8


def test_speed_is_that_of_all_updates_together():
    """16 pairs at 4 and 4 pairs at 2 a second: 20 pairs in 4 + 2 s, and 4 · 100 + 2 · 80 tokens."""
    described = T.describe_speed(HISTORY)
    assert described == {
        "updates": "2, 20 pairs",
        "time": "6.0 s for the updates",
        "speed": "3.33 pairs/s, 93 tokens/s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.4, "59.4 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (9e4, "25 h 0 min"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert T.duration(seconds) == text
