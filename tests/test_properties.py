"""Properties that hold for any input: random texts, prefixes, limits, pairs, ranks and files instead of chosen ones."""

import collections
import copy
import io
import itertools
import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import test_tokenise
import torch
from conftest import CHATML, make_model
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_forward import CLOSE, pack, padded_logps, padded_soft_logps
from test_tokenise import DROPS, END, HEAD, REFUSES, TAIL, TEMPLATES, adds_bos, ids, template_ids, variant
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import train_with_preference_prompt as T

joins_newlines = test_tokenise.joins_newlines  # the fixture, for this file too


def examples(count: int):
    """The same random examples in every run."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
    )


PIECES = ["a", "Two plus two?", " ", "\n", "\n\n", "\t ", "\r\n", "'s", "12345678", "word " * 12, "user", "system"]
PIECES += ["你好，", "番茄", "🥚", "🇨🇭", "e\u0301", "\u0301", "\u200d", "\u2028", "\x85", "\xa0", "\x00", "\ufeff"]
PIECES += ["<|im_end|>", "<|im_start|>", "<|im_end", "|>", "</s>", "{{ x }}", "{% if %}"]
NOT_BLANK = [piece for piece in PIECES if piece.strip()]
letters = st.characters(codec="utf-8", exclude_characters=T.PLACEHOLDER)  # which PREFERENCE_TEXT may not hold
texts = st.lists(st.sampled_from(PIECES) | st.text(letters, max_size=6), max_size=10).map("".join)
words = st.tuples(texts, st.sampled_from(NOT_BLANK), texts).map("".join)
prompts = words | words.map(lambda text: f"{text}{T.PLACEHOLDER}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# --- data


answer_pairs = st.tuples(texts, texts) | texts.map(lambda text: (text, f" {text}\n"))  # also the same but for spaces
rows_with_more = st.builds(
    lambda prompt, answers, more: {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **more},
    prompts,
    answer_pairs,
    st.fixed_dictionaries(
        {}, optional={"id": st.integers(), "score": st.none() | st.floats(), "tags": st.lists(texts)}
    ),
)


@examples(60)
@given(
    rows=st.lists(st.tuples(rows_with_more, st.integers(0, 2), st.booleans()), min_size=1, max_size=6),
    newline=st.sampled_from(["\n", "\r\n", " \n"]),
    start=st.sampled_from(["", "\ufeff", "\ufeff\n", "\r\n"]),
    end=st.sampled_from(["", "\n", "\n\n \t\n"]),
)
def test_rows_are_read_as_they_were_written(folder, rows, newline, start, end):
    """Whatever the line ends, blank lines, escapes and further fields are; row numbers count every line from 1."""
    text, numbers = start, []
    for row, blank_lines, escaped in rows:
        text += newline * blank_lines
        numbers.append(1 + text.count("\n"))
        text += json.dumps(row, ensure_ascii=escaped) + newline
    path = folder / "pairs.jsonl"
    path.write_bytes((text.removesuffix(newline) + end).encode())
    expected = [
        T.Pair(row["prompt"], row["chosen"], row["rejected"], number)
        for number, (row, *_) in zip(numbers, rows, strict=True)
    ]
    empty = [pair.row for pair in expected if not (pair.chosen.strip() and pair.rejected.strip())]
    same = [pair.row for pair in expected if pair.row not in empty and pair.chosen.strip() == pair.rejected.strip()]
    usable = [pair for pair in expected if pair.row not in empty + same]
    if not usable:
        with pytest.raises(T.InputError, match=f"none of its {len(rows)} rows is usable"):
            T.read_pairs(path, data_format="plain")
        return
    pairs, report = T.read_pairs(path, data_format="plain")  # else answers that repeat their prompt might lose it
    assert pairs == usable
    dropped = [[row for _, row in places] for places in report.dropped.values()]
    assert sorted(dropped) == sorted(rows for rows in (empty, same) if rows)
    assert (report.rows, report.usable) == (len(rows), len(usable))


GOOD = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "五。🥚"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just("\ud83d"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(T.PAIR_FIELDS), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, whole: bytes):
    """A valid file with some bytes changed, put in or taken out, or its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


lines = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=4).map(lambda raw: b'{"prompt": "a%s", "chosen": "a", "rejected": "b"}' % raw),
    damaged(json.dumps(GOOD, ensure_ascii=False).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({name: json_values for name in T.PAIR_FIELDS}).map(lambda row: json.dumps(row).encode()),
)


@examples(300)
@given(line=lines.map(lambda line: line.replace(b"\n", b"")))
@example(line=b'{"prompt": ' + b"[" * 100_000)
@example(line=b'{"prompt": ' + b"1" * 5000 + b"}")
@example(line=b'{"%s": 1}' % (b"a" * 5000))
@example(line=b'{"%s": 1, "%s": 2}' % (b"a" * 5000, b"a" * 5000))
def test_any_line_is_a_pair_or_an_error_that_names_its_row(folder, line):
    """No bytes in a line raise anything else, and none of them hide or change the rows around it; errors are brief."""
    try:
        pair = T.Pair(*T.parse_plain(T.checked_record(T.parse_line(line)))[:3], row=2)
    except ValueError as error:
        pair, problem = None, str(error)
    else:
        assert pair == T.Pair(*map(json.loads(line.decode()).get, T.PAIR_FIELDS), row=2)
    path, good = folder / "pairs.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    around = [T.Pair(**GOOD, row=1), T.Pair(**GOOD, row=3)]
    if pair is None and line.strip():
        with pytest.raises(T.InputError) as caught:
            T.read_pairs(path)
        assert str(caught.value).startswith(f"- data file {path}, row 2: ")
        assert len(caught.value.problems) == 1
        assert 0 < len(problem.strip()) < 1000 and problem.isprintable()
    else:
        pairs, report = T.read_pairs(path)
        teaches = (
            pair and pair.chosen.strip() and pair.rejected.strip() and pair.chosen.strip() != pair.rejected.strip()
        )
        assert pairs == [around[0], *([pair] if teaches else []), around[1]]
        assert sum(report.dropped.values(), []) == ([(str(path), 2)] if pair and not teaches else [])
        assert report.rows == 2 + bool(line.strip())


# --- prompts and answers
#
# The tokenizer of conftest merges nothing across white space and special tokens, so that the ids of a rendered prompt
# are those of its parts, and the expected ids can be put together from the parts.

SYSTEM = "<|im_start|>system\n{}" + END + "\n"
SETUPS = {  # name → (template, adds a BOS, what stands before the content, the same with the prefix {}, after it)
    "ChatML": (CHATML, False, HEAD, SYSTEM + HEAD, TAIL),
    "contains the BOS": (
        "{{ '<|endoftext|>' }}" + CHATML,
        True,
        "<|endoftext|>" + HEAD,
        "<|endoftext|>" + SYSTEM + HEAD,
        TAIL,
    ),
    "default system message": (
        TEMPLATES["default system message"][0],
        False,
        SYSTEM.format("You are helpful.") + HEAD,
        SYSTEM + HEAD,
        TAIL,
    ),
    "refuses the system role": (REFUSES, False, HEAD, HEAD + "{}\n\n", TAIL),
    "drops the system role": (DROPS, True, HEAD, HEAD + "{}\n\n", TAIL),
    "no template": (None, False, "", "{}\n\n", ""),
    "no template, BOS": (None, True, "<|endoftext|>", "<|endoftext|>{}\n\n", ""),
}


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    with_bos = adds_bos(tokenizer)
    made = {name: variant(with_bos if bos else tokenizer, template) for name, (template, bos, *_) in SETUPS.items()}
    return made.__getitem__  # short in a report


def tokenised(tokenizer, pair, prefix, max_prompt_length=10_000, max_length=20_000):
    report = T.DataReport(Path("memory"), rows=1)
    return T.PairTokenizer(tokenizer, prefix, max_length, max_prompt_length)(pair, report), report


def answer_ids(tokenizer, answer: str) -> list[int]:
    """Special tokens spelt out are text; an end token that the answer brings is the one it gets."""
    if answer.rstrip().endswith(END):
        answer = answer.rstrip()[: -len(END)]
    return [*tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids, 2]


short = st.sampled_from(["", "a", "user", "s", "?", "0"])
prefixes = st.builds(T.Prefix, text=short | words) | st.builds(T.Prefix, num_virtual_tokens=st.integers(0, 40))


@pytest.mark.parametrize("name", SETUPS)
@examples(70)
@given(
    prefix=prefixes,
    prompt=prompts,
    answers=st.tuples(words, words),
    prompt_room=st.integers(1, 40),
    answer_room=st.integers(1, 40),
    common=st.integers(0, 1),
)
def test_ids_of_a_pair(tokenizers, name, prefix, prompt, answers, prompt_room, answer_room, common):
    """Prompt ids are before + content + after, both conditions with the same content and answers.

    Of a long prompt the newest content is kept, and all of the template; the prefix is kept whole and counts against no
    limit; an answer is cut at the end and ends in exactly one end token if it is not cut; a pair whose answers are
    empty or the same once cut is dropped and counted.
    """
    tokenizer, (_, _, before, guided_before, after) = tokenizers(name), SETUPS[name]
    before_ids, content_ids, after_ids = ids(tokenizer, before), ids(tokenizer, prompt), ids(tokenizer, after)
    guided_ids = ids(tokenizer, guided_before.format(prefix.text)) if prefix.text else before_ids
    limit = len(before_ids) + prompt_room + len(after_ids)
    kept = content_ids[max(0, len(content_ids) - prompt_room) :]
    chosen, rejected = answers[0], answers[0] + answers[1] if common else answers[1]
    full = [answer_ids(tokenizer, answer) for answer in (chosen, rejected)]

    done, report = tokenised(tokenizer, T.Pair(prompt, chosen, rejected, 7), prefix, limit, limit + answer_room)

    plain = before_ids + kept + after_ids
    room = limit + answer_room - len(plain)
    cut = [answer[:room] for answer in full]
    assert room >= answer_room >= 1
    if min(map(len, full)) == 1 or cut[0] == cut[1]:
        assert done is None and list(report.dropped.values()) == [[("", 7)]] and report.usable == 0
        return
    virtual = [-1 - k for k in range(prefix.num_virtual_tokens)]
    assert done.prompt_ids == plain
    assert done.pref_prompt_ids == virtual + guided_ids + kept + after_ids
    assert [done.chosen_ids, done.rejected_ids] == cut and done.source.row == 7
    assert len(done.prompt_ids) <= limit
    for ids_of_answer, whole in zip((done.chosen_ids, done.rejected_ids), full, strict=True):
        assert 1 <= len(ids_of_answer) <= limit + answer_room - len(done.prompt_ids)
        specials = [i for i in ids_of_answer if i < 3]  # 2 is the end token, 0 and 1 are the other special tokens
        assert specials == ([2] if len(whole) <= room else []) and (len(whole) > room or ids_of_answer[-1] == 2)
    assert report.truncated_prompts == (len(content_ids) > prompt_room)
    assert report.truncated_answers == sum(len(answer) > room for answer in full)
    assert (report.usable, report.dropped) == (1, {})


@pytest.mark.parametrize("name", SETUPS)
@examples(25)
@given(prefix=prefixes, prompt=prompts, answer=words)
def test_decoding_gives_the_text_back(tokenizers, name, prefix, prompt, answer):
    """Uncut, both prompts and the answer are the rendered text, letter for letter."""
    tokenizer, (_, _, before, guided_before, after) = tokenizers(name), SETUPS[name]
    done, _ = tokenised(tokenizer, T.Pair(prompt, "x", answer + "!", 1), prefix)
    shown = [tokenizer.decode([i for i in found if i >= 0]) for found in (done.prompt_ids, done.pref_prompt_ids)]
    guided_before = guided_before.format(prefix.text) if prefix.text else before
    assert shown == [before + prompt + after, guided_before + prompt + after]
    assert tokenizer.decode(done.rejected_ids) == answer + "!" + END


@pytest.fixture(scope="module")
def with_templates(tokenizer):
    return {name: variant(tokenizer, template) for name, (template, _) in TEMPLATES.items()}.__getitem__


@pytest.mark.parametrize("name", TEMPLATES)
@examples(25)
@given(prompt=prompts, text=short.filter(bool) | words)
def test_prompts_are_those_of_the_tokenizers_own_template(with_templates, name, prompt, text):
    """`apply_chat_template` gives the same ids, in both conditions."""
    tokenizer, user = with_templates(name), {"role": "user", "content": prompt}
    guided = {
        "system": [{"role": "system", "content": text}, user],
        "user": [{"role": "user", "content": f"{text}\n\n{prompt}"}],
    }[TEMPLATES[name][1]]
    done, _ = tokenised(tokenizer, T.Pair(prompt, "a", "b", 1), T.Prefix(text))
    assert done.prompt_ids == template_ids(tokenizer, [user])
    assert done.pref_prompt_ids == template_ids(tokenizer, guided)


@pytest.mark.parametrize("name", SETUPS)
@examples(25)
@given(
    prompt=prompts,
    prefix=prefixes,
    own=st.tuples(st.booleans(), st.booleans()),
    room=st.integers(1, 50),
)
def test_one_bos_at_most(tokenizers, name, prompt, prefix, own, room):
    """One where the tokenizer or the template adds it, else none; also where prompt or prefix bring their own."""
    tokenizer, (template, adds, before, _, after) = tokenizers(name), SETUPS[name]
    if not template and adds:
        prompt = "<|endoftext|>" * own[0] + prompt
        prefix = T.dataclasses.replace(prefix, text="<|endoftext|>" * (own[1] and prefix.text != "") + prefix.text)
    limit = len(ids(tokenizer, before + after)) + room
    done, _ = tokenised(tokenizer, T.Pair(prompt, "a", "b<|endoftext|>", 1), prefix, limit, limit + 20)
    has_one = [0] * ("<|endoftext|>" in before)
    for found in (done.prompt_ids, done.pref_prompt_ids):
        tokens = [i for i in found if i >= 0]
        assert [i for i in tokens if i == 0] == has_one == tokens[: len(has_one)]
    assert 0 not in done.chosen_ids + done.rejected_ids


@pytest.fixture(scope="module")
def plain_models(tokenizer):
    """Two models with their own attention."""
    return tuple(make_model(kind, len(tokenizer)) for kind in ("llama", "qwen2"))


@examples(30)
@given(
    name=st.sampled_from(sorted(SETUPS)),
    prefix=st.sampled_from([T.Prefix(), T.Prefix(""), T.Prefix(num_virtual_tokens=0)]),
    prompts=st.lists(prompts, min_size=1, max_size=3),
    answers=st.tuples(words, words),
    room=st.integers(1, 30),
)
def test_a_prefix_of_no_tokens_changes_nothing(tokenizers, plain_models, name, prefix, prompts, answers, room):
    """The ids are the plain ones, and so the log-probabilities are the same bit for bit."""
    tokenizer, (_, _, before, _, after) = tokenizers(name), SETUPS[name]
    limit = len(ids(tokenizer, before + after)) + room
    pairs = [tokenised(tokenizer, T.Pair(prompt, *answers, 1), prefix, limit, 2 * limit)[0] for prompt in prompts]
    assume(None not in pairs)
    assert all(pair.pref_prompt_ids == pair.prompt_ids for pair in pairs)
    dataset = T.PairDataset(pairs)
    batch = T.collate_pairs([dataset[(index, 1.0)] for index in range(len(pairs))])
    model = T.enable_packed_forward(copy.deepcopy(plain_models[0]))
    assert torch.equal(T.teacher_logps(model, batch["base"]), T.teacher_logps(model, batch["pref"]))


# --- tokenizers whose tokens span template and content

ASCII = st.text(alphabet="user\n ab", min_size=1, max_size=12).filter(str.strip)


def merging_tokenizer(*merges: tuple[str, str]):
    """A byte-level BPE without any splitting; Ċ is a newline and Ġ a space."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, additional_special_tokens=["<|im_start|>"])
    made.chat_template = CHATML
    return made


@st.composite
def random_merges(draw):
    """Merges that join what stands next to the content with it."""
    tokens, merges = list("userabĊĠ"), []
    for _ in range(draw(st.integers(0, 8))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges and len("".join(pair)) <= 5:
            merges.append(pair)
            tokens.append("".join(pair))
    return merges


@examples(120)
@given(merges=random_merges(), prompt=ASCII, text=ASCII, limit=st.integers(0, 30))
@example(merges=[("Ċ", "Ċ"), ("r", "Ċ"), ("e", "rĊ"), ("s", "erĊ")], prompt="\nab", text="a", limit=3)
def test_tokens_that_span_template_and_content(merges, prompt, text, limit):
    """Uncut, the ids are the template's own; cut, the decoded prompt is template, newest content, template.

    Both conditions have the same ids after the template's part before the content.
    """
    tokenizer = merging_tokenizer(*merges)
    limit += len(ids(tokenizer, HEAD)) + len(ids(tokenizer, TAIL)) + 1
    user = {"role": "user", "content": prompt}
    done, report = tokenised(tokenizer, T.Pair(prompt, "a", "b", 1), T.Prefix(text), limit, limit + 9)
    whole = template_ids(tokenizer, [user])
    assert len(done.prompt_ids) <= limit
    if len(whole) <= limit:
        assert (done.prompt_ids, report.truncated_prompts) == (whole, 0)
        assert done.pref_prompt_ids == template_ids(tokenizer, [{"role": "system", "content": text}, user])
        return
    shown, guided = tokenizer.decode(done.prompt_ids), tokenizer.decode(done.pref_prompt_ids)
    assert report.truncated_prompts == 1
    assert shown.startswith(HEAD) and shown.endswith(TAIL) and guided == SYSTEM.format(text) + shown
    content = shown[len(HEAD) : -len(TAIL)]
    assert content and prompt.endswith(content) and len(content) < len(prompt)
    shared = len(done.prompt_ids) - len(ids(tokenizer, HEAD))
    assert done.prompt_ids[-shared:] == done.pref_prompt_ids[-shared:]


@examples(60)
@given(prompt=prompts, text=words, kept=st.integers(1, 60))
def test_newlines_that_join(joins_newlines, prompt, text, kept):
    """With the splitting of Qwen2's and Llama 3's tokenizers: the template's own ids, cut only within the content."""
    user = {"role": "user", "content": prompt}
    limit = len(ids(joins_newlines, HEAD)) + kept + len(ids(joins_newlines, TAIL))
    done, report = tokenised(joins_newlines, T.Pair(prompt, "a", "b", 1), T.Prefix(text), limit, limit + 9)
    whole = template_ids(joins_newlines, [user])
    guided = template_ids(joins_newlines, [{"role": "system", "content": text}, user])
    assert report.truncated_prompts == (len(whole) > limit)
    if len(whole) <= limit:
        assert (done.prompt_ids, done.pref_prompt_ids) == (whole, guided)
    else:
        before, tail = ids(joins_newlines, HEAD), kept + len(ids(joins_newlines, TAIL))
        assert done.prompt_ids == before + whole[-tail:]
        assert done.pref_prompt_ids == ids(joins_newlines, SYSTEM.format(text)) + done.prompt_ids


# --- packed rows

some_ids = st.lists(st.integers(3, 399), min_size=1, max_size=7)
triples = st.tuples(some_ids, some_ids, some_ids)
pair_lists = st.lists(triples, min_size=1, max_size=5)


def as_pairs(found, size: int = 0) -> list:
    """Tokenised pairs of these ids, the prefixed prompt with `size` soft embeddings."""
    return [T.TokenizedPair(p, [-1 - k for k in range(size)] + p, c, r, T.Pair("", "", "", 1)) for p, c, r in found]


@examples(200)
@given(found=pair_lists, size=st.integers(0, 4))
def test_a_packed_row_holds_every_token_once_and_scores_every_answer_token_once(found, size):
    """Trees tile the row; trunk and branches hold their ids, positions count on from the trunk in both branches; each
    answer token is scored once, where the token before it stands."""
    row = T.pack_row((pair.pref_prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in as_pairs(found, size))
    (row_ids,), (positions,) = row.input_ids.tolist(), row.position_ids.tolist()
    assert [tree.start for tree in row.trees] + [len(row_ids)] == [0] + [tree.end for tree in row.trees]
    expected = []  # (where it is predicted, the token, its answer)
    for number, (tree, (prompt, chosen, rejected)) in enumerate(zip(row.trees, found, strict=True)):
        trunk = list(range(-1, -1 - size, -1)) + prompt
        assert row_ids[tree.start : tree.chosen_start] == trunk
        assert positions[tree.start : tree.chosen_start] == list(range(len(trunk)))
        branches = ((chosen, tree.chosen_start, tree.rejected_start), (rejected, tree.rejected_start, tree.end))
        for side, (answer, start, end) in enumerate(branches):
            assert row_ids[start:end] == answer[:-1]
            assert positions[start:end] == [len(trunk) + step for step in range(len(answer) - 1)]
            places = [tree.chosen_start - 1, *range(start, end)]  # the prompt's last token, then the answer's own
            expected += [(place, token, 2 * number + side) for place, token in zip(places, answer, strict=True)]
    scored = zip(row.score_positions.tolist(), row.target_ids.tolist(), row.answer_index.tolist(), strict=True)
    assert sorted(scored) == sorted(expected)


@pytest.fixture(scope="module")
def scorers(plain_models):
    """For each model: itself, the same with packed rows, and its soft prompt."""
    made = []
    for model in plain_models:
        start = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)) * 0.3
        soft = nn.Embedding.from_pretrained(start)
        made.append((model, T.enable_packed_forward(copy.deepcopy(model), soft), soft))
    return made.__getitem__


@examples(50)
@given(found=pair_lists, size=st.integers(0, 6), which=st.integers(0, 1), data=st.data())
def test_packed_logps_are_the_padded_ones(scorers, found, size, which, data):
    """For any lengths, with and without a soft prompt; whatever stands in the row beside a pair, in whatever order."""
    model, packed, soft = scorers(which)
    pairs = as_pairs(found, size)
    with torch.no_grad():
        expected = padded_logps(model, pairs)
        expected_soft = padded_soft_logps(model, pairs, soft.weight[:size])
    torch.testing.assert_close(T.teacher_logps(packed, pack(pairs)), expected, **CLOSE)
    torch.testing.assert_close(T.teacher_logps(packed, pack(pairs, "pref_prompt_ids")), expected_soft, **CLOSE)
    order = data.draw(st.permutations(range(len(pairs))))
    cut = data.draw(st.integers(1, len(pairs)))
    for part in (order[:cut], order[cut:]):
        if part:
            logps = T.teacher_logps(packed, pack([pairs[index] for index in part], "pref_prompt_ids"))
            torch.testing.assert_close(logps, expected_soft[list(part)], **CLOSE)


def counted_on(row):
    """The same row, the rejected branch's positions going on from the chosen one's."""
    positions = torch.cat([torch.arange(tree.end - tree.start) for tree in row.trees])
    return T.dataclasses.replace(row, position_ids=positions[None])


def leaking_branches(row):
    """The same row, the rejected branch seeing the chosen one."""
    return T.dataclasses.replace(row, trees=tuple(tree._replace(rejected_start=tree.end) for tree in row.trees))


def joined_pairs(row):
    """The same row, every pair's rejected branch seeing all pairs before it (the number of trees stays)."""
    length = row.trees[-1].end
    empty = [T.Tree(length, length, length, length)] * (len(row.trees) - 1)
    return T.dataclasses.replace(row, trees=(T.Tree(0, length, length, length), *empty))


distinct_ids = st.lists(st.integers(3, 399), min_size=4, max_size=7, unique=True)


@pytest.mark.parametrize("wrong", [counted_on, leaking_branches, joined_pairs])
@examples(15)
@given(found=st.lists(st.tuples(distinct_ids, distinct_ids, distinct_ids), min_size=2, max_size=4))
def test_negative_control_wrong_rows_have_other_logps(scorers, wrong, found):
    """What the comparison with padded rows must notice: a rejected answer's number is off, in every example."""
    for model, packed, _ in map(scorers, (0, 1)):
        pairs = as_pairs(found)
        with torch.no_grad():
            expected = padded_logps(model, pairs)[:, 1]
        logps = T.teacher_logps(packed, wrong(pack(pairs)))[:, 1]
        assert ((logps - expected).abs() > 100 * CLOSE["rtol"] * expected.abs()).any()


# --- dealing pairs out

deals = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 300), min_size=1, max_size=60),
        "pairs_per_update": st.integers(1, 20),
        "pairs_per_forward": st.integers(1, 20),
        "world_size": st.integers(1, 6),
        "seed": st.none() | st.integers(0, 2**32 - 1),
    }
)


def dealt(world_size: int, epoch: int, **options) -> list:
    """What each rank gets: forwards of (index, weight)."""
    ranks = []
    for rank in range(world_size):
        sampler = T.PairSampler(rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


def update_sets(ranks, pairs_per_update: int, pairs_per_forward: int) -> list[list[int]]:
    """The pairs of each update that count, of all ranks, sorted."""
    forwards, updates = math.ceil(pairs_per_update / pairs_per_forward), []
    for start in range(0, len(ranks[0]), forwards):
        items = itertools.chain.from_iterable(itertools.chain(*rank[start : start + forwards]) for rank in ranks)
        updates.append(sorted(index for index, weight in items if weight))
    return updates


@examples(150)
@given(deal=deals, epoch=st.integers(0, 3), other_forward=st.integers(1, 20))
def test_every_pair_is_dealt_once(deal, epoch, other_forward):
    """Each pair counts once an epoch; ranks have as many forwards; fillers weigh 0 and stand where there are too few
    pairs; an update's pairs are those of one rank with all its pairs, whatever the pairs per forward."""
    ranks = dealt(epoch=epoch, **deal)
    items = [item for rank in ranks for forward in rank for item in forward]
    size, num_pairs = deal["pairs_per_update"] * deal["world_size"], len(deal["lengths"])
    assert sorted(index for index, weight in items if weight == 1.0) == list(range(num_pairs))
    assert all(weight in (0.0, 1.0) for _, weight in items)
    assert len({len(rank) for rank in ranks}) == 1
    assert all(1 <= len(forward) <= deal["pairs_per_forward"] for rank in ranks for forward in rank)
    rest, last = num_pairs % size, 0
    if rest:
        last = deal["world_size"] * math.ceil(math.ceil(rest / deal["world_size"]) / deal["pairs_per_forward"])
    per_update = deal["world_size"] * math.ceil(deal["pairs_per_update"] / deal["pairs_per_forward"])
    fillers = num_pairs // size * max(0, per_update - size) + max(0, last - rest)
    assert len(items) - num_pairs == fillers

    updates = update_sets(ranks, deal["pairs_per_update"], deal["pairs_per_forward"])
    others = dealt(epoch=epoch, **{**deal, "pairs_per_forward": other_forward})
    assert update_sets(others, deal["pairs_per_update"], other_forward) == updates
    alone = dealt(epoch=epoch, **{**deal, "pairs_per_update": size, "world_size": 1})
    assert update_sets(alone, size, deal["pairs_per_forward"]) == updates
    assert [len(update) for update in updates] == [size] * (num_pairs // size) + [rest] * (rest > 0)


@examples(40)
@given(deal=deals, epoch=st.integers(0, 3))
def test_the_order_is_a_matter_of_seed_and_epoch(deal, epoch):
    """Dealt again it is the same; without a seed it is the data set's; another epoch's is another."""
    alone = {**deal, "world_size": 1, "pairs_per_update": 1}  # so that forwards show the order
    order = [index for forward in dealt(epoch=epoch, **alone)[0] for index, _ in forward]
    torch.manual_seed(epoch)
    assert [index for forward in dealt(epoch=epoch, **alone)[0] for index, _ in forward] == order
    if deal["seed"] is None:
        assert order == list(range(len(order)))
    elif len(order) > 20:  # by chance once in 20! times
        assert order != [index for forward in dealt(epoch=epoch + 1, **alone)[0] for index, _ in forward]


# --- soft prompts

KEYS = (
    "prompt_embeddings",
    "embeddings",
    "weight",
    "prompt_encoder.default.embedding.weight",
    "a.prompt_encoder.x.embedding.weight",
)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


EIGHTHS = st.sampled_from([n / 8 for n in range(-8, 9)])  # three significant bits: exact in every type
NUMBERS = {torch.float32: st.floats(width=32, allow_nan=False, allow_infinity=False)}
NUMBERS[torch.float64] = NUMBERS[torch.float32]


@st.composite
def soft_prompts(draw):
    """A type, and values (K, H) in fp32 that it has exactly."""
    size, width, kind = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.sampled_from(FLOATS))
    numbers = st.lists(NUMBERS.get(kind, EIGHTHS), min_size=size * width, max_size=size * width)
    return kind, torch.tensor(draw(numbers), dtype=torch.float32).view(size, width)


def zip_file(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def legacy_file(value) -> bytes:
    torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def safetensors_file(value) -> bytes:
    return safetensors.torch.save(value if isinstance(value, dict) else {"prompt_embeddings": value})


FORMATS = {"soft.pt": zip_file, "legacy.pt": legacy_file, "soft.safetensors": safetensors_file}


@examples(120)
@given(
    typed=soft_prompts(),
    key=st.sampled_from(KEYS) | st.none(),
    file=st.sampled_from(sorted(FORMATS)),
    layout=st.sampled_from(["contiguous", "transposed", "part", "one"]),
    with_size=st.booleans(),
    in_folder=st.booleans(),
)
def test_soft_prompts_are_read_as_they_were_written(folder, typed, key, file, layout, with_size, in_folder):
    """In any floating-point type, format and layout, under any accepted key: the same numbers in fp32, (K, H)."""
    kind, soft = typed
    assume(kind.itemsize > 1 or file != "legacy.pt")  # torch's older format has no 8-bit types
    expected = soft[:1] if layout == "one" else soft
    value = {
        "contiguous": soft,
        "transposed": soft.T.contiguous().T,
        "part": torch.cat((-soft, soft, -soft))[len(soft) : 2 * len(soft)],
        "one": soft[0],
    }[layout].to(kind)
    value = value.contiguous() if file == "soft.safetensors" else value  # which has no strides
    content = FORMATS[file](value if key is None else {"more": torch.zeros_like(value), key: value})
    (folder / file).write_bytes(content)
    path = folder / file
    if in_folder:
        path = folder / "adapter"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text('{"peft_type": "P_TUNING"}')
        for name in T.ADAPTER_FILES:
            (path / name).unlink(missing_ok=True)
        (path / T.ADAPTER_FILES[file != "soft.safetensors"]).write_bytes(content)
    found = T.read_soft_prompt(str(path), soft.shape[1] if with_size else None)
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, expected)


@examples(60)
@given(
    numbers=st.lists(st.floats() | st.sampled_from([math.nan, math.inf, 1e300, -1e39]), min_size=4, max_size=4),
    kind=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    file=st.sampled_from(sorted(FORMATS)),
)
def test_numbers_that_are_not_finite_are_refused(folder, numbers, kind, file):
    """A soft prompt is read if and only if fp32 has all its numbers; the error says how many it has not."""
    soft = torch.tensor([numbers], dtype=torch.float64).to(kind)
    (folder / file).write_bytes(FORMATS[file](soft))
    not_finite = sum(not abs(number) < 2.0**128 for number in soft.float()[0].tolist())
    if not_finite:
        with pytest.raises(T.InputError, match=f"{not_finite} of its 4 numbers are not finite in fp32"):
            T.read_soft_prompt(str(folder / file), 4)
    else:
        assert torch.equal(T.read_soft_prompt(str(folder / file), 4), soft.float())


@examples(100)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    kind=st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64]),
    key=st.sampled_from(KEYS) | st.none() | st.just("any"),
    hidden_size=st.none() | st.integers(1, 3),
)
def test_only_a_table_as_wide_as_the_model_is_a_soft_prompt(folder, shape, kind, key, hidden_size):
    """Floating-point, one or two dimensions, none of them 0, the last one the model's hidden size if that is known."""
    value = torch.zeros(shape).to(kind)
    (folder / "soft.pt").write_bytes(zip_file(value if key is None else {key: value}))
    if kind in FLOATS and len(shape) in (1, 2) and 0 not in shape and hidden_size in (None, shape[-1]):
        found = T.read_soft_prompt(str(folder / "soft.pt"), hidden_size)
        assert torch.equal(found, torch.zeros([1, 1, *shape][-2:]))
    else:
        with pytest.raises(T.InputError, match="holds"):
            T.read_soft_prompt(str(folder / "soft.pt"), hidden_size)


def read_or_refused(path, hidden_size) -> None:
    """Reads a soft prompt: it is a proper one, or an InputError of one brief, printable line says why not."""
    try:
        found = T.read_soft_prompt(str(path), hidden_size)
    except T.InputError as error:
        (problem,) = error.problems
        assert problem.startswith("PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is ")
        assert problem.isprintable() and len(problem) < 4000
        return
    if found is None:
        assert hidden_size is None
        return
    assert found.dtype == torch.float32 and found.dim() == 2 and found.isfinite().all() and found.numel() > 0
    assert hidden_size in (None, found.shape[1])


VALUES = torch.arange(8).reshape(2, 4) / 8
WHOLE = {
    f"{kind} {number}": write(value)
    for kind, write in FORMATS.items()
    for number, value in enumerate([VALUES, {"weight": VALUES, "step": VALUES[0].clone()}])
}
PICKLED = zipfile.ZipFile(io.BytesIO(WHOLE["soft.pt 1"])).read("archive/data.pkl")


def zipped(pickled: bytes) -> bytes:
    """A zip file of torch's with this as its pickle; the storages are those of WHOLE."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in {"data.pkl": pickled, "data/0": bytes(32), "data/1": bytes(16), "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


files = st.one_of(
    st.binary(max_size=80),
    st.sampled_from(sorted(WHOLE)).flatmap(lambda name: damaged(WHOLE[name])),
    damaged(PICKLED).map(zipped),
    damaged(WHOLE["soft.safetensors 1"][8:-48]).map(lambda head: len(head).to_bytes(8, "little") + head + bytes(48)),
)


@examples(400)
@given(content=files, with_size=st.booleans())
def test_damaged_soft_prompts_are_read_or_refused(folder, content, with_size):
    """No bytes in a tensor file raise anything but an InputError."""
    (folder / "soft").write_bytes(content)
    read_or_refused(folder / "soft", 4 if with_size else None)


@examples(100)
@given(
    config=damaged(b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}')
    | json_values.map(lambda value: json.dumps(value).encode())
    | json_values.map(lambda value: json.dumps({"peft_type": value}).encode()),
)
@example(config=b'{"peft_type": "a\\nb\\u001b[2J"}')
@example(config=b"[" * 100_000)
def test_any_adapter_configuration_is_read_or_refused(folder, config):
    """No bytes in a PEFT folder's configuration raise anything but an InputError, on one printable line."""
    path = folder / "configured"
    path.mkdir(exist_ok=True)
    (path / "adapter_model.bin").write_bytes(WHOLE["soft.pt 0"])
    (path / "adapter_config.json").write_bytes(config)
    read_or_refused(path, 4)


class Unpickled:
    """Pickled, it becomes what this call returns, with this state and these items."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def with_attributes(attributes: dict) -> Unpickled:
    """A tensor that has these attributes when torch.load has read it."""
    rebuild, arguments = VALUES._reduce_ex_internal(2)
    return Unpickled(torch._tensor._rebuild_from_type_v2, (rebuild, torch.Tensor, arguments, attributes))


STORAGE = torch.zeros(5000).untyped_storage()
attribute_values = st.none() | st.integers(0, 9) | st.sampled_from([torch.Size, collections.OrderedDict, VALUES])
METHODS = {kind: sorted(name for name in dir(kind) if not name.startswith("__")) for kind in (dict, torch.Tensor)}


@examples(100)
@given(
    attributes=st.dictionaries(st.sampled_from(METHODS[dict]), attribute_values, max_size=3),
    kind=st.sampled_from([collections.OrderedDict, collections.Counter]),
)
@example(attributes={"items": 5}, kind=collections.OrderedDict)
def test_attributes_of_a_dict_hide_none_of_its_methods(folder, attributes, kind):
    """An OrderedDict in a file may bring attributes (a state dict's `_metadata` is one), named as it likes."""
    (folder / "soft.pt").write_bytes(zip_file(Unpickled(kind, (), attributes, None, iter([("weight", VALUES)]))))
    read_or_refused(folder / "soft.pt", 4)


@examples(150)
@given(
    attributes=st.dictionaries(st.sampled_from(METHODS[torch.Tensor]), attribute_values, max_size=3),
    key=st.sampled_from(KEYS) | st.none(),
)
@example(attributes={"dim": 5}, key=None)
@example(attributes={"is_floating_point": 5}, key="weight")
def test_attributes_of_a_tensor_hide_none_of_its_methods(folder, attributes, key):
    """The same for a tensor in a file."""
    tensor = with_attributes(attributes)
    (folder / "soft.pt").write_bytes(zip_file(tensor if key is None else {key: tensor}))
    read_or_refused(folder / "soft.pt", 4)


@examples(40)
@given(
    keys=st.lists(
        st.text() | st.sampled_from(["a" * 5000, "\n", 10**70, None, (1,) * 5000, b"a", torch.float16, STORAGE]),
        min_size=1,
        max_size=6,
        unique_by=repr,
    ),
    fits=st.booleans(),
)
@example(keys=["a" * 5000], fits=False)
@example(keys=[(1,) * 5000], fits=False)
@example(keys=[STORAGE], fits=False)  # as text all its bytes, a line each
def test_any_keys_are_read_or_refused(folder, keys, fits):
    """Keys that are long, or no text at all, make no long error; a soft prompt beside them is found all the same."""
    (folder / "soft.pt").write_bytes(zip_file({**dict.fromkeys(keys), **({"weight": VALUES} if fits else {})}))
    if fits:
        assert torch.equal(T.read_soft_prompt(str(folder / "soft.pt"), 4), VALUES)
    else:
        read_or_refused(folder / "soft.pt", 4)


CALLS = {"open": open, "eval": eval, "exec": exec, "os.system": T.os.system, "mkdir": T.os.mkdir}


@examples(60)
@given(
    call=st.sampled_from(sorted(CALLS)),
    path_in=st.lists(st.sampled_from(["list", "dict", "key", "tuple", "state", "argument"]), max_size=4),
    file=st.sampled_from(["soft.pt", "legacy.pt", "plain.pkl", "adapter_model.bin"]),
    protocol=st.integers(0, 5),
)
def test_no_code_in_a_file_is_run(folder, call, path_in, file, protocol):
    """Wherever in the file a call stands and however it was pickled: it is refused, and nothing happens."""
    marker = folder / "marker"
    argument = {"eval": f"open({str(marker)!r}, 'w')", "exec": f"open({str(marker)!r}, 'w')"}.get(call, str(marker))
    argument = f"touch '{marker}'" if call == "os.system" else argument
    bomb = Unpickled(CALLS[call], (argument, "w") if call == "open" else (argument,))
    wraps = {
        "list": lambda inner: [VALUES, inner],
        "dict": lambda inner: {"weight": VALUES, "note": inner},
        "key": lambda inner: {"weight": VALUES, Unpickled(torch.Size, ([inner],)): 2},
        "tuple": lambda inner: (inner,),
        "state": lambda inner: Unpickled(collections.OrderedDict, (), {"note": inner}),
        "argument": lambda inner: Unpickled(torch.Size, ([inner],)),
    }
    value = bomb
    for name in path_in:
        value = wraps[name](value)
    if file == "plain.pkl":
        pickled = pickle.dumps(bomb, protocol)
    else:
        write = legacy_file if file == "legacy.pt" else zip_file
        pickled = write(value)
    target = folder / "hostile"
    target.mkdir(exist_ok=True)
    (target / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    (target / file).write_bytes(pickled)
    with pytest.raises(T.InputError, match="is not a file of tensors"):
        T.read_soft_prompt(str(target if file == "adapter_model.bin" else target / file), 4)
    assert not marker.exists()
