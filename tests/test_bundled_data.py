"""Bundled sample data: fields, counts, languages, no repeated questions or stock phrases, nothing to learn from length.

Read by people, as no program can tell it: that the chosen answers are right and the rejected ones worse, and that no
question appears once in English and once in Chinese. The figures are printed on every run.
"""

import json
import math
import random
import re
from collections.abc import Callable
from itertools import combinations

import pytest

import train_with_preference_prompt as T

ROWS = {"train": 160, "test": 60}
CHINESE_SHARE = (0.18, 0.22)
CHOSEN_LONGER = (0.45, 0.55)
MAX_TOKENS = 80

CJK = re.compile(r"[\u3400-\u9fff]")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[\u3040-\u30ff\u3400-\u9fff]")


def words(text: str) -> list[str]:
    return WORD.findall(text.lower().replace("’", "'"))


# Similarity is the Jaccard index of the sets of content words (English: cut at five letters, so that endings count
# little; Chinese: characters). Words that questions of any subject share are left out: with them, "What is the
# difference between 'affect' and 'effect'?" and "what is the difference between weather and climate" come out at 0.60,
# and by difflib's ratio of the letters at 0.76, where most of the paraphrases below lie between 0.53 and 0.64.
#
# Thresholds: over all 24,090 pairs of rows the most alike prompts reach 0.33 (two questions about a job interview) and
# the paraphrases 0.43 or more; the most alike chosen answers reach 0.24 (two Chinese congratulations). The answers are
# compared too, since two prompts may ask for the same advice in different words: a pair that the sample once held (a
# password in a data breach, a password typed into a fake page) has 0.15 between its prompts, 0.28 between its answers.
MAX_PROMPT_SIMILARITY = 0.40
MAX_CHOSEN_SIMILARITY = 0.26
COMMON_WORDS = frozenset(
    words(
        "a about after all am an and any are as at be been before between but by can can't could did "
        "difference do does doing don't done for from get give go had has have he help her him his how i i'm "
        "i've if in into is it it's its just long make many may me might much my need no not of on one or our "
        "out over please really say shall she should so some someone still tell than that the their them then "
        "there they this to too up us want was we what what's when where which who why will with would you "
        "your"
    )
)
COMMON_CHARACTERS = frozenset("的了吗呢吧啊么怎我你您是有在要不能和会就什多少为哪样还好来给把到行个一")

PARAPHRASES = {
    "Which planet in the solar system has the highest temperature?": "Which planet is the hottest in our solar system?",
    "Can a rusty cast iron pan be saved?": "My grandmother's cast iron pan has gone rusty. Can I save it?",
    "how can i change a file's name in the linux terminal": "How do I rename a file in the Linux terminal?",
    "I want to tip. How much is 15 percent of 80?": "What is 15 percent of 80? I need it for a tip.",
    "How many minutes do I boil an egg for a jammy yolk?": (
        "How long should I boil eggs if I want the yolk jammy but not runny?"
    ),
    "Why does ice float in a glass of water and not sink?": (
        "Why does ice float on water instead of sinking to the bottom of the glass?"
    ),
    "What's the way to capture the screen of an iPhone without the home button?": (
        "How do I take a screenshot on an iPhone that has no home button?"
    ),
    "月光族想攒钱，怎么起步？": "月光族怎么开始攒钱？",
    "做饭时油锅着火，该怎么办？": "厨房油锅着火了怎么办！",
    "秦始皇统一六国是在哪年？": "秦始皇是哪一年统一六国的？",
    "地球围着太阳转一圈需要多长时间？": "地球绕太阳转一圈要多久？",
}
ONCE_HELD = (
    "Call your bank right away on the number printed on your card. Change that password there and anywhere you reused "
    "it, turn on two-step login, and watch the account for charges you don't recognise."
)

# Chosen answers share no run of this many words (Chinese: characters); shorter runs are ordinary language.
BOILERPLATE_WORDS = 4


def is_chinese(pair: T.Pair) -> bool:
    return bool(CJK.search(pair.prompt))


def content(text: str) -> set[str]:
    kept = (word for word in words(text) if word not in COMMON_WORDS and word not in COMMON_CHARACTERS)
    return {word.removesuffix("'s").rstrip("s")[:5] for word in kept} - {""}


def similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


def most_alike(texts: list[str]) -> list[tuple[float, str, str]]:
    """All pairs of the texts, the most alike first."""
    sets = [content(text) for text in texts]
    pairs = combinations(range(len(texts)), 2)
    return sorted(((similarity(sets[a], sets[b]), texts[a], texts[b]) for a, b in pairs), reverse=True)


def shared_runs(texts: list[str]) -> dict[tuple[str, ...], set[int]]:
    """Runs of BOILERPLATE_WORDS words in more than one of the texts, with the places of those texts."""
    places: dict[tuple[str, ...], set[int]] = {}
    for place, text in enumerate(texts):
        said = words(text)
        for start in range(len(said) - BOILERPLATE_WORDS + 1):
            places.setdefault(tuple(said[start : start + BOILERPLATE_WORDS]), set()).add(place)
    return {run: found for run, found in places.items() if len(found) > 1}


def token_bound(text: str) -> float:
    """At least the tokens of a byte-level BPE such as SmolLM2's, without the model: one more than a token for every
    five letters begun of a word, two for a digit (a space before it may stand alone), two and a half for a Chinese or
    accented character, one for other signs. test_length_limit holds it against the real counts when it can."""
    bound = 1.0
    for piece in re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", text):
        if piece.isdigit():
            bound += 2
        elif piece.isascii():
            bound += math.ceil(len(piece) / 5)
        else:
            bound += 2.5
    return bound


@pytest.fixture(scope="module")
def splits():
    return {split: T.read_pairs(path)[0] for split, path in T.BUNDLED_DATA.items()}


@pytest.fixture(scope="module")
def rows(splits):
    return [pair for pairs in splits.values() for pair in pairs]


@pytest.fixture(scope="module")
def count_tokens(bundled_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_model, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def answers(rows):
    return [answer for pair in rows for answer in (pair.chosen, pair.rejected)]


@pytest.mark.parametrize("split", ROWS)
def test_rows_and_fields(splits, split):
    assert len(splits[split]) == ROWS[split]  # read_pairs drops unusable rows, so none was
    lines = T.BUNDLED_DATA[split].read_text(encoding="utf-8").splitlines()
    assert len(lines) == ROWS[split]
    for number, row in enumerate(map(json.loads, lines), start=1):
        assert tuple(row) == T.PAIR_FIELDS, f"row {number}"
        for field, text in row.items():
            assert isinstance(text, str) and text and text == text.strip(), f"row {number}, {field}"
            assert "\ufffd" not in text and "  " not in text, f"row {number}, {field}"


@pytest.mark.parametrize("split", ROWS)
def test_languages(splits, split, capsys):
    chinese = sum(map(is_chinese, splits[split]))
    with capsys.disabled():
        print(f"\n{split}: {len(splits[split])} pairs, {chinese} of them Chinese ({chinese / ROWS[split]:.1%})")
    assert CHINESE_SHARE[0] <= chinese / ROWS[split] <= CHINESE_SHARE[1]
    for pair in splits[split]:
        for answer in (pair.chosen, pair.rejected):
            assert bool(CJK.search(answer)) == is_chinese(pair), f"{split} row {pair.row}: answer in another language"


def test_no_prompt_twice(rows):
    prompts = [" ".join(words(pair.prompt)) for pair in rows]
    assert len(set(prompts)) == sum(ROWS.values())


def test_no_near_duplicates(rows, capsys):
    prompts = most_alike([pair.prompt for pair in rows])
    chosen = most_alike([pair.chosen for pair in rows])
    with capsys.disabled():
        print(f"\nmost alike of {len(prompts)} pairs of prompts: {prompts[0]}\n... of chosen answers: {chosen[0]}")
    assert [pair for pair in prompts if pair[0] >= MAX_PROMPT_SIMILARITY] == []
    assert [pair for pair in chosen if pair[0] >= MAX_CHOSEN_SIMILARITY] == []


@pytest.mark.parametrize("paraphrase", PARAPHRASES)
def test_a_paraphrase_would_be_caught(rows, paraphrase):
    found = most_alike([pair.prompt for pair in rows] + [paraphrase])
    caught = [{one, other} for alike, one, other in found if alike >= MAX_PROMPT_SIMILARITY]
    assert caught == [{PARAPHRASES[paraphrase], paraphrase}]


def test_the_same_advice_would_be_caught(rows):
    found = most_alike([pair.chosen for pair in rows] + [ONCE_HELD])
    caught = [pair for pair in found if pair[0] >= MAX_CHOSEN_SIMILARITY]
    assert len(caught) == 1 and ONCE_HELD in caught[0][1:]


def test_chosen_answers_share_no_boilerplate(rows):
    assert shared_runs([pair.chosen for pair in rows]) == {}


@pytest.mark.parametrize(
    "refusals",
    [
        ("I can't help with that, because it hurts people.", "Sorry, I can’t help with that; it's theft."),
        ("造假我帮不了你。", "骗人的事我帮不了。"),
    ],
)
def test_boilerplate_would_be_caught(refusals):
    assert shared_runs(list(refusals)) != {}


# Rules that see nothing but the lengths of a pair's chosen and rejected answer. Each says how far it picks the chosen
# one (1 or 0, a half where it cannot decide), given a limit that is fitted, as is whether the rule or its opposite is
# followed. That the longer answer is chosen in half of the pairs is not enough: the sample once held chosen answers of
# 70 to 110 and 160 to 205 characters against rejected ones that were shorter still or had 190 to 250, and the second
# rule found the chosen one in 92 percent of the English test pairs.
LENGTH_RULES: dict[str, Callable[[int, int, float], float]] = {
    "the longer answer": lambda chosen, rejected, limit: float(chosen > rejected),
    "the longer answer unless above a limit": lambda chosen, rejected, limit: float(
        (chosen > rejected) is (max(chosen, rejected) <= limit)
    ),
    "the longer answer unless longer by more than a limit": lambda chosen, rejected, limit: float(
        (chosen > rejected) is (abs(chosen - rejected) <= limit)
    ),
    "the answer nearer to a length": lambda chosen, rejected, limit: (
        0.5 if abs(chosen - limit) == abs(rejected - limit) else float(abs(chosen - limit) < abs(rejected - limit))
    ),
}
# English: fitted to the train pairs, and applied to the test pairs. Chinese: fitted to all 44 pairs, as 12 test pairs
# would tell nothing. Fitting alone lifts a rule above one half, the more so the fewer the pairs.
MAX_ENGLISH_TRAIN_ACCURACY = 0.65
MAX_ENGLISH_TEST_ACCURACY = 0.63
MAX_CHINESE_ACCURACY = 0.70

Lengths = list[tuple[int, int]]  # of the chosen and the rejected answer


def rule_accuracy(rule: str, lengths: Lengths, limit: int, opposite: bool) -> float:
    share = sum(LENGTH_RULES[rule](chosen, rejected, limit) for chosen, rejected in lengths) / len(lengths)
    return 1 - share if opposite else share


def fitted_rule(rule: str, lengths: Lengths) -> tuple[int, bool]:
    limits = range(max(map(max, lengths)) + 2)
    choices = ((limit, opposite) for limit in limits for opposite in (False, True))
    return max(choices, key=lambda choice: rule_accuracy(rule, lengths, *choice))


def lengths_of(pairs: list[T.Pair], measure, chinese: bool) -> Lengths:
    return [(measure(pair.chosen), measure(pair.rejected)) for pair in pairs if is_chinese(pair) is chinese]


def try_length_rules(splits, measure) -> tuple[list[str], list[str]]:
    """A line for each rule and group of pairs, and those of the lines that are above their bound."""
    lines, too_good = [], []

    def note(rule: str, group: str, lengths: Lengths, choice: tuple[int, bool], bound: float):
        accuracy = rule_accuracy(rule, lengths, *choice)
        lines.append(f"{rule} ({choice[0]}{', opposite' * choice[1]}), {group}: {accuracy:.1%}, at most {bound:.0%}")
        if accuracy > bound:
            too_good.append(lines[-1])

    train, test = (lengths_of(splits[split], measure, chinese=False) for split in ("train", "test"))
    chinese = [both for pairs in splits.values() for both in lengths_of(pairs, measure, chinese=True)]
    for rule in LENGTH_RULES:
        choice = fitted_rule(rule, train)
        note(rule, "English train", train, choice, MAX_ENGLISH_TRAIN_ACCURACY)
        note(rule, "English test", test, choice, MAX_ENGLISH_TEST_ACCURACY)
        note(rule, "Chinese", chinese, fitted_rule(rule, chinese), MAX_CHINESE_ACCURACY)
    return lines, too_good


def check_length_rules(splits, measure, unit, capsys):
    lines, too_good = try_length_rules(splits, measure)
    with capsys.disabled():
        print(f"\nrules that see only {unit}:", *lines, sep="\n  ")
    assert too_good == []


def check_balance(splits, measure, unit, capsys):
    lines, shares = [], []
    for split, pairs in splits.items():
        chinese = [pair for pair in pairs if is_chinese(pair)]
        english = [pair for pair in pairs if not is_chinese(pair)]
        for language, group in (("English", english), ("Chinese", chinese), ("all", pairs)):
            assert all(measure(pair.chosen) != measure(pair.rejected) for pair in group), "answers of equal length"
            longer = sum(measure(pair.chosen) > measure(pair.rejected) for pair in group)
            share = longer / len(group)
            shares.append(share)
            best = max(share, 1 - share)
            lines.append(
                f"{split}, {language}: the longer answer is chosen in {longer} of {len(group)} pairs; "
                f"length-only accuracy {share:.1%}, with the better rule of the two {best:.1%}"
            )
    with capsys.disabled():
        print(f"\nby {unit}:", *lines, sep="\n  ")
    assert all(CHOSEN_LONGER[0] <= share <= CHOSEN_LONGER[1] for share in shares)


def test_the_longer_answer_in_characters_is_chosen_half_the_time(splits, capsys):
    check_balance(splits, len, "characters", capsys)


def test_the_longer_answer_in_tokens_is_chosen_half_the_time(splits, count_tokens, capsys):
    check_balance(splits, count_tokens, "tokens", capsys)


def test_lengths_in_characters_do_not_give_the_chosen_answer_away(splits, capsys):
    check_length_rules(splits, len, "characters", capsys)


def test_lengths_in_tokens_do_not_give_the_chosen_answer_away(splits, count_tokens, capsys):
    check_length_rules(splits, count_tokens, "tokens", capsys)


def test_lengths_in_bands_would_be_caught():
    """The bands the sample once kept to: the longer answer is chosen half the time, and a limit tells which half."""
    draw = random.Random(0).randint

    def pairs(count: int) -> list[T.Pair]:
        lengths = [(draw(70, 110), draw(190, 250)) for _ in range(count // 2)]
        lengths += [(draw(160, 205), draw(10, 110)) for _ in range(count // 2)]
        return [T.Pair("?", "c" * chosen, "r" * rejected, row) for row, (chosen, rejected) in enumerate(lengths, 1)]

    # Chinese answers of lengths that tell nothing, so that only the English ones can be caught.
    chinese = [T.Pair("问", "答" * chosen, "答" * rejected, 0) for chosen, rejected in ((10, 20), (20, 10))]
    lines, too_good = try_length_rules({"train": pairs(128) + chinese, "test": pairs(48) + chinese}, len)
    caught = {re.sub(r" \(.*?\)|: .*", "", line) for line in too_good}
    assert {f"the longer answer unless above a limit, English {split}" for split in ROWS} <= caught
    assert not any(line.startswith("the longer answer (") or "Chinese" in line for line in too_good)
    assert len(lines) == 3 * len(LENGTH_RULES)


def test_length_limit_without_the_model(rows):
    assert [answer for answer in answers(rows) if token_bound(answer) > MAX_TOKENS] == []


def test_length_limit(rows, count_tokens, capsys):
    counts = {answer: count_tokens(answer) for answer in answers(rows)}
    with capsys.disabled():
        print(f"\nlongest answer: {max(counts.values())} tokens; bound {max(map(token_bound, counts))}")
    assert max(counts.values()) <= MAX_TOKENS
    assert [answer for answer, count in counts.items() if count > token_bound(answer)] == []
