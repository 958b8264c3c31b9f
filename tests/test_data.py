"""Data: every kind of file, data set and format gives the same pairs; malformed rows are named by file, row and field,
pairs that cannot teach dropped and counted; several sources with weights, and a share of the prompts that is held out."""

import collections
import csv
import dataclasses
import gzip
import json
import pickle
from pathlib import Path

import pytest
from conftest import PROJECT, ROWS, write_rows
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset

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
    assert sorted([row for _, row in places] for places in report.dropped.values()) == [[2, 3, 7], [4, 5]]
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


# --- files of every kind

MORE = [{**GOOD, "id": 7}, {**GOOD, "prompt": 'Say "yes",\nplease. 🥚', "chosen": "Yes,\r\nwell.", "rejected": "五"}]


def packed(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_name(path.name + ".gz")


def as_csv(path):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", *T.PAIR_FIELDS], restval="")
        writer.writeheader()
        writer.writerows(MORE)
    return path


def as_parquet(path):
    Dataset.from_list([{"id": None, **row} for row in MORE]).to_parquet(path)
    return path


def as_json(path, value=MORE, **options):
    path.write_text(json.dumps(value, **options), encoding="utf-8")
    return path


def as_lines(path):
    return write_rows(path, MORE)


KINDS = {  # name → (what writes it, the rows' numbers)
    "a.jsonl": (as_lines, [1, 2]),
    "a.jsonl.gz": (lambda path: packed(as_lines(path.with_suffix(""))), [1, 2]),
    "packed, not named so": (lambda path: packed(as_lines(path)).rename(path), [1, 2]),
    "array.json": (as_json, [1, 2]),
    "indented.json": (lambda path: as_json(path, indent=1), [1, 2]),
    "with a byte-order mark.json": (lambda path: path.write_text("\ufeff" + json.dumps(MORE)) and path, [1, 2]),
    "one list in an object.json": (lambda path: as_json(path, {"version": 1, "data": MORE}), [1, 2]),
    "lines.json": (as_lines, [1, 2]),
    "A.JSON.gz": (lambda path: packed(as_json(path.with_suffix(""))), [1, 2]),
    "a.csv": (as_csv, [2, 3]),  # lines; the header is the first
    "a.parquet": (as_parquet, [1, 2]),
    "Parquet, not named so": (as_parquet, [1, 2]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_pairs(tmp_path, name):
    write, numbers = KINDS[name]
    path = write(tmp_path / name)
    assert path == tmp_path / name
    pairs, report = T.read_pairs(path)
    assert pairs == [T.Pair(*map(row.get, T.PAIR_FIELDS), number) for row, number in zip(MORE, numbers, strict=True)]
    assert {pair.file for pair in pairs} == {str(path)}
    assert (report.path, report.rows, list(report.unused)) == (path, 2, ["id"])
    assert report.describe_format() == "plain, texts prompt, chosen, rejected; columns not used: id"


def test_one_object_is_one_row(tmp_path):
    for indent in (None, 2):
        pairs, _ = T.read_pairs(as_json(tmp_path / "a.json", GOOD, indent=indent))
        assert pairs == [T.Pair(**GOOD, row=1)]


BROKEN = {  # name of the file → (content, its problems after the name)
    "a.json": (
        '[{"prompt": 1},\n {"prompt": }]',
        [" is not valid JSON (Expecting value at line 2, column 13); mend it"],
    ),
    "b.json": (json.dumps([GOOD, 7]), [", row 2: is int, not an object with the fields prompt, chosen, rejected"]),
    "c.json": (
        '[{"prompt": "a", "prompt": "b"}, {"a": {"x": 1, "x": 2}}]',
        [
            ", row 1: field 'prompt' occurs twice; write each field once",
            ", row 2: has no field 'prompt'; it has 'a'",
        ],
    ),
    "d.json": ('{"a": [], "b": []}', [" is one object with not one list of rows in it ('a', 'b'); keep one"]),
    "e.json": (b'["\xff"]', [" is not UTF-8 (invalid start byte); save the file as UTF-8"]),
    "f.json": ("[" * 100_000, [" is nested too deeply"]),
    "g.json": ("\n ", [": it is empty; write one object with prompt, chosen, rejected a line"]),
    "h.json": (
        json.dumps(GOOD) + '\n{"prompt": }\n',
        [", row 2: is not valid JSON (Expecting value at column 12); write one object a line"],
    ),
    "a.csv": (
        'prompt,chosen,rejected\n"two\nlines",b,c\na,b\n\n,b,c\n',
        [
            ", row 4: has 2 cells for 3 columns; quote cells with commas",
            ", row 6: field 'prompt' is empty",
        ],
    ),
    "b.csv": ("prompt;chosen;rejected\na;b;c\n", [", row 2: has no field 'prompt'; it has 'prompt;chosen;rejected'"]),
    "c.csv": (
        'prompt,chosen,rejected\na,b,c\na,"b,c\na,b,c\n',
        [", row 3: is not valid CSV (unexpected end of data); mend its quotes"],
    ),
    "d.csv": ("a,b,a\n1,2,3\n", [": column 'a' occurs twice; rename one"]),
    "e.csv": (
        b"prompt,chosen,rejected\na,\xff,c\n",
        [", row 2: is not UTF-8 (invalid start byte); save the file as UTF-8"],
    ),
    "f.csv": ("prompt,chosen,rejected\n", [": it is empty; write one object with prompt, chosen, rejected a line"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name):
    content, expected = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert problems(path) == [f"- data file {path}{problem}" for problem in expected]


def test_a_parquet_file_without_the_columns_names_those_it_has(tmp_path):
    Dataset.from_list([{"question": "a"}]).to_parquet(tmp_path / "a.parquet")
    (problem,) = problems(tmp_path / "a.parquet")
    assert problem.endswith("row 1: has no field 'prompt'; it has 'question'")


def test_columns_that_are_not_used_are_not_unpacked(tmp_path):
    """A picture that cannot be decoded does no harm, but one that the model would have to see does."""
    broken = {"bytes": b"no picture", "path": None}
    features = Features({**dict.fromkeys(T.PAIR_FIELDS, Value("string")), "icon": Image(), "image": Image()})
    for column, ends in (("icon", None), ("image", "field 'image' is not empty; tools and images are not supported")):
        row = {**GOOD, "icon": None, "image": None, column: broken}
        data = Dataset.from_list([row], features=features)
        data.save_to_disk(tmp_path / column)
        data.to_parquet(tmp_path / f"{column}.parquet")
        for path in (tmp_path / column, tmp_path / f"{column}.parquet"):
            if ends:
                assert ends in problems(path)[0]
            else:
                assert T.read_pairs(path)[0] == [T.Pair(**GOOD, row=1)]


# --- folders, saved data sets, the hub


def test_a_folder_of_files(tmp_path):
    for name in ("b/c", "b/.hidden"):
        (tmp_path / name).mkdir(parents=True)
    write_rows(tmp_path / "z.jsonl", [GOOD])
    as_csv(tmp_path / "b/c/a.csv")
    write_rows(tmp_path / "b/.hidden/a.jsonl", [GOOD])
    write_rows(tmp_path / ".a.jsonl", [GOOD])
    (tmp_path / "b/README.md").write_text("mine")
    pairs, report = T.read_pairs(tmp_path)
    places = [(str(tmp_path / "b/c/a.csv"), 2), (str(tmp_path / "b/c/a.csv"), 3), (str(tmp_path / "z.jsonl"), 1)]
    assert [(pair.file, pair.row) for pair in pairs] == places and report.rows == 3
    assert report.notices == [f"left out of {tmp_path}, not being data files: b/README.md"]


def test_dropped_rows_of_several_files_are_named_with_them(tmp_path):
    same = {**GOOD, "rejected": "Four. "}
    write_rows(tmp_path / "a.jsonl", [GOOD, same, same])
    write_rows(tmp_path / "b.jsonl", [same, {**GOOD, "chosen": ""}])
    _, report = T.read_pairs(tmp_path)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    expected = f"3 with identical answers (rows 2, 3 of {a}; row 1 of {b}); 1 with an empty answer (row 2 of {b})"
    assert (report.describe_dropped(), report.usable) == (expected, 1)
    (tmp_path / "a.jsonl").write_text(json.dumps(same))
    (problem,) = problems(tmp_path)
    assert problem.startswith(
        f"- data set {tmp_path}: none of its 3 rows is usable: 2 with identical answers (row 1 of"
    )


@pytest.fixture
def saved(tmp_path):
    """A data set with the splits train and prefs, saved by `datasets`."""
    splits = {"train": [{**GOOD, "prompt": "A"}], "prefs": [{**GOOD, "prompt": "B"}, GOOD]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_saved_data_set(saved, tmp_path):
    assert [pair.prompt for pair in T.read_pairs(saved)[0]] == ["A"]
    pairs, report = T.read_pairs(f"{saved}:prefs", split="test")
    assert [(pair.prompt, pair.row, pair.file) for pair in pairs] == [
        ("B", 1, f"{saved}:prefs"),
        (GOOD["prompt"], 2, f"{saved}:prefs"),
    ]
    assert str(report) == f"data set {saved}:prefs"
    with pytest.raises(T.InputError) as caught:
        T.read_pairs(saved, split="test")
    (problem,) = caught.value.problems
    assert problem.endswith(f"has no split 'test'; name one of those it has (train, prefs): {saved}:train")
    assert [pair.prompt for pair in T.read_pairs(Path(saved) / "prefs", split="test")[0]] == ["B", GOOD["prompt"]]
    assert "has no splits; leave :x out" in problems(f"{saved}/prefs:x")[0]
    next(Path(saved, "train").glob("*.arrow")).write_bytes(b"none")
    assert "cannot be loaded (" in problems(saved)[0] and "save it again" in problems(saved)[0]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: `load_dataset` itself, reading a local folder in place of each data set."""
    repository = tmp_path / "repository"
    for name, rows in (("train_prefs", [GOOD]), ("test_prefs", [{**GOOD, "prompt": "B"}, {**GOOD, "prompt": ""}])):
        (repository / "main").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(repository / f"main/{name}-00000-of-00001.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train_prefs, path: main/train_prefs-*}\n  - {split: test_prefs, path: main/test_prefs-*}\n"
        "- config_name: other\n  data_files:\n  - {split: train, path: main/train_prefs-*}\n---\n"
    )
    asked = []

    def load(name, config=None):
        asked.append((name, config))
        print("a greeting")
        return load_dataset(str(repository), config, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(T, "load_dataset", load)
    return asked


def test_a_data_set_of_the_hub(hub, capsys):
    pairs, report = T.read_pairs("org/name:other:train")
    assert pairs == [T.Pair(**GOOD, row=1)] and str(report) == "data set org/name:other:train"
    assert T.read_pairs("org/name:main:train_prefs")[0] == pairs
    assert hub == [("org/name", "other"), ("org/name", "main")]
    assert problems("org/name:main:test_prefs") == [
        "- data set org/name:main:test_prefs, row 2: field 'prompt' is empty"
    ]
    assert problems("org/name:main:train")[0].endswith(
        "has no split 'train'; name one of those it has (train_prefs, test_prefs): org/name:main:train_prefs"
    )
    (problem,) = problems("org/name:train_prefs")  # which of the configurations?
    assert "cannot be loaded (ValueError: Config name is missing. Please pick one among" in problem
    assert "check the name (org/name:config:split), the network and, where it is gated" in problem
    assert capsys.readouterr().out == ""  # the plan prints NAME=value lines there


# --- formats

USER, ANSWER, OTHER = ({"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "A."), ("assistant", "B.")))
SYSTEM, EARLIER = (
    {"role": "system", "content": "S."},
    [{"role": "user", "content": "P?"}, {"role": "assistant", "content": "O."}],
)
LONGER = (("system", "S."), ("user", "P?"), ("assistant", "O."))
HH = "\n\nHuman: P?\n\nAssistant: O.\n\nHuman: Q?\n\nAssistant:"

FORMATS = {  # name → (fields, the format recognised, prompt, history)
    "plain": (GOOD, "plain", "Two plus two?", None),
    "prompt inside": ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "messages", "Q?", ()),
    "prompt inside and beside": (
        {"prompt": " Q?\n", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        "messages",
        "Q?",
        (),
    ),
    "text beside": ({"prompt": "Q?", "chosen": [ANSWER], "rejected": [OTHER]}, "messages", "Q?", ()),
    "messages beside": (
        {"prompt": [SYSTEM, *EARLIER, USER], "chosen": [ANSWER], "rejected": [OTHER]},
        "messages",
        "Q?",
        LONGER,
    ),
    "messages beside bare answers": (
        {"prompt": [SYSTEM, *EARLIER, USER], "chosen": "A.", "rejected": "B."},
        "messages",
        "Q?",
        LONGER,
    ),
    "conversation inside": (
        {
            "chosen": [SYSTEM, *EARLIER, USER, ANSWER],
            "rejected": [SYSTEM, *EARLIER, USER, {**OTHER, "tool_calls": None, "name": "x"}],
        },
        "messages",
        "Q?",
        LONGER,
    ),
    "prompt and answers that go on": (
        {"prompt": "P?", "chosen": [EARLIER[1], USER, ANSWER], "rejected": [EARLIER[1], USER, OTHER]},
        "messages",
        "Q?",
        LONGER[1:],
    ),
    "the assistant speaks first": (
        {"chosen": [EARLIER[1], USER, ANSWER], "rejected": [EARLIER[1], USER, OTHER]},
        "messages",
        "Q?",
        LONGER[2:],
    ),
    "the assistant speaks first, the prompt beside as well": (
        {"prompt": "Q?", "chosen": [EARLIER[1], USER, ANSWER], "rejected": [EARLIER[1], USER, OTHER]},
        "messages",
        "Q?",
        LONGER[2:],
    ),
    "parts of text": (
        {
            "chosen": [{**USER, "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}, ANSWER],
            "rejected": [USER, OTHER],
        },
        "messages",
        "Q?",
        (),
    ),
    "JSON in texts": (
        {"prompt": "Q?", "chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])},
        "messages",
        "Q?",
        (),
    ),
    "repeated": ({"prompt": "Q?", "chosen": "Q?A.", "rejected": "Q?B."}, "repeated", "Q?", None),
    "transcript": ({"chosen": f"{HH} A.", "rejected": f"{HH} B.\n"}, "transcript", "Q?", LONGER[1:]),
    "transcript beside": ({"prompt": HH, "chosen": " A.", "rejected": " B."}, "transcript", "Q?", LONGER[1:]),
    "transcript inside and beside": (
        {"prompt": HH, "chosen": f"{HH} A.", "rejected": f"{HH} B."},
        "transcript",
        "Q?",
        LONGER[1:],
    ),
    "null for a prompt": (
        {"prompt": None, "chosen": f"{HH} A.", "rejected": f"{HH} B."},
        "transcript",
        "Q?",
        LONGER[1:],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised(tmp_path, name):
    fields, data_format, prompt, history = FORMATS[name]
    path = write_rows(tmp_path / "a.jsonl", [fields])
    answers = ("Four.", "Five.") if name == "plain" else ("A.", "B.")
    for forced in ("auto", data_format):
        (pair,), report = T.read_pairs(path, data_format=forced)
        assert pair == T.Pair(prompt, *answers, 1, history)
        assert list(report.formats) == [data_format] and report.notices == []


def test_a_conversation_comes_through_every_kind_of_file(tmp_path):
    fields = FORMATS["conversation inside"][0]
    (expected,), _ = T.read_pairs(write_rows(tmp_path / "a.jsonl", [fields]))
    Dataset.from_list([fields]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list([fields]).save_to_disk(tmp_path / "saved")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["chosen", "rejected"], [json.dumps(fields[n]) for n in ("chosen", "rejected")]])
    for name in ("a.parquet", "saved", "a.csv"):
        (pair,), _ = T.read_pairs(tmp_path / name)
        assert (pair.content, len(pair.history)) == (expected.content, 3)


def test_a_format_can_be_forced(tmp_path):
    """The same row, four readings: what looks like messages or transcripts may be texts, and the other way round."""
    texts = {"prompt": "Q?", "chosen": json.dumps([USER, ANSWER]), "rejected": "Q? B."}
    (pair,), _ = T.read_pairs(write_rows(tmp_path / "a.jsonl", [texts]), data_format="plain")
    assert (pair.chosen, pair.history) == (texts["chosen"], None)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Q?", "chosen": "Q?A.", "rejected": "Q?B."}])
    expected = {"plain": ("Q?A.", None), "repeated": ("A.", None), "messages": ("Q?A.", ()), "auto": ("A.", None)}
    for data_format, made in expected.items():
        (pair,), _ = T.read_pairs(path, data_format=data_format)
        assert (pair.chosen, pair.history) == made
    with pytest.raises(T.InputError, match="row 1: field 'chosen' is no transcript"):
        T.read_pairs(path, data_format="transcript")


def repeating(count: int, of: int) -> list[dict]:
    """Rows of which some repeat their prompt."""
    start = [f"{n}?" if n < count else "" for n in range(of)]
    return [{"prompt": f"{n}?", "chosen": f"{s}A", "rejected": f"{s}B"} for n, s in enumerate(start)]


@pytest.mark.parametrize(("count", "read"), [(0, "A"), (1, "A"), (2, None), (3, None), (4, "A")])
def test_all_rows_repeat_the_prompt_or_most_do_not(tmp_path, count, read):
    path = write_rows(tmp_path / "a.jsonl", repeating(count, 4))
    if read:
        pairs, report = T.read_pairs(path)
        assert list(report.formats) == ["repeated" if count == 4 else "plain"]
        assert [pair.chosen for pair in pairs] == [f"{n}?A" if n < count < 4 else "A" for n in range(4)]
        return
    (problem,) = problems(path)
    assert f"in {count} of 4 rows both answers begin with the prompt; set DATA_FORMAT=plain if" in problem
    with pytest.raises(T.InputError, match=f"row {count + 1}: field 'chosen' does not begin with the prompt"):
        T.read_pairs(path, data_format="repeated")


def messages(*chosen, **more) -> dict:
    return {"chosen": list(chosen), "rejected": [USER, OTHER], **more}


MISTAKES = {  # name → (the second row, after a good one; what is said about it)
    "text beside messages": (messages() | {"chosen": "A."}, "has no message of the user right before the answer"),
    "no message": (messages(), "field 'chosen' is a list without messages"),
    "texts in the list": (
        messages("Q?", "A."),
        "message 1 of field 'chosen' is str, not an object with role and content",
    ),
    "no role": (
        messages(USER, {"content": "A."}),
        "message 2 of field 'chosen' has the role None; known are system, user, assistant",
    ),
    "other names": (messages({"from": "human", "value": "Q?"}), "message 1 of field 'chosen' has the role None"),
    "unknown role": (
        messages(USER, {**ANSWER, "role": "gpt"}),
        "has the role 'gpt'; known are system, user, assistant",
    ),
    "tool's message": (
        messages(USER, {"role": "tool", "content": "4"}, ANSWER),
        "message 2 of field 'chosen' calls a tool or is a tool's; tools and images",
    ),
    "tool call": (messages(USER, {**ANSWER, "tool_calls": [{"id": 1}]}), "message 2 of field 'chosen' calls a tool"),
    "function call": (messages(USER, {**ANSWER, "function_call": {"name": "f"}}), "calls a tool"),
    "picture": (
        messages({**USER, "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}, ANSWER),
        "message 1 of field 'chosen' holds a part of kind 'image'; tools and images",
    ),
    "no content": (
        messages(USER, {"role": "assistant", "content": None}),
        "the content of message 2 of field 'chosen' is NoneType, not a string",
    ),
    "half a surrogate": (messages(USER, {**ANSWER, "content": "\ud83d"}), "holds half a surrogate pair"),
    "role twice": (
        '{"chosen": [{"role": "user", "role": "user", "content": ""}], "rejected": []}',
        "message 1 of field 'chosen': field 'role' occurs twice",
    ),
    "content twice": (
        json.dumps(messages({**USER, "content": [{"type": "text", "text": ""}]}, ANSWER)).replace(
            '"text": ""', '"text": "", "text": ""'
        ),
        "a part of message 1 of field 'chosen': field 'text' occurs twice",
    ),
    "user at the end": (messages(USER), "field 'chosen' ends in a message of the user, not the assistant's answer"),
    "answer alone": ({"chosen": [ANSWER], "rejected": [OTHER]}, "has no field 'prompt'; it has 'chosen', 'rejected'"),
    "two answers in a row": (messages(USER, EARLIER[1], ANSWER), "has no message of the user right before the answer"),
    "late system message": (
        messages(*EARLIER, SYSTEM, USER, ANSWER),
        "has a system message after the first message; put it first",
    ),
    "empty question": (messages({**USER, "content": " \n"}, ANSWER), "the user's last message is empty"),
    "images": (
        messages(USER, ANSWER, images=["a.png"]),
        "field 'images' is not empty; tools and images are not supported",
    ),
    "tools": (messages(USER, ANSWER, tools=[{"name": "f"}]), "field 'tools' is not empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_malformed_conversation_names_row_and_field(tmp_path, name):
    bad, phrase = MISTAKES[name]
    good = messages(USER, ANSWER, images=[], tools=None)
    path = write_lines(tmp_path, json.dumps(good), bad if isinstance(bad, str) else json.dumps(bad))
    (problem,) = problems(path)
    assert problem.startswith(f"- data file {path}, row 2: ") and phrase in problem


@pytest.mark.parametrize("answer", ['[{"role": "admin"}, null]', '[{"role": "admin"}, 3]', '[{"role": 1}, "a role"]'])
def test_an_answer_that_is_json_but_no_messages_is_a_text(tmp_path, answer):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Which roles?", "chosen": answer, "rejected": "None."}])
    (pair,), report = T.read_pairs(path)
    assert pair.chosen == answer and list(report.formats) == ["plain"]


def test_an_error_of_another_process_is_the_same():
    error = T.InputError("row 9: no", "row 10: no")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "- row 9: no\n- row 10: no" and again.problems == error.problems


def test_messages_as_python_prints_them_are_an_error(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "Q?", "chosen": str([USER, ANSWER]), "rejected": str([USER, OTHER])}]
    )
    assert problems(path)[0].endswith("holds lists of messages as Python prints them; write them with json.dumps")
    assert len(T.read_pairs(path, data_format="plain")[0]) == 1


@pytest.mark.parametrize("start", ["", "Human:", "Hello.\n\nHuman: Q?\n\nAssistant:"])
def test_a_text_that_is_no_transcript(tmp_path, start):
    good = {"chosen": f"{HH} A.", "rejected": f"{HH} B."}
    path = write_rows(tmp_path / "a.jsonl", [good, {"chosen": f"{start} A.", "rejected": f"{HH} B."}])
    assert problems(path)[0].startswith(f"- data file {path}, row 2: field 'chosen' ")


def test_answers_to_different_conversations_are_dropped(tmp_path):
    """Such rows are in Anthropic's data; half of a pair would be scored after the other's question."""
    rows = [
        {"chosen": f"{HH} A.", "rejected": f"{HH} B."},
        {"chosen": f"{HH} A.", "rejected": "\n\nHuman: X?\n\nAssistant: B."},
    ]
    pairs, report = T.read_pairs(write_rows(tmp_path / "a.jsonl", rows))
    assert len(pairs) == 1 and report.describe_dropped() == "1 whose answers belong to different conversations (row 2)"


def test_a_prompt_beside_messages_that_is_none_of_them_gets_a_notice(tmp_path):
    rows = [messages(USER, ANSWER, prompt=prompt) for prompt in ("Q?", "X?", [SYSTEM, USER], [USER], 7, None)]
    pairs, report = T.read_pairs(write_rows(tmp_path / "a.jsonl", rows))
    assert [(pair.prompt, pair.history) for pair in pairs] == [("Q?", ())] * 6
    assert report.notices == [
        f"in 2 rows of {tmp_path / 'a.jsonl'} the field prompt says what no message of chosen does: the messages count"
    ]


@pytest.mark.parametrize("layout", [{"indent": 1}, {"separators": (",", ":")}])
def test_messages_may_be_json_text_of_any_layout(layout, tmp_path):
    row = {name: json.dumps([USER, answer], **layout) for name, answer in (("chosen", ANSWER), ("rejected", OTHER))}
    (pair,), report = T.read_pairs(write_rows(tmp_path / "a.jsonl", [row]))
    assert (pair.prompt, pair.history, pair.chosen) == ("Q?", (), ANSWER["content"]) and "messages" in report.formats


@pytest.mark.parametrize("prompt", ["Human: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: "])
def test_a_transcript_repeats_its_prompt_whatever_white_space_is_around_it(prompt, tmp_path):
    row = {"prompt": prompt, "chosen": "\n\nHuman: Hi\n\nAssistant: A.", "rejected": "Human: Hi\n\nAssistant: B."}
    (pair,), _ = T.read_pairs(write_rows(tmp_path / "a.jsonl", [row]))
    assert (pair.prompt, pair.history, pair.chosen, pair.rejected) == ("Hi", (), "A.", "B.")


def test_a_column_may_have_any_name(tmp_path):
    _, report = T.read_pairs(write_lines(tmp_path, json.dumps({**GOOD, "a\nb": 1, "\ud83d": 2, "c": 3})))
    assert report.describe_format().endswith(r"; columns not used: 'a\nb', '\ud83d', c")


def test_how_a_prompt_is_shown():
    assert T.Pair("Q?", "A.", "B.", 1).shown_prompt == T.Pair("Q?", "A.", "B.", 1, ()).shown_prompt == "Q?"
    assert T.Pair("Q?", "A.", "B.", 1, LONGER).shown_prompt == "system: S.\nuser: P?\nassistant: O.\nuser: Q?"


# --- several sources, weights, a share that is held out


def numbered(path, numbers, **more) -> str:
    return str(write_rows(path, [{**GOOD, "prompt": f"{n}?", **more} for n in numbers]))


def divided(**settings):
    args = T.ScriptArguments(**settings)
    return T.divide(args, {split: T.read_split(args, split) for split in args.sources})


def test_weights_say_how_often_a_pair_is_taken(tmp_path):
    a, b, c = (numbered(tmp_path / f"{name}.jsonl", range(10 * k, 10 * k + 10)) for k, name in enumerate("abc"))
    test = numbered(tmp_path / "test.jsonl", [99])
    settings = {"train_dataset_path": f"{a}*0.5,{b}*2,{c}*1.3", "test_dataset_path": test}
    pairs, reports = divided(**settings)
    counts = collections.Counter(int(pair.prompt[:-1]) for pair in pairs["train"])
    of = [sorted(counts[n] for n in range(10 * k, 10 * k + 10)) for k in range(3)]
    assert of == [[0] * 5 + [1] * 5, [2] * 10, [1] * 7 + [2] * 3]
    train = reports["train"]
    assert (train.usable, train.describe_changes()) == (38, "dropped: none; weights add 8")  # −5 + 10 + 3
    assert str(train) == f"data set {settings['train_dataset_path']}"
    assert divided(**settings) == (pairs, reports)
    assert divided(**settings, seed=1)[0] != pairs
    assert len(divided(train_dataset_path=f"{a}*0.01", test_dataset_path=test)[0]["train"]) == 1  # at least one


def test_a_share_of_the_prompts_is_held_out(tmp_path):
    """By prompt, whatever the white space, the form, the file, the order and the seed; weights come after."""
    rows = [{**GOOD, "prompt": f"{n} ?"} for n in range(20)] + [
        {**GOOD, "chosen": "4", "prompt": f"{n}\n?"} for n in range(20)
    ]
    ask = [{"role": "user", "content": f"{n} ?"} for n in range(20)]
    talks = [{"chosen": [m, ANSWER], "rejected": [m, OTHER]} for m in ask]
    path, other = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", talks)
    pairs, reports = divided(train_dataset_path=f"{path}*2,{other}", test_share=0.15)
    held = {pair.prompt_key for pair in pairs["test"]}
    assert len(held) == 3 and len(pairs["test"]) == 9  # 0.15 × 20 prompts, three rows each
    assert held.isdisjoint(pair.prompt_key for pair in pairs["train"])
    assert len(pairs["train"]) == 2 * 34 + 17
    train, test = reports["train"], reports["test"]
    assert (train.rows, train.held_out, train.repeated, train.usable) == (60, 9, 34, 85)
    assert (test.rows, test.prompts, test.usable, str(test.path)) == (9, 3, 9, f"held out of {train.path}")
    write_rows(tmp_path / "a.jsonl", rows[::-1])
    again, _ = divided(train_dataset_path=f"{other},{path}", test_share=0.15, seed=7)
    assert {pair.prompt_key for pair in again["test"]} == held
    more, _ = divided(train_dataset_path=str(path), test_share=0.3)
    assert held < {pair.prompt_key for pair in more["test"]}


@pytest.mark.parametrize(
    ("share", "prompts", "held"), [(0.001, 9, 1), (0.5, 9, 4), (0.999, 9, 8), (0.1, 2, 1), (0.9, 2, 1)]
)
def test_how_many_prompts_are_held_out(share, prompts, held):
    """At least one, and never all; 0.5 × 9 is rounded to the even 4."""
    assert len(T.held_out_prompts({str(n) for n in range(prompts)}, share)) == held


def test_the_history_is_part_of_the_prompt():
    keys = [T.Pair("Q?", "A.", "B.", 1, history).prompt_key for history in (None, (), LONGER, LONGER[1:])]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_test_prompts_that_are_trained_on_get_a_notice(tmp_path):
    train, test = numbered(tmp_path / "a.jsonl", range(5)), numbered(tmp_path / "b.jsonl", range(3, 9))
    _, reports = divided(train_dataset_path=train, test_dataset_path=test)
    assert reports["test"].notices == ["2 of 6 test prompts occur in the training data, too"]
    _, reports = divided(train_dataset_path=train, test_dataset_path=numbered(tmp_path / "b.jsonl", range(5, 9)))
    assert reports["test"].notices == []


def test_the_digest_is_of_what_the_pairs_say(tmp_path):
    plain = write_rows(tmp_path / "a.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "b.parquet")
    digest = T.pairs_digest(T.read_pairs(plain)[0])
    assert T.pairs_digest(T.read_pairs(tmp_path / "b.parquet")[0]) == digest
    pairs = T.read_pairs(plain)[0]
    changes = ({"prompt": "x"}, {"chosen": "x"}, {"rejected": "x"}, {"history": ()}, {"history": LONGER})
    changed = [T.pairs_digest([dataclasses.replace(pairs[0], **change), *pairs[1:]]) for change in changes]
    assert len({digest, T.pairs_digest(pairs[1:]), T.pairs_digest(pairs[::-1]), *changed}) == 8


def test_the_plan_says_what_was_read_and_how(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{**GOOD, "prompt": f"{n}?", "id": n} for n in range(10)])
    args = T.ScriptArguments(train_dataset_path=f"{path}*2", test_share=0.2)
    plan = T.describe_data(args, divided(**dataclasses.asdict(args))[1])
    assert plan == {
        "training data": f"{path}, 16 pairs (dropped: none; held out for the test: 2; weights add 8)",
        "test data": "held out: 2 pairs of 2 prompts (TEST_SHARE 0.2)",
        "data format": "plain, texts prompt, chosen, rejected; columns not used: id",
    }
    talks = write_rows(tmp_path / "b.jsonl", [{**FORMATS["text beside"][0], "prompt": "0?"}])
    args.test_dataset_path = str(talks)
    plan = T.describe_data(args, divided(**dataclasses.asdict(args))[1])
    assert plan["test data"] == f"{talks}, 1 pairs (dropped: none)"
    assert plan["data format"] == (
        "train: plain, texts prompt, chosen, rejected; columns not used: id; "
        "test: messages, chosen and rejected are lists of messages"
    )
    assert plan["data notice"] == (
        "1 of 1 test prompts occur in the training data, too; "
        "TEST_SHARE has no part: the test data is not held out of the training data"
    )
