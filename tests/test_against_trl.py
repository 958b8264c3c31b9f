"""Against TRL: with ALPHA=0 ours is TRL's DPO, from the token ids to the trained adapter.

TRL's own `DPOTrainer` trains and is watched: the adapter before each update, what it computes of each pair, the
gradient. Two comparisons follow. At each of TRL's states our packed forward and our losses must give the same numbers
of each pair and the same gradient of each LoRA matrix. And our whole program, given the same model, data, settings
and seed, must go the same way by itself.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
import torch
from conftest import CHATML, ROWS, make_model, output_of, series, train, write_rows
from peft import LoraConfig
from safetensors.torch import load_file
from test_tokenise import adds_bos
from transformers import AutoTokenizer

import train_with_preference_prompt as T

trl = pytest.importorskip("trl", reason="TRL is installed for these tests only")
datasets = pytest.importorskip("datasets", reason="TRL takes its data as one of these")

SEED = 42
LEARNING_RATE = 0.003  # large enough that 20 updates lead somewhere
PAIRS = ROWS + [{**row, "prompt": "Again: " + row["prompt"]} for row in ROWS]
# ChatML whose last turn ends with its end token. Usually a newline follows; TRL would score it as a part of the answer,
# see test_trl_scores_what_the_template_puts_after_the_end_token.
CHAT = CHATML.replace(
    "<|im_end|>\n' }}", "<|im_end|>' }}{% if add_generation_prompt or not loop.last %}{{ '\n' }}{% endif %}"
)


class Case(NamedTuple):
    """One training; every update has `update` pairs, of which ours packs up to `forward` into a row."""

    kind: str
    data: str
    loss_type: str = "sigmoid"
    smoothing: float = 0.0
    update: int = 1
    forward: int = 1
    epochs: int = 2
    beta: float = 0.1

    def __str__(self):
        return f"{self.kind}-{self.data}-{self.loss_type}"

    @property
    def setup(self):
        return self.kind, self.data

    def order(self):
        """The pairs in the order in which ours takes them, one epoch after the other."""
        generators = [torch.Generator().manual_seed(SEED + epoch) for epoch in range(self.epochs)]
        return [i for generator in generators for i in torch.randperm(len(PAIRS), generator=generator).tolist()]


BOS, END = 0, 2  # ids of the tokenizer's <|endoftext|> and <|im_end|>
SETUPS = [(kind, data) for kind in ("llama", "qwen2") for data in ("plain", "chat")]
# 24 updates of one pair each, so that what our program logs of an update is that pair's own, and 21 updates of four.
CASES = [Case(*setup) for setup in SETUPS] + [
    Case("llama", "plain", "hinge", update=4, forward=4, epochs=7, beta=0.02),
    Case("llama", "chat", "robust", 0.2, update=4, forward=2, epochs=7),
    Case("qwen2", "chat", "ipo", update=4, forward=3, epochs=7),
]

each_setup = pytest.mark.parametrize("setup", SETUPS, ids="-".join)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def offline():
    """TRL sends no telemetry and asks the hub nothing; its library has long since read the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors as small as these two threads spend their time waiting for each other, most of all on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """(model kind, data kind) → a folder with model, tokenizer and data; Llama's texts begin with a BOS."""
    made = {}
    for kind, data in SETUPS:
        folder = made[kind, data] = tmp_path_factory.mktemp(f"{kind}_{data}")
        own = adds_bos(tokenizer) if kind == "llama" else copy.deepcopy(tokenizer)
        own.chat_template = None if data == "plain" else ("{{ bos_token }}" if kind == "llama" else "") + CHAT
        own.save_pretrained(folder / "model")
        make_model(kind, len(own)).save_pretrained(folder / "model")
        write_rows(folder / "train.jsonl", PAIRS)
        write_rows(folder / "test.jsonl", ROWS[:1])
    return made


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model):
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


# --- TRL's side

TRL_NAMES = {  # ours → what TRL calls it
    "loss": "loss",
    "dpo_loss": "loss",
    "accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
}
EVERYTHING = {*TRL_NAMES, "gradient"}


@dataclass
class Update:
    """The adapter before an update of TRL's, its gradient before clipping, and the metrics of its pairs, each (P,)."""

    adapter: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor]


class WatchedTrainer(trl.DPOTrainer):
    """TRL's trainer, which takes one pair at a time here and notes what it computes of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updates, self.seen = [], []

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen.append({"loss": loss.item()} | {name: values[-1] for name, values in self._metrics["train"].items()})
        return loss

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if len(self.seen) == self.args.gradient_accumulation_steps:
            metrics = {ours: torch.tensor([pair[name] for pair in self.seen]) for ours, name in TRL_NAMES.items()}
            gradient = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
            self.updates.append(Update(snapshot(model), gradient, metrics))
            self.seen = []
        return loss


def for_trl(row, data):
    """A row as TRL takes it: strings, or lists of messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: row[name] if data == "plain" else [{"role": roles[name], "content": row[name]}] for name in roles}


def trl_trainer(case, folder, rows, tokenizer=None):
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        beta=case.beta,
        loss_type=[case.loss_type],
        label_smoothing=case.smoothing,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        weight_decay=0.0,
        seed=SEED,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=case.update,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return WatchedTrainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=datasets.Dataset.from_list([for_trl(row, case.data) for row in rows]),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )


def train_by_trl(case, folder, pairs=PAIRS):
    """A finished trainer of TRL's that had the pairs in our order."""
    trainer = trl_trainer(case, folder, [pairs[i] for i in case.order()])
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trl_runs(folders):
    """Case → TRL's finished trainer."""
    return {case: train_by_trl(case, folders[case.setup]) for case in CASES}


# --- our side


def variables(case, folder):
    return {
        "POLICY_MODEL_PATH": str(folder / "model"),
        "TRAIN_DATASET_PATH": str(folder / "train.jsonl"),
        "TEST_DATASET_PATH": str(folder / "test.jsonl"),
        "ALPHA": "0",
        "BETA": str(case.beta),
        "LOSS_TYPE": case.loss_type,
        "LABEL_SMOOTHING": str(case.smoothing),
        "LORA_DROPOUT": "0",
        "LEARNING_RATE": str(LEARNING_RATE),
        "NUM_EPOCHS": str(case.epochs),
        "GRADIENT_ACCUM_STEPS": str(case.update),
        "PAIRS_PER_FORWARD": str(case.forward),
        "EVAL_STEPS": "0",
        "SEED": str(SEED),
    }


@pytest.fixture(scope="module")
def our_runs(folders, tmp_path_factory):
    """Case → the working folder of our program's finished run."""
    made = {case: tmp_path_factory.mktemp("ours") for case in CASES}
    for case, cwd in made.items():
        result = train(variables(case, folders[case.setup]), cwd)
        assert result.returncode == 0, result.stderr[-3000:]
    return made


def tokenize(folder, rows, tokenizer=None):
    """The rows as our program tokenises them."""
    ours = T.PairTokenizer(tokenizer or AutoTokenizer.from_pretrained(folder / "model"), T.Prefix(), 300, 128)
    return [ours(T.Pair(**row, row=0), T.DataReport(Path("memory"))) for row in rows]


class OurPolicy:
    """Our policy, in which the adapter can be replaced, and our pairs."""

    def __init__(self, folder):
        self.pairs = tokenize(folder, PAIRS)
        settings = T.ScriptArguments(lora_dropout=0.0, seed=SEED)
        T.transformers.set_seed(SEED)
        model = T.load_base_model(str(folder / "model"), torch.float32)
        self.policy, _, _ = T.build_policy(settings, model, None, T.PairDataset(self.pairs))
        self.start = snapshot(self.policy)

    def at(self, adapter, pairs, beta, loss_type, smoothing):
        """The metrics of the pairs, packed into one row, and the gradient of their mean loss."""
        parameters = trained_parameters(self.policy)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapter[name])
        batch = T.first_batch(T.PairDataset(pairs), len(pairs))
        reference, lengths = T.reference_logps(self.policy, batch["base"]), batch["lengths"]
        policy = T.policy_logps(self.policy, batch["base"])
        metrics = T.preference_guided_loss(policy, reference, None, lengths, beta, 0.0, loss_type, smoothing)
        gradient = torch.autograd.grad(metrics["loss"].mean(), list(parameters.values()))
        return metrics, dict(zip(parameters, gradient, strict=True))


@pytest.fixture(scope="module")
def policies(folders):
    return {setup: OurPolicy(folder) for setup, folder in folders.items()}


# --- how far apart the two are, in units of what rounding may do

# The log-probabilities are sums of up to 200 nats, near which fp32 numbers lie 1.5e-5 apart.
REWARD, LOGP = {"rtol": 1e-5, "atol": 2e-5}, {"rtol": 2e-6, "atol": 5e-5}
ROUNDING = {
    "loss": REWARD,
    "dpo_loss": REWARD,
    "chosen_reward": REWARD,
    "rejected_reward": REWARD,
    "reward_margin": REWARD,
    "chosen_logps": LOGP,
    "rejected_logps": LOGP,
}
GRADIENT = 5e-5  # of the largest entry in the matrix
GRAD_NORM = {"rtol": 1e-4, "atol": 1e-4}  # at the end of each trainer's own way
# Of the way that the matrix has gone. AdamW divides a gradient by its own size, so the few entries whose gradient is
# nothing but rounding take steps of full size.
ADAPTER = 2e-3


def off(ours, theirs, rtol=0.0, atol=0.0):
    """The largest |ours − theirs| / (atol + rtol |theirs|): at most 1 where they agree."""
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs() / (atol + rtol * theirs.abs())).max().item()


def accuracy_off(ours, theirs, margins):
    """Infinite if an accuracy differs, but for margins of 0, whose sign is one of rounding."""
    pairs = zip(ours, theirs, margins, strict=True)
    return max((math.inf for mine, its, margin in pairs if mine != its and abs(margin) > 1e-4), default=0.0)


def at_state(ours, case, number, update, swapped=False, **changes):
    """Quantity → how far ours is off TRL's at one of its states; `swapped` and `changes` are for the controls."""
    start = number * case.update
    first, *rest = (ours.pairs[i] for i in case.order()[start : start + case.update])
    if swapped:
        first = T.dataclasses.replace(first, chosen_ids=first.rejected_ids, rejected_ids=first.chosen_ids)
    settings = {"beta": case.beta, "loss_type": case.loss_type, "smoothing": case.smoothing} | changes
    metrics, gradient = ours.at(update.adapter, [first, *rest], **settings)
    theirs = update.metrics
    result = {name: off(metrics[name].detach(), theirs[name], **rounding) for name, rounding in ROUNDING.items()}
    result["accuracy"] = accuracy_off(metrics["accuracy"], theirs["accuracy"], theirs["reward_margin"])
    result["gradient"] = max(
        off(gradient[name], matrix, atol=GRADIENT * matrix.abs().max().item() + 1e-12)
        for name, matrix in update.gradient.items()
    )
    return result


def along_the_way(cwd, trainer):
    """Quantity → how far the run of our program is off TRL's; TRL's metrics are averaged over an update as ours are."""
    means = {name: [update.metrics[name].mean().item() for update in trainer.updates] for name in TRL_NAMES}
    logged = {name: series(cwd, T.TAGS[name][0]) for name in TRL_NAMES}
    result = {name: off(logged[name], means[name], **rounding) for name, rounding in ROUNDING.items()}
    nearest = [update.metrics["reward_margin"].abs().min().item() for update in trainer.updates]
    result["accuracy"] = accuracy_off(logged["accuracy"], means["accuracy"], nearest)
    stock = [logs for logs in trainer.state.log_history if "grad_norm" in logs]
    result["grad_norm"] = off(series(cwd, T.GRAD_NORM_TAG), [logs["grad_norm"] for logs in stock], **GRAD_NORM)
    rates = [logs["learning_rate"] for logs in stock]
    result["learning_rate"] = off(series(cwd, T.LEARNING_RATE_TAG), rates, rtol=1e-9, atol=1e-12)
    saved = load_file(output_of(cwd) / "adapter_model.safetensors")
    theirs = {name.replace(".default", ""): matrix for name, matrix in snapshot(trainer.model).items()}
    start = {name.replace(".default", ""): matrix for name, matrix in trainer.updates[0].adapter.items()}
    assert saved.keys() == theirs.keys()
    result["adapter"] = max(
        ((saved[name] - matrix).norm() / (matrix - start[name]).norm() / ADAPTER).item()
        for name, matrix in theirs.items()
    )
    return result


def differing(distances):
    """What differs by more than rounding, or is no number."""
    return {name: distance for name, distance in distances.items() if not distance <= 1}


# --- tokens and start


def ids_of(folder, data, rows, tokenizer=None):
    """Token ids of the rows, by field: ours, and those of TRL."""
    trainer = trl_trainer(Case("", data), folder, rows, tokenizer)
    ours, fields = tokenize(folder, rows, tokenizer), ("prompt_ids", "chosen_ids", "rejected_ids")
    return (
        {name: [getattr(pair, name) for pair in ours] for name in fields},
        {name: list(trainer.train_dataset[name]) for name in fields},
    )


@each_setup
def test_token_ids_are_those_of_trl(folders, setup):
    ours, theirs = ids_of(folders[setup], setup[1], PAIRS)
    assert ours == theirs
    assert {ids.count(BOS) for ids in ours["prompt_ids"]} == {1 if setup[0] == "llama" else 0}
    assert all(ids.index(END) == len(ids) - 1 for ids in ours["chosen_ids"] + ours["rejected_ids"])


def test_trl_scores_what_the_template_puts_after_the_end_token(folders, tokenizer):
    """ChatML as it is usually written: the newline that separates turns is no part of our answers."""
    ours, theirs = ids_of(folders["qwen2", "chat"], "chat", PAIRS, copy.deepcopy(tokenizer))
    (newline,) = tokenizer("\n").input_ids
    assert theirs["prompt_ids"] == ours["prompt_ids"]
    for name in ("chosen_ids", "rejected_ids"):
        assert theirs[name] == [[*ids, newline] for ids in ours[name]]


def test_trl_moves_the_end_of_a_plain_prompt_into_the_answer_where_tokens_merge(folders):
    """It tokenises prompt and answer together; ours scores the answer after the very ids of the prompt."""
    folder = folders["qwen2", "plain"]
    decode = AutoTokenizer.from_pretrained(folder / "model").decode
    row = {"prompt": "Two plus two? ", "chosen": "Four.", "rejected": "Five."}
    ours, theirs = ids_of(folder, "plain", [row])
    assert decode(ours["prompt_ids"][0]) == row["prompt"] and decode(theirs["prompt_ids"][0]) == "Two plus two?"
    assert decode(ours["chosen_ids"][0]) == "Four.<|im_end|>" and decode(theirs["chosen_ids"][0]) == " Four.<|im_end|>"


@pytest.mark.parametrize("data, answer", [("chat", "Four.<|im_end|>"), ("plain", "<|im_end|> is one.")])
def test_an_end_token_spelled_out_in_an_answer_is_one_to_trl(folders, data, answer):
    """Ours has exactly one end token in an answer, whatever the text spells."""
    row = {"prompt": "Two plus two?", "chosen": answer, "rejected": "Five."}
    ours, theirs = ids_of(folders["qwen2", data], data, [row])
    assert ours["chosen_ids"][0].count(END) == 1 and theirs["chosen_ids"][0].count(END) == 2
    assert ours["prompt_ids"] == theirs["prompt_ids"] and ours["rejected_ids"] == theirs["rejected_ids"]


@each_setup
def test_the_adapter_starts_as_that_of_trl(policies, trl_runs, setup):
    ours, theirs = policies[setup].start, trl_runs[Case(*setup)].updates[0].adapter
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 2  # A and B of 7 linear layers in 2 blocks
    assert all(torch.equal(matrix, theirs[name]) for name, matrix in ours.items())


# --- pairs and gradients, at every state of TRL's


@each_case
def test_there_is_something_to_compare(trl_runs, case):
    """At least 20 updates, of which some are clipped, pairs that are won and lost, a gradient for each matrix."""
    updates = trl_runs[case].updates
    margins, losses = (torch.cat([update.metrics[name] for update in updates]) for name in ("reward_margin", "loss"))
    assert len(updates) >= 20 and losses.std() > 0.1
    assert margins.min() < -1e-3 and margins.max() > 1
    if case.loss_type == "hinge":
        assert 0 < (losses == 0).sum() < len(losses)
    norms = [torch.stack([matrix.norm() for matrix in update.gradient.values()]) for update in updates]
    assert max(norm.norm() for norm in norms) > 1 and torch.stack(norms).amax(0).min() > 1e-2


@each_case
def test_every_pair_and_gradient_is_that_of_trl(policies, trl_runs, case):
    ours = policies[case.setup]
    for number, update in enumerate(trl_runs[case].updates):
        distances = at_state(ours, case, number, update)
        assert not differing(distances), f"before update {number + 1}"
        assert distances.keys() == EVERYTHING


REWARDS = {"chosen_reward", "rejected_reward", "reward_margin"}
OF_THE_LOSS = {"loss", "dpo_loss", "gradient"}


def changes(case):
    """What is changed on our side → how, and what must differ then."""
    others = [name for name in T.DPO_LOSSES if name != case.loss_type or case.smoothing]
    return {
        "beta": ({"beta": 1.01 * case.beta}, OF_THE_LOSS | REWARDS),
        "swapped": ({"swapped": True}, EVERYTHING),
        **{name: ({"loss_type": name, "smoothing": 0.19}, OF_THE_LOSS) for name in others},
    }


@pytest.mark.parametrize("case, name", [(case, name) for case in CASES for name in changes(case)], ids=str)
def test_negative_control_a_small_change_shows_in_pairs_and_gradient(policies, trl_runs, case, name):
    """β 1 % larger, the answers of one pair swapped, another loss, or robust with a slightly other label smoothing."""
    (change, affected), number = changes(case)[name], 2
    distances = at_state(policies[case.setup], case, number, trl_runs[case].updates[number], **change)
    assert differing(distances).keys() == affected


# --- whole runs


@each_case
def test_our_program_goes_the_way_of_trl(our_runs, trl_runs, case):
    distances = along_the_way(our_runs[case], trl_runs[case])
    assert not differing(distances)
    assert distances.keys() == {*TRL_NAMES, "grad_norm", "learning_rate", "adapter"}


def test_negative_control_trl_with_another_beta_goes_another_way(our_runs, folders):
    case = CASES[0]
    trainer = train_by_trl(case._replace(beta=1.1 * case.beta), folders[case.setup])
    distances = along_the_way(our_runs[case], trainer)
    assert differing(distances).keys() == distances.keys() - {"accuracy", "learning_rate"}


def test_negative_control_trl_with_one_pair_swapped_goes_another_way(our_runs, folders):
    case, (first, *rest) = CASES[0], PAIRS
    swapped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    distances = along_the_way(our_runs[case], train_by_trl(case, folders[case.setup], [swapped, *rest]))
    assert differing(distances).keys() == distances.keys() - {"learning_rate"}
