"""The reference's log-probabilities: computed once per model and data set, kept on disk, never trusted blindly."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROWS, make_model, output_of, start, train, two_ranks, write_rows
from safetensors.torch import load_file, save_file
from test_around import sabotaged
from test_trainer import adapter, logged

import train_with_preference_prompt as T

# Says of every forward of the reference how many pairs it has; the self-check adds one of the first pairs.
COUNTED = """
score = T.reference_logps
def counted(model, row, weights):
    print("scored", len(row.trees), flush=True)
    return score(model, row, weights)
T.reference_logps = counted
"""
SELF_CHECK = [2]  # PAIRS_PER_FORWARD
PREFIXED = [1, 2, 2]  # the test pairs with the prefix
ALL = [2] * 6 + [1, 2, 2] + PREFIXED + SELF_CHECK  # 12 training and 5 test pairs
SHORT = {"NUM_EPOCHS": "0.1", "EVAL_STEPS": "0"}


def counted_run(variables, cwd: Path, patch: str = "") -> tuple[list[int], str]:
    """Pairs of each forward of the reference in a run, and what was printed."""
    cwd.mkdir(exist_ok=True)
    result = train({**variables, "OVERWRITE": "true"}, cwd, sabotaged(COUNTED + patch, cwd))
    assert result.returncode == 0, result.stderr[-3000:]
    return [int(n) for n in re.findall(r"^scored (\d+)$", result.stdout, re.M)], result.stdout


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture
def short(tiny_run, tmp_path):
    """The shortest run, with a cache of its own."""
    return {**tiny_run, **SHORT, "REFERENCE_CACHE": str(tmp_path / "cache")}


@pytest.fixture(scope="module")
def filled(tiny_run, tmp_path_factory):
    """A run that computed everything, and its cache, not to be written to."""
    cwd = tmp_path_factory.mktemp("filled")
    variables = {**tiny_run, "LORA_DROPOUT": "0.3", "REFERENCE_CACHE": str(cwd / "cache")}
    forwards, said = counted_run(variables, cwd)
    assert forwards == ALL
    return {"cwd": cwd, "cache": cwd / "cache", "variables": variables, "said": said}


@pytest.fixture
def copied(filled, tmp_path):
    """The same for a test that may change its cache."""
    shutil.copytree(filled["cache"], tmp_path / "cache")
    return {**filled["variables"], "REFERENCE_CACHE": str(tmp_path / "cache")}


def file_for(cache: Path, pairs: int) -> Path:
    """The file of the only data set with so many pairs."""
    (found,) = (path for path in cache.iterdir() if len(load_file(path)["ref_logps"]) == pairs)
    return found


def reports(said: str) -> dict[str, str]:
    """Data set and condition → what was said of its log-probabilities."""
    return dict(re.findall(r"^reference log-probabilities, (.*?): (.*)$", said, re.M))


# --- whole runs


def test_a_run_from_the_cache_equals_the_one_that_filled_it(filled, tmp_path):
    forwards, said = counted_run(filled["variables"], tmp_path)
    assert forwards == SELF_CHECK
    first, second, files = reports(filled["said"]), reports(said), set()
    for name, pairs in {"train data": 12, "test data": 5, "test data with the prefix": 5}.items():
        (file,) = re.findall(rf"^{pairs} of {pairs} pairs from (\S+) \([\d.]+ KiB\)$", second[name])
        size = f"{Path(file).stat().st_size / 1024:.1f} KiB"
        assert first[name] == f"0 of {pairs} pairs from {file} ({size}), {pairs} computed" and size in second[name]
        files.add(Path(file))
    assert files == set(files_in(filled["cache"])) and len(files) == len(first) == len(second) == 3
    assert logged(tmp_path) == logged(filled["cwd"])
    assert all(torch.equal(tensor, adapter(filled["cwd"])[name]) for name, tensor in adapter(tmp_path).items())


def test_off_writes_nothing_and_gives_the_same_run(filled, tmp_path):
    default = f"T.CACHE_FOLDER = {str(tmp_path / 'default')!r}\n"
    forwards, said = counted_run({**filled["variables"], "REFERENCE_CACHE": "off"}, tmp_path, default)
    assert forwards == ALL and reports(said)["train data"] == "12 computed, not kept"
    assert not (tmp_path / "default").exists() and not (tmp_path / "off").exists()
    assert logged(tmp_path) == logged(filled["cwd"])
    counted_run({**filled["variables"], **SHORT, "REFERENCE_CACHE": ""}, tmp_path, default)
    assert len(files_in(tmp_path / "default")) == 3  # what is looked at is what an empty one means


def test_runs_with_other_settings_share_it(copied, tmp_path):
    before = {path: path.read_bytes() for path in files_in(tmp_path / "cache")}
    changed = {"BETA": "0.3", "ALPHA": "0", "LEARNING_RATE": "1e-3", "LORA_R": "3", "LORA_TARGET_MODULES": "q_proj"}
    changed |= {"SEED": "7", "LOSS_TYPE": "hinge", "PAIRS_PER_FORWARD": "2", **SHORT}
    assert counted_run({**copied, **changed}, tmp_path / "other")[0] == SELF_CHECK
    assert {path: path.read_bytes() for path in files_in(tmp_path / "cache")} == before
    for prefix in ({"PREFERENCE_TEXT": "Be brief."}, {"TRAINING_MODE": "ptuning", "NUM_VIRTUAL_TOKENS": "3"}):
        assert counted_run({**copied, **SHORT, **prefix}, tmp_path / "prefix")[0] == PREFIXED + SELF_CHECK
        assert counted_run({**copied, **SHORT, **prefix}, tmp_path / "again")[0] == SELF_CHECK
    after = {path: path.read_bytes() for path in files_in(tmp_path / "cache")}
    assert before.items() <= after.items() and len(after) == len(before) + 2


BOTH_WAYS = """
loop = T.PreferenceGuidedDPOTrainer.evaluation_loop
def both(self, *args, **kwargs):
    kept = loop(self, *args, **kwargs)
    if self.state.global_step == 0:
        self.state.global_step = 1
        print("equal", kept.metrics == loop(self, *args, **kwargs).metrics, len(kept.metrics), flush=True)
        self.state.global_step = 0
    return kept
T.PreferenceGuidedDPOTrainer.evaluation_loop = both
"""


@pytest.mark.parametrize("mode", ["text", "embedding", "ptuning"])
def test_the_first_evaluation_is_what_the_policy_would_give(mode, copied, tmp_path):
    soft_prompt = tmp_path / "soft.pt"
    torch.save(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), soft_prompt)
    copied |= {"TRAINING_MODE": mode, "PROMPT_EMBEDDING_PATH": str(soft_prompt) if mode == "embedding" else "", **SHORT}
    said = counted_run(copied, tmp_path / "run", BOTH_WAYS)[1]
    assert re.findall(r"^equal (.*)$", said, re.M) == [f"True {len(T.TAGS)}"]


def test_another_soft_prompt_of_the_same_size_is_scored_anew(copied, tmp_path):
    soft_prompt, values = tmp_path / "soft.pt", torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    copied |= {"TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": str(soft_prompt), **SHORT}
    for factor, forwards in ((1, PREFIXED + SELF_CHECK), (2, PREFIXED + SELF_CHECK)):
        torch.save(factor * values, soft_prompt)
        assert counted_run(copied, tmp_path / "run")[0] == forwards


def test_other_weights_in_the_same_folder_do_not(copied, tmp_path, tokenizer):
    model = tmp_path / "model"
    shutil.copytree(copied["POLICY_MODEL_PATH"], model)
    copied |= {"POLICY_MODEL_PATH": str(model), **SHORT}
    assert counted_run(copied, tmp_path / "run")[0] == SELF_CHECK  # only the place is another
    make_model("llama", len(tokenizer), seed=1).save_pretrained(model)
    assert counted_run(copied, tmp_path / "run")[0] == ALL
    rows = [*ROWS[:5], {**ROWS[5], "rejected": "Nope."}]
    copied["TEST_DATASET_PATH"] = str(write_rows(tmp_path / "test.jsonl", rows))
    assert counted_run(copied, tmp_path / "run")[0] == [2, 2, 2] * 2 + SELF_CHECK  # the training data are the same
    assert len(files_in(tmp_path / "cache")) == 3 + 3 + 2


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_an_interrupted_pass_goes_on_where_it_was(how, short, tmp_path):
    short |= {"PAIRS_PER_FORWARD": "1"}
    ended = f"""
import os, signal
forwards, score = [], T.reference_logps
def ends(model, row, weights):
    forwards.append(1)
    if len(forwards) == 12:
        os.kill(os.getpid(), signal.{how})
    return score(model, row, weights)
T.reference_logps = ends
"""
    assert train({**short, "OVERWRITE": "true"}, tmp_path, sabotaged(ended, tmp_path)).returncode < 0
    (file,) = files_in(tmp_path / "cache")
    assert load_file(file)["ref_logps"].isfinite().sum(0).tolist() == [8, 8]  # kept each 8 forwards
    forwards, said = counted_run(short, tmp_path)
    assert forwards == [1] * (4 + 5 + 5 + 1) and f"train data: 8 of 12 pairs from {file} " in said
    whole = {**short, "REFERENCE_CACHE": str(tmp_path / "whole")}
    counted_run(whole, tmp_path)
    for path in files_in(tmp_path / "cache"):  # the same pairs in the same forwards
        assert torch.equal(load_file(path)["ref_logps"], load_file(tmp_path / "whole" / path.name)["ref_logps"])


def test_numbers_that_another_model_gave_stop_the_run(copied, tmp_path):
    file = file_for(tmp_path / "cache", 12)
    T.ReferenceCache(tmp_path / "cache", {}).write(file, load_file(file)["ref_logps"])  # as it was
    assert counted_run({**copied, **SHORT}, tmp_path / "run")[0] == SELF_CHECK
    file.unlink()
    T.ReferenceCache(tmp_path / "cache", {}).write(file, torch.full((12, 2), -3.0))
    result = train({**copied, "OVERWRITE": "true"}, tmp_path / "run")
    assert result.returncode == 1
    assert f"the reference pass (from {file}: delete that file) and of the reference scored again" in result.stderr


def test_a_reference_that_is_not_finite_is_not_kept(short, tmp_path):
    patch = """
score = T.reference_logps
broken = lambda row: torch.arange(len(row.trees))[:, None] == 1
T.reference_logps = lambda model, row, weights: score(model, row, weights).masked_fill(broken(row), {})
"""
    for number in ("float('nan')", "float('inf')"):
        result = train({**short, "OVERWRITE": "true"}, tmp_path, sabotaged(patch.format(number), tmp_path))
        (file,) = files_in(tmp_path / "cache")
        unknown = load_file(file)["ref_logps"].isnan()
        rows = [1 + index for index in unknown.all(1).nonzero().flatten().tolist()]
        assert len(rows) == 6 == unknown.any(1).sum()
        named = f"not finite for rows {', '.join(map(str, rows[:5]))}, … of"
        assert result.returncode == 1 and named in result.stderr
        file.unlink()


def test_a_folder_that_cannot_be_written_costs_a_notice(short, tmp_path):
    (tmp_path / "file").write_text("in the way")
    default = f"T.CACHE_FOLDER = {str(tmp_path / 'file' / 'cache')!r}\n"
    forwards, said = counted_run({**short, "REFERENCE_CACHE": ""}, tmp_path, default)
    assert forwards == ALL and said.count("notice: ") == 1
    assert re.search(rf"notice: {tmp_path}/file/cache/\S+ cannot be written \(Not a directory\); the run goes on", said)
    assert reports(said)["test data"] == "5 computed, not kept"


def test_two_runs_at_once(short, tmp_path):
    """Both finish, what is left is whole, and nothing lies beside it."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for result in [run.wait() for run in [start(short, tmp_path / name) for name in ("one", "two")]]:
        assert result.returncode == 0 and "notice: " not in result.stdout, result.stderr[-3000:]
    assert [path.suffix for path in files_in(tmp_path / "cache")] == [".safetensors"] * 3
    assert logged(tmp_path / "one") == logged(tmp_path / "two")
    assert counted_run(short, tmp_path)[0] == SELF_CHECK


@pytest.mark.skipif(T.CORES < 2, reason="two ranks need two cores")
def test_two_ranks_share_what_one_has_and_fill_what_is_missing(copied, tmp_path):
    """5 of 12 pairs are missing, so one rank has a filler; only the first rank reads and writes."""
    cache, whole = tmp_path / "cache", load_file(file_for(tmp_path / "cache", 12))["ref_logps"]
    (partial := whole.clone())[[0, 3, 4, 9, 11]] = math.nan
    file = file_for(cache, 12)
    file.unlink()
    T.ReferenceCache(cache, {}).write(file, partial)
    ranks = two_ranks({**copied, "GRADIENT_ACCUM_STEPS": "3"}, tmp_path)
    assert [status for status, _, _ in ranks] == [0, 0], [error[-3000:] for *_, error in ranks]
    said = "".join(stdout for _, stdout, _ in ranks)
    assert said.count("reference log-probabilities, train data: ") == 1
    assert f"7 of 12 pairs from {file} " in said and "KiB), 5 computed" in said
    assert "test data: 5 of 5 pairs from " in said and len(files_in(cache)) == 3
    now, old = load_file(file)["ref_logps"], ~partial.isnan()
    assert torch.equal(now[old], whole[old]) and not torch.equal(now, partial)
    torch.testing.assert_close(now, whole, rtol=1e-5, atol=1e-4)


# --- the plan


def plan_problems(tmp_path, value: str) -> list[str]:
    return T.cache_problems(T.ScriptArguments(reference_cache=value, output_dir=str(tmp_path / "out")))


def test_the_folder_is_looked_at_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert plan_problems(tmp_path, "off") == plan_problems(tmp_path, str(tmp_path / "new" / "cache")) == []
    (problem,) = plan_problems(tmp_path, str(tmp_path / "file" / "x"))
    assert problem.startswith("REFERENCE_CACHE (--reference_cache) is ") and "is a file; name another folder" in problem
    (problem,) = plan_problems(tmp_path, str(tmp_path / "out" / "x"))
    assert "lies in OUTPUT_DIR, with which it would be moved; name another" in problem
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert plan_problems(tmp_path, "") == []  # the default folder is only tried


def test_where_the_folder_is(tmp_path, monkeypatch):
    def folder(value: str):
        return T.ScriptArguments(reference_cache=value).reference_cache_path

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder("") == tmp_path / ".cache" / "preference_guided_dpo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # does not count
    assert folder("") == tmp_path / ".cache" / "preference_guided_dpo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert folder("") == Path("/caches/preference_guided_dpo")
    assert folder("~/mine") == tmp_path / "mine" and folder("off") is folder("OFF") is None


def test_the_plan_says_where(tmp_path):
    reports = {split: T.DataReport(Path("data"), rows=99) for split in ("train", "test")}
    devices = T.Devices("localhost:0", 1, on_gpu=False)
    for value, words in (("/some/where", "kept in /some/where"), ("off", "this run only (REFERENCE_CACHE=off)")):
        args = T.ScriptArguments(reference_cache=value, output_dir=str(tmp_path))
        assert f"log-probabilities {words}" in re.sub("computed for ", "", T.describe_plan(args, devices, reports))


# --- the key


@pytest.fixture
def identity(tokenizer):
    model = make_model("llama", len(tokenizer))
    return T.reference_identity(model, T.weights_digest(model), torch.device("cpu"))


def identity_of(model, device="cpu") -> dict[str, str]:
    return T.reference_identity(model, T.weights_digest(model), torch.device(device))


def nudged(model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    return model


def biased(model, bias: float, persistent: bool = True):
    """With a buffer as the router of a mixture of experts has it."""
    model.model.layers[0].register_buffer("e_score_correction_bias", torch.tensor(bias), persistent=persistent)
    return model


def reconfigured(model, **changes):
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_what_changes_the_numbers_changes_the_key(tokenizer, tokenized, identity, monkeypatch):
    def fresh():
        return make_model("llama", len(tokenizer))

    def name(identity, pairs=tokenized, condition="base", soft_prompt=""):
        return T.ReferenceCache(Path("cache"), identity, soft_prompt).file_of(pairs, condition)

    replace = T.dataclasses.replace
    same = [name(identity), name(identity_of(fresh())), name(identity_of(reconfigured(fresh(), _name_or_path="/x")))]
    soft = [replace(pair, pref_prompt_ids=[-1]) for pair in tokenized]
    same += [name(identity, soft, soft_prompt="1"), name(identity_of(biased(fresh(), 0.1, persistent=False)))]
    first, *rest = tokenized
    other = [
        name(identity_of(nudged(fresh()))),
        name(identity_of(fresh().bfloat16())),
        *(name(identity_of(biased(fresh(), bias))) for bias in (0.1, 0.2)),
        name(identity_of(reconfigured(fresh(), rms_norm_eps=1e-5))),
        name(identity_of(reconfigured(fresh(), rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))),
        name(identity_of(fresh(), "cuda")),
        name(identity, rest),
        name(identity, [*rest, first]),
        *(
            name(identity, [replace(first, **{part: [*getattr(first, part), 5]}), *rest])
            for part in ("prompt_ids", "chosen_ids", "rejected_ids")
        ),
        *(name(identity | {library: "0.0"}) for library in ("torch", "transformers")),
        name(identity, condition="pref"),
        *(name(identity, soft, "pref", soft_prompt) for soft_prompt in "12"),
    ]
    monkeypatch.setattr(T.ReferenceCache, "FORMAT", 99)
    other.append(name(identity))
    assert len(set(same)) == 1 and len({same[0], *other}) == 1 + len(other)


# --- the file


LOGPS = torch.arange(10.0).neg().view(5, 2)
PARTIAL = LOGPS.clone().index_fill_(0, torch.tensor([1, 3]), math.nan)


@pytest.fixture
def cache(tmp_path):
    return T.ReferenceCache(tmp_path / "a" / "cache", {})


@pytest.fixture
def file(cache):
    cache.write(cache.folder / "it.safetensors", LOGPS)
    return cache.folder / "it.safetensors"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_what_is_written_is_read(cache, file, capsys):
    assert torch.equal(cache.read(file, 5), LOGPS) and files_in(cache.folder) == [file]
    file.unlink()
    assert cache.read(file, 5).isnan().all() and cache.read(None, 5).shape == (5, 2)
    cache.write(file, PARTIAL)
    assert same(cache.read(file, 5), PARTIAL)
    assert capsys.readouterr().out == ""


def flipped(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit of a number": lambda file: flipped(file, -9),
    "a bit of the header": lambda file: flipped(file, 12),
    "a bit of the header's length": lambda file: flipped(file, 6),
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "of another kind": lambda file: file.write_text(json.dumps({"ref_logps": [[1, 2]] * 5})),
    "of other pairs": lambda file: T.ReferenceCache(None, {}).write(file, LOGPS[:4]),
    "without a checksum": lambda file: save_file({"ref_logps": LOGPS}, file),
    "under another name": lambda file: save_file({"logps": LOGPS}, file),
    "in half precision": lambda file: save_file({"ref_logps": LOGPS.half()}, file),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_cannot_be_used_is_replaced_with_a_notice(how, cache, file, capsys):
    DAMAGE[how](file)
    assert cache.read(file, 5).isnan().all()
    said = capsys.readouterr().out
    assert said.startswith(f"notice: {file} cannot be used: ") and said.endswith("; it will be replaced\n")
    assert said.count("\n") == 1
    cache.write(file, PARTIAL)
    assert same(cache.read(file, 5), PARTIAL) and files_in(cache.folder) == [file]
    assert capsys.readouterr().out == ""


def test_writing_loses_nothing_that_another_run_has_added(cache, file):
    cache.write(file, PARTIAL + 1)
    assert torch.equal(cache.read(file, 5), LOGPS.where(PARTIAL.isnan(), LOGPS + 1))


def test_a_full_disk_leaves_the_old_file_and_costs_one_notice(cache, file, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        cache.write(file, LOGPS + 1)
    cache.write(cache.folder / "other.safetensors", LOGPS)
    notice = f"notice: {file} cannot be written (No space left on device); the run goes on without it\n"
    assert capsys.readouterr().out == notice
    assert torch.equal(cache.read(file, 5), LOGPS) and files_in(cache.folder) == [file]
    assert cache.describe(file, 2, 5) == f"2 of 5 pairs from {file}, 3 computed, not kept"


def write_often(folder: Path, number: int) -> None:
    cache = T.ReferenceCache(folder, {})
    for _ in range(100):
        cache.write(folder / "it.safetensors", torch.full((3000, 2), float(number)))
    sys.exit(0 if cache.writable else 1)


def test_several_processes_write_at_once(tmp_path):
    """Whoever reads meanwhile finds one of the whole files."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    cache, file, seen = T.ReferenceCache(tmp_path, {}), tmp_path / "it.safetensors", 0
    while any(writer.is_alive() for writer in writers):
        if file.exists():
            logps, seen = cache.load(file, 3000), seen + 1
            assert len(logps.unique()) == 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and seen > 10
    assert files_in(tmp_path) == [file]


def test_the_output_of_a_run_does_not_depend_on_where_the_cache_is(filled):
    settings = json.loads((output_of(filled["cwd"]) / T.RUN_SETTINGS).read_text())
    assert "reference_cache" not in settings
    assert "reference_cache" not in T.hyperparameters(T.ScriptArguments())
