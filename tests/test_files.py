"""Files: a failure to write is one error, a JSON file is whole or as it was, and only a complete checkpoint counts."""

import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

import train_with_preference_prompt as T


def checkpoint(output_dir, update, complete=True):
    folder = output_dir / f"checkpoint-{update}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "global_step" / "optim_states.pt").write_bytes(b"x" * 100)
    if complete:
        T.mark_complete(folder)
    return folder


def test_a_checkpoint_lists_its_files(tmp_path):
    folder = checkpoint(tmp_path, 5)
    listed = json.loads((folder / "complete.json").read_text())
    assert listed == {
        "global_step/optim_states.pt": [100, zlib.crc32(b"x" * 100)],
        "trainer_state.json": [2, zlib.crc32(b"{}")],
    }
    assert T.is_complete(folder) and T.newest_checkpoint(tmp_path) == folder


DAMAGE = {
    "no list": lambda folder: (folder / "complete.json").unlink(),
    "half a list": lambda folder: (folder / "complete.json").write_text('{"trainer_state.json": 2'),
    "a list of another kind": lambda folder: (folder / "complete.json").write_text("[1, 2]"),
    "a size that is no number": lambda folder: (folder / "complete.json").write_text('{"trainer_state.json": "2"}'),
    "a missing file": lambda folder: (folder / "trainer_state.json").unlink(),
    "a shorter file": lambda folder: (folder / "global_step" / "optim_states.pt").write_bytes(b"x" * 99),
    "a longer file": lambda folder: (folder / "global_step" / "optim_states.pt").write_bytes(b"x" * 101),
    "another byte": lambda folder: (folder / "global_step" / "optim_states.pt").write_bytes(b"x" * 99 + b"y"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    older, newer = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    assert T.newest_checkpoint(tmp_path) == newer and T.skipped_checkpoints(tmp_path, newer) == []
    DAMAGE[damage](newer)
    assert T.newest_checkpoint(tmp_path) == older and T.skipped_checkpoints(tmp_path, older) == [newer]
    DAMAGE[damage](older)
    assert T.newest_checkpoint(tmp_path) is None and T.skipped_checkpoints(tmp_path, None) == [older, newer]


def test_checkpoints_are_ordered_by_number_and_renamed_ones_left_alone(tmp_path):
    for update in (10, 9, 100):
        checkpoint(tmp_path, update)
    checkpoint(tmp_path, "best")
    assert [path.name for path in T.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    T.drop_old_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-100", "checkpoint-best"}


@pytest.mark.parametrize(
    ("complete", "cut_short", "left"),
    [
        ([2], [], [2]),
        ([2, 4], [], [2, 4]),
        ([2, 4, 6], [], [4, 6]),
        ([2, 4], [6], [2, 4, 6]),  # an incomplete one never makes a complete one go
        ([2, 6], [4], [2, 4, 6]),
        ([4, 6], [2], [4, 6]),
        ([2, 3], [4, 6], [2, 3, 4, 6]),
    ],
)
def test_two_complete_checkpoints_stay(tmp_path, complete, cut_short, left):
    for update in complete + cut_short:
        checkpoint(tmp_path, update, complete=update in complete)
    T.drop_old_checkpoints(tmp_path)
    assert [path.name for path in T.checkpoints(tmp_path)] == [f"checkpoint-{update}" for update in left]


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "settings.json"
    T.write_json(path, {"text": "请简短"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "请简短"}
    with pytest.raises(TypeError):
        T.write_json(path, {"first": 1, "second": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "请简短"}


# /dev/full takes no byte, as a full disk does
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x"),
        lambda path: torch.save({"a": torch.ones(10)}, path),
        lambda path: torch.save({"a": torch.ones(10)}, path, _use_new_zipfile_serialization=False),  # as DeepSpeed does
        lambda path: save_file({"a": torch.ones(10)}, path / "a.safetensors"),  # the device is no folder either
    ],
)
def test_a_full_disk_is_named_with_what_is_left(tmp_path, write):
    checkpoint(tmp_path / "out", 4)
    full = tmp_path / "out" / "checkpoint-6"
    full.symlink_to("/dev/full")
    with pytest.raises(T.RankError) as caught, T.writing(full, tmp_path / "out"):
        write(full)
    message = str(caught.value)
    assert message.startswith(f"{full} cannot be written: ") and "MiB are free there. Make room" in message
    assert message.endswith(f"{tmp_path}/out/checkpoint-4 is complete, from which RESUME=true continues")
    with pytest.raises(T.RankError, match="no checkpoint is complete yet, so that RESUME=true begins again"):
        with T.writing(full, tmp_path / "elsewhere"):
            write(full)


@pytest.mark.parametrize("error", [T.SelfCheckError("differs"), RuntimeError("mat1 and mat2 shapes"), KeyError("x")])
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, T.writing(tmp_path):
        raise error
    assert caught.value is error
