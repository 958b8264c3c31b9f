"""README: every variable, flag, path and command in it is real, and the Chinese one says the same."""

import itertools
import re
import shlex

import pytest
from conftest import PROJECT
from test_launcher import DESIGN_VARIABLES, EDIT_BLOCK

import train_with_preference_prompt as T

READMES = ("README.md", "README.zh-CN.md")
TEXT = {name: (PROJECT / name).read_text(encoding="utf-8") for name in READMES}


def code(text: str) -> list[str]:
    """All code, in blocks and in line, without the shell comments, which are prose."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    without_blocks = re.sub(r"```\w*\n.*?```", "", text, flags=re.S)
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line] + re.findall(r"`([^`\n]+)`", without_blocks)


def variable_rows(text: str) -> dict[str, list[str]]:
    """Variable → the cells of its table row; a row may name several variables."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| `[A-Z_0-9]+`", line)]
    return {name: cells for cells in rows for name in re.findall(r"`([A-Z_0-9]+)`", cells[0])}


@pytest.mark.parametrize("name", READMES)
def test_every_variable_has_its_row_and_no_other_has(name):
    assert sorted(variable_rows(TEXT[name])) == sorted(DESIGN_VARIABLES)


@pytest.mark.parametrize("name", READMES)
def test_defaults_in_the_table_are_the_launchers(name):
    checked = 0
    for variable, cells in variable_rows(TEXT[name]).items():
        default = re.search(rf'^{variable}="\$\{{{variable}:-(.*?)\}}"', EDIT_BLOCK, re.M)
        stated = re.findall(r"`([^`]+)`", cells[1])
        if default and default[1] and len(stated) == cells[0].count("`") // 2:
            checked += 1
            assert default[1] == stated[re.findall(r"`([A-Z_0-9]+)`", cells[0]).index(variable)], variable
    assert checked >= 25


@pytest.mark.parametrize("name", READMES)
def test_flags_exist(name):
    known = {f"--{field.name}" for field in T.dataclasses.fields(T.ScriptArguments)}
    foreign = {"--include", "--logdir", "--help", "--setup", "--index-url"}
    assert "--setup)" in (PROJECT / "fast_train.sh").read_text(encoding="utf-8")
    pieces = code(TEXT[name])
    benchmark = [piece for piece in pieces if "benchmark.py" in piece]
    of_benchmark = {flag for piece in benchmark for flag in re.findall(r"--[a-z_]+", piece)}
    source = (PROJECT / "tests" / "benchmark" / "benchmark.py").read_text(encoding="utf-8")
    assert of_benchmark and all(f'add_argument("{flag}"' in source for flag in of_benchmark)
    mentioned = {flag for piece in pieces if piece not in benchmark for flag in re.findall(r"--[a-z_-]+", piece)}
    assert mentioned and mentioned <= known | foreign


@pytest.mark.parametrize("name", READMES)
def test_files_exist(name):
    made_by_a_run = ("model_output", "logs", "models", ".venv", "merged", "runs", "checkpoint")
    pattern = r"[\w./-]+\.(?:sh|py|md|txt|json|jsonl)\b"
    pieces = [piece for piece in code(TEXT[name]) if "=" not in piece]
    paths = {path for piece in pieces for path in re.findall(pattern, piece)}
    paths |= set(re.findall(r"\]\(([^)]+\.md)\)", TEXT[name]))
    outputs = set(re.findall(pattern, TEXT[name].split("model_output/Preference_Guided_DPO/  ")[1].split("\n\n")[0]))
    outputs |= {"pairs.jsonl", "pairs.json", "result.json", "scores.json", "BETA_ALPHA.md"}  # the user's, and a sweep's
    missing = [p for p in paths - outputs if not p.startswith(made_by_a_run) and not (PROJECT / p).exists()]
    assert {"fast_train.sh", "tests/run.sh"} <= {path.removeprefix("./") for path in paths} and missing == []


@pytest.mark.parametrize("name", READMES)
def test_links_within_lead_to_a_heading(name):
    headings = re.findall(r"^##+ (.*)$", re.sub(r"```\w*\n.*?```", "", TEXT[name], flags=re.S), re.M)
    # as GitHub makes them
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\]\(#([^)]+)\)", TEXT[name]))
    assert len(linked) >= 14 and linked <= anchors


def test_the_room_table_is_the_modules():
    source = (PROJECT / "train_with_preference_prompt.py").read_text(encoding="utf-8")
    rooms = re.findall(r"^# (\d+) · ([\w ]+?) — ", source, re.M)
    for name in READMES:
        assert re.findall(r"^\| (\d+) ([A-Z][\w ]+?) \|", TEXT[name], re.M) == rooms


def test_messages_under_troubleshooting_are_real():
    source = "".join((PROJECT / name).read_text() for name in ("train_with_preference_prompt.py", "fast_train.sh"))
    table = TEXT["README.md"].split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(messages) >= 5
    for message in messages:  # numbers and names in a message are examples
        words = re.split(r"\d+(?:, \d+)*|…|'\w+'", message)
        assert all(piece.strip(" ;,:") in source for piece in words), message


def test_the_chinese_readme_has_the_same_code():
    blocks = {name: re.findall(r"```\w*\n(.*?)```", TEXT[name], re.S) for name in READMES}
    stripped = {
        name: [[re.sub(r"\s+#.*", "", line) for line in block.splitlines()] for block in found]
        for name, found in blocks.items()
    }
    assert stripped["README.md"] == stripped["README.zh-CN.md"]
    assert TEXT["README.md"].count("\n## ") == TEXT["README.zh-CN.md"].count("\n## ")


def test_the_figures_are_the_same_in_both():
    """The table of the default run's result, once in each."""
    figures = {
        name: re.findall(r"^\s+(?:loss|accuracy|\w+_margin|\w+_ratio)\s+[\d.-]+.*$", TEXT[name], re.M)
        for name in READMES
    }
    assert figures["README.md"] and figures["README.md"] == figures["README.zh-CN.md"]


def test_the_table_of_the_soft_prompt_cycle_is_the_same_in_both():
    numbers = {}
    for name in READMES:
        section = next(part for part in TEXT[name].split("\n## ") if "TRAINING_MODE=ptuning" in part)
        numbers[name] = [re.findall(r"−?\d+(?:\.\d+)?", row) for row in re.findall(r"^\|.*→.*$", section, re.M)]
    assert len(numbers["README.md"]) == 5 and numbers["README.md"] == numbers["README.zh-CN.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_variables_set_in_commands_are_the_launchers(name):
    commands = [piece for piece in code(TEXT[name]) if piece.endswith("./fast_train.sh") and "=" in piece]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)[:-1]
        assert words and {word.split("=")[0] for word in words} <= set(DESIGN_VARIABLES), command


def test_chinese_lines_break_where_a_space_does_no_harm():
    """A line break inside a sentence is shown as a space, which has no place between two Chinese characters."""
    lines = (PROJECT / "README.zh-CN.md").read_text(encoding="utf-8").splitlines()
    broken = [
        first
        for first, second in itertools.pairwise(lines)
        if re.search("[\u4e00-\u9fff]$", first) and re.match(" *[\u4e00-\u9fff]", second) and first[0] not in "#|"
    ]
    assert broken == []
