"""The measurements of the README's guide: what is read from a run, how runs are compared, and that remedies are real."""

import importlib.util

import pytest
from conftest import PROJECT
from test_launcher import DESIGN_VARIABLES

import train_with_preference_prompt as T

spec = importlib.util.spec_from_file_location("guide", PROJECT / "tests" / "benchmark" / "guide.py")
guide = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guide)

SPEED, ACCURACY = "throughput/pairs_per_second", "rewards_eval/accuracy"
MARGIN, RATIO = "preference_metrics/base_margin_eval", "preference_metrics/pref_advantage_ratio_eval"


def history(speeds, peak):
    evaluations = [{ACCURACY: 0.0, MARGIN: -2.0, RATIO: 3.0}, {ACCURACY: 0.75, MARGIN: 1.0, RATIO: 0.5}]
    return [evaluations[0], *({SPEED: speed} for speed in speeds), evaluations[1], {T.PEAK_MEMORY: peak}]


def test_the_first_update_does_not_count_for_the_speed():
    found = guide.figures_of(history([0.1, 2.0, 4.0, 9.0], 1.5))
    assert found == {
        "peak GiB": 1.5,
        "pairs/s": 4.0,
        "accuracy": 0.75,
        "base margin": 1.0,
        "ratio, start": 3.0,
        "ratio, end": 0.5,
    }
    assert guide.figures_of(history([0.1], 1.5))["pairs/s"] == 0.1


def test_a_ratio_is_the_median_of_each_rounds_own():
    """The machine was twice as fast in the second round: 2 / 1, 2 / 2 and 9 / 3 of the baseline, 2 in the middle."""
    baseline = [guide.figures_of(history([0, speed], 4.0)) for speed in (1.0, 2.0, 3.0)]
    changed = [guide.figures_of(history([0, speed], 3.0)) for speed in (2.0, 2.0, 9.0)]
    shown = guide.table({guide.BASELINE: baseline, "ALPHA=0": changed}).splitlines()
    assert shown[-2].startswith("| `as shipped` | 4.00 (1.00 ×) | 2.00 (1.00 ×) |")
    assert shown[-1].startswith("| `ALPHA=0` | 3.00 (0.75 ×) | 2.00 (2.00 ×) | 0.750 | 1.000 | 3.000 | 0.500 |")


@pytest.mark.parametrize("remedy", sorted({remedy for subject in guide.REMEDIES.values() for remedy in subject}))
def test_remedies_set_variables_of_the_launcher(remedy):
    assert {word.split("=")[0] for word in remedy.split()} <= set(DESIGN_VARIABLES)
    flags = [f"--{name.lower()}={value}" for name, value in (word.split("=") for word in remedy.split())]
    args, problems = T.read_arguments(flags)
    assert problems == [] and args != T.ScriptArguments()


def test_the_tags_are_the_trainers():
    assert {tag for tag, _ in guide.FIGURES.values()} - {T.PEAK_MEMORY, T.PAIRS_PER_SECOND_TAG} <= {
        tags[1] for tags in T.TAGS.values()
    }
