"""Tokenise: the ids are those of the tokenizer's own chat template, both conditions share content and answers, and the
two limits cut what they may cut: the oldest content of a prompt and the end of an answer, never template or prefix."""

import copy
from pathlib import Path

import pytest
from conftest import CHATML, PREFERENCE, ROWS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import train_with_preference_prompt as T

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # around the content of a prompt in ChatML
END = "<|im_end|>"

REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
TEMPLATES = {  # name → (template, where the preference belongs)
    "ChatML": (CHATML, "system"),
    "default system message": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        + CHATML,
        "system",
    ),
    "contains the BOS": ("{{ '<|endoftext|>' }}" + CHATML, "system"),
    "system message inside the user's": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        + CHATML.replace("message['content']", "(first if loop.first else '') + message['content']"),
        "system",
    ),
    "strips content": (CHATML.replace("message['content']", "message['content'] | trim"), "system"),
    "refuses the system role": (REFUSES, "user"),
    "drops the system role": (DROPS, "user"),
}
PROMPTS = [
    "How do I boil an egg?",
    "x",
    "  two spaces before, one after ",
    "\nA newline before, and after\n",
    "\n\n\nThree\n\n",
    "🥚 first, and a flag last 🇨🇭",
    "你好，今天吃什么？",
    "e\u0301 combining, \u2028 separator, \x00 nul",
    "A spelt-out <|im_end|> and <|im_start|>system too",
    "\ue000\ue001",
    "{{ messages }} {% raise %} %s {0}",
    "  ".join(["word"] * 12),
]
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def variant(tokenizer, template, eos=END):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template, changed.eos_token = template, eos
    return changed


def adds_bos(tokenizer):
    """Like Llama's and Gemma's: every text that is encoded with special tokens begins with the BOS."""
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|endoftext|>"
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert changed("x").input_ids[0] == changed.bos_token_id == 0
    return changed


def template_ids(tokenizer, messages) -> list[int]:
    """What the tokenizer itself makes of a prompt."""
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)


def ids(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pair(prompt="Two plus two?", chosen="Four.", rejected="Five, I think.", row=1):
    return T.Pair(prompt, chosen, rejected, row)


def run(tokenizer, one, text=PREFERENCE, max_length=500, max_prompt_length=400):
    """The tokenised pair and the report."""
    report = T.DataReport(Path("memory"), rows=1)
    return T.PairTokenizer(tokenizer, T.Prefix(text), max_length, max_prompt_length)(one, report), report


# --- prompts


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_are_those_of_the_chat_template(tokenizer, name, prompt):
    template, place = TEMPLATES[name]
    changed = variant(tokenizer, template)
    done, report = run(changed, pair(prompt))
    user = {"role": "user", "content": prompt}
    guided = {
        "system": [{"role": "system", "content": PREFERENCE}, user],
        "user": [{"role": "user", "content": f"{PREFERENCE}\n\n{prompt}"}],
    }
    assert done.prompt_ids == template_ids(changed, [user])
    assert done.pref_prompt_ids == template_ids(changed, guided[place])
    assert PREFERENCE in changed.decode(done.pref_prompt_ids)
    assert report.truncated_prompts == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_conditions_share_content_and_answers(tokenizer, name):
    changed = variant(tokenizer, TEMPLATES[name][0])
    for row in ROWS:
        done, _ = run(changed, T.Pair(**row, row=1))
        shared = ids(changed, row["prompt"]) + ids(changed, TAIL)
        assert done.prompt_ids[-len(shared) :] == done.pref_prompt_ids[-len(shared) :] == shared
        assert done.chosen_ids == [*ids(changed, row["chosen"]), 2]
        assert done.rejected_ids == [*ids(changed, row["rejected"]), 2]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_preference_leaves_the_prompt_as_it_is(tokenizer, name):
    done, _ = run(variant(tokenizer, TEMPLATES[name][0]), pair(), text="")
    assert done.pref_prompt_ids == done.prompt_ids


def test_without_a_template_the_preference_stands_before_the_prompt(tokenizer):
    plain = variant(tokenizer, None)
    done, _ = run(plain, pair("How do I boil an egg?"))
    assert done.prompt_ids == ids(plain, "How do I boil an egg?")
    assert done.pref_prompt_ids == ids(plain, f"{PREFERENCE}\n\n") + done.prompt_ids
    assert run(plain, pair(), text="")[0].pref_prompt_ids == ids(plain, "Two plus two?")


@pytest.mark.parametrize("limit", [400, 8])
def test_one_bos_without_a_template(tokenizer, limit):
    changed = variant(adds_bos(tokenizer), None)
    done, _ = run(changed, pair(LONG), max_prompt_length=limit)
    for prompt_ids in (done.prompt_ids, done.pref_prompt_ids):
        assert prompt_ids[0] == 0 and prompt_ids.count(0) == 1
    assert 0 not in done.chosen_ids + done.rejected_ids
    assert len(done.prompt_ids) == min(limit, 1 + len(ids(changed, LONG)))


@pytest.mark.parametrize(("name", "count"), [("contains the BOS", 1), ("ChatML", 0)])
def test_a_template_alone_decides_about_the_bos(tokenizer, name, count):
    """As `apply_chat_template` does: what the tokenizer would add to bare text is not added to a rendered prompt."""
    changed = variant(adds_bos(tokenizer), TEMPLATES[name][0])
    done, _ = run(changed, pair())
    assert done.prompt_ids.count(0) == done.pref_prompt_ids.count(0) == count
    assert done.prompt_ids == template_ids(changed, [{"role": "user", "content": "Two plus two?"}])
    assert 0 not in done.chosen_ids + done.rejected_ids


def test_one_bos_where_the_prompt_brings_its_own(tokenizer):
    done, _ = run(variant(adds_bos(tokenizer), None), pair("<|endoftext|>Two plus two?"))
    assert done.prompt_ids.count(0) == 1 and done.pref_prompt_ids.count(0) == 1


# --- a soft prompt


def run_soft(tokenizer, one, soft=3, **limits):
    """The same pair with K soft embeddings and with nothing that guides, and the report of the former."""
    limits = {"max_length": 500, "max_prompt_length": 400, **limits}
    report = T.DataReport(Path("memory"), rows=1)
    done = T.PairTokenizer(tokenizer, T.Prefix(num_virtual_tokens=soft), **limits)(one, report)
    return done, T.PairTokenizer(tokenizer, T.Prefix(), **limits)(one, T.DataReport(Path("memory"), rows=1)), report


@pytest.mark.parametrize("limits", [{}, {"max_prompt_length": 40, "max_length": 50}], ids=["whole", "cut"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_soft_embeddings_stand_before_everything_and_change_no_id(tokenizer, name, bos, limits):
    template = TEMPLATES[name][0] if name else None
    changed = variant(adds_bos(tokenizer) if bos else tokenizer, template)
    for row in (*ROWS, {"prompt": LONG, "chosen": LONG, "rejected": "No."}):
        done, unguided, report = run_soft(changed, T.Pair(**row, row=1), **limits)
        assert done.pref_prompt_ids == [-1, -2, -3, *done.prompt_ids]
        assert (done.prompt_ids, done.chosen_ids, done.rejected_ids) == (
            unguided.prompt_ids,
            unguided.chosen_ids,
            unguided.rejected_ids,
        )
        assert min(done.prompt_ids) >= 0 and unguided.pref_prompt_ids == unguided.prompt_ids
        if bos and not template:
            assert done.pref_prompt_ids[2:4] == [-3, changed.bos_token_id]
    assert (report.truncated_prompts, report.truncated_answers) == ((1, 1) if limits else (0, 0))  # those of LONG


@pytest.mark.parametrize("soft", [1, 1000])
def test_soft_embeddings_count_against_no_limit(tokenizer, soft):
    limits = {"max_length": 30, "max_prompt_length": 25}
    done, unguided, _ = run_soft(tokenizer, pair(LONG, chosen=LONG), soft, **limits)
    assert done.pref_prompt_ids == [*range(-1, -soft - 1, -1), *unguided.prompt_ids]
    assert len(done.prompt_ids) == 25 and len(done.chosen_ids) == 5


# --- where the preference goes


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_the_preference_goes(tokenizer, name):
    template, place = TEMPLATES[name]
    changed = variant(tokenizer, template)
    shown = changed.decode(run(changed, pair("Is it?"))[0].pref_prompt_ids)
    if place == "user" or name == "system message inside the user's":
        assert f"{HEAD}{PREFERENCE}\n\nIs it?{END}" in shown and "system" not in shown
    else:
        assert f"<|im_start|>system\n{PREFERENCE}{END}" in shown and f"{HEAD}Is it?{END}" in shown
    assert shown.count(PREFERENCE) == 1


def test_white_space_around_the_preference_does_not_move_it(tokenizer):
    changed = variant(tokenizer, TEMPLATES["strips content"][0])
    done, _ = run(changed, pair("Is it?"), text=f"{PREFERENCE}\n")
    assert f"<|im_start|>system\n{PREFERENCE}{END}" in changed.decode(done.pref_prompt_ids)


def test_an_error_that_is_not_the_templates_is_not_hidden(tokenizer):
    changed = variant(tokenizer, CHATML)
    render = changed.apply_chat_template

    def fails_with_a_system_role(messages, **options):
        if messages[0]["role"] == "system":
            raise MemoryError("no room")
        return render(messages, **options)

    changed.apply_chat_template = fails_with_a_system_role
    with pytest.raises(MemoryError):
        run(changed, pair())


UNUSABLE_TEMPLATES = {
    "says the prompt twice": CHATML.replace("message['content']", "message['content'] + message['content']"),
    "never says the prompt": CHATML.replace("message['content']", "'…'"),
    "wants a list of parts": CHATML.replace("message['content']", "message['content'][0]['text']"),
}


@pytest.mark.parametrize("name", UNUSABLE_TEMPLATES)
def test_a_template_that_does_not_show_the_prompt_once_is_an_error(tokenizer, name):
    with pytest.raises(T.InputError, match="template"):
        run(variant(tokenizer, UNUSABLE_TEMPLATES[name]), pair())


def test_a_template_that_depends_on_the_prompt_is_an_error(tokenizer):
    changed = variant(tokenizer, "{{ 'Cook! ' if 'egg' in messages[-1]['content'] }}" + CHATML)
    assert run(changed, pair("A pan?"))[0].prompt_ids == ids(changed, f"{HEAD}A pan?{TAIL}")
    with pytest.raises(T.InputError, match="template.*rewrites the prompt 'An egg"):
        run(changed, pair("An egg?"))


# --- a prompt that is too long


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_overlong_prompt_loses_its_oldest_content_only(tokenizer, name):
    changed = variant(tokenizer, TEMPLATES[name][0])
    content, tail = ids(changed, LONG), ids(changed, TAIL)
    whole, _ = run(changed, pair(LONG))
    head = whole.prompt_ids[: -len(content + tail)]
    pref_head = whole.pref_prompt_ids[: -len(content + tail)]
    assert whole.prompt_ids == head + content + tail and len(content) > 40
    for kept in (1, 2, 17, len(content) - 1):
        limit = len(head) + kept + len(tail)
        done, report = run(changed, pair(LONG), max_prompt_length=limit)
        assert done.prompt_ids == head + content[-kept:] + tail
        assert done.pref_prompt_ids == pref_head + content[-kept:] + tail
        assert (len(done.prompt_ids), report.truncated_prompts) == (limit, 1)
    done, report = run(changed, pair(LONG), max_prompt_length=len(whole.prompt_ids))
    assert (done.prompt_ids, report.truncated_prompts) == (whole.prompt_ids, 0)


def test_an_overlong_prompt_without_a_template(tokenizer):
    plain = variant(tokenizer, None)
    content = ids(plain, LONG)
    done, report = run(plain, pair(LONG), max_prompt_length=9)
    assert done.prompt_ids == content[-9:]
    assert done.pref_prompt_ids == ids(plain, f"{PREFERENCE}\n\n") + content[-9:]
    assert report.truncated_prompts == 1


@pytest.mark.parametrize("template", [CHATML, REFUSES, None])
def test_the_prefix_is_never_cut_and_counts_against_no_limit(tokenizer, template):
    changed = variant(tokenizer, template)
    long_text = " ".join([PREFERENCE] * 30)
    limits = {"max_length": 30, "max_prompt_length": 25}
    assert len(ids(changed, long_text)) > 300
    brief, _ = run(changed, pair(LONG, chosen=LONG), text="Be brief.", **limits)
    wordy, report = run(changed, pair(LONG, chosen=LONG), text=long_text, **limits)
    assert long_text in changed.decode(wordy.pref_prompt_ids)
    assert len(wordy.prompt_ids) == 25
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert getattr(wordy, name) == getattr(brief, name)
    assert (report.truncated_prompts, report.truncated_answers) == (1, 2)


@pytest.mark.parametrize("limit", [1, 16])
def test_a_limit_smaller_than_the_template_is_an_error(tokenizer, limit):
    frame = len(ids(tokenizer, HEAD + TAIL))
    assert frame == 16  # <|im_start|> u s er \n · <|im_end|> \n <|im_start|> a s s i s t an t \n, with this vocabulary
    with pytest.raises(T.InputError, match=rf"MAX_PROMPT_LENGTH \(--max_prompt_length\) is {limit}, .*takes 16 tokens"):
        run(tokenizer, pair(), max_prompt_length=limit)


def test_a_limit_one_larger_than_the_template_keeps_one_token_of_content(tokenizer):
    done, _ = run(tokenizer, pair("Two plus two?"), max_prompt_length=17)
    assert done.prompt_ids == ids(tokenizer, HEAD) + ids(tokenizer, "Two plus two?")[-1:] + ids(tokenizer, TAIL)


@pytest.fixture(scope="module")
def joins_newlines():
    """Splits text as Qwen2's and Llama 3's tokenizers do, where two newlines in a row are one token."""
    pattern = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ĊĊ", "<|im_start|>", END])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, additional_special_tokens=["<|im_start|>"])
    made.chat_template = CHATML
    assert made.convert_ids_to_tokens(ids(made, "a\n\nb")) == ["a", "ĊĊ", "b"]
    return made


def test_a_token_that_spans_template_and_content_is_kept_whole(joins_newlines):
    """The template's newline and the prompt's first one are a single token."""
    prompt = "\nWhat?"
    done, _ = run(joins_newlines, pair(prompt))
    user = {"role": "user", "content": prompt}
    assert done.prompt_ids == template_ids(joins_newlines, [user])
    assert done.pref_prompt_ids == template_ids(joins_newlines, [{"role": "system", "content": PREFERENCE}, user])


@pytest.mark.parametrize("prompt", ["How do I boil an egg?", "\nHow?", " How?"])
def test_a_template_that_ends_in_a_space_loses_no_word(prompt):
    """`[INST] ` and the prompt's first word share a token of a Metaspace tokenizer, as in Llama 2 and Mistral."""
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", END], initial_alphabet=list("▁\n"))
    core.train_from_iterator([f"[INST] {prompt} [/INST] {PREFERENCE}"] * 3 + [" How", " Answer"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=END)
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
        "{% endfor %}"
    )
    for limit in (80, 200):
        done, _ = run(made, pair(prompt), max_prompt_length=limit)
        for shown in (made.decode(done.prompt_ids), made.decode(done.pref_prompt_ids)):
            assert prompt.strip() in shown and shown.count("How") == 1
        assert PREFERENCE in made.decode(done.pref_prompt_ids)
    assert made.decode(done.prompt_ids) == f"[INST] {prompt} [/INST]"


def test_cutting_a_prompt_that_begins_with_a_newline_keeps_the_template(joins_newlines):
    done, _ = run(joins_newlines, pair("\nWhat is a very long question?"), max_prompt_length=40)
    shown = joins_newlines.decode(done.prompt_ids)
    assert shown.startswith(HEAD) and shown.endswith("question?" + TAIL) and len(done.prompt_ids) <= 40


# --- answers


def test_an_answer_ends_with_one_end_token_unless_it_is_cut(tokenizer):
    prompt_ids = ids(tokenizer, f"{HEAD}Two plus two?{TAIL}")
    chosen, rejected = ids(tokenizer, "Four."), ids(tokenizer, LONG)
    assert len(chosen) < len(rejected) and 2 not in chosen + rejected
    for room in range(1, len(rejected) + 3):
        options = {"max_length": len(prompt_ids) + room, "max_prompt_length": len(prompt_ids)}
        done, report = run(tokenizer, pair("Two plus two?", "Four.", LONG), **options)
        assert done.prompt_ids == prompt_ids
        assert done.chosen_ids == (chosen[:room] if room <= len(chosen) else [*chosen, 2])
        assert done.rejected_ids == (rejected[:room] if room <= len(rejected) else [*rejected, 2])
        assert done.chosen_ids and done.rejected_ids
        assert report.truncated_answers == (room <= len(chosen)) + (room <= len(rejected))


def test_a_shorter_prompt_leaves_more_room_for_the_answer(tokenizer):
    limits = {"max_length": 60, "max_prompt_length": 40}
    for prompt in ("x", "Two plus two?", LONG):
        done, _ = run(tokenizer, pair(prompt, chosen=LONG * 2), **limits)
        assert len(done.prompt_ids) <= 40 and len(done.prompt_ids) + len(done.chosen_ids) == 60


@pytest.mark.parametrize(("max_prompt_length", "max_length"), [(17, 18), (30, 31), (25, 40)])
def test_no_answer_is_ever_empty(tokenizer, pairs, max_prompt_length, max_length):
    for one in pairs:
        done, _ = run(tokenizer, one, max_length=max_length, max_prompt_length=max_prompt_length)
        for answer in (done.chosen_ids, done.rejected_ids):
            assert answer and len(done.prompt_ids) + len(answer) <= max_length


@pytest.mark.parametrize(
    "answer",
    [
        "Say <|im_end|> and <|im_start|>system to stop.",
        "<|im_start|>assistant",
        "<|im_end|>\nFour.",
        "<|endoftext|>",
    ],
)
def test_special_tokens_spelt_out_in_an_answer_stay_text(tokenizer, answer):
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 200, 100)
    report = T.DataReport(Path("memory"))
    for _ in range(2):  # the setting is the backend's: it must not leak from answers into prompts, nor back
        done = tokenize(pair(chosen=answer), report)
        assert [i for i in done.chosen_ids if i < 3] == [2]
        assert tokenizer.decode(done.chosen_ids) == answer + END
        assert [i for i in done.prompt_ids if i < 3] == [1, 2, 1]


@pytest.mark.parametrize("answer", ["Four.<|im_end|>", "Four.", "Four.<|im_end|>\n", "Four.<|im_end|> "])
def test_an_answer_that_brings_its_end_token_gets_no_second(tokenizer, answer):
    done, _ = run(tokenizer, pair(chosen=answer))
    assert done.chosen_ids == [*ids(tokenizer, "Four."), 2]


END_TOKENS = {  # template, eos → end token's id; 0 is <|endoftext|>, 2 is <|im_end|>
    "eos ends the turn": (CHATML, END, 2),
    "another token ends the turn": (CHATML, "<|endoftext|>", 2),
    "white space before it": (CHATML.replace("'<|im_end|>", "'\n<|im_end|>"), "<|endoftext|>", 2),
    "no token ends the turn": (CHATML.replace("<|im_end|>", "</turn>"), "<|endoftext|>", 0),
    "eos after the turn only": (
        CHATML.replace("{% endfor %}", "{{ eos_token if message['role'] == 'assistant' }}{% endfor %}").replace(
            END, ""
        ),
        "<|endoftext|>",
        0,
    ),
    "no template": (None, "<|endoftext|>", 0),
}


@pytest.mark.parametrize("name", END_TOKENS)
def test_the_end_token_is_the_one_that_ends_the_templates_turn(tokenizer, name):
    template, eos, end_id = END_TOKENS[name]
    changed = variant(tokenizer, template, eos)
    done, _ = run(changed, pair())
    assert done.chosen_ids == [*ids(changed, "Four."), end_id]
    assert done.rejected_ids == [*ids(changed, "Five, I think."), end_id]
    text = changed.convert_ids_to_tokens(end_id)
    assert run(changed, pair(chosen=f"Four.{text}"))[0].chosen_ids == done.chosen_ids


# --- where a finished turn is not what the generation prompt begins

OPENED = "<|im_start|>assistant\n"
FINISHED = {  # generation prompt, what stands before a finished answer → what else than that has a place
    "an empty thought": (OPENED, OPENED + "<think>\n\n</think>\n\n", OPENED),  # Qwen3
    "a thought that is open": (OPENED + "<think>\n", OPENED + "<think>\n\n</think>\n\n", OPENED),  # Qwen3.6
    "no thought": (OPENED + "<think>\n", OPENED, OPENED),  # DeepSeek-R1
    "a channel": (
        "<|im_start|>assistant",
        "<|im_start|>assistant<|im_end|>final\n",
        "<|im_start|>assistant",
    ),  # gpt-oss
    "a space": ("<|im_start|>assistant:", "<|im_start|>assistant: ", "<|im_start|>assistant: "),  # Llama-2
    "no generation prompt": ("", OPENED, ""),
}


def finishes(tokenizer, name):
    """A tokenizer whose template begins and finishes an answer in these ways, and what stands before its answers."""
    opened, before, thinks = FINISHED[name]
    turn = CHATML.partition("{% if add_generation_prompt")[0]
    template = turn.replace("'<|im_start|>' + message['role'] + '\n'", "begins")
    template = template.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% set begins = BEFORE if message['role'] == 'assistant' "
        "else '<|im_start|>' + message['role'] + '\n' %}",
    ).replace("BEFORE", repr(before))
    changed = variant(tokenizer, template + "{% if add_generation_prompt %}{{ " + repr(opened) + " }}{% endif %}")
    changed.add_tokens(["<think>", "</think>"])
    assert template_text(changed, "Four.").endswith(f"{before}Four.<|im_end|>\n")
    return changed, before, thinks


def template_text(tokenizer, answer: str) -> str:
    """The template's own finished conversation."""
    turns = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("name", FINISHED)
def test_an_answer_stands_where_the_template_puts_it(tokenizer, name):
    changed, before, _ = finishes(tokenizer, name)
    done, _ = run(changed, pair())
    whole = ids(changed, template_text(changed, "Four.").removesuffix("\n"))
    assert done.prompt_ids + done.chosen_ids == whole
    assert (
        changed.decode(done.prompt_ids).endswith(before.rstrip(" "))
        and changed.decode(done.chosen_ids[1:]) in "Four." + END
    )
    assert done.pref_prompt_ids[-len(ids(changed, before.rstrip(" "))) :] == ids(changed, before.rstrip(" "))
    tight = len(done.prompt_ids) - 1  # what the template puts there is part of it
    cut, report = run(changed, pair(), max_prompt_length=tight)
    assert report.truncated_prompts == 1 and len(cut.prompt_ids) == tight
    assert cut.prompt_ids[-5:] == done.prompt_ids[-5:]


@pytest.mark.parametrize("name", ["an empty thought", "a thought that is open", "no thought"])
def test_an_answer_may_bring_its_own_thought(tokenizer, name):
    changed, before, thinks = finishes(tokenizer, name)
    thought = "<think>\nTwice two.\n</think>\n\nFour."
    own, _ = run(changed, pair(chosen=thought, rejected=thought + "!"))
    mixed, _ = run(changed, pair(chosen=thought))
    head = changed.decode(run(changed, pair())[0].prompt_ids).removesuffix(before)
    for done in (own, mixed):
        assert changed.decode(done.prompt_ids + done.chosen_ids) == head + thinks + thought + END
    assert changed.decode(mixed.prompt_ids + mixed.rejected_ids) == head + before + "Five, I think." + END


def test_what_the_template_begins_an_answer_with_is_said(tokenizer):
    notices = T.PairTokenizer(finishes(tokenizer, "no thought")[0], T.Prefix(), 300, 128).notices
    assert notices == [
        "the chat template begins a finished answer with '' where its generation prompt ends with '<think>\\n': so do the "
        "prompts here, but before answers that bring their own <think>"
    ]
    assert T.PairTokenizer(tokenizer, T.Prefix(), 300, 128).notices == []


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("template", ["Zephyr", "Llama-2", None])
def test_no_space_comes_between_prompt_and_answer(scheme, template):
    """Where the tokenizer, SentencePiece's, puts a space in front of every text: it belongs to the beginning alone."""
    texts = ["Two plus two? Four. Five, I think.", "user\nassistant\n[INST] a [/INST]"] * 9
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(texts, trainer)
    changed = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    changed.chat_template = {
        "Zephyr": "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
        "Llama-2": "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + "
        "m['content'] }}{% endfor %}",
        None: None,
    }[template]
    one = pair() if template else pair("Two plus two?", " Four.", " Five, I think.")
    done, _ = run(changed, one, text="")
    whole = template_text(changed, "Four.").removesuffix("\n") if template else "Two plus two? Four."
    assert changed.unk_token_id not in ids(changed, whole)
    assert done.prompt_ids + done.chosen_ids[:-1] == ids(changed, whole)


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now("%d %b %Y")'])
def test_a_template_that_shows_the_day_shows_one_day(tokenizer, call):
    changed = variant(tokenizer, "{{ " + call + " }}" + CHATML)
    made = T.PairTokenizer(changed, T.Prefix(), 300, 128)
    assert changed.decode(made(pair(), T.DataReport(Path("memory"))).prompt_ids).startswith("26 Jul 2024<|im_start|>")
    assert made.notices == ["the chat template shows the day: it is 2024-07-26 in all prompts"]


# --- pairs that cannot teach


@pytest.mark.parametrize(
    ("chosen", "rejected", "room", "kept"),
    [
        ("abcdX", "abcdY", 4, False),
        ("abcdX", "abcdY", 5, True),
        ("abcd", "abcdY", 4, False),
        ("abcd", "abcdY", 5, True),  # the end token against Y
        ("abcd<|im_end|>", "abcd", 9, False),
    ],
)
def test_answers_that_are_the_same_once_cut_are_dropped(joins_newlines, chosen, rejected, room, kept):
    prompt_length = len(ids(joins_newlines, f"{HEAD}Two?{TAIL}"))
    options = {"max_length": prompt_length + room, "max_prompt_length": prompt_length}
    done, report = run(joins_newlines, pair("Two?", chosen, rejected, row=7), **options)
    assert (done is not None) == kept
    assert list(report.dropped.values()) == ([] if kept else [[("", 7)]])
    if not kept:
        assert (report.truncated_answers, report.usable) == (0, 0)
        assert "MAX_LENGTH (row 7)" in report.describe_dropped()


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_an_answer_that_is_only_the_end_token_is_empty(tokenizer, field):
    done, report = run(tokenizer, pair(**{field: END}))
    assert done is None and list(report.dropped.values()) == [[("", 1)]]


def test_pairs_of_a_file(tokenizer, pairs, tokenize):
    report = T.DataReport(Path("memory"), rows=7)
    same = pair(chosen="Four." + END, rejected="Four.", row=7)
    done = T.tokenize_pairs([*pairs, same], report, tokenize)
    assert [one.source.row for one in done] == [1, 2, 3, 4, 5, 6]
    assert (report.usable, list(report.dropped.values())) == (6, [[("", 7)]])
    with pytest.raises(T.InputError, match=r"data file memory: none .*row 7"):
        T.tokenize_pairs([same], T.DataReport(Path("memory"), rows=1), tokenize)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where `datasets` keeps the ids of data sets of five pairs and more."""
    monkeypatch.setattr(T, "MANY_PAIRS", 5)
    monkeypatch.setattr(T.datasets_config, "HF_DATASETS_CACHE", tmp_path / "kept")
    return tmp_path / "kept"


def test_many_pairs_are_kept(kept, tokenizer, pairs, monkeypatch):
    """They come out as they would one by one, without being tokenised a second time, for what decides on them only."""
    same = pair(chosen="Four." + END, rejected="Four.", row=7)
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), max_length=24, max_prompt_length=20)
    by_one = T.DataReport(Path("memory"), rows=7)
    expected = [ids for ids in (tokenize(one, by_one) for one in [*pairs, same]) if ids]
    assert by_one.dropped and by_one.truncated_answers and len(expected) >= 5

    def again(limit, *others):
        report = T.DataReport(Path("memory"), rows=7)
        made = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), max_length=limit, max_prompt_length=20)
        return T.tokenize_pairs([*pairs, same, *others], report, made), report

    assert again(24) == (expected, by_one)
    files = sorted(kept.rglob("*.arrow"))
    assert len(files) == T.CORES
    with monkeypatch.context() as patch:
        patch.setattr(T.PairTokenizer, "__call__", None)
        assert again(24) == (expected, by_one)
    assert again(25)[0] != expected and again(24, pair(row=8))[0][:-1] == expected
    assert len(sorted(kept.rglob("*.arrow"))) == 3 * len(files)


def test_pairs_that_are_all_dropped_have_columns_too(kept, tokenizer):
    """`datasets` would take the kind of a column from the first thousand."""
    same = [pair(chosen="Four." + END, rejected="Four.", row=row) for row in range(1, 2003)]
    tokenize, report = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), 24, 20), T.DataReport(Path("memory"), rows=2003)
    (one,) = T.tokenize_pairs([*same, pair(row=2003)], report, tokenize)
    assert (one.source.row, report.usable) == (2003, 1)


def test_what_decides_on_the_ids_decides_on_the_digest(tokenizer, pairs):
    def digest(change=lambda tokenizer: None, prefix=PREFERENCE, of=pairs):
        changed = copy.deepcopy(tokenizer)
        change(changed)
        return T.PairTokenizer(changed, T.Prefix(prefix), 24, 20).digest(of)

    changes = [
        lambda t: setattr(t, "bos_token", "<|im_start|>"),
        lambda t: setattr(t, "split_special_tokens", True),
        lambda t: setattr(t, "chat_template", t.chat_template + "{# #}"),
        lambda t: t.add_tokens(["xyz"]),
    ]
    assert digest() == digest()
    found = [digest(), *map(digest, changes), digest(prefix="x"), digest(of=pairs[1:])]
    assert len(set(found)) == len(found)


def test_a_folder_that_cannot_keep_them_costs_a_notice(kept, tokenizer, pairs, capsys):
    kept.write_text("in the way")
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), max_length=24, max_prompt_length=20)
    assert len(T.tokenize_pairs(pairs, T.DataReport(Path("memory")), tokenize)) == 6
    assert capsys.readouterr().out.startswith(f"notice: {kept / T.CACHE_FOLDER} cannot keep the token ids (")


def test_an_error_in_one_of_many_pairs_is_the_same(kept, tokenizer, pairs):
    tokenize = T.PairTokenizer(tokenizer, T.Prefix(PREFERENCE), max_length=24, max_prompt_length=3)
    with pytest.raises(T.InputError, match="MAX_PROMPT_LENGTH .* is 3, but the chat template alone"):
        T.tokenize_pairs([pair(LONG, row=n) for n in range(9)], T.DataReport(Path("memory")), tokenize)


# --- tokenizers that cannot be used


def test_a_slow_tokenizer_is_an_error():
    with pytest.raises(T.InputError, match="ByT5Tokenizer.*fast"):
        T.PairTokenizer(ByT5Tokenizer(), T.Prefix(PREFERENCE), 200, 100)


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_tokenizer_without_an_end_token_is_an_error(tokenizer, template):
    with pytest.raises(T.InputError, match="no end-of-sequence token"):
        T.PairTokenizer(variant(tokenizer, template, eos=None), T.Prefix(PREFERENCE), 200, 100)


# --- what is shown


def test_the_example_shows_both_conditions_and_what_is_scored(tokenizer):
    done, _ = run(tokenizer, pair("Two plus two?", "Four.", "Five."))
    assert T.describe_example(done, tokenizer).splitlines() == [
        "--- plain, chosen answer",
        "<|im_start|>user",
        "Two plus two?<|im_end|>",
        "<|im_start|>assistant",
        "⟦Four.<|im_end|>⟧",
        "--- with the preference, chosen answer",
        "<|im_start|>system",
        "Answer plainly and honestly.<|im_end|>",
        "<|im_start|>user",
        "Two plus two?<|im_end|>",
        "<|im_start|>assistant",
        "⟦Four.<|im_end|>⟧",
        "--- the rejected answer, scored after the same two prompts",
        "⟦Five.<|im_end|>⟧",
    ]


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_example_shows_how_many_soft_embeddings_there_are(tokenizer, template):
    changed = variant(tokenizer, template)
    done, unguided, _ = run_soft(changed, pair("Two plus two?", "Four.", "Five."), soft=12)
    begin, end = (HEAD, TAIL) if template else ("", "")
    answer = f"{begin}Two plus two?{end}⟦Four.{END}⟧\n--- "
    shown = T.describe_example(done, changed)
    assert f"--- plain, chosen answer\n{answer}" in shown
    assert f"--- with the preference, chosen answer\n(12 soft embeddings){answer}" in shown
    assert "soft" not in T.describe_example(unguided, changed)


def test_lengths_are_medians_and_longest():
    made = [T.TokenizedPair([0] * p, [0] * 99, [0] * c, [0] * r, None) for p, c, r in ((3, 1, 7), (9, 2, 8), (4, 5, 3))]
    assert T.describe_lengths(made) == "prompt 4 tokens (longest 9), answer 4 tokens (longest 8)"  # of 1 2 3 5 7 8
