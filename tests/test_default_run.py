"""The bundled default, trained for real: several minutes, so it carries the marker `slow`."""

import pytest
from conftest import launch, output_of, series

import train_with_preference_prompt as T


@pytest.mark.slow
def test_the_default_run_learns_the_preference(tmp_path):
    result = launch({}, cwd=tmp_path, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    accuracy = series(tmp_path, "rewards_eval/accuracy")
    margin = series(tmp_path, "rewards_eval/margin")
    assert accuracy[0] == 0.0 and accuracy[-1] >= 0.7 and margin[-1] > 0.1
    assert series(tmp_path, "preference_metrics/pref_advantage_ratio_eval")[0] > 1
    assert (output_of(tmp_path) / T.MODEL_CARD).exists()
