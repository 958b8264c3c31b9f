"""PRESET puts in its β and α and nothing else; settings outside their usual ranges are named, and used."""

import pytest
from conftest import parse
from test_plan import ONE_RANK, plan

import train_with_preference_prompt as T

VALUES = {"": (0.05, 0.1), "conservative": (0.01, 0.05), "balanced": (0.05, 0.1), "aggressive": (0.1, 0.2)}


@pytest.mark.parametrize(("preset", "values"), VALUES.items())
def test_a_preset_sets_beta_and_alpha_and_nothing_else(preset, values):
    args = parse([f"--preset={preset}"])
    assert args == T.ScriptArguments(preset=preset, beta=values[0], alpha=values[1])
    assert T.with_preset(args) == args


def test_in_ptuning_mode_alpha_keeps_its_value():
    args = parse(["--preset=aggressive", "--training_mode=ptuning", "--alpha=0.3"])
    assert (args.beta, args.alpha) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--beta=0.2"], ["BETA (--beta) is 0.2, but PRESET=conservative stands for BETA=0.01; leave BETA at 0.05"]),
        (["--alpha=0"], ["ALPHA (--alpha) is 0.0, but PRESET=conservative stands for ALPHA=0.05; leave ALPHA at 0.1"]),
        (["--beta=0.1", "--alpha=0.2"], ["BETA (--beta) is 0.1,", "ALPHA (--alpha) is 0.2,"]),
        (["--beta=0.01", "--alpha=0.05"], []),  # what it would set
        (["--beta=0.05", "--alpha=0.1"], []),  # the defaults, which the launcher passes
        (["--beta=0.2", "--preset="], []),  # the last flag counts
    ],
)
def test_another_value_beside_a_preset_is_an_error_that_names_both(flags, named):
    args, problems = T.read_arguments(["--preset=conservative", *flags])
    assert len(problems) == len(named)
    for problem, words in zip(problems, named, strict=True):
        assert problem.startswith(words) and problem.endswith("or empty PRESET")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "sigmoid, β 0.05, α 0.1"),
        ({"preset": "balanced"}, "sigmoid, β 0.05, α 0.1 (from PRESET=balanced)"),
        (
            {"preset": "conservative"},
            "sigmoid, β 0.01, α 0.05 (from PRESET=conservative, in the place of BETA=0.05 and ALPHA=0.1)",
        ),
        (
            {"preset": "aggressive", "training_mode": "ptuning"},
            "sigmoid, β 0.1 (from PRESET=aggressive, in the place of BETA=0.05)",
        ),
    ],
)
def test_the_plan_says_where_beta_and_alpha_come_from(changes, words):
    args = T.with_preset(T.ScriptArguments(**changes))
    assert plan(ONE_RANK, 160, **vars(args))["loss"] == words


def test_what_is_recorded_and_compared_is_what_was_used():
    """A preset and its values by hand are the same run; HParams shows the values."""
    named, by_hand = T.with_preset(T.ScriptArguments(preset="aggressive")), T.ScriptArguments(beta=0.1, alpha=0.2)
    assert T.recorded_settings(named, ONE_RANK, {}) == T.recorded_settings(by_hand, ONE_RANK, {})
    assert T.recorded_settings(named, ONE_RANK, {})["beta"] == 0.1
    assert T.hyperparameters(named) == T.hyperparameters(by_hand) and T.hyperparameters(named)["alpha"] == 0.2


# --- ranges

INSIDE, BELOW, ABOVE = "inside", "below", "above"
RANGES = [  # setting, value → where it lies
    ("beta", 0.01, INSIDE),
    ("beta", 0.5, INSIDE),
    ("beta", 0.0099, BELOW),
    ("beta", 0.51, ABOVE),
    ("alpha", 0.05, INSIDE),
    ("alpha", 0.2, INSIDE),
    ("alpha", 0.049, BELOW),
    ("alpha", 0.21, ABOVE),
    ("alpha", 0.0, INSIDE),  # plain DPO, on purpose
    ("learning_rate", 1e-5, INSIDE),
    ("learning_rate", 1e-3, INSIDE),
    ("learning_rate", 9e-6, BELOW),
    ("learning_rate", 2e-3, ABOVE),
    ("lora_dropout", 0.05, INSIDE),
    ("lora_dropout", 0.1, INSIDE),
    ("lora_dropout", 0.0, BELOW),
    ("lora_dropout", 0.2, ABOVE),
]


@pytest.mark.parametrize(("name", "value", "place"), RANGES)
def test_a_value_outside_its_usual_range_is_named_with_the_range(name, value, place):
    args = T.ScriptArguments(**{name: value})
    notices = T.range_notices(args)
    assert len(notices) == (place != INSIDE) and T.argument_problems(args) == []
    if place != INSIDE:
        low, high = {"beta": (0.01, 0.5), "alpha": (0.05, 0.2), "learning_rate": (1e-5, 1e-3)}.get(name, (0.05, 0.1))
        assert notices[0].startswith(f"{name.upper()} {value:g} is {place} the usual {low:g} to {high:g}: ")
        assert plan(ONE_RANK, 160, **{name: value})["notice"] == notices[0]


def test_every_setting_that_left_its_range_is_named_where_it_has_a_part():
    outside = {"beta": 0.9, "alpha": 0.9, "learning_rate": 0.1, "lora_dropout": 0.5}
    named = [notice.split(" ")[0] for notice in T.range_notices(T.ScriptArguments(**outside))]
    assert named == ["BETA", "ALPHA", "LEARNING_RATE", "LORA_DROPOUT"]
    ptuning = T.range_notices(T.ScriptArguments(**outside, training_mode="ptuning"))
    assert [notice.split(" ")[0] for notice in ptuning] == ["BETA"]
    assert T.range_notices(T.ScriptArguments()) == []
