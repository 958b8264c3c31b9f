"""Loss: the maths of the guided loss, with every expected number derived by hand."""

import math

import pytest
import torch

import train_with_preference_prompt as T

BETA, ALPHA = 0.1, 0.5
# Two pairs: log π(y|x), log π_ref(y|x) and log π(y|p, x) of (chosen, rejected).
POLICY = [[-10.0, -14.0], [-20.0, -15.0]]
REFERENCE = [[-11.0, -12.0], [-18.0, -17.0]]
TEACHER = [[-8.0, -15.0], [-21.0, -14.0]]
#               Δ_base   Δ_ref   Δ_pref   Δ_base − Δ_ref   Δ_pref − Δ_base
# first pair       4       1        7            3                3
# second pair     −5      −1       −7           −4               −2


def guided(alpha=ALPHA, teacher=TEACHER):
    policy = torch.tensor(POLICY, requires_grad=True)
    teacher = None if teacher is None else torch.tensor(teacher, requires_grad=True)
    metrics = T.preference_guided_loss(policy, torch.tensor(REFERENCE), teacher, BETA, alpha, "sigmoid")
    return policy, teacher, metrics


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def close(actual, expected):
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_components_and_loss():
    _, _, metrics = guided()
    dpo = [-math.log(sigmoid(BETA * 3)), -math.log(sigmoid(BETA * -4))]
    close(metrics["dpo_loss"], dpo)
    close(metrics["aligned_loss"], [3.0, 0.0])
    close(metrics["loss"], [dpo[0] + ALPHA * 3, dpo[1]])


def test_rewards_margins_and_preference_metrics():
    _, _, metrics = guided()
    close(metrics["chosen_reward"], [BETA * 1, BETA * -2])
    close(metrics["rejected_reward"], [BETA * -2, BETA * 2])
    close(metrics["reward_margin"], [BETA * 3, BETA * -4])
    close(metrics["accuracy"], [1.0, 0.0])
    close(metrics["base_margin"], [4.0, -5.0])
    close(metrics["pref_margin"], [7.0, -7.0])
    close(metrics["pref_advantage"], [3.0, -2.0])
    close(metrics["active_fraction"], [1.0, 0.0])


def test_gradient_reaches_the_policy_and_not_the_teacher():
    policy, teacher, metrics = guided()
    metrics["loss"].sum().backward()
    assert teacher.grad is None
    # d dpo / d Δ_base = −β σ(−β (Δ_base − Δ_ref)); d aligned / d Δ_base = −1 where active, else 0
    slopes = [-BETA * sigmoid(-BETA * 3) - ALPHA, -BETA * sigmoid(BETA * 4)]
    close(policy.grad, [[slopes[0], -slopes[0]], [slopes[1], -slopes[1]]])


def test_only_the_loss_carries_a_gradient():
    _, _, metrics = guided()
    assert metrics.pop("loss").requires_grad
    assert [name for name, values in metrics.items() if values.requires_grad and name not in teacher_given()] == []


def teacher_given():
    """Metrics that are the teacher's own numbers; in training they come from a pass without gradient."""
    return {"pref_margin", "pref_chosen_logps", "pref_rejected_logps"}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 2.0])
def test_alpha_enters_linearly(alpha):
    at_0, at_1 = (guided(alpha=a)[2]["loss"].detach() for a in (0.0, 1.0))
    torch.testing.assert_close(guided(alpha=alpha)[2]["loss"].detach(), at_0 + alpha * (at_1 - at_0))


def test_plain_dpo_without_teacher():
    _, _, metrics = guided(teacher=None)
    assert torch.equal(metrics["loss"], metrics["dpo_loss"]) and "aligned_loss" not in metrics


def test_start_of_training_is_ln_2():
    same = torch.tensor(REFERENCE)
    metrics = T.preference_guided_loss(same, same, None, BETA, ALPHA, "sigmoid")
    close(metrics["loss"], [math.log(2)] * 2)
    close(metrics["accuracy"], [0.0, 0.0])  # equal rewards are no win
    assert T.DPO_START["sigmoid"] == math.log(2) and T.DPO_START.keys() == T.DPO_LOSSES.keys()


def test_large_margins_stay_finite():
    losses = T.sigmoid_loss(torch.tensor([1e4, -1e4]), 1.0)
    close(losses, [0.0, 1e4])


# --- P-tuning: the policy is the model with its prefix, TEACHER above; reference and plain policy are both REFERENCE
#               Δ_pref   Δ_ref   Δ_pref − Δ_ref   rewards β (log π(y|p, x) − log π(y|x)) of chosen and rejected
# first pair       7       1            6              β · 3   β · −3
# second pair     −7      −1           −6              β · −3  β · 3


def ptuning():
    prefixed = torch.tensor(TEACHER, requires_grad=True)
    return prefixed, T.ptuning_loss(prefixed, torch.tensor(REFERENCE), BETA, "sigmoid")


def test_ptuning_is_dpo_of_the_prefixed_model():
    _, metrics = ptuning()
    loss = [-math.log(sigmoid(BETA * 6)), -math.log(sigmoid(BETA * -6))]
    close(metrics["loss"], loss)
    close(metrics["dpo_loss"], loss)
    close(metrics["chosen_reward"], [BETA * 3, BETA * -3])
    close(metrics["rejected_reward"], [BETA * -3, BETA * 3])
    close(metrics["reward_margin"], [BETA * 6, BETA * -6])
    close(metrics["accuracy"], [1.0, 0.0])


def test_ptuning_reports_what_there_is_to_distil():
    """Δ_pref − Δ_base, with the reference as the plain policy."""
    _, metrics = ptuning()
    close(metrics["aligned_loss"], [6.0, 0.0])
    close(metrics["pref_advantage"], [6.0, -6.0])
    close(metrics["active_fraction"], [1.0, 0.0])
    close(metrics["base_margin"], [1.0, -1.0])
    close(metrics["pref_margin"], [7.0, -7.0])
    for place, answer in enumerate(("chosen", "rejected")):
        close(metrics[f"{answer}_logps"], [pair[place] for pair in REFERENCE])
        close(metrics[f"pref_{answer}_logps"], [pair[place] for pair in TEACHER])


def test_only_ptunings_loss_carries_a_gradient():
    prefixed, metrics = ptuning()
    assert [name for name, values in metrics.items() if values.requires_grad] == ["loss"]
    metrics["loss"].sum().backward()
    slopes = [-BETA * sigmoid(-BETA * 6), -BETA * sigmoid(BETA * 6)]  # d loss / d Δ_pref
    close(prefixed.grad, [[slopes[0], -slopes[0]], [slopes[1], -slopes[1]]])


def test_ptuning_reports_the_metrics_of_guided_training():
    assert ptuning()[1].keys() == guided()[2].keys()
