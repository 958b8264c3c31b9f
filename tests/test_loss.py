"""Loss: the maths of the guided loss, with every expected number derived by hand."""

import math

import numpy as np
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


LENGTHS = [[2, 4], [5, 2]]  # tokens; only the IPO loss looks at them


def guided(alpha=ALPHA, teacher=TEACHER, **loss):
    policy = torch.tensor(POLICY, requires_grad=True)
    teacher = None if teacher is None else torch.tensor(teacher, requires_grad=True)
    metrics = T.preference_guided_loss(
        policy, torch.tensor(REFERENCE), teacher, torch.tensor(LENGTHS), BETA, alpha, **loss
    )
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


def test_accuracy_with_the_prefix_compares_with_the_reference():
    """Δ_pref > Δ_ref, whatever the plain policy does: the second pair's Δ_base is −5, and −0.5 a win over −1."""
    close(guided()[2]["pref_accuracy"], [1.0, 0.0])  # 7 > 1, −7 < −1
    close(guided(teacher=[[-8.0, -15.0], [-15.0, -14.5]])[2]["pref_accuracy"], [1.0, 1.0])
    close(guided(teacher=REFERENCE)[2]["pref_accuracy"], [0.0, 0.0])  # a tie is no win
    assert "pref_accuracy" not in guided(teacher=None)[2]


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
    metrics = T.preference_guided_loss(same, same, None, torch.tensor(LENGTHS), BETA, ALPHA)
    close(metrics["loss"], [math.log(2)] * 2)
    close(metrics["accuracy"], [0.0, 0.0])  # equal rewards are no win


def test_large_margins_stay_finite():
    logratios = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    close(T.sigmoid_loss(logratios, None, 1.0, 0.0), [0.0, 1e4])
    close(T.robust_loss(logratios, None, 1.0, 0.25), [-0.25 * 1e4 / 0.5, 0.75 * 1e4 / 0.5])


# loss type, label smoothing → the loss of each pair; Δ_base − Δ_ref is 3 and −4, log-ratios are (1, −2) and (−2, 2)
LOSSES = {
    ("sigmoid", 0.0): [-math.log(sigmoid(BETA * 3)), -math.log(sigmoid(BETA * -4))],
    ("hinge", 0.0): [1 - BETA * 3, 1 - BETA * -4],
    ("ipo", 0.0): [(1 / 2 - -2 / 4 - 1 / (2 * BETA)) ** 2, (-2 / 5 - 2 / 2 - 1 / (2 * BETA)) ** 2],
    ("robust", 0.0): [-math.log(sigmoid(BETA * 3)), -math.log(sigmoid(BETA * -4))],
    ("robust", 0.2): [
        (-0.8 * math.log(sigmoid(BETA * x)) + 0.2 * math.log(sigmoid(-BETA * x))) / (1 - 2 * 0.2) for x in (3, -4)
    ],
}


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_each_dpo_loss(loss_type, smoothing):
    _, _, metrics = guided(loss_type=loss_type, label_smoothing=smoothing)
    close(metrics["dpo_loss"], LOSSES[loss_type, smoothing])
    close(metrics["loss"] - metrics["dpo_loss"], [ALPHA * 3, 0.0])  # the consistency loss is always that of the sums
    close(metrics["reward_margin"], [BETA * 3, BETA * -4])  # and so are the rewards
    prefixed, reference = torch.tensor(POLICY), torch.tensor(REFERENCE)
    trained = T.ptuning_loss(prefixed, reference, torch.tensor(LENGTHS), BETA, loss_type, smoothing)
    close(trained["loss"], LOSSES[loss_type, smoothing])


def test_every_loss_is_tested_and_can_be_chosen():
    assert {loss_type for loss_type, _ in LOSSES} == T.DPO_LOSSES.keys() == set(T.ONLY["loss_type"][0])


@pytest.mark.parametrize("loss_type", T.DPO_LOSSES)
def test_the_guided_loss_in_double_precision(loss_type):
    """Design §2, written once more in float64 with numpy, for 1,000 random pairs."""
    random = np.random.default_rng(0)
    policy, reference, teacher = (random.normal(-60, 25, (1000, 2)) for _ in range(3))
    lengths, smoothing = random.integers(1, 200, (1000, 2)), 0.1
    delta_base, delta_ref, delta_pref = (x[:, 0] - x[:, 1] for x in (policy, reference, teacher))
    h = BETA * (delta_base - delta_ref)
    average = ((policy - reference) / lengths)[:, 0] - ((policy - reference) / lengths)[:, 1]
    dpo = {
        "sigmoid": np.log1p(np.exp(-h)),
        "hinge": np.maximum(0, 1 - h),
        "ipo": (average - 1 / (2 * BETA)) ** 2,
        "robust": ((1 - smoothing) * np.log1p(np.exp(-h)) - smoothing * np.log1p(np.exp(h))) / (1 - 2 * smoothing),
    }[loss_type]
    expected = dpo + ALPHA * np.maximum(0, delta_pref - delta_base)
    inputs = (torch.tensor(x, dtype=torch.float32) for x in (policy, reference, teacher))
    metrics = T.preference_guided_loss(*inputs, torch.tensor(lengths), BETA, ALPHA, loss_type, smoothing)
    np.testing.assert_allclose(metrics["loss"].numpy(), expected, rtol=2e-5, atol=2e-5)
    in_double = (torch.tensor(x) for x in (policy, reference, teacher))
    metrics = T.preference_guided_loss(*in_double, torch.tensor(lengths), BETA, ALPHA, loss_type, smoothing)
    np.testing.assert_allclose(metrics["loss"].numpy(), expected, rtol=1e-12)


# --- P-tuning: the policy is the model with its prefix, TEACHER above; reference and plain policy are both REFERENCE
#               Δ_pref   Δ_ref   Δ_pref − Δ_ref   rewards β (log π(y|p, x) − log π(y|x)) of chosen and rejected
# first pair       7       1            6              β · 3   β · −3
# second pair     −7      −1           −6              β · −3  β · 3


def ptuning():
    prefixed = torch.tensor(TEACHER, requires_grad=True)
    return prefixed, T.ptuning_loss(prefixed, torch.tensor(REFERENCE), torch.tensor(LENGTHS), BETA)


def test_ptuning_is_dpo_of_the_prefixed_model():
    _, metrics = ptuning()
    loss = [-math.log(sigmoid(BETA * 6)), -math.log(sigmoid(BETA * -6))]
    close(metrics["loss"], loss)
    close(metrics["dpo_loss"], loss)
    close(metrics["chosen_reward"], [BETA * 3, BETA * -3])
    close(metrics["rejected_reward"], [BETA * -3, BETA * 3])
    close(metrics["reward_margin"], [BETA * 6, BETA * -6])
    close(metrics["accuracy"], [1.0, 0.0])
    assert torch.equal(metrics["pref_accuracy"], metrics["accuracy"])


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
