"""Logging: metrics are exact means over pairs, and the tags are those of the contract."""

import math

import pytest
import torch

import train_with_preference_prompt as T

CONTRACT_TRAIN = {
    "loss/train",
    "loss_components/dpo_loss",
    "loss_components/aligned_loss",
    *(f"rewards_train/{name}" for name in ("accuracy", "chosen", "rejected", "margin")),
    *(f"preference_metrics/{n}" for n in ("pref_advantage_ratio", "pref_margin", "base_margin", "active_fraction")),
    *(f"logps_train/{name}" for name in ("chosen", "rejected", "pref_chosen", "pref_rejected")),
}
CONTRACT_EVAL = {
    "loss/eval",
    "loss_components/dpo_loss_eval",
    "loss_components/aligned_loss_eval",
    *(f"rewards_eval/{name}" for name in ("accuracy", "chosen", "rejected", "margin")),
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
    throughput = {T.PAIRS_PER_SECOND_TAG, T.TOKENS_PER_SECOND_TAG}
    assert throughput == {"throughput/pairs_per_second", "throughput/tokens_per_second"}


def test_every_metric_of_the_loss_has_a_tag():
    logps = torch.zeros(1, 2)
    metrics = T.preference_guided_loss(logps, logps, logps, None, beta=0.1, alpha=0.1)
    sums = T.MetricSums()
    sums.add(metrics, torch.ones(1))
    means, _, _ = sums.means()
    assert set(T.tagged(means, split=0)) == CONTRACT_TRAIN and set(T.tagged(means, split=1)) == CONTRACT_EVAL


def test_means_cover_batches_of_unequal_size_and_skip_fillers():
    sums = T.MetricSums()
    sums.add({"loss": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([1.0, 1.0, 1.0]), tokens=30)
    sums.add({"loss": torch.tensor([10.0, 99.0])}, torch.tensor([1.0, 0.0]), tokens=7)
    means, pairs, tokens = sums.means()
    assert means == {"loss": (1 + 2 + 3 + 10) / 4} and (pairs, tokens) == (4, 37)


@pytest.mark.parametrize(("advantages", "expected"), [([1.0, 3.0], math.exp(2)), ([0.0], 1.0), ([2000.0], math.inf)])
def test_advantage_ratio_is_a_geometric_mean(advantages, expected):
    sums = T.MetricSums()
    sums.add({"pref_advantage": torch.tensor(advantages)}, torch.ones(len(advantages)))
    means, _, _ = sums.means()
    assert means == {"pref_advantage_ratio": pytest.approx(expected)}


def test_metrics_carry_no_graph():
    sums = T.MetricSums()
    sums.add({"loss": torch.ones(2, requires_grad=True) * 2}, torch.ones(2))
    assert not sums.sums.requires_grad


def test_table_cells_survive_markdown():
    cell = T.table_cell(" a|b\n<i>&amp; ")
    assert cell == "a\\|b<br>&lt;i>&amp;amp;"
    assert T.table(("x", "y"), [(1, "a|b")]) == "| x | y |\n| --- | --- |\n| 1 | a\\|b |"
