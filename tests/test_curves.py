"""The picture of the curves: what is drawn where matplotlib is installed, and what is said where it is not."""

import math
import sys

import pytest

import train_with_preference_prompt as T

RATIO, EVAL_RATIO = T.TAGS["pref_advantage_ratio"]


def history(updates=4):
    """Training figures at each update, held-out figures at every second; each tag has values of its own."""
    logs = []
    for step in range(updates + 1):
        for split in (0, 1):
            if (step > 0) if split == 0 else (step % 2 == 0):
                tags = {tags[split]: step + place / 100 for place, tags in enumerate(T.TAGS.values(), start=1)}
                logs.append({**tags, "step": step, "epoch": step / 2} | ({T.GRAD_NORM_TAG: 1.0} if split == 0 else {}))
    return logs


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


@pytest.fixture
def pyplot():
    return pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (tests/requirements.txt)")


def test_every_chart_is_a_panel_with_training_and_held_out_figures(pyplot):
    found = panels(T.curves_figure(history()))
    charts = {title: name for category in T.CHARTS.values() for title, name in category.items()}
    assert found.keys() == charts.keys()
    for title, name in charts.items():
        if name in T.TAGS:
            place = (list(T.TAGS).index(name) + 1) / 100
            held_out = ([0, 2, 4], [0 + place, 2 + place, 4 + place])
            assert lines(found[title]) == {
                "training": ([1, 2, 3, 4], [1 + place, 2 + place, 3 + place, 4 + place]),
                "held out": held_out,
            }
    assert lines(found["gradient norm"]) == {"training": ([1, 2, 3, 4], [1.0] * 4)}
    assert {title for title in charts if found[title].get_yscale() == "log"} == {"preference-advantage ratio"}


def test_the_picture_is_a_png_and_pyplot_is_left_alone(pyplot, tmp_path, capsys):
    """Of the shortest run there is, with a ratio that no axis can show and no prefixed condition in training."""
    logs = [{**entry, EVAL_RATIO: math.inf} for entry in history(1) if "loss/eval" in entry] + history(1)[1:]
    before = pyplot.get_fignums(), pyplot.get_backend()
    T.save_curves([{tag: value for tag, value in entry.items() if tag != RATIO} for entry in logs], tmp_path)
    content = (tmp_path / T.CURVES_FILE).read_bytes()
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and width == 1500 and height > 1500
    assert (pyplot.get_fignums(), pyplot.get_backend()) == before and capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == [T.CURVES_FILE]


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    T.save_curves(history(), tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("no training_curves.png: matplotlib is not installed; ")
    assert said.endswith(f"{sys.executable} -m pip install matplotlib\n") and list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_run(tmp_path, monkeypatch, capsys):
    def broken(history):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(T, "curves_figure", broken)
    T.save_curves(history(), tmp_path)
    assert capsys.readouterr().out.startswith(
        "no training_curves.png: matplotlib could not draw it: ImportError: numpy"
    )


def test_a_full_disk_is_an_error_all_the_same(tmp_path, monkeypatch):
    """What the run must not lose is written before."""

    def full(*args):
        raise OSError(28, "No space left on device")

    class Figure:
        def savefig(self, file, **options):
            file.write(b"png")

    monkeypatch.setattr(T, "curves_figure", lambda history: Figure())
    monkeypatch.setattr(T, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        T.save_curves(history(), tmp_path)
