"""Bad input: whatever is wrong with settings, files or folders ends in one message, before anything is written.

Each case is a mistake (or several) and, a line for each problem, all that the program may say about it. It goes through
the real entry point; a server process imports the libraries once and forks for each case, so that it takes a fraction
of a second. The weights of the good model are none: a case in which they are loaded fails with another message.
"""

import ctypes
import gzip
import json
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import forkserver
import pytest
import safetensors.torch
import torch
from conftest import PROJECT, ROWS, launch, make_model, write_rows

import train_with_preference_prompt as T

PROGRAM = str(PROJECT / "train_with_preference_prompt.py")
SECONDS = 30  # that a case may take; most take a fifth of a second
GOOD = {"POLICY_MODEL_PATH": "../model", "TRAIN_DATASET_PATH": "../train.jsonl", "TEST_DATASET_PATH": "../test.jsonl"}
OFFLINE_CPU = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

# --- what a case is made of


class Case(NamedTuple):
    """What is wrong, and what the program has to say: nothing else, and a line for each problem."""

    problems: tuple[str, ...]  # … stands for anything, {here} for the working folder
    variables: dict[str, str]  # the launcher's, besides those that name a good model and good data
    flags: tuple[str, ...]
    files: dict[str, Any]  # in the working folder: name → text, bytes, a folder's files or what makes it
    trains: bool  # whether the mistake shows only when a rank starts; else in the plan


def case(*problems: str, flags=(), files=None, trains=False, **variables: str) -> Case:
    return Case(problems, variables, tuple(flags), files or {}, trains)


def data(content: Any, *problems: str, more: int = 0) -> Case:
    """A training file with this content; its problems, and how many more rows are counted but not listed."""
    lines = [f"data file pairs.jsonl{problem}" for problem in problems]
    lines += [f"… and {more} more rows of pairs.jsonl"] if more else []
    return case(*lines, files={"pairs.jsonl": content}, TRAIN_DATASET_PATH="pairs.jsonl")


def soft(content: Any, problem: str) -> Case:
    """Embedding mode with a soft prompt of this content."""
    line = f"PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is 'soft.pt': {problem}"
    return case(line, files={"soft.pt": content}, TRAINING_MODE="embedding", PROMPT_EMBEDDING_PATH="soft.pt")


def model(content: Any, problem: str, trains=True, **variables: str) -> Case:
    """A model folder with this content."""
    line = f"POLICY_MODEL_PATH (--policy_model_path) is './model': {problem}"
    return case(line, files={"model": content}, trains=trains, POLICY_MODEL_PATH="./model", **variables)


def deepspeed(content: Any, problem: str) -> Case:
    """A DeepSpeed configuration with this content."""
    return case(f"DS_CONFIG (--ds_config) is 'ds.json': {problem}", files={"ds.json": content}, DS_CONFIG="ds.json")


def output(content: Any, problem: str, **variables: str) -> Case:
    """An output folder with this content, or something in its place."""
    line = f"OUTPUT_DIR (--output_dir) is '{{here}}/out': {problem}"
    return case(line, files={"out": content}, OUTPUT_DIR="out", **variables)


# --- contents of files


def write(path: Path, content: Any) -> None:
    """Text, bytes, a folder's files by name, or whatever a function makes at that path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str | bytes):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif isinstance(content, Mapping):
        path.mkdir()
        for name, inner in content.items():
            write(path / name, inner)
    else:
        content(path)


def row(**changes: Any) -> str:
    """A line of a data file; a field that is ... is left out."""
    record = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five.", **changes}
    return json.dumps({name: value for name, value in record.items() if value is not ...}) + "\n"


def unreadable(path: Path) -> None:
    path.write_text("{}\n")
    path.chmod(0)


def unwritable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o555)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def cut(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The first two thirds of what `make` writes."""

    def first_part(path: Path) -> None:
        make(path)
        os.truncate(path, path.stat().st_size * 2 // 3)

    return first_part


def model_with(changes: Mapping[str, Any]) -> Callable[[Path], None]:
    """The good model with some files changed: None removes one, a dict changes keys of its JSON object."""

    def changed_copy(path: Path) -> None:
        shutil.copytree(path.parent.parent / "model", path)
        for name, content in changes.items():
            if isinstance(content, Mapping):
                content = json.dumps({**json.loads((path / name).read_text()), **content})
            (path / name).unlink(missing_ok=True)
            if content is not None:
                write(path / name, content)

    return changed_copy


def weights(change: Callable[[dict], dict] = dict) -> Callable[[Path], None]:
    """Real weights for the good model's config.json, changed."""

    def write_changed(path: Path) -> None:
        vocabulary = json.loads((path.parent / "config.json").read_text())["vocab_size"]
        tensors = make_model("llama", vocabulary).state_dict()
        del tensors["lm_head.weight"]  # tied to the input embeddings
        safetensors.torch.save_file(change(tensors), path, metadata={"format": "pt"})

    return write_changed


class RunsCode:
    """Makes a folder wherever it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


RUNS_CODE = "import os\nos.mkdir('code_was_run')\n"
STATE = '{"global_step": 5}'
STARTED = {"run_settings.json": "{}", "checkpoint-5": {"trainer_state.json": STATE, "x.pt": "shard"}}
FINISHED = {**STARTED, "trainer_state.json": STATE, "README.md": "card"}

# --- the cases: settings

NO_FLAG = "is not a flag of this program nor the value of one"

FLAGS = {
    "unknown flag": case(f"'--colour=red' {NO_FLAG}; --help lists all flags", flags=["--colour=red"]),
    "misspelt flag": case(f"'--bta=0.1' {NO_FLAG}; did you mean --beta?", flags=["--bta=0.1"]),
    "abbreviated flag": case(f"'--max_len=9' {NO_FLAG}; did you mean --max_length?", flags=["--max_len=9"]),
    "variable for a flag": case(f"'BETA=0.1' {NO_FLAG}; --help lists all flags", flags=["BETA=0.1"]),
    "flag without its value": case("argument --seed: expected one argument", flags=["--seed"]),
    "word for a number": case("BETA (--beta) is 'small': must be a number…", BETA="small"),
    "decimal comma": case("NUM_EPOCHS (--num_epochs) is '1,5': must be a number…", NUM_EPOCHS="1,5"),
    "fraction for a count": case("LORA_R (--lora_r) is '16.0': must be a whole number…", LORA_R="16.0"),
    "exponent for a count": case("MAX_LENGTH (--max_length) is '3e2': must be a whole number…", MAX_LENGTH="3e2"),
    "nothing for a count": case("SEED (--seed) is '': must be a whole number…", SEED=""),
    "count of 5,000 digits": case("SEED (--seed) is '9999…: must be a whole number", SEED="9" * 5000),
    "word for a switch": case("RESUME (--resume) is 'perhaps': must be true or false", RESUME="perhaps"),
    "β of 0": case("BETA (--beta) is 0.0: must be a finite number above 0; 0.05 is a good start", BETA="0"),
    "β of NaN": case("BETA (--beta) is nan: must be a finite number above 0; 0.05 is a good start", BETA="nan"),
    "α below 0": case("ALPHA (--alpha) is -0.1: must be a finite number of at least 0; 0.1 is…", ALPHA="-0.1"),
    "infinite α": case("ALPHA (--alpha) is inf: must be a finite number of at least 0; 0.1 is…", ALPHA="inf"),
    "learning rate of 5": case(
        "LEARNING_RATE (--learning_rate) is 5.0: must lie between 0 and 1; 5e-4 is a good start for LoRA",
        LEARNING_RATE="5",
    ),
    "learning rate of NaN": case(
        "PTUNING_LEARNING_RATE (--ptuning_learning_rate) is nan: must lie between 0 and 1; 3e-2 is a good start",
        PTUNING_LEARNING_RATE="nan",
    ),
    "no epochs": case("NUM_EPOCHS (--num_epochs) is 0.0: must be above 0 and at most 10**6", NUM_EPOCHS="0"),
    "infinite epochs": case("NUM_EPOCHS (--num_epochs) is inf: must be above 0 and at most 10**6", NUM_EPOCHS="inf"),
    "more updates than a number counts": case(
        "NUM_EPOCHS (--num_epochs) is 1e+308: must be …", NUM_EPOCHS="1e308", GRADIENT_ACCUM_STEPS="1"
    ),
    "more pairs in an update than a number counts": case(
        "GRADIENT_ACCUM_STEPS (--gradient_accum_steps) is 1000…: must be …", GRADIENT_ACCUM_STEPS="1" + "0" * 400
    ),
    "no pairs in an update": case(
        "GRADIENT_ACCUM_STEPS (--gradient_accum_steps) is 0: must be 1 to 2**20: it counts the pairs of an update",
        GRADIENT_ACCUM_STEPS="0",
    ),
    "less than no pairs in a forward": case(
        "PAIRS_PER_FORWARD (--pairs_per_forward) is -4: must be 1 to 2**20: it counts the pairs of one forward pass",
        PAIRS_PER_FORWARD="-4",
    ),
    "LoRA of rank 0": case("LORA_R (--lora_r) is 0: must be 1 to 4096; 16 is usual", LORA_R="0"),
    "dropout of everything": case(
        "LORA_DROPOUT (--lora_dropout) is 1.0: must be at least 0 and below 1; 0.05 to 0.1 is usual", LORA_DROPOUT="1"
    ),
    "comma without a module": case(
        "LORA_TARGET_MODULES (--lora_target_modules) is 'q_proj,': must be all-linear or module names",
        LORA_TARGET_MODULES="q_proj,",
    ),
    "no room for answers": case(
        "MAX_LENGTH (--max_length) is 128: must be larger than MAX_PROMPT_LENGTH, 128, so that every answer keeps a "
        "token; raise one or lower the other",
        MAX_LENGTH="128",
    ),
    "no room for prompts": case(
        "MAX_PROMPT_LENGTH (--max_prompt_length) is 0: must be at least 1 token", MAX_PROMPT_LENGTH="0"
    ),
    "no room beside the template": case(
        "MAX_PROMPT_LENGTH (--max_prompt_length) is 4, but the chat template alone takes 16 tokens of every prompt; …",
        MAX_PROMPT_LENGTH="4",
    ),
    "seed below 0": case("SEED (--seed) is -1: must lie between 0 and 2**32 - 1", SEED="-1"),
    "evaluations before the start": case(
        "EVAL_STEPS (--eval_steps) is -5: must be at least 0 updates; 0 evaluates only at the start and the end",
        EVAL_STEPS="-5",
    ),
    "unknown mode": case(
        "TRAINING_MODE (--training_mode) is 'p-tuning': there is no such mode; set it to 'text' or 'embedding' or "
        "'ptuning'",
        TRAINING_MODE="p-tuning",
    ),
    "unknown start of the soft prompt": case(
        "PROMPT_INIT (--prompt_init) is 'zeros': a soft prompt starts from PREFERENCE_TEXT or at random; set it to "
        "'text' or 'random'",
        TRAINING_MODE="ptuning",
        PROMPT_INIT="zeros",
    ),
    "unknown loss": case("LOSS_TYPE (--loss_type) is 'dpo': …; set it to 'sigmoid' or …", LOSS_TYPE="dpo"),
    "most labels wrong": case(
        "LABEL_SMOOTHING (--label_smoothing) is 0.7: must be at least 0 and below 0.5…",
        LABEL_SMOOTHING="0.7",
        LOSS_TYPE="robust",
    ),
    "unknown precision": case(
        "PRECISION (--precision) is 'int4': there is no such precision; set it to 'auto' or 'bf16' or 'fp16' or 'fp32'",
        PRECISION="int4",
    ),
    "unknown schedule": case(
        "LR_SCHEDULER_TYPE (--lr_scheduler_type) is 'polynomial': must be one of linear, cosine, …",
        LR_SCHEDULER_TYPE="polynomial",
    ),
    "ZeRO and offloading": case(
        "ZERO_STAGE (--zero_stage) is '4': there is no such ZeRO stage; set it to '' or '0' or '1' or '2' or '3'",
        "OFFLOAD (--offload) is 'cpu': there is no such offloading; set it to '' or 'optimizer' or 'parameters' or 'both'",
        ZERO_STAGE="4",
        OFFLOAD="cpu",
    ),
    "one node's settings without nodes": case(
        "NODE_RANK (--node_rank) is '0', but GPU_NODES names no nodes: name them all, node1:0,1,node2:0,1, or empty it",
        "MASTER_ADDR (--master_addr) is 'n1', but GPU_NODES names no nodes: name them all, …",
        "MASTER_PORT (--master_port) is '80': must be 1024 to 65535, a port of the first node, or empty",
        NODE_RANK="0",
        MASTER_ADDR="n1",
        MASTER_PORT="80",
    ),
    "a node without the first one's address": case(
        "NODE_RANK (--node_rank) is '1', but MASTER_ADDR is empty: name the first node's address, the same on every node",
        "CPU_RANKS (--cpu_ranks) is 2: the ranks of several nodes are those that GPU_NODES names; set it to 1",
        GPU_NODES="node1:0,node2:0",
        NODE_RANK="1",
        CPU_RANKS="2",
    ),
    "a node that is not there": case(
        "NODE_RANK (--node_rank) is '2': there is no such node; set it to 0 for node1, 1 for node2",
        GPU_NODES="node1:0,node2:0",
        NODE_RANK="2",
        MASTER_ADDR="10.0.0.1",
    ),
    "a hostfile that is no hostfile": case(
        "HOSTFILE (--hostfile) is 'hosts': line 2, 'node2 slots=two', is not of the form node1 slots=2; mend it",
        "HOSTFILE (--hostfile) is 'hosts': line 4, 'node1 slots=1', names node1 again; mend it",
        files={"hosts": "node1 slots=2  # the first\nnode2 slots=two\n\nnode1 slots=1\n"},
        HOSTFILE="hosts",
        NODE_RANK="0",
        MASTER_ADDR="10.0.0.1",
    ),
    "nodes that the hostfile lacks": case(
        "GPU_NODES (--gpu_nodes) is 'node1:0,2,node3:0': HOSTFILE 'hosts' gives node1 2 slots, counted from 0, so that it "
        "has no 2; raise slots or leave it out",
        "GPU_NODES (--gpu_nodes) is 'node1:0,2,node3:0': HOSTFILE 'hosts' has no node3, only node1, node2; …",
        files={"hosts": "node1 slots=2\nnode2 slots=2\n"},
        GPU_NODES="node1:0,2,node3:0",
        HOSTFILE="hosts",
        NODE_RANK="0",
        MASTER_ADDR="10.0.0.1",
    ),
    "preference that is no UTF-8": case(
        r"PREFERENCE_TEXT (--preference_text) is 'Sei h\udcf6flich.': must be text in UTF-8, …",
        PREFERENCE_TEXT=os.fsdecode(b"Sei h\xf6flich."),
    ),
    "no words for a soft prompt": case(
        "PREFERENCE_TEXT (--preference_text) is ' ': with PROMPT_INIT=text the soft prompt starts from its words; "
        "state the preference or set PROMPT_INIT=random",
        TRAINING_MODE="ptuning",
        PREFERENCE_TEXT=" ",
    ),
    "more virtual tokens than any prompt has": case(
        "NUM_VIRTUAL_TOKENS (--num_virtual_tokens) is 4097: must be 1 to 4096; 10 to 100 is usual",
        TRAINING_MODE="ptuning",
        NUM_VIRTUAL_TOKENS="4097",
    ),
    "resumed and replaced at once": case(
        "RESUME (--resume) is True, and so is OVERWRITE: set one of them to false", RESUME="true", OVERWRITE="true"
    ),
    "seven settings at once": case(
        "ALPHA (--alpha) is 'much': must be a number…",
        f"'--sede=1' {NO_FLAG}; did you mean --seed?",
        "TRAINING_MODE (--training_mode) is 'ptune': there is no such mode; set it to 'text' or 'embedding' or …",
        "BETA (--beta) is -1.0: must be a finite number above 0; 0.05 is a good start",
        "NUM_EPOCHS (--num_epochs) is nan: must be above 0 and at most 10**6",
        "LORA_R (--lora_r) is 0: must be 1 to 4096; 16 is usual",
        "MAX_LENGTH (--max_length) is 64: must be larger than MAX_PROMPT_LENGTH, 128, …; raise one or lower the other",
        flags=["--sede=1"],
        ALPHA="much",
        TRAINING_MODE="ptune",
        BETA="-1",
        NUM_EPOCHS="nan",
        LORA_R="0",
        MAX_LENGTH="64",
    ),
    "seven files and devices at once": case(
        "POLICY_MODEL_PATH (--policy_model_path) is './none': there is no such folder; name a local model folder or …",
        "OUTPUT_DIR (--output_dir) is '{here}/file': {here}/file is a file; name another folder",
        "DS_CONFIG (--ds_config) is 'none.json': …; name a DeepSpeed configuration",
        "GPU_NODES (--gpu_nodes) is 'localhost:0': there is no GPU 0; this machine has no GPU; auto trains on its CPU",
        "data file none.jsonl does not exist; name a file (.jsonl, .json, .csv, .parquet), a folder of them or a hub id (org/name)",
        "data file broken.jsonl, row 1: is not valid JSON (…at column 2); write one object a line",
        "PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is 'none.pt': there is no such file; name a soft prompt",
        files={"file": "", "broken.jsonl": "{"},
        POLICY_MODEL_PATH="./none",
        OUTPUT_DIR="file",
        DS_CONFIG="none.json",
        GPU_NODES="localhost:0",
        TRAIN_DATASET_PATH="none.jsonl",
        TEST_DATASET_PATH="broken.jsonl",
        TRAINING_MODE="embedding",
        PROMPT_EMBEDDING_PATH="none.pt",
    ),
    "six paths of an unknown user": case(
        "POLICY_MODEL_PATH (--policy_model_path) is '~nobody7/a': …; …",
        "OUTPUT_DIR (--output_dir) is '~nobody7/b': …; …",
        "LOG_DIR (--log_dir) is '~nobody7/c': …; …",
        "DS_CONFIG (--ds_config) is '~nobody7/d': …; …",
        "…~nobody7/e…; …",
        "PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is '~nobody7/f': …; …",
        POLICY_MODEL_PATH="~nobody7/a",
        OUTPUT_DIR="~nobody7/b",
        LOG_DIR="~nobody7/c",
        DS_CONFIG="~nobody7/d",
        TRAIN_DATASET_PATH="~nobody7/e",
        TRAINING_MODE="embedding",
        PROMPT_EMBEDDING_PATH="~nobody7/f",
    ),
}

# --- the cases: data

DATA = {
    "no such data": data(
        link_to("gone.jsonl"),
        " does not exist; name a file (.jsonl, .json, .csv, .parquet), a folder of them or a hub id (org/name)",
    ),
    "hub id for data": case(
        "data set HuggingFaceH4/ultrafeedback_binarized cannot be loaded (ConnectionError: Couldn't reach …); check …",
        TRAIN_DATASET_PATH="HuggingFaceH4/ultrafeedback_binarized",
    ),
    "hub id with too many colons": case(
        "data set org/name:a:b:c: a colon is followed by a split; write saved_folder:split, org/name:split or …",
        TRAIN_DATASET_PATH="org/name:a:b:c",
    ),
    "split of a file": case(
        "data set ../train.jsonl:train: a colon is followed by a split; write …",
        TRAIN_DATASET_PATH="../train.jsonl:train",
    ),
    "folder without data": data({".hidden.jsonl": row(), "notes.txt": "mine"}, " is a folder without a data file; …"),
    "folder with a broken file": case(
        "data file pairs/b/c.jsonl, row 1: field 'prompt' is empty",
        "data file pairs/d.csv: column 'prompt' occurs twice; rename one",
        files={"pairs": {"a.jsonl": row(), "b": {"c.jsonl": row(prompt="")}, "d.csv": "prompt,prompt\n"}},
        TRAIN_DATASET_PATH="pairs",
    ),
    "two sources broken": case(
        "data file a.jsonl does not exist; …",
        "data file b.jsonl, row 1: field 'chosen' is int, not a string",
        files={"b.jsonl": row(chosen=1)},
        TRAIN_DATASET_PATH="a.jsonl,../train.jsonl*2,b.jsonl*0.5",
    ),
    "weighted test data": case(
        "TEST_DATASET_PATH (--test_dataset_path) is '../test.jsonl*2': weights belong to the training data; …",
        TEST_DATASET_PATH="../test.jsonl*2",
    ),
    "unknown format": case(
        "DATA_FORMAT (--data_format) is 'chatml': there is no such format; set it to 'auto' or …",
        DATA_FORMAT="chatml",
    ),
    "everything held out": case(
        "TEST_SHARE (--test_share) is 1.0: must be above 0 and below 1; 0.1 is usual",
        TEST_SHARE="1",
        TEST_DATASET_PATH="",
    ),
    "nothing to hold out": case(
        "TEST_DATASET_PATH (--test_dataset_path) is '': nothing can be held out of data file pairs.jsonl, which has one "
        "prompt only; name test data",
        files={"pairs.jsonl": row() + row(prompt=" Two  plus two?\n")},
        TRAIN_DATASET_PATH="pairs.jsonl",
        TEST_DATASET_PATH="",
    ),
    "pipe for data": data(os.mkfifo, " is no regular file; name a file …"),
    "device for data": case("data file /dev/zero is no regular file; name a file …", TRAIN_DATASET_PATH="/dev/zero"),
    "data that may not be read": data(unreadable, " cannot be read: Permission denied; check its permissions"),
    "over-long name of data": case(
        "TRAIN_DATASET_PATH (--train_dataset_path) is 'xxxx…: file name too long; name another path",
        TRAIN_DATASET_PATH="x" * 300,
    ),
    "line break in the name of data": case("…no\\nsuch.jsonl…; …", TRAIN_DATASET_PATH="no\nsuch.jsonl"),
    "empty data": data("", ": it is empty; …"),
    "data of blank lines": data("\n \r\n\t\n", ": it is empty; …"),
    "broken JSON": data(
        row() + "\n" + '{"prompt": "a", "chosen": }\n' + row(),
        ", row 3: is not valid JSON (Expecting value at column 27); write one object a line",
    ),
    "two rows in one line": data(
        row().strip() + row(), ", row 1: is not valid JSON (Extra data at column 68); write one object a line"
    ),
    "array in a row": data(
        row() + '["a", "b", "c"]\n',
        ", row 2: is list, not an object with the fields prompt, chosen, rejected",
    ),
    "JSON array for JSON lines": data(
        json.dumps([json.loads(row())] * 2), ", row 1: is list, not an object with the fields prompt, chosen, rejected"
    ),
    "indented JSON for JSON lines": data(
        json.dumps(json.loads(row()), indent=1),
        ", row 1: is not valid JSON (Expecting property name … at column 2); write one object a line",
        ", row 2: is not valid JSON (Extra data at column 9); write one object a line",
        ", row 3: is not valid JSON (Extra data at column 9); write one object a line",
        ", row 4: is not valid JSON (Extra data at column 11); write one object a line",
        ", row 5: is not valid JSON (Expecting value at column 1); write one object a line",
    ),
    "missing field": data(row(rejected=...), ", row 1: has no field 'rejected'; it has 'prompt', 'chosen'"),
    "fields of other names": data(
        '{"question": "a", "Chosen": "b"}', ", row 1: has no field 'prompt'; it has 'question', 'Chosen'"
    ),
    "row of 10,000 other fields": data(
        json.dumps({f"field {n}": n for n in range(10_000)}), ", row 1: has no field 'prompt'; it has 'field 0', …"
    ),
    "number for an answer": data(row() + row(chosen=4), ", row 2: field 'chosen' is int, not a string"),
    "messages for an answer": data(
        row() + row(chosen=[{"role": "assistant", "content": "Four."}]), ", row 2: field 'chosen' is list, not a string"
    ),
    "null for an answer": data(row() + row(rejected=None), ", row 2: field 'rejected' is NoneType, not a string"),
    "empty prompt": data(row() + row(prompt=" \n"), ", row 2: field 'prompt' is empty"),
    "field twice": data(
        row() + '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        ", row 2: field 'chosen' occurs twice; …",
    ),
    "UTF-16": data(row().encode("utf-16"), "…UTF-16…; save the file as UTF-8"),
    "Latin-1": data(
        row().encode() + row(chosen="caf!").encode().replace(b"!", b"\xe9"),
        ", row 2: is not UTF-8 (invalid continuation byte); save the file as UTF-8",
    ),
    "byte of 0 in a text": data(
        row() + row(chosen="nothing!").replace("!", "\0"),
        ", row 2: is not valid JSON (Invalid control character at… column 47); write one object a line",
    ),
    "bytes of 0 after a crash": data(
        row() + "\0" * 512, ", row 2: is not valid JSON (Expecting value at column 1); write one object a line"
    ),
    "half a surrogate pair": data(
        row() + row(chosen="cut emoji: \ud83d"),
        r", row 2: field 'chosen' holds half a surrogate pair (\ud800 to \udfff), which is no character",
    ),
    "row nested too deeply": data("[" * 100_000, ", row 1: is nested too deeply"),
    "row of 17 MiB": data(row() + row(chosen="x" * (17 << 20)), ", row 2: is longer than 16 MiB; …"),
    "damaged gzip": data(b"\x1f\x8b\x08\x00" + bytes(range(128, 256)), "…gzip…; …"),
    "cut gzip": data(gzip.compress(row().encode() * 99)[:-30], ": what gzip packed is damaged (…); pack it again"),
    "gzip in gzip": data(gzip.compress(gzip.compress(row().encode())), " is packed with gzip twice; unpack it"),
    "endless line in gzip": data(gzip.compress(b" " * (17 << 20)), ", row 1: is longer than 16 MiB; …"),
    "zip": data(b"PK\x03\x04", " is a zip archive; unpack it"),
    "damaged Parquet": data(b"PAR1\x15\x04\x15\x90" + bytes(range(128, 256)), "…Parquet…; …"),
    "identical answers only": data(
        row(rejected="Four.") + row(rejected=" Four.\n"),
        ": none of its 2 rows is usable: 2 with identical answers (rows 1, 2); …",
    ),
    "empty answers only": data(
        row(rejected="") * 6, ": none of its 6 rows is usable: 6 with an empty answer (rows 1, 2, 3, 4, 5, …); …"
    ),
    "seven broken rows": data(
        row() + row(chosen=...) * 7,
        ", row 2: has no field 'chosen'; it has 'prompt', 'rejected'",
        ", row 3: has no field 'chosen'; it has 'prompt', 'rejected'",
        ", row 4: has no field 'chosen'; it has 'prompt', 'rejected'",
        ", row 5: has no field 'chosen'; it has 'prompt', 'rejected'",
        ", row 6: has no field 'chosen'; it has 'prompt', 'rejected'",
        more=2,
    ),
    "good training data, broken test data": case(
        "data file test.jsonl, row 2: has no field 'prompt'; it has 'chosen', 'rejected'",
        files={"test.jsonl": row() + row(prompt=...)},
        TEST_DATASET_PATH="test.jsonl",
    ),
    "training and test data broken": case(
        "data file train.jsonl, row 1: field 'prompt' is empty",
        "data file train.jsonl, row 3: is int, not an object with the fields prompt, chosen, rejected",
        "data file test.jsonl: it is empty; …",
        files={"train.jsonl": row(prompt="") + row() + "7\n", "test.jsonl": ""},
        TRAIN_DATASET_PATH="train.jsonl",
        TEST_DATASET_PATH="test.jsonl",
    ),
}

# --- the cases: soft prompts

SOFT_PROMPTS = {
    "no soft prompt named": case(
        "PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is '', but TRAINING_MODE is 'embedding'; "
        "name a soft prompt, such as the prompt_embeddings.pt that TRAINING_MODE=ptuning writes",
        TRAINING_MODE="embedding",
    ),
    "soft prompt in text mode": case(
        "PROMPT_EMBEDDING_PATH (--prompt_embedding_path) is 'soft.pt': only TRAINING_MODE=embedding reads a soft "
        "prompt, and TRAINING_MODE is 'text'; empty the one or change the other",
        PROMPT_EMBEDDING_PATH="soft.pt",
    ),
    "no such soft prompt": soft(link_to("gone.pt"), "there is no such file; name a soft prompt"),
    "soft prompt that may not be read": soft(
        unreadable, "soft.pt cannot be read (Permission denied); check its permissions"
    ),
    "pipe for a soft prompt": soft(os.mkfifo, "is no regular file; name a soft prompt"),
    "empty soft prompt": soft("", "soft.pt is empty; expected a tensor"),
    "text for a soft prompt": soft(
        "Be helpful.\n", "soft.pt is not a file of tensors (…); write one with torch.save or safetensors"
    ),
    "soft prompt for another model": soft(
        saved(torch.ones(7, 16)),
        "holds float32 (7, 16), but the model's embeddings have 32 numbers, not 16; use a soft prompt that was trained "
        "for this model",
    ),
    "soft prompt with a batch": soft(
        saved(torch.ones(1, 7, 32)), "holds float32 (1, 7, 32); expected one floating-point tensor (K, 32)"
    ),
    "soft prompt of no embeddings": soft(
        saved(torch.ones(0, 32)), "holds float32 (0, 32); expected one floating-point tensor (K, 32)"
    ),
    "soft prompt with a NaN": soft(
        saved(torch.tensor([[1.0] * 31 + [torch.nan]])),
        "1 of its 32 numbers are not finite in fp32; train it again",
    ),
    "token ids for a soft prompt": soft(
        saved(torch.ones(7, 32, dtype=torch.long)), "holds int64 (7, 32); expected one floating-point tensor (K, 32)"
    ),
    "soft prompt that runs code": soft(
        saved(RunsCode()),
        "soft.pt is not a file of tensors: it asks to run 'posix.mkdir', which is refused; write one with torch.save "
        "or safetensors",
    ),
    "LoRA for a soft prompt": soft(
        {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "lora"},
        "that folder holds a 'LORA' adapter, not one of prompt tuning; name a tensor file or another folder",
    ),
    "folder of anything for a soft prompt": soft(
        {"notes.txt": "mine"},
        "that folder has no adapter_config.json of a PEFT prompt-tuning adapter; name a tensor file or another folder",
    ),
    "cut soft prompt": soft(
        cut(saved(torch.ones(7, 32))),
        "soft.pt is not a file of tensors (RuntimeError); write one with torch.save or safetensors",
    ),
    "cut safetensors for a soft prompt": soft(
        safetensors.torch.save({"weight": torch.ones(7, 32)})[:-8],
        "soft.pt is not a file of tensors (SafetensorError); write one with torch.save or safetensors",
    ),
    "soft prompt of 4,097 embeddings": soft(
        saved(torch.ones(4097, 32)), "holds float32 (4097, 32); a soft prompt has at most 4096 embeddings"
    ),
    "soft prompt that fills the context": soft(
        saved(torch.ones(1024, 32)),
        "holds 1024 embeddings: they leave no room in the model's context of 1024 tokens; use a shorter soft prompt",
    ),
    "two tensors that could be the soft prompt": soft(
        saved({"a": torch.ones(2, 32), "b": torch.ones(3, 32)}),
        "is ambiguous, 'a' and 'b' could be the soft prompt: found 'a' float32 (2, 32), 'b' float32 (3, 32); expected "
        "one floating-point tensor (K, 32)",
    ),
    "list for a soft prompt": soft(saved([1.0]), "holds list, expected a tensor or a dict of tensors"),
    "empty dict for a soft prompt": soft(
        saved({}), "holds none: found nothing; expected one floating-point tensor (K, 32)"
    ),
}

# --- the cases: models

OWN_CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
MODELS = {
    "no such model": case(
        "POLICY_MODEL_PATH (--policy_model_path) is './none': there is no such folder; name a local model folder or a "
        "hub id such as Qwen/Qwen2.5-1.5B",
        POLICY_MODEL_PATH="./none",
    ),
    "file for a model": model("weights", "there is no such folder; name a local model folder or …", trains=False),
    "empty model folder": model(
        {}, "that folder has no config.json; name the folder that from_pretrained would load", trains=False
    ),
    "folder for config.json": model(
        model_with({"config.json": Path.mkdir}),
        "that folder has no config.json; name the folder that from_pretrained would load",
        trains=False,
    ),
    "adapter for a model": model(
        {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
        "that folder holds an adapter, not a model; name the base model it was trained from",
        trains=False,
    ),
    "no adapter, and another mistake": case(
        "BETA (--beta) is -1.0: must be a finite number above 0; …",
        "ADAPTER_PATH (--adapter_path) is 'none': there is no such folder; name the local folder of an adapter, such …",
        BETA="-1",
        ADAPTER_PATH="none",
        ADAPTER_REFERENCE="base",
    ),
    "soft prompt for an adapter": case(
        "ADAPTER_PATH (--adapter_path) is 'soft': it is a 'PROMPT_TUNING' adapter, and only LoRA can be continued; "
        "name it in PROMPT_EMBEDDING_PATH with TRAINING_MODE=embedding",
        files={"soft": {"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}'}},
        ADAPTER_PATH="soft",
        ADAPTER_REFERENCE="adapter",
    ),
    "hub id that cannot be reached": case(
        "POLICY_MODEL_PATH (--policy_model_path) is 'nobody7/model': it cannot be loaded (…): …; …",
        POLICY_MODEL_PATH="nobody7/model",
        trains=True,
    ),
    "hub id that cannot be one": case(
        "POLICY_MODEL_PATH (--policy_model_path) is 'no..such--model': …; …",
        POLICY_MODEL_PATH="no..such--model",
        trains=True,
    ),
    "broken config.json": model(model_with({"config.json": "{"}), "it cannot be loaded (config.json): …JSON…; …"),
    "array for config.json": model(model_with({"config.json": "[]"}), "it cannot be loaded (config.json): …; …"),
    "UTF-16 for config.json": model(
        model_with({"config.json": "{}".encode("utf-16")}), "it cannot be loaded (config.json): …; …"
    ),
    "no model_type": model(
        model_with({"config.json": '{"hidden_size": 32}'}), "it cannot be loaded (config.json): …Unrecognized model…; …"
    ),
    "unknown model_type": model(model_with({"config.json": {"model_type": "llama9"}}), "…llama9…; …"),
    "BERT for a model": model(
        model_with({"config.json": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}}),
        "BertForMaskedLM is not a causal language model; name one that AutoModelForCausalLM can load",
    ),
    "quantised weights": model(
        model_with({"config.json": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}}),
        "its weights are quantised already, which cannot be trained from here; name the model that they were made from, "
        "and set LOAD_IN_4BIT=true to load that in 4 bits",
    ),
    "T5 for a model": model(
        model_with({"config.json": {"model_type": "t5"}}),
        "t5 is not a causal language model; name one that AutoModelForCausalLM can load",
    ),
    "word for the hidden size": model(model_with({"config.json": {"hidden_size": "big"}}), "…hidden_size…; …"),
    "model and adapter in one folder": model(
        model_with({"adapter_config.json": "{}"}),
        "that folder holds a model and an adapter, which would be applied twice; name its folder merged, …",
    ),
    "no attention heads": model(model_with({"config.json": {"num_attention_heads": 0}}), "it cannot be …; …"),
    "vocabulary below 0": model(model_with({"config.json": {"vocab_size": -1}}), "it cannot be …; …"),
    "model with code of its own": model(
        model_with({"config.json": {"model_type": "own", "auto_map": OWN_CODE}, "own.py": RUNS_CODE}),
        "it cannot be loaded (…): it brings code of its own (auto_map), which is never run; …",
    ),
    "model with code of its own, looked at in the plan": model(
        model_with({"config.json": {"model_type": "own", "auto_map": OWN_CODE}, "own.py": RUNS_CODE}),
        "it cannot be loaded (…): it brings code of its own (auto_map), which is never run; …",
        trains=False,
        TRAINING_MODE="ptuning",
    ),
    "tokenizer with code of its own": model(
        model_with(
            {
                "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
                "own.py": RUNS_CODE,
            }
        ),
        "it cannot be loaded (…): it brings code of its own (auto_map), which is never run; …",
    ),
    "no tokenizer": model(
        model_with({"tokenizer.json": None, "tokenizer_config.json": None}),
        "it cannot be loaded (tokenizer.json): …; …",
    ),
    "broken tokenizer": model(model_with({"tokenizer.json": "{"}), "it cannot be loaded (tokenizer.json): …; …"),
    "broken chat template": case(
        "the chat template of ./model fails: Expected an expression, got 'end of statement block'…",
        files={"model": model_with({"chat_template.jinja": "{% for %}"})},
        POLICY_MODEL_PATH="./model",
    ),
    "tokenizer with more tokens than the model": model(
        model_with({"config.json": {"vocab_size": 100}}), "…token…100…; …"
    ),
    "no weights": model(
        model_with({"model.safetensors": None}), "its weights cannot be loaded: …model.safetensors…; …"
    ),
    "weights that are none": model(model_with({}), "its weights cannot be loaded: …header…; …"),
    "cut weights": model(
        model_with({"model.safetensors": cut(weights())}), "its weights cannot be loaded: …incomplete metadata…; …"
    ),
    "weights of another size": model(
        model_with({"model.safetensors": weights(lambda all: {name: t[..., :8].clone() for name, t in all.items()})}),
        "its weights lack 20 tensors of the model, or have them in other sizes: …; …",
    ),
    "weights of half a model": model(
        model_with({"model.safetensors": weights(lambda all: {n: t for n, t in all.items() if "layers.1." not in n})}),
        "its weights lack 9 tensors of the model, …layers.1.…; …",
    ),
    "weights that run code": model(
        model_with({"model.safetensors": None, "pytorch_model.bin": saved(RunsCode())}),
        "its weights cannot be loaded: …; …",
    ),
    "modules that the model has not": case(
        "LORA_TARGET_MODULES (--lora_target_modules) is 'q_proj,no_such': the model has no module 'no_such'…",
        LORA_TARGET_MODULES="q_proj,no_such",
        trains=True,
    ),
    "answers longer than the context": case(
        "MAX_LENGTH (--max_length) is 5000: with the prefix (PREFERENCE_TEXT) a sequence has … tokens, but the model's "
        "context is 1024; lower MAX_LENGTH or use a shorter prefix",
        files={"long.jsonl": row(chosen="four " * 2000)},
        TRAIN_DATASET_PATH="long.jsonl",
        MAX_LENGTH="5000",
        trains=True,
    ),
}

# --- the cases: devices and DeepSpeed


def gpus(value: str, problem: str) -> Case:
    line = f"GPU_NODES (--gpu_nodes) is {value!r}: {problem}; this machine has no GPU; auto trains on its CPU"
    return case(line, GPU_NODES=value)


def gpu_form(value: str, word: str) -> Case:
    line = (
        f"GPU_NODES (--gpu_nodes) is {value!r}: must be auto, localhost:0,1, or several nodes with their GPU numbers: "
    )
    return case(f"{line}node1:0,1,node2:0,1; {word!r} is not part of such a list", GPU_NODES=value)


DEVICES = {
    "cuda for devices": gpu_form("cuda", "cuda"),
    "GPUs without their machine": gpu_form("0,1", "0"),
    "machine without its GPUs": gpu_form("localhost:", "localhost:"),
    "comma without a GPU": gpu_form("localhost:0,", ""),
    "GPU below 0": gpu_form("localhost:-1", "localhost:-1"),
    "GPUs of another machine": case(
        "GPU_NODES (--gpu_nodes) is 'node1:0,1': node1:0,1 is one node only; …", GPU_NODES="node1:0,1"
    ),
    "GPU that is not there": gpus("localhost:7", "there is no GPU 7"),
    "GPU twice": case(
        "GPU_NODES (--gpu_nodes) is 'localhost:0,0': names a GPU twice on localhost; name each once",
        GPU_NODES="localhost:0,0",
    ),
    "no ranks": case("CPU_RANKS (--cpu_ranks) is 0: must be 1 to …, the cores that there are", CPU_RANKS="0"),
    "more ranks than cores": case(
        "CPU_RANKS (--cpu_ranks) is 100000: must be 1 to …, the cores that there are", CPU_RANKS="100000"
    ),
    **(
        {}
        if torch.ops.mkldnn._is_mkldnn_fp16_supported()
        else {
            "fp16 on a CPU without it": case(
                "PRECISION (--precision) is 'fp16': DeepSpeed trains in fp16 on GPUs of compute capability 7.0 or newer "
                "and on CPUs that multiply in fp16 (AVX512-FP16); this CPU does not; set it to auto or fp32",
                PRECISION="fp16",
            )
        }
    ),
    "no DeepSpeed configuration": case(
        "DS_CONFIG (--ds_config) is 'none.json': there is no such file; name a DeepSpeed configuration",
        DS_CONFIG="none.json",
    ),
    "pipe for DeepSpeed": deepspeed(os.mkfifo, "…no regular file…; name a DeepSpeed configuration"),
    "folder for DeepSpeed": deepspeed({}, "is no regular file; name a DeepSpeed configuration"),
    "broken JSON for DeepSpeed": deepspeed(
        "{", "not a readable JSON object (Expecting property name …); name a DeepSpeed configuration"
    ),
    "array for DeepSpeed": deepspeed(
        "[]", "not a JSON object, or its zero_optimization is none; name a DeepSpeed configuration"
    ),
    "UTF-16 for DeepSpeed": deepspeed(
        "{}".encode("utf-16"), "not a readable JSON object (…utf-8…); name a DeepSpeed configuration"
    ),
    "null for ZeRO": deepspeed('{"zero_optimization": null}', "…zero_optimization…; …"),
    "ZeRO 4": deepspeed('{"zero_optimization": {"stage": 4}}', "there is no ZeRO stage 4; use 0, 1, 2 or 3"),
    "word for a ZeRO stage": deepspeed(
        '{"zero_optimization": {"stage": "two"}}', "there is no ZeRO stage 'two'; use 0, 1, 2 or 3"
    ),
    "another ZeRO stage than the configuration's": case(
        "ZERO_STAGE (--zero_stage) is '3', but in ds.json (DS_CONFIG) zero_optimization.stage is 1; empty ZERO_STAGE, "
        "or change that or leave it out",
        files={"ds.json": '{"zero_optimization": {"stage": 1}}'},
        DS_CONFIG="ds.json",
        ZERO_STAGE="3",
    ),
    "parameters kept in CPU memory but not divided": case(
        "OFFLOAD (--offload) is 'parameters': offload_param needs at least ZeRO stage 3, and this is 2; choose a higher "
        "stage (ZERO_STAGE), or empty OFFLOAD",
        OFFLOAD="parameters",
    ),
    "DeepSpeed counts an update otherwise": deepspeed(
        '{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 3}',
        "…gradient_accumulation_steps…; …auto…",
    ),
    "fp16 by DeepSpeed": deepspeed('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "…fp16…; …auto…"),
    "optimizer of DeepSpeed": deepspeed(
        '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Nonsense"}}', "…optimizer…; …"
    ),
    "DeepSpeed lets broken numbers pass": deepspeed(
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto", "check_grad_overflow": false}}',
        "bf16 is {'enabled': 'auto', 'check_grad_overflow': False}; set it to {\"enabled\": \"auto\"} or leave "
        "it out, and set PRECISION",
    ),
    "auto for an optimizer of DeepSpeed": deepspeed(
        '{"zero_optimization": {"stage": 2}, "optimizer": "auto"}',
        "optimizer is 'auto'; leave it out, and set LEARNING_RATE",
    ),
    "word for a DeepSpeed switch": deepspeed(
        '{"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}', "…overlap_comm…; …"
    ),
}

# --- the cases: output

FOREIGN = "holds files that are not of a run of this program; name another folder"
OUTPUTS = {
    "file for the output": output("mine", "{here}/out is a file; name another folder"),
    "file above the output": case(
        "OUTPUT_DIR (--output_dir) is '{here}/file/run': {here}/file is a file; name another folder",
        files={"file": "mine"},
        OUTPUT_DIR="file/run",
    ),
    "device for the output": case(
        "OUTPUT_DIR (--output_dir) is '/dev/full': /dev/full is a file; name another folder", OUTPUT_DIR="/dev/full"
    ),
    "notes in the output": output({"notes.txt": "mine"}, FOREIGN),
    "model in the output": output(model_with({}), FOREIGN, OVERWRITE="true"),
    "unfinished run in the output": output(
        STARTED, "holds an unfinished run; set RESUME=true to continue it or OVERWRITE=true to replace it"
    ),
    "nothing to resume": output(
        {}, "RESUME is true, but there is no …; name its folder or set RESUME=false", RESUME="true"
    ),
    "finished run to resume": output(
        FINISHED, "RESUME is true, but the run in it is finished; set RESUME=false to start a new one", RESUME="true"
    ),
    "damaged settings of a run to resume": output(
        {**STARTED, "run_settings.json": "{"}, "RESUME is true, but …; set OVERWRITE=true…", RESUME="true"
    ),
    "logs in the output": case(
        "LOG_DIR (--log_dir) is '{here}/out/logs': lies in OUTPUT_DIR, with which it would be moved; name another",
        OUTPUT_DIR="out",
        LOG_DIR="out/logs",
    ),
    "logs and output in one": case(
        "LOG_DIR (--log_dir) is '{here}/out': lies in OUTPUT_DIR, with which it would be moved; name another",
        OUTPUT_DIR="out",
        LOG_DIR="out",
    ),
    "files for output and logs": case(
        "OUTPUT_DIR (--output_dir) is '{here}/out': {here}/out is a file; name another folder",
        "LOG_DIR (--log_dir) is '{here}/logs/run': {here}/logs is a file; name another folder",
        files={"out": "", "logs": ""},
        OUTPUT_DIR="out",
        LOG_DIR="logs/run",
    ),
    "output that may not be written": output(unwritable, "{here}/out is not writable; name another folder"),
    "output where nobody may write": case(
        "OUTPUT_DIR (--output_dir) is '/proc/out': /proc is not writable; name another folder", OUTPUT_DIR="/proc/out"
    ),
    "over-long name of the output": case(
        "OUTPUT_DIR (--output_dir) is 'xxxx…: file name too long; name another path", OUTPUT_DIR="x" * 300
    ),
    "output that is a link to itself": case(
        "OUTPUT_DIR (--output_dir) is 'out': too many levels of symbolic links; name another path",
        files={"out": link_to("out")},
        OUTPUT_DIR="out",
    ),
    "line break in the name of the output": case(
        r"OUTPUT_DIR (--output_dir) is 'a\nb': holds control characters; name a path without them", OUTPUT_DIR="a\nb"
    ),
    "blanks for the logs": case("LOG_DIR (--log_dir) is '  ': must name a folder", LOG_DIR="  "),
    "model in a run that makes way": case(
        "OUTPUT_DIR (--output_dir) is '{here}/out': the run in it must make way, but out/merged lies in it; name …",
        "POLICY_MODEL_PATH (--policy_model_path) is 'out/merged': it cannot be loaded (config.json): …; name another …",
        files={"out": {**FINISHED, "merged": {"config.json": "{}"}}},
        OUTPUT_DIR="out",
        POLICY_MODEL_PATH="out/merged",
    ),
    "data in a run that makes way": output(
        {**FINISHED, "pairs.jsonl": row()},
        "the run in it must make way, but out/pairs.jsonl lies in it; name another folder",
        TRAIN_DATASET_PATH="out/pairs.jsonl",
        OVERWRITE="true",
    ),
}

CASES = FLAGS | DATA | SOFT_PROMPTS | MODELS | DEVICES | OUTPUTS

# --- the server


def serve() -> None:
    """Starts the program for each line on stdin and answers with its exit status, or −9 when it took too long."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    forkserver.prepare()
    # Without capabilities (capset(2), version 3) root is a user like any other: files can be closed to it.
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become_the_program(**json.loads(line))
        watch = os.pidfd_open(child)
        if not select.select([watch], [], [], SECONDS)[0]:
            os.killpg(child, signal.SIGKILL)
        os.close(watch)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def become_the_program(words: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> None:
    """Runs it and leaves without the interpreter's clean-up, which takes ten times as long as the program."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.argv, status = [PROGRAM, *words], 0
    try:
        runpy.run_path(PROGRAM, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- the tests


@pytest.fixture(scope="module")
def ground(tokenizer, tmp_path_factory) -> Path:
    """A folder with a model without weights and good data; each case gets a folder in it."""
    folder = tmp_path_factory.mktemp("ground")
    tokenizer.save_pretrained(folder / "model")
    make_model("llama", len(tokenizer)).config.save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").write_text("these are no weights")
    for name in ("train.jsonl", "test.jsonl"):
        write_rows(folder / name, ROWS)
    return folder


@pytest.fixture(scope="module")
def server():
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **OFFLINE_CPU}) as process:
        yield process
        process.stdin.close()


def prepare(ground: Path, name: str, made: Case) -> Path:
    """The working folder of a case, with its files."""
    here = ground / name
    here.mkdir()
    for file, content in made.files.items():
        write(here / file, content)
    return here


CACHE_OFF = {"REFERENCE_CACHE": "off"}


def run(server, here: Path, made: Case) -> subprocess.CompletedProcess:
    """Starts the program as the launcher does for the plan, or as DeepSpeed starts its only rank."""
    words = [f"--{name.lower()}={value}" for name, value in {**GOOD, **CACHE_OFF, **made.variables}.items()] + list(
        made.flags
    )
    environment = {}
    if made.trains:
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(T.free_port())}
    else:
        words += ["--plan", "true"]
    stdin, stdout, stderr = streams = [here.with_name(f"{here.name}.{name}") for name in ("in", "out", "err")]
    for path, text in zip(streams, ("y\n" * 9, "", ""), strict=True):
        path.write_text(text)  # a yes to whatever is asked
    request = {"words": words, "folder": str(here), "environment": environment, "streams": list(map(str, streams))}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    return subprocess.CompletedProcess(words, status, stdout.read_text(), stderr.read_text())


def everything_in(folder: Path) -> dict[str, tuple]:
    """Every file and folder with its kind, size and the time of its last change."""
    states = {str(path): path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (state.st_mode, state.st_size, state.st_mtime_ns) for path, state in states.items()}


def require_problems(made: Case, here: Path, stderr: str) -> None:
    """One message, a line for each problem that the case expects, and no other line."""
    _, *messages = re.split(r"^error:\n", stderr, flags=re.M)
    assert len(messages) == 1, stderr[-3000:]
    said = messages[0].splitlines()
    for problem in made.problems:
        pattern = re.compile("- " + ".*".join(map(re.escape, problem.replace("{here}", str(here)).split("…"))))
        assert [line for line in said if pattern.fullmatch(line)], f"expected: {problem}\nsaid: {messages[0]}"
    assert len(said) == len(made.problems), messages[0]
    assert max(map(len, said)) < 1000, "an endless value or list should be cut"


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_message_and_leaves_no_trace(name, ground, server):
    made = CASES[name]
    here = prepare(ground, name, made)
    before = everything_in(here) | everything_in(ground / "model")
    result = run(server, here, made)
    assert everything_in(here) | everything_in(ground / "model") == before
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    assert result.returncode == 2, result.stderr[-3000:]
    require_problems(made, here, result.stderr)
    if made.trains:
        assert "[y/N]" not in result.stdout
    else:
        assert result.stdout == "" and result.stderr.startswith("error:\n")


ACCEPTED = {  # unusual, but no mistake
    "nothing unusual": case(),
    "a number of 5,000 digits in a field that is not read": data(row(id=1).replace("1", "1" * 5000)),
    "a byte order mark, Windows line ends, blank lines": data(b"\xef\xbb\xbf\r\n" + row().encode()[:-1] + b"\r\n\r\n"),
    "one row, without a line end": data(row().strip()),
    "one usable row": data(row(rejected="") + row(rejected="Four.") + row()),
    "a link to data": case(files={"pairs.jsonl": link_to("../train.jsonl")}, TRAIN_DATASET_PATH="pairs.jsonl"),
    "a finished run in the output": case(files={"out": FINISHED}, OUTPUT_DIR="out"),
    "flags with spaces": case(flags=["--beta", "0.1", "--weight_decay", "0"]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_only_unusual_gets_its_plan(name, ground, server):
    here = prepare(ground, name, ACCEPTED[name])
    before = everything_in(here)
    result = run(server, here, ACCEPTED[name])
    assert (result.returncode, everything_in(here)) == (0, before)
    assert "INCLUDE=localhost:0\n" in result.stdout and "error:" not in result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "seven settings at once",
        "seven files and devices at once",
        "preference that is no UTF-8",
        "model with code of its own, looked at in the plan",
    ],
)
def test_the_launcher_passes_the_message_on(name, ground):
    here = prepare(ground, f"{name}, launched", CASES[name])
    before = everything_in(here)
    variables = {**OFFLINE_CPU, **GOOD, **CASES[name].variables}
    result = launch(variables, *CASES[name].flags, cwd=here, timeout=120, input="y\n" * 9)
    assert everything_in(here) == before
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.stderr[-3000:]
    require_problems(CASES[name], here, result.stderr)


def tools(folder: Path, python: str | None) -> dict[str, str]:
    """A PATH with the system's commands and no Python but this one."""
    folder.mkdir()
    for command in ("bash", "dirname", "find", "mktemp", "readlink", "rm", "sleep"):
        (folder / command).symlink_to(shutil.which(command))
    if python is not None:
        (folder / "python3").write_text(f"#!{folder}/bash\n{python}\n")
        (folder / "python3").chmod(0o755)
    return {"PATH": str(folder)}


LAUNCHER = {  # what is wrong → variables, flags, python3, what the launcher says
    "DRY_RUN of 2": ({"DRY_RUN": "2"}, [], ..., "DRY_RUN is '2': must be 0 or 1"),
    "flag of the plan": ({}, ["--plan=false"], ..., "--plan=false: set DRY_RUN=1 to see the plan"),
    "no Python": ({}, [], None, "no python3 was found; install Python 3.10 or newer"),
    "Python that does not start": ({}, [], "exit 127", "{tools}/python3 does not run; install Python 3.10 or newer"),
    "Python 3.9": (
        {},
        [],
        'case "$*" in *version_info*) exit 1 ;; *) echo "$0" ;; esac',
        "{tools}/python3 is too old; Python 3.10 or newer is needed",
    ),
}


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_the_launcher_itself_refuses(tmp_path, name):
    variables, flags, python, said = LAUNCHER[name]
    here = tmp_path / "here"
    here.mkdir()
    if python is not ...:
        variables = tools(tmp_path / "tools", python)
    result = launch(variables, *flags, cwd=here, timeout=60, stdin=subprocess.DEVNULL)
    assert result.stderr == f"error: {said.replace('{tools}', str(tmp_path / 'tools'))}\n"
    assert (result.returncode, result.stdout, list(here.iterdir())) == (2, "", [])


if __name__ == "__main__":
    serve()
