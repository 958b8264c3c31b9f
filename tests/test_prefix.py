"""Prefix: where the preference in words stands, with and without a system role; an empty one changes nothing."""

import copy

import pytest

import train_with_preference_prompt as T

USER = {"role": "user", "content": "Is the earth flat?"}
ASSISTANT = {"role": "assistant", "content": "No."}
MORE = {"role": "user", "content": "Sure?"}
PREFIX = T.Prefix("Answer plainly.")

CASES = {
    "system message": (
        PREFIX.as_system_message,
        [USER],
        [{"role": "system", "content": "Answer plainly."}, USER],
    ),
    "system message before a dialogue": (
        PREFIX.as_system_message,
        [USER, ASSISTANT, MORE],
        [{"role": "system", "content": "Answer plainly."}, USER, ASSISTANT, MORE],
    ),
    "in the first message": (
        PREFIX.before_first_message,
        [USER],
        [{"role": "user", "content": "Answer plainly.\n\nIs the earth flat?"}],
    ),
    "in the first message of a dialogue": (
        PREFIX.before_first_message,
        [USER, ASSISTANT, MORE],
        [{"role": "user", "content": "Answer plainly.\n\nIs the earth flat?"}, ASSISTANT, MORE],
    ),
    "empty, system message": (T.Prefix("").as_system_message, [USER], [USER]),
    "empty, in the first message": (T.Prefix("").before_first_message, [USER, ASSISTANT], [USER, ASSISTANT]),
}


@pytest.mark.parametrize("name", CASES)
def test_messages(name):
    guide, messages, expected = CASES[name]
    before = copy.deepcopy(messages)
    assert guide(messages) == expected
    assert messages == before  # the caller's messages are left as they were


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("Answer plainly.", "Is it?", "Answer plainly.\n\nIs it?"),
        ("Answer plainly.", "", "Answer plainly.\n\n"),
        ("", "Is it?", "Is it?"),
        ("", "", ""),
        ("One.\nTwo. {prompt} %s", "\nIs it?\n", "One.\nTwo. {prompt} %s\n\n\nIs it?\n"),
    ],
)
def test_before_prompt(text, prompt, expected):
    assert T.Prefix(text).before_prompt(prompt) == expected


def test_further_fields_of_a_message_are_kept():
    (message,) = PREFIX.before_first_message([{**USER, "name": "Ada"}])
    assert message == {"role": "user", "content": "Answer plainly.\n\nIs the earth flat?", "name": "Ada"}


def test_a_text_prefix_is_no_virtual_token_wide():
    assert PREFIX.num_virtual_tokens == 0
