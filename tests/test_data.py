"""Data: rows as the file states them, malformed rows named by file, row and field, and pairs that cannot teach."""

import json

import pytest
from conftest import PROJECT, ROWS, write_rows

import train_with_preference_prompt as T

GOOD = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."}


def line(**changes) -> str:
    """A good row as JSON with some fields changed; `...` leaves one out."""
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not ...})


def write_lines(folder, *lines: str | bytes):
    path = folder / "pairs.jsonl"
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in lines))
    return path


def problems(path) -> list[str]:
    """The lines of the one error that reading this file raises."""
    with pytest.raises(T.InputError) as caught:
        T.read_pairs(path)
    return str(caught.value).splitlines()


# --- what is read


def test_rows_as_they_are(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", ROWS)
    pairs, report = T.read_pairs(path)
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs] == ROWS
    assert [p.row for p in pairs] == [1, 2, 3, 4, 5, 6]
    assert (report.path, report.rows, report.usable, report.describe_dropped()) == (path, 6, 6, "none")


def test_white_space_line_separators_and_further_fields_are_kept_or_ignored(tmp_path):
    text = " a\n\tb\r\n\u2028c\x85\u00a0 "  # JSON strings may hold U+2028 and U+0085 unescaped: they end no row
    row = json.dumps({**GOOD, "prompt": text, "chosen": text, "id": 7, "tags": ["x"]}, ensure_ascii=False)
    (pair,), report = T.read_pairs(write_lines(tmp_path, row))
    assert (pair.prompt, pair.chosen, pair.rejected, pair.row) == (text, text, "Five.", 1)
    assert report.rows == 1


def test_blank_lines_do_not_count_as_rows_but_keep_the_line_numbers(tmp_path):
    pairs, report = T.read_pairs(write_lines(tmp_path, "", line(), "", "  \t", line(prompt="Again?"), "", ""))
    assert [(p.prompt, p.row) for p in pairs] == [("Two plus two?", 2), ("Again?", 5)]
    assert report.rows == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("byte-order mark", b"\xef\xbb\xbf" + line().encode() + b"\n" + line(prompt="B").encode() + b"\n"),
        ("byte-order mark, blank first line", b"\xef\xbb\xbf\n" + line().encode() + b"\n" + line(prompt="B").encode()),
        ("CRLF", line().encode() + b"\r\n" + line(prompt="B").encode() + b"\r\n"),
        ("no final newline", line().encode() + b"\n" + line(prompt="B").encode()),
    ],
)
def test_how_files_may_be_written(tmp_path, name, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    pairs, report = T.read_pairs(path)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("Two plus two?", "Four.", "Five."),
        ("B", "Four.", "Five."),
    ]
    assert report.rows == 2


@pytest.mark.parametrize(("split", "count"), [("train", 160), ("test", 60)])
def test_the_bundled_data_is_whole(split, count):
    pairs, report = T.read_pairs(PROJECT / "data" / f"{split}.jsonl")
    assert len(pairs) == report.rows == report.usable == count


# --- malformed rows

MALFORMED = {
    "broken JSON": ('{"prompt": "a", "chosen": }', ["valid JSON", "column 27"]),
    "cut line": ('{"prompt": "a", "cho', ["valid JSON"]),
    "two rows in a line": (line() + line(), ["valid JSON"]),
    "array": ('["a", "b", "c"]', ["list", "prompt, chosen, rejected"]),
    "string": ('"a"', ["str", "prompt, chosen, rejected"]),
    "number": ("7", ["int"]),
    "null row": ("null", ["NoneType"]),
    "no prompt": (line(prompt=...), ["no field 'prompt'", "'chosen', 'rejected'"]),
    "no chosen": (line(chosen=...), ["no field 'chosen'", "'prompt', 'rejected'"]),
    "no rejected": (line(rejected=...), ["no field 'rejected'", "'prompt', 'chosen'"]),
    "other names": ('{"question": "a", "answer": "b"}', ["no field 'prompt'", "'question', 'answer'"]),
    "empty object": ("{}", ["no field 'prompt'"]),
    "prompt null": (line(prompt=None), ["'prompt'", "NoneType", "not a string"]),
    "chosen null": (line(chosen=None), ["'chosen'", "NoneType", "not a string"]),
    "rejected number": (line(rejected=5), ["'rejected'", "int", "not a string"]),
    "chosen list": (line(chosen=["Four."]), ["'chosen'", "list", "not a string"]),
    "rejected object": (line(rejected={"text": "Five."}), ["'rejected'", "dict", "not a string"]),
    "prompt true": (line(prompt=True), ["'prompt'", "bool", "not a string"]),
    "prompt empty": (line(prompt=""), ["'prompt'", "empty"]),
    "prompt blank": (line(prompt=" \n\t"), ["'prompt'", "empty"]),
    "not UTF-8": (line(chosen="caf!").encode().replace(b"caf!", b"caf\xe9"), ["UTF-8"]),
    "UTF-16": (line().encode("utf-16"), ["UTF-8"]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_names_file_row_and_field(tmp_path, name):
    text, expected = MALFORMED[name]
    path = write_lines(tmp_path, line(), "", text, line())
    (problem,) = problems(path)
    assert problem.startswith(f"- data file {path}, row 3: ")
    for word in expected:
        assert word in problem


@pytest.mark.parametrize("name", T.PAIR_FIELDS)
def test_half_a_surrogate_pair_is_malformed(tmp_path, name):
    path = write_lines(tmp_path, line(), line(**{name: "cut emoji: \ud83d"}))  # in the file: the escape \ud83d
    (problem,) = problems(path)
    assert problem.startswith(f"- data file {path}, row 2: ") and repr(name) in problem


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    (pair,), _ = T.read_pairs(write_lines(tmp_path, line().replace("Four.", r"\ud83e\udd5a")))
    assert pair.chosen == "\U0001f95a"


@pytest.mark.parametrize(("bad", "shown", "more"), [(1, 1, None), (5, 5, None), (6, 5, 1), (12, 5, 7)])
def test_more_than_five_problems_are_summarised(tmp_path, bad, shown, more):
    path = write_lines(tmp_path, line(), *[line(chosen=None)] * bad, line())
    lines = problems(path)
    rows = [f"- data file {path}, row {row}: " for row in range(2, 2 + shown)]
    assert [text.startswith(start) for text, start in zip(lines, rows, strict=False)] == [True] * shown
    assert len(lines) == shown + (more is not None)
    assert more is None or (f" {more} more " in lines[-1] and str(path) in lines[-1])


def test_each_problem_of_a_file_is_named(tmp_path):
    lines = problems(write_lines(tmp_path, "{", line(), line(prompt=""), line(rejected=1)))
    assert [text.split(", ")[1].split(":")[0] for text in lines] == ["row 1", "row 3", "row 4"]


def test_a_line_that_is_not_utf8_hides_no_other_problem(tmp_path):
    lines = problems(write_lines(tmp_path, line(prompt=""), b'{"prompt": "\xff"}', line(rejected=1)))
    assert [text.split(", ")[1].split(":")[0] for text in lines] == ["row 1", "row 2", "row 3"]


# --- files that are none


def test_a_missing_file(tmp_path):
    (problem,) = problems(tmp_path / "none.jsonl")
    assert problem.startswith(f"- data file {tmp_path / 'none.jsonl'} does not exist")


def test_a_folder(tmp_path):
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"- data file {tmp_path} is a folder")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.startswith(f"- data file {path}: ") and "it is empty" in problem


# --- pairs that cannot teach


def test_pairs_that_cannot_teach_are_dropped_and_counted(tmp_path):
    path = write_lines(
        tmp_path,
        line(),
        line(chosen=""),
        line(rejected=" \n\t"),
        line(chosen="Same.", rejected="Same."),
        line(chosen=" Same.\n", rejected="Same."),
        "",
        line(chosen="", rejected=""),
        line(chosen="Same.", rejected="same."),
    )
    pairs, report = T.read_pairs(path)
    assert [p.row for p in pairs] == [1, 8]
    assert (report.rows, report.usable) == (7, 2)
    assert sorted(report.dropped.values()) == [[2, 3, 7], [4, 5]]
    assert report.describe_dropped() == "3 with an empty answer (rows 2, 3, 7); 2 with identical answers (rows 4, 5)"


def test_dropped_rows_are_listed_up_to_five():
    report = T.DataReport("memory", rows=20)
    report.drop("with an empty answer", 9)
    assert report.describe_dropped() == "1 with an empty answer (row 9)"
    for row in range(11, 17):
        report.drop("with identical answers", row)
    assert report.describe_dropped().endswith("; 6 with identical answers (rows 11, 12, 13, 14, 15, …)")
    assert report.usable == 13


def test_all_pairs_dropped_is_an_error(tmp_path):
    path = write_lines(tmp_path, line(chosen=""), line(chosen="a", rejected="a"))
    (problem,) = problems(path)
    assert problem.startswith(f"- data file {path}: none of its 2 rows is usable: ")
    assert "1 with an empty answer (row 1); 1 with identical answers (row 2)" in problem


def test_a_malformed_row_is_an_error_though_others_are_dropped(tmp_path):
    (problem,) = problems(write_lines(tmp_path, line(chosen=""), line(chosen=None), line()))
    assert ", row 2: " in problem
