"""Conversations: the ids are those of the tokenizer's own template in both conditions, for tokenizers of the shapes that
Llama 2, Llama 3, Gemma, GPT-2 and Qwen have; over-long ones lose their oldest exchanges first, and no system message."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import CHATML, PREFERENCE, ROWS, train, write_rows
from test_tokenise import DROPS, END, REFUSES, ids, template_ids, variant
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import train_with_preference_prompt as T

SYSTEM = ("system", "You cook.")
TALK = (("user", "An egg?"), ("assistant", "Boil it."), ("user", "How long?"), ("assistant", "Eight minutes."))
HISTORIES = {"none": (), "system": (SYSTEM,), "turns": TALK, "system and turns": (SYSTEM, *TALK)}
PROMPT = "And two of them?"

ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for m in turns %}" + ALTERNATE + ""
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}{{ ' ' + content | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SHAPES = {  # name → (special tokens, the first being the BOS; template; eos; pad; words begin with ▁; what ends an answer)
    "Llama 2": (["<s>", "</s>"], LLAMA_2, "</s>", None, True, "</s>"),
    "Llama 3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        LLAMA_3,
        "<|end_of_text|>",
        "<|end_of_text|>",
        False,
        "<|eot_id|>",
    ),
    "Gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], GEMMA, "<eos>", "<eos>", False, "<end_of_turn>"),
    "GPT-2": (["<|endoftext|>"], None, "<|endoftext|>", None, False, "<|endoftext|>"),
    "Llama 2, no template": (["<s>", "</s>"], None, "</s>", None, True, "</s>"),
}


def shaped(name: str):
    """A tokenizer of that shape whose tokens are special tokens and single characters or bytes."""
    specials, template, eos, pad, with_spaces, _ = SHAPES[name]
    text = "".join(map(chr, range(32, 127))) + "\n▁"
    alphabet = sorted(text) if with_spaces else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first")
        if with_spaces
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first") if with_spaces else decoders.ByteLevel()
    if name == "Llama 2, no template":  # the older form, in which a text that begins with a space gets a second one
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0],
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=specials[1:],
    )
    if name != "GPT-2":
        single = {"single": f"{specials[0]} $A", "special_tokens": [(specials[0], 0)]}
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(**single)
        assert made("x").input_ids[0] == 0
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizers():
    return {name: shaped(name) for name in SHAPES}


def talk(history, prompt=PROMPT, chosen="Four.", rejected="Five, I think."):
    return T.Pair(prompt, chosen, rejected, 7, history)


def tokenised(tokenizer, pair, text=PREFERENCE, max_length=900, max_prompt_length=800, soft=0):
    report = T.DataReport(Path("memory"), rows=1)
    made = T.PairTokenizer(tokenizer, T.Prefix(text, soft), max_length, max_prompt_length)
    return made(pair, report), report


def as_messages(history, prompt=PROMPT, text="", system_role=True) -> list[dict]:
    """What the template should be given: preference, then system message of the data, in one message."""
    system = "\n\n".join(filter(None, [text, *(content for role, content in history if role == "system")]))
    turns = [{"role": r, "content": c} for r, c in (*history, ("user", prompt)) if r != "system"]
    if system and system_role:
        return [{"role": "system", "content": system}, *turns]
    return [{**turns[0], "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]] if system else turns


TEMPLATES = {  # name → whether there is a system role
    "Llama 2": True,
    "Llama 3": True,
    "Gemma": False,
    "ChatML": True,
    "refuses the system role": False,
    "drops the system role": False,
}


@pytest.fixture(scope="module")
def with_templates(tokenizers, tokenizer):
    own = {"ChatML": CHATML, "refuses the system role": REFUSES, "drops the system role": DROPS}
    return {**tokenizers, **{name: variant(tokenizer, template) for name, template in own.items()}}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_template(with_templates, name, history):
    made, has_role = with_templates[name], TEMPLATES[name]
    done, report = tokenised(made, talk(HISTORIES[history]))
    assert done.prompt_ids == template_ids(made, as_messages(HISTORIES[history], system_role=has_role))
    guided = as_messages(HISTORIES[history], text=PREFERENCE, system_role=has_role)
    assert done.pref_prompt_ids == template_ids(made, guided)
    shown = made.decode(done.pref_prompt_ids)
    assert shown.count(PREFERENCE) == 1 and shown.count("You cook.") == ("system" in history)
    assert report.truncated_prompts == 0 and min(done.prompt_ids) >= 0
    end = made.convert_tokens_to_ids(SHAPES[name][-1] if name in SHAPES else END)
    for answer, text in ((done.chosen_ids, "Four."), (done.rejected_ids, "Five, I think.")):
        assert answer == [*ids(made, text), end]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_of_one_message_is_a_plain_row(with_templates, name):
    for limit in (800, 60):
        plain, in_messages = (
            tokenised(with_templates[name], talk(history), max_prompt_length=limit)[0] for history in (None, ())
        )
        assert dataclasses.replace(plain, source=None) == dataclasses.replace(in_messages, source=None)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", [*TEMPLATES, "GPT-2", "Llama 2, no template"])
def test_a_soft_prompt_stands_before_the_same_ids(with_templates, name, history):
    done, _ = tokenised(with_templates[name], talk(HISTORIES[history]), text="", soft=3)
    assert done.pref_prompt_ids == [-1, -2, -3, *done.prompt_ids]


# --- without a template

WRITTEN = {
    "none": "\n\nHuman: {}\n\nAssistant:",
    "system": "You cook.\n\nHuman: {}\n\nAssistant:",
    "turns": "\n\nHuman: An egg?\n\nAssistant: Boil it.\n\nHuman: How long?\n\nAssistant: Eight minutes."
    "\n\nHuman: {}\n\nAssistant:",
}
WRITTEN["system and turns"] = "You cook." + WRITTEN["turns"]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama 2, no template"])
def test_without_a_template_a_conversation_is_a_transcript(tokenizers, name, history):
    made, text = tokenizers[name], WRITTEN[history].format(PROMPT)
    bos = [] if name == "GPT-2" else [0]
    done, _ = tokenised(made, talk(HISTORIES[history]))
    assert done.prompt_ids == bos + ids(made, text)
    before = f"{PREFERENCE}\n\n" if "system" in history else PREFERENCE
    assert done.pref_prompt_ids == bos + ids(made, before + text)
    for answer, words in ((done.chosen_ids, "Four."), (done.rejected_ids, "Five, I think.")):
        end = made.eos_token_id
        assert answer[-1] == end and end not in answer[:-1]
        assert made.decode(done.prompt_ids[len(bos) :] + answer[:-1]) == f"{text} {words}"  # one space, no two
        assert answer[:-1] == ids(made, f"{text} {words}")[len(done.prompt_ids) - len(bos) :]


@pytest.mark.parametrize(("chosen", "begins"), [("Four.", " Four."), ("\nFour.", "\nFour."), ("  Four.", "  Four.")])
def test_an_answer_in_a_transcript_begins_with_white_space(tokenizers, chosen, begins):
    made = tokenizers["GPT-2"]
    assert tokenised(made, talk(TALK, chosen=chosen))[0].chosen_ids == [*ids(made, begins), 0]
    assert tokenised(made, talk(None, chosen=chosen))[0].chosen_ids == [*ids(made, chosen), 0]  # as it was written


def test_an_answer_of_the_end_token_alone_is_empty_in_a_transcript(tokenizers):
    done, report = tokenised(tokenizers["GPT-2"], talk(TALK, chosen="<|endoftext|>"))
    assert done is None and report.describe_dropped() == "1 with an empty answer (row 7)"


def test_one_bos_in_a_transcript_whose_system_message_brings_its_own(tokenizers):
    done, _ = tokenised(
        tokenizers["Llama 2, no template"], talk((("system", "<s>You cook."), *TALK)), text="<s>Be kind."
    )
    for found in (done.prompt_ids, done.pref_prompt_ids[:9]):
        assert found[0] == 0 and found[1:].count(0) == 0


# --- too long


def expected_prompts(made, history, limit, has_role, text):
    """Plain and prefixed ids within the limit, whether something was cut; None where the system message leaves no room.

    The tokens are special tokens and single characters, so that ids can be put together.
    """
    kept = [0, 2, 4] if len(history) >= 4 else [0]
    has_system = int(bool(history) and history[0][0] == "system")
    for start in kept:
        shown = (*history[:has_system], *history[has_system + start :])
        whole = template_ids(made, as_messages(shown, system_role=has_role))
        if len(whole) <= limit:
            guided = template_ids(made, as_messages(shown, text=text, system_role=has_role))
            return whole, guided, start > 0
    content = ids(made, PROMPT)
    room = limit - (len(whole) - len(content))
    if room < 1:
        return None
    guided = template_ids(made, as_messages(shown, text=text, system_role=has_role))
    tail = next(n for n in range(len(whole)) if whole[len(whole) - n - len(content) : len(whole) - n] == content)

    def cut(found):
        end = len(found) - tail
        return found[: end - len(content)] + found[end - room :]

    return cut(whole), cut(guided), True


@pytest.mark.parametrize("history", ["turns", "system and turns", "system"])
@pytest.mark.parametrize("name", ["Llama 3", "Gemma"])
def test_the_oldest_exchanges_go_first(with_templates, name, history):
    """At every limit; then the start of the last message goes, and never the system message or the template."""
    made, has_role, turns = with_templates[name], TEMPLATES[name], HISTORIES[history]
    longest, outcomes = len(tokenised(made, talk(turns))[0].prompt_ids), set()
    frame = len(template_ids(made, as_messages(turns[:1] if turns[0] == SYSTEM else (), system_role=has_role)))
    for limit in range(frame - len(PROMPT), longest + 2):
        expected = expected_prompts(made, turns, limit, has_role, PREFERENCE)
        if expected is None and "system" not in history:
            with pytest.raises(T.InputError, match=f"MAX_PROMPT_LENGTH .* is {limit}, but the chat template alone"):
                tokenised(made, talk(turns), max_prompt_length=limit)
            continue
        done, report = tokenised(made, talk(turns), max_prompt_length=limit)
        if expected is None:
            dropped = "1 whose system message leaves no room within MAX_PROMPT_LENGTH (row 7)"
            assert done is None and report.describe_dropped() == dropped
            continue
        assert (done.prompt_ids, done.pref_prompt_ids, bool(report.truncated_prompts)) == expected
        assert len(done.prompt_ids) <= limit
        assert ("You cook." in made.decode(done.prompt_ids)) == ("system" in history)
        outcomes.add(made.decode(done.prompt_ids).count("?"))
    assert outcomes == ({1, 2, 3} if "turns" in history else {1})  # questions shown


def test_a_transcript_loses_its_oldest_exchanges_first(tokenizers):
    made = tokenizers["GPT-2"]
    texts = [WRITTEN["system and turns"], WRITTEN["system"] + "", WRITTEN["system"]]
    texts[1] = texts[0].replace("\n\nHuman: An egg?\n\nAssistant: Boil it.", "")
    texts = [text.format(PROMPT) for text in texts]
    for longer, text in zip(texts, texts[1:], strict=False):
        for limit in (len(text), len(longer) - 1):
            done, report = tokenised(made, talk((SYSTEM, *TALK)), max_prompt_length=limit)
            assert made.decode(done.prompt_ids) == text
            assert made.decode(done.pref_prompt_ids) == f"{PREFERENCE}\n\n{text}" and report.truncated_prompts == 1
    done, _ = tokenised(made, talk((SYSTEM, *TALK)), max_prompt_length=len(texts[2]) - 4)
    assert made.decode(done.prompt_ids) == texts[2].replace("And ", "")


def test_the_assistant_may_speak_first():
    """Nothing is left before the user's message that the first exchange ends with."""
    spoken = (("assistant", "Hello."), ("user", "P?"), ("assistant", "O."))
    assert list(T.shorter_histories(spoken)) == [spoken, spoken[1:], ()]
    assert list(T.shorter_histories((SYSTEM, *spoken))) == [(SYSTEM, *spoken), (SYSTEM, *spoken[1:]), (SYSTEM,)]
    for history in (None, (), (SYSTEM,)):
        assert list(T.shorter_histories(history)) == [history]


def test_the_preference_stands_before_the_users_first_message_that_is_shown(with_templates):
    made = with_templates["drops the system role"]
    done, _ = tokenised(made, talk((SYSTEM, ("assistant", "Hello."))))
    assert f"user\n{PREFERENCE}\n\nYou cook.\n\n{PROMPT}" in made.decode(done.pref_prompt_ids)
    assert f"user\nYou cook.\n\n{PROMPT}" in made.decode(done.prompt_ids)


# --- what else can be wrong


def test_a_template_that_refuses_a_conversation_names_its_row(with_templates):
    pair = dataclasses.replace(talk((("assistant", "Hello."),)), file="a.jsonl")
    with pytest.raises(T.InputError, match=r"row 7 of a.jsonl: the chat template of .* fails: roles must alternate"):
        tokenised(with_templates["Gemma"], pair)


@pytest.mark.parametrize("content", [T.PLACEHOLDER, T.PLACEHOLDER * 2, "<|im_end|>", "{{ x }}"])
def test_nothing_in_a_history_is_taken_for_something_else(with_templates, content):
    made, history = with_templates["ChatML"], (("user", content), ("assistant", f"{content}!"))
    done, _ = tokenised(made, talk(history))
    assert done.prompt_ids == template_ids(made, as_messages(history))


def test_many_conversations_are_kept_too(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(T, "MANY_PAIRS", 2)
    monkeypatch.setattr(T.datasets_config, "HF_DATASETS_CACHE", tmp_path)
    pairs = [talk(history) for history in (*HISTORIES.values(), None)]
    made = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 300, 200)
    report = T.DataReport(Path("memory"), rows=len(pairs))
    one_by_one = [made(pair, T.DataReport(Path("memory"))) for pair in pairs]
    assert T.tokenize_pairs(pairs, report, made) == one_by_one
    digests = {made.digest([talk(history)]) for history in (*HISTORIES.values(), None)}
    assert len(digests) == 5
    assert made.digest([dataclasses.replace(talk(TALK), file="renamed", row=9)]) == made.digest([talk(TALK)])


def test_plain_rows_and_message_lists_give_the_same_ids(tmp_path, tokenizer):
    """From the file to the ids, in three formats."""
    lists = [
        {
            name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            for name in row
        }
        for row in ROWS
    ]
    beside = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    (tmp_path / "b.json").write_text(json.dumps([{n: r[n] for n in ("chosen", "rejected")} for r in lists]))
    paths = [write_rows(tmp_path / "a.jsonl", ROWS), tmp_path / "b.json", write_rows(tmp_path / "c.jsonl", beside)]
    made = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 80, 40)
    found = []
    for path in paths:
        pairs, report = T.read_pairs(path)
        found.append(T.tokens_digest(T.tokenize_pairs(pairs, report, made)))
    assert found[0] == found[1] == found[2]


def test_a_run_on_conversations_with_a_share_held_out(tiny_run, tmp_path):
    """Two sources of two formats, a weight, no test set."""
    talks = [
        {
            name: as_messages((SYSTEM, ("user", f"{n}?"), ("assistant", "Yes.")), row["prompt"])
            + [{"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        }
        for n, row in enumerate(ROWS)
    ]
    write_rows(tmp_path / "talks.jsonl", talks)
    variables = {**tiny_run, "TRAIN_DATASET_PATH": f"talks.jsonl*1.5,{tiny_run['TRAIN_DATASET_PATH']}"}
    variables |= {"TEST_DATASET_PATH": "", "TEST_SHARE": "0.34", "EVAL_STEPS": "0"}
    result = train(variables, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    held = int(re.search(r"test data: (\d+) rows held out, \1 pairs used", result.stdout)[1])
    assert held == 6  # 0.34 of 18 prompts, one row each
    assert re.search(
        r"train data: 18 rows read, \d+ pairs used, dropped: none; held out for the test: 6; ", result.stdout
    )
    assert "messages, chosen and rejected are lists of messages (talks.jsonl); plain, texts" in result.stdout
    assert f"{PREFERENCE}\n\nYou cook.<|im_end|>" in result.stdout  # the example that is shown is a conversation
