"""Prefix: where the preference in words stands, and which files hold a soft prompt: every accepted format is read to
the same values, every other file is refused by name, and no code in a file is run."""

import copy
import io
import math
import os
import pickle
import random

import pytest
import safetensors.torch
import torch
from conftest import make_model
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn

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


def test_virtual_ids_count_down_from_minus_one():
    assert T.Prefix(num_virtual_tokens=3).virtual_ids == [-1, -2, -3]
    assert PREFIX.virtual_ids == T.Prefix().virtual_ids == []


# --- soft prompts that can be read

K, H = 3, 32  # H is that of make_model
VALUES = (torch.arange(K * H) % 17 - 8).reshape(K, H) / 8  # 4 significant bits: exact even in float8; rows differ
OTHERS = {"ids": VALUES.long(), "wider": torch.ones(K, H + 1), "cube": torch.ones(1, K, H)}  # none fits

DICTS = {
    "prompt_embeddings": {"prompt_embeddings": VALUES},
    "embeddings": {"embeddings": VALUES},
    "weight": dict(nn.Embedding.from_pretrained(VALUES).state_dict()),
    "PEFT's own key": {"prompt_encoder.default.embedding.weight": VALUES},
    "PEFT's own key below module": {"module.prompt_encoder.other.embedding.weight": VALUES, "more": torch.zeros(K, H)},
    "the only one that fits": {**OTHERS, "soft": VALUES},
    "named, beside one that fits": {"more": torch.zeros(K, H), **OTHERS, "weight": VALUES},
}
OBJECTS = {
    **DICTS,
    "(K, H)": VALUES,
    "(H,)": VALUES[0],
    "the only tensor": {"step": 7, "name": "soft", "sizes": [1, 2], "soft": VALUES, 0: None},
    "a parameter": nn.Parameter(VALUES),
    "a parameter in a dict": {"prompt_embeddings": nn.Parameter(VALUES)},
    "a state dict with metadata": nn.Embedding.from_pretrained(VALUES).state_dict(),
    "not contiguous": VALUES.T.contiguous().T,
    "part of a larger tensor": torch.cat([torch.ones(1, H), VALUES, torch.ones(1, H)])[1:-1],
    **{str(kind): VALUES.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    "float8": VALUES.to(torch.float8_e4m3fn),
}


def assert_read(path, expected=VALUES):
    found = T.read_soft_prompt(str(path), H)
    assert torch.equal(found, expected) and found.shape == expected.shape and found.dtype == torch.float32
    assert found.is_contiguous() and not found.requires_grad


def peft_model(kind: str):
    model = get_peft_model(make_model("llama", 300), PEFT[kind])
    if kind == "PROMPT_TUNING":
        model.prompt_encoder["default"].embedding.weight.data = VALUES.clone()
    return model


PEFT = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=K),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=K),
    "LORA": LoraConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(
    ("name", "zipped"),
    [(name, zipped) for name in OBJECTS for zipped in (True, False) if zipped or name != "float8"],  # newer than legacy
)
def test_what_torch_saved_is_read(tmp_path, name, zipped):
    torch.save(OBJECTS[name], tmp_path / "soft.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "soft.pt", VALUES[:1] if name == "(H,)" else VALUES)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", DICTS)
def test_safetensors_are_read(tmp_path, name, kind):
    tensors = {key: value.to(kind) if value.is_floating_point() else value for key, value in DICTS[name].items()}
    safetensors.torch.save_file(tensors, tmp_path / "soft.safetensors")
    assert_read(tmp_path / "soft.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_state_of_a_whole_peft_model_is_read(tmp_path, prefix):
    state = {prefix + key: value for key, value in peft_model("PROMPT_TUNING").state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    assert len(state) > 10  # the frozen model's weights are in it
    assert_read(tmp_path / "state.pt")


@pytest.mark.parametrize(("safe", "name"), [(True, "adapter_model.safetensors"), (False, "adapter_model.bin")])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_peft_folders_are_read(tmp_path, kind, safe, name):
    model = peft_model(kind)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    expected = model.get_prompt_embedding_to_save("default").detach()
    assert (tmp_path / name).is_file() and (kind == "P_TUNING" or torch.equal(expected, VALUES))
    assert_read(tmp_path, expected)


def test_a_path_below_home_and_any_hidden_size(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(VALUES[:, :5].clone(), tmp_path / "soft.pt")
    assert torch.equal(T.read_soft_prompt("~/soft.pt", None), VALUES[:, :5])


# --- soft prompts that cannot


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def problem_of(path) -> str:
    """The one line of the error for this path, without the start that every such error has."""
    with pytest.raises(T.InputError) as caught:
        T.read_soft_prompt(str(path), H)
    text = str(caught.value)
    start = f"- {T.describe('prompt_embedding_path', str(path))}: "
    assert text.startswith(start) and len(text.splitlines()) == 1 and "weights_only" not in text
    return text.removeprefix(start)


def with_one(value: float, dtype=torch.float32) -> torch.Tensor:
    changed = VALUES.clone().to(dtype)
    changed[1, 2] = value
    return changed


EXPECTED = f"expected one floating-point tensor (K, {H})"
BROKEN = f"1 of its {K * H} numbers are not finite in fp32"
BAD_OBJECTS = {  # what torch.save wrote → what the error says
    "wrong hidden size": (torch.ones(2, 31), ["holds float32 (2, 31)", f"have {H} numbers, not 31", "this model"]),
    "wrong hidden size, named": ({"weight": torch.ones(2, 31), "x": VALUES}, ["float32 (2, 31)", f"{H} numbers"]),
    "two named": (
        {"embeddings": VALUES, "weight": VALUES},
        ["ambiguous, 'embeddings' and 'weight'", "'weight' float32 (3, 32)", EXPECTED],
    ),
    "two that fit": ({**OTHERS, "a": VALUES, "b": VALUES[0]}, ["ambiguous, 'a' and 'b'", "'b' float32 (32,)"]),
    "none that fits": (OTHERS, ["holds none: found 'ids' int64 (3, 32), 'wider' float32 (3, 33)", EXPECTED]),
    "no tensor": ({"weights": VALUES.tolist(), "step": 7}, ["found 'weights' list, 'step' int", EXPECTED]),
    "a list under a key": ({"prompt_embeddings": VALUES.tolist()}, ["found 'prompt_embeddings' list", EXPECTED]),
    "a dict in a dict": ({"state": {"weight": VALUES}}, ["found 'state' dict", EXPECTED]),
    "an empty dict": ({}, ["found nothing", EXPECTED]),
    "a whole table": (
        VALUES[:1].expand(10**12, H),
        ["holds float32 (1000000000000, 32); a soft prompt has at most 4096"],
    ),
    "a list": ([VALUES], ["holds list, expected a tensor or a dict of tensors"]),
    "None": (None, ["holds NoneType, expected a tensor or a dict of tensors"]),
    "integers": (VALUES.long(), ["holds int64 (3, 32)", EXPECTED]),
    "booleans": (VALUES > 0, ["holds bool (3, 32)", EXPECTED]),
    "complex": (VALUES.to(torch.complex64), ["holds complex64 (3, 32)", EXPECTED]),
    "three dimensions": (VALUES[None], ["holds float32 (1, 3, 32)", EXPECTED]),
    "no embedding": (VALUES[:0], ["holds float32 (0, 32)", EXPECTED]),
    "a scalar": (VALUES[0, 0], ["holds float32 ()", EXPECTED]),
    "sparse": (VALUES.to_sparse(), ["sparse", "(3, 32)", EXPECTED]),
    "without values": (VALUES.to("meta"), ["meta", "(3, 32)", EXPECTED]),
    "nested": (torch.nested.nested_tensor([VALUES[0], VALUES[1]]), ["nested", EXPECTED]),
    "NaN": (with_one(math.nan), [BROKEN]),
    "infinity": (with_one(math.inf), [BROKEN]),
    "overflows fp32": (with_one(1e300, torch.float64), [BROKEN]),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_what_is_no_soft_prompt_is_named(tmp_path, name):
    value, phrases = BAD_OBJECTS[name]
    torch.save(value, tmp_path / "soft.pt")
    problem = problem_of(tmp_path / "soft.pt")
    assert [phrase for phrase in phrases if phrase not in problem] == []


def test_a_long_list_of_what_was_found_is_cut(tmp_path):
    torch.save({f"layer {n}": torch.ones(2) for n in range(1000)}, tmp_path / "soft.pt")
    problem = problem_of(tmp_path / "soft.pt")
    assert problem.count("'layer ") == T.MAX_LISTED_PROBLEMS and ", …; expected" in problem


@pytest.mark.parametrize("part", ["prompt_encoder", ""])
def test_an_encoder_is_not_its_embeddings(tmp_path, part):
    state = {key: value for key, value in peft_model("P_TUNING").state_dict().items() if part in key}
    assert any("mlp_head" in key for key in state)
    torch.save(state, tmp_path / "state.pt")
    assert "holds a P-tuning encoder, not its embeddings; name the folder" in problem_of(tmp_path / "state.pt")


NO_TENSORS = "is not a file of tensors"
SAFE = safetensors.torch.save({"weight": VALUES})
BAD_FILES = {  # file name, its bytes → what the error says
    "empty": ("soft.pt", b"", "soft.pt is empty; expected a tensor"),
    "text": ("soft.pt", b"Answer plainly.\n", NO_TENSORS),
    "random bytes": ("soft.pt", random.Random(0).randbytes(999), NO_TENSORS),
    "safetensors by name only": ("soft.safetensors", saved(VALUES), NO_TENSORS),
    "a pickle by another name": ("soft.safetensors", pickle.dumps({"weight": [1.0]}), NO_TENSORS),
    "TorchScript": ("soft.pt", None, NO_TENSORS),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_tensors_is_named(tmp_path, name):
    file, content, phrase = BAD_FILES[name]
    if content is None:
        torch.jit.save(torch.jit.trace(nn.Linear(H, K), VALUES), tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    assert phrase in problem_of(tmp_path / file)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 1])
@pytest.mark.parametrize(
    ("file", "whole"),
    [
        ("soft.pt", saved(VALUES)),
        ("soft.pt", saved(VALUES, _use_new_zipfile_serialization=False)),
        ("soft.safetensors", SAFE),
    ],
    ids=["zip", "legacy", "safetensors"],
)
def test_a_file_that_was_cut_off_is_named(tmp_path, file, whole, share):
    (tmp_path / file).write_bytes(whole)
    assert_read(tmp_path / file)
    (tmp_path / file).write_bytes(whole[: int(share * len(whole)) - (share == 1)])
    assert NO_TENSORS in problem_of(tmp_path / file)


@pytest.mark.parametrize("path", ["/nowhere/soft.pt", "soft\0.pt", "/dev/null", "~nobody_here/soft.pt", "x" * 300])
def test_a_path_that_is_no_file_is_named(path):
    assert problem_of(path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """What any user but root, who may read every file, gets from the system."""

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    torch.save(VALUES, tmp_path / "soft.pt")
    monkeypatch.setattr(torch, "load", refuse)
    assert "cannot be read (Permission denied); check its permissions" in problem_of(tmp_path / "soft.pt")


FOLDERS = {  # files in a folder → what the error says
    "empty": ({}, "has no adapter_config.json of a PEFT prompt-tuning adapter"),
    "a broken configuration": ({"adapter_config.json": '{"peft_type"'}, "has no adapter_config.json"),
    "another configuration": ({"adapter_config.json": "[1]"}, "has no adapter_config.json"),
    "no weights": (
        {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}'},
        "has neither adapter_model.safetensors nor adapter_model.bin",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_soft_prompt_is_named(tmp_path, name):
    files, phrase = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    problem = problem_of(tmp_path)
    assert phrase in problem and problem.endswith("; name a tensor file or another folder")
    torch.save(VALUES, tmp_path / "prompt_embeddings.pt")
    problem = problem_of(tmp_path)
    assert phrase in problem and problem.endswith("; name its prompt_embeddings.pt")


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING"])
def test_an_adapter_of_another_kind_is_named(tmp_path, kind):
    peft_model(kind).save_pretrained(tmp_path)
    problem = f"that folder holds a {kind!r} adapter, not one of prompt tuning; name "
    assert problem_of(tmp_path) == problem + "a tensor file or another folder"
    torch.save(VALUES, tmp_path / "prompt_embeddings.pt")
    assert problem_of(tmp_path) == problem + "its prompt_embeddings.pt"
    assert_read(tmp_path / "prompt_embeddings.pt")


# --- code in a file is never run


class Runs:
    """Pickled, it becomes a call that makes the marker file when it is read."""

    def __init__(self, call, argument):
        self.called = (call, (argument,))

    def __reduce__(self):
        return self.called


CALLS = {  # what is called, with {} for the marker → the name in the error
    "posix.system": (os.system, "touch '{}'"),
    "exec": (exec, "open('{}', 'w')"),
    "eval": (eval, "open('{}', 'w')"),
}
HOSTILE = {  # name → the file and its bytes
    "bare": lambda bomb: ("soft.pt", saved(bomb)),
    "beside a tensor": lambda bomb: ("soft.pt", saved({"prompt_embeddings": VALUES, "note": bomb})),
    "legacy": lambda bomb: (
        "soft.pt",
        saved({"prompt_embeddings": VALUES, "note": bomb}, _use_new_zipfile_serialization=False),
    ),
    "in a PEFT folder": lambda bomb: ("adapter_model.bin", saved({"prompt_embeddings": VALUES, "note": bomb})),
    "a plain pickle": lambda bomb: ("soft.pt", pickle.dumps(bomb)),
    "called safetensors": lambda bomb: ("soft.safetensors", saved(bomb)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name, call):
    marker, folder = tmp_path / "marker", tmp_path / "folder"
    function, argument = CALLS[call]
    file, content = HOSTILE[name](Runs(function, argument.format(marker)))
    folder.mkdir()
    (folder / file).write_bytes(content)
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    problem = problem_of(folder if file == "adapter_model.bin" else folder / file)
    assert NO_TENSORS in problem and not marker.exists()
    if name not in ("a plain pickle", "called safetensors"):  # torch.load and safetensors read no further than it
        assert f"it asks to run {call!r}, which is refused" in problem
    if name != "a plain pickle":  # the file does run code when it is let
        torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists()


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    torch.save(nn.Embedding.from_pretrained(VALUES), tmp_path / "soft.pt")
    assert "it asks to run 'torch.nn.modules.sparse.Embedding', which is refused" in problem_of(tmp_path / "soft.pt")


def test_a_small_file_with_an_endless_embedding_is_refused_before_it_takes_memory(tmp_path):
    """Where the model's size is not known yet: one number that is said to be 2 billion."""
    torch.save(torch.zeros(1).expand(2 * 10**9), tmp_path / "soft.pt")
    assert (tmp_path / "soft.pt").stat().st_size < 10_000
    with pytest.raises(T.InputError, match="no model has embeddings of more than 65536 numbers"):
        T.read_soft_prompt(str(tmp_path / "soft.pt"), None)
