"""ZeRO 0 to 3 and offloading: each gives the losses of one rank, saves all and resumes; contradictions are found before.

What one rank with ds_config.json's ZeRO-2 trains is compared with a plain loop elsewhere (test_trainer,
test_soft_prompt).
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, free_port, make_model, output_of, parse, series, start, train, two_ranks
from peft import PeftModel
from test_around import POISON, sabotaged
from test_memory import ON_GPU, limit
from test_trainer import adapter, assert_bit_equal, assert_near, finished
from transformers import AutoModelForCausalLM

import train_with_preference_prompt as T

ranked = pytest.mark.skipif(T.CORES < 2, reason="two ranks need two cores")
SHIPPED = json.loads((PROJECT / "ds_config.json").read_text())
MODES = ("text", "embedding", "ptuning")
SETTINGS = {"LORA_DROPOUT": "0", "BETA": "0.1", "NUM_EPOCHS": "1", "EVAL_STEPS": "1", "NUM_VIRTUAL_TOKENS": "6"}
OF_LORA = {"ALPHA": "0.5", "LEARNING_RATE": "0.01"}
TRAJECTORY = ("loss/train", "loss/eval", "optim/grad_norm", "rewards_eval/accuracy", "logps_train/pref_chosen")


@pytest.fixture(scope="module")
def variables(tiny_run, tmp_path_factory):
    """Settings of a mode: updates of 8 and 4 of the 12 pairs, 5 test pairs; nothing is divided evenly."""
    soft = tmp_path_factory.mktemp("soft") / "soft.pt"
    torch.manual_seed(0)
    torch.save({"prompt_embeddings": 0.3 * torch.randn(4, 32)}, soft)

    def of_mode(mode: str, ranks: int = 1) -> dict[str, str]:
        shared = {**tiny_run, **SETTINGS, "TRAINING_MODE": mode, "GRADIENT_ACCUM_STEPS": str(8 // ranks)}
        own = {"PROMPT_EMBEDDING_PATH": str(soft)} if mode == "embedding" else {}
        return {**shared, **own, **({} if mode == "ptuning" else OF_LORA)}

    return of_mode


@pytest.fixture(scope="module")
def alone(variables, tmp_path_factory):
    """A finished run of a mode on one rank, as ds_config.json has it."""

    @functools.cache
    def run(mode: str) -> Path:
        cwd = tmp_path_factory.mktemp(f"alone_{mode}")
        finished(train(variables(mode), cwd))
        return cwd

    return run


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """Settings of a ZeRO stage and offloading. ZeRO-3 would leave parameters as small as these whole while it trains."""
    zero_3 = {**SHIPPED["zero_optimization"], "stage3_param_persistence_threshold": 0}
    del zero_3["stage"]
    path = tmp_path_factory.mktemp("zero") / "zero.json"
    path.write_text(json.dumps({**SHIPPED, "zero_optimization": zero_3}))

    def of_stage(stage: str, offload: str = "") -> dict[str, str]:
        return {"ZERO_STAGE": stage, "OFFLOAD": offload, **({"DS_CONFIG": str(path)} if stage == "3" else {})}

    return of_stage


@pytest.fixture(scope="module")
def divided(variables, zero, tmp_path_factory):
    """A finished run on two ranks with a ZeRO stage and offloading."""

    @functools.cache
    def run(mode: str, stage: str, offload: str = "") -> Path:
        cwd = tmp_path_factory.mktemp(f"{mode}_{stage}_{offload}")
        both_finished({**variables(mode, 2), **zero(stage, offload)}, cwd)
        return cwd

    return run


def both_finished(settings: dict[str, str], cwd: Path) -> None:
    for status, _, error in two_ranks(settings, cwd):
        assert status == 0, error[-3000:]


def assert_the_same_training(cwd: Path, whole: Path) -> None:
    for tag in TRAJECTORY:
        torch.testing.assert_close(series(cwd, tag), series(whole, tag), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter(cwd).items():
        assert_near(tensor, adapter(whole)[name])
    assert series(cwd, T.SAMPLES_TAG) == series(whole, T.SAMPLES_TAG)


def assert_all_is_saved(cwd: Path, mode: str, base: str) -> None:
    """The files are whole: adapter on base model and merged weights, opened by the libraries alone, compute the same."""
    folder, model = output_of(cwd), AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(20, 60)[None]
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tuned = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        adapted = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with tuned.disable_adapter():
            plain = tuned(input_ids=ids).logits
    if mode == "ptuning":
        assert not (folder / T.MERGED_WEIGHTS).exists() and adapted.shape[1] == 6 + ids.shape[1]
        soft = torch.load(folder / T.SOFT_PROMPT, weights_only=True)["prompt_embeddings"]
        assert torch.equal(soft, adapter(cwd)["prompt_embeddings"])
        return
    assert (adapted - plain).abs().max() > 0.1  # the adapter does something
    merged = torch.load(folder / T.MERGED_WEIGHTS, weights_only=True)
    assert {name: tensor.shape for name, tensor in merged.items()} == sizes
    opened = AutoModelForCausalLM.from_pretrained(folder / T.MERGED_FOLDER)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-3)


COVERING = [("3", "text", "both"), ("0", "text", ""), ("3", "ptuning", "")]


@ranked
@pytest.mark.parametrize(("stage", "mode", "offload"), COVERING)
def test_a_stage_trains_and_saves_as_one_rank_does(stage, mode, offload, alone, divided, tiny_run):
    cwd = divided(mode, stage, offload)
    assert_the_same_training(cwd, alone(mode))
    assert_all_is_saved(cwd, mode, tiny_run["POLICY_MODEL_PATH"])


def offloads_of(stage: str) -> tuple[str, ...]:
    return {"0": ("",), "3": ("", "optimizer", "parameters", "both")}.get(stage, ("", "optimizer"))


EVERY = [(stage, mode, offload) for stage in "0123" for mode in MODES for offload in offloads_of(stage)]


@pytest.mark.slow
@ranked
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "mode", "offload"), EVERY)
def test_every_stage_in_every_mode(stage, mode, offload, ranks, alone, divided, variables, zero, tiny_run, tmp_path):
    """With activations computed again, too, where one rank alone trains: on two ranks the covering cases have them not."""
    cwd = tmp_path
    if ranks == 2:
        cwd = divided(mode, stage, offload)
    else:
        finished(train({**variables(mode), **zero(stage, offload), "GRADIENT_CHECKPOINTING": "true"}, cwd))
    assert_the_same_training(cwd, alone(mode))
    assert_all_is_saved(cwd, mode, tiny_run["POLICY_MODEL_PATH"])


@pytest.mark.slow
@ranked
@pytest.mark.parametrize("mode", MODES)
def test_zero_3_with_activations_computed_again_on_two_ranks(mode, alone, variables, zero, tmp_path):
    both_finished({**variables(mode, 2), **zero("3"), "GRADIENT_CHECKPOINTING": "true"}, tmp_path)
    assert_the_same_training(tmp_path, alone(mode))


def two_ranks_train_as_one(variables, changed, divided, tmp_path) -> Path:
    """Where two ranks with settings of ZeRO trained in text mode as one rank without them did."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    finished(train({**variables("text"), **changed}, one))
    both_finished({**variables("text", 2), **changed, **divided}, two)
    assert_the_same_training(two, one)
    return two


@pytest.mark.slow
@ranked
def test_zero_3_with_untied_embeddings_and_an_adapted_head(variables, zero, tokenizer, tmp_path):
    """The head's weights are no longer the embeddings', and are read by an adapter of their own."""
    make_model("qwen2", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = {"POLICY_MODEL_PATH": str(tmp_path / "model"), "LORA_TARGET_MODULES": "q_proj,v_proj,lm_head"}
    two = two_ranks_train_as_one(variables, named, zero("3"), tmp_path)
    assert_all_is_saved(two, "text", named["POLICY_MODEL_PATH"])


@pytest.mark.slow
@ranked
@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_zero_3_continues_an_adapter(reference, alone, variables, zero, tmp_path):
    """Also where the reference is the adapter as it was, whose values are put in place of the trained ones for a time."""
    of_adapter = {"ADAPTER_PATH": str(output_of(alone("text"))), "ADAPTER_REFERENCE": reference}
    two_ranks_train_as_one(variables, of_adapter, zero("3"), tmp_path)


@pytest.mark.slow
@ranked
@pytest.mark.parametrize("stage", ["1", "3"])
@pytest.mark.parametrize("mode", ["text", "ptuning"])
def test_half_precision_gives_the_same_at_every_stage(stage, mode, variables, zero, tmp_path):
    """Text mode as plain DPO: after an evaluation, ZeRO-3 has fetched ahead what is then not needed."""
    halved = {"PRECISION": "bf16", "ALPHA": "0", "NUM_EPOCHS": "2", "LEARNING_RATE": "0.0001"}
    losses = []
    for of_stage in (zero(stage), zero("2")):
        cwd = tmp_path / of_stage["ZERO_STAGE"]
        cwd.mkdir()
        both_finished({**variables(mode, 2), **(halved if mode == "text" else {"PRECISION": "bf16"}), **of_stage}, cwd)
        losses.append(series(cwd, "loss/train") + series(cwd, "loss/eval"))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    merged = torch.load(output_of(cwd) / T.MERGED_WEIGHTS, weights_only=True) if mode == "text" else {}
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())


# --- resuming


def stopped_before_the_end(cwd: Path, copy: Path) -> None:
    shutil.copytree(output_of(cwd), output_of(copy), symlinks=True)
    (output_of(copy) / T.MODEL_CARD).unlink()  # as if it had been stopped while it saved after update 2
    (output_of(copy) / "checkpoint-2" / T.CHECKPOINT_FILES).unlink()
    assert T.newest_checkpoint(output_of(copy)).name == "checkpoint-1"


def assert_resumed(stage, mode, offload, divided, variables, zero, tmp_path):
    whole = divided(mode, stage, offload)
    stopped_before_the_end(whole, tmp_path)
    both_finished({**variables(mode, 2), **zero(stage, offload), "RESUME": "true"}, tmp_path)
    assert_bit_equal(tmp_path, whole)


@ranked
@pytest.mark.parametrize(("stage", "mode", "offload"), [("3", "text", "both"), ("0", "text", "")])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, mode, offload, divided, variables, zero, tmp_path):
    assert_resumed(stage, mode, offload, divided, variables, zero, tmp_path)


@pytest.mark.slow
@ranked
@pytest.mark.parametrize(("stage", "mode", "offload"), [case for case in EVERY if case[1] != "embedding"])
def test_every_stage_resumes(stage, mode, offload, divided, variables, zero, tmp_path):
    assert_resumed(stage, mode, offload, divided, variables, zero, tmp_path)


@pytest.mark.slow
@ranked
def test_a_run_that_lacks_memory_may_go_on_offloaded(divided, variables, zero, tmp_path):
    stopped_before_the_end(divided("text", "3"), tmp_path)
    both_finished({**variables("text", 2), **zero("3", "both"), "RESUME": "true"}, tmp_path)
    assert_the_same_training(tmp_path, divided("text", "3"))


def test_a_run_resumes_with_its_own_stage_and_any_offloading():
    def recorded(**settings):
        return T.recorded_settings(T.ScriptArguments(**settings), T.Devices("localhost:0", 1, on_gpu=False), {})

    as_shipped, three = recorded(), recorded(zero_stage="3")
    assert T.differences(as_shipped, recorded(zero_stage="2", offload="optimizer"), "interrupted") == []
    assert T.differences(three, recorded(zero_stage="3", offload="both"), "interrupted") == []
    assert T.differences(as_shipped, three, "interrupted") == [
        ("the interrupted run had ZERO_STAGE 2, not 3", "set it back")
    ]


# --- what is broken ends the run


@ranked
@pytest.mark.parametrize(("stage", "mode", "gradient"), [("0", "text", True), ("3", "embedding", False)])
def test_a_number_that_is_not_finite_is_found(stage, mode, gradient, variables, zero, tmp_path):
    """Row 12 is the second rank's: the first one names it. A rank with fewer suspects has to compute as often."""
    script = sabotaged(POISON.format(training=True, place=11, value="nan", gradient=gradient), tmp_path)
    settings = {**variables(mode, 2), **zero(stage), "GRADIENT_ACCUM_STEPS": "3"}
    (status, _, first), (other_status, _, second) = two_ranks(settings, tmp_path, script)
    assert (status, other_status) == (1, 1), first[-2000:] + second[-2000:]
    assert "it comes from row 12 of" in first and "error:" not in second


def test_zero_3_says_what_does_not_fit_into_memory(variables, zero, tmp_path):
    program = limit(tmp_path, tokens=0, error=ON_GPU)
    result = train({**variables("text"), **zero("3")}, tmp_path, program)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    message = result.stderr.split("error:\n")[1]
    assert "PAIRS_PER_FORWARD (--pairs_per_forward) is 2: the longest batch, 2 pairs, does not fit" in message
    assert "lower it" in message and "GRADIENT_CHECKPOINTING (now false): true" in message


# --- ranks


@ranked
def test_rank_0_alone_writes(variables, tmp_path):
    """The second rank has a folder of its own: only DeepSpeed's and the random state's part of a checkpoint are there."""
    folders, port = (tmp_path / "first", tmp_path / "second"), str(free_port())
    settings = {**variables("text", 2), "CPU_RANKS": "2"}
    runs = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        runs.append(start(settings, folder, port=port, rank=rank, ranks=2))
    for run in runs:
        finished(run.wait())
    written = {path.name for path in folders[1].rglob("*") if path.is_file()}
    assert written == {"zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_state_1.pth"}
    assert (output_of(folders[0]) / T.MODEL_CARD).exists()


FAILS = """
score = T.PreferenceGuidedDPOTrainer.score
def failing(self, model, batch, guided):
    if os.environ["RANK"] == "1" and self.state.global_step == 1 and self.model.training:
        raise {error}
    return score(self, model, batch, guided)
import os
T.PreferenceGuidedDPOTrainer.score = failing
"""
OF_ONE_RANK = {"an error of ours": ('T.RankError("it is broken")', 0), "any other": ('RuntimeError("it is broken")', 1)}


@ranked
@pytest.mark.parametrize("kind", OF_ONE_RANK)
def test_a_failure_of_one_rank_is_shown_once(kind, variables, tmp_path):
    """The other one, left in the middle of an exchange, ends too, in a line."""
    error, tracebacks = OF_ONE_RANK[kind]
    program = sabotaged(FAILS.format(error=error), tmp_path)
    (status, _, first), (other_status, _, second) = two_ranks(variables("text", 2), tmp_path, program)
    assert (status, other_status) == (1, 1)
    assert second.count("it is broken\n") == 1 and second.count("Traceback") == tracebacks, second[-2000:]
    assert "it is broken" not in first and "Traceback" not in first, first[-2000:]
    assert "rank 0 has lost another one, whose message says why" in first


@pytest.mark.slow
@ranked
@pytest.mark.parametrize("kind", OF_ONE_RANK)
def test_a_failure_of_one_rank_ends_the_launcher(kind, variables, tmp_path):
    program = sabotaged(FAILS.format(error=OF_ONE_RANK[kind][0]), tmp_path)
    flags = [f"--{name.lower()}={value}" for name, value in {**variables("text", 2), "CPU_RANKS": "2"}.items()]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--include=localhost:0,1", "--no_local_rank"]
    command = [*launcher, f"--master_port={free_port()}", str(program), *flags]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stderr.count("it is broken\n") == 1, result.stderr[-3000:]


def test_which_errors_are_those_of_a_lost_rank():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21183"
    assert T.has_lost_a_rank(RuntimeError(gloo)) and T.has_lost_a_rank(torch.distributed.DistBackendError("NCCL"))
    for message in ("mat1 and mat2 shapes cannot be multiplied", "CUDA error: out of memory", "Broken pipe"):
        assert not T.has_lost_a_rank(RuntimeError(message))


# --- the configuration


def test_the_shipped_configuration_stands_where_nothing_is_set():
    assert T.deepspeed_config(parse([]), on_gpu=True) == SHIPPED and SHIPPED["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_the_stage_is_overridden(stage):
    expected = {**SHIPPED, "zero_optimization": {**SHIPPED["zero_optimization"], "stage": int(stage)}}
    assert T.deepspeed_config(parse([f"--zero_stage={stage}"]), on_gpu=True) == expected


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(
    ("offload", "parts"),
    [
        ("optimizer", ["offload_optimizer"]),
        ("parameters", ["offload_param"]),
        ("both", ["offload_optimizer", "offload_param"]),
    ],
)
def test_offloading_is_added(offload, parts, on_gpu):
    config = T.deepspeed_config(parse(["--zero_stage=3", f"--offload={offload}"]), on_gpu)
    place = {"device": "cpu", "pin_memory": on_gpu}
    zero = {**SHIPPED["zero_optimization"], "stage": 3, **dict.fromkeys(parts, place)}
    own_adam = {"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in parts else {}
    assert config == {**SHIPPED, "zero_optimization": zero, **own_adam}


def own(folder: Path, **parts) -> list[str]:
    """Flags for a configuration of one's own."""
    (folder / "own.json").write_text(json.dumps(parts))
    return [f"--ds_config={folder / 'own.json'}"]


def test_a_configuration_of_ones_own_is_honoured(tmp_path):
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 1000, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}
    parts = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": True, "steps_per_print": 7}
    args = parse([*own(tmp_path, **parts), "--zero_stage=3", "--offload=optimizer"])
    left_out = {part: "auto" for part in T.BATCH_PARTS} | {kind: {"enabled": "auto"} for kind in ("bf16", "fp16")}
    assert T.deepspeed_config(args, on_gpu=True) == left_out | parts
    assert T.ds_config_problems(args, T.Devices("localhost:0", 1, on_gpu=False)) == []


@pytest.mark.parametrize("stage", [0, 3])
def test_a_configuration_may_leave_out_what_the_arguments_say(stage, tiny_run, tmp_path):
    """Batch sizes, clipping and precision; ZeRO-3 needs them as it loads, the gradient's norm needs the clipping."""
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    result = train({**tiny_run, "NUM_EPOCHS": "0.5", "DS_CONFIG": str(config)}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(norm > 0 for norm in series(tmp_path, "optim/grad_norm"))


def test_a_configuration_without_a_stage_takes_the_one_that_is_set(tmp_path):
    flags = own(tmp_path, zero_optimization={"overlap_comm": False})
    assert T.zero_of(parse(flags)) == {"stage": 0, "overlap_comm": False}
    assert T.zero_of(parse([*flags, "--zero_stage=3"])) == {"stage": 3, "overlap_comm": False}


def test_numbers_that_agree_may_stand_in_the_configuration(tmp_path):
    """In pairs; they become "auto", as the Trainer counts rows and PAIRS_PER_FORWARD may yet be lowered."""
    numbers = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    numbers |= {"gradient_clipping": 1.0}
    parts = {"zero_optimization": {"stage": 2}, **numbers, "bf16": {"enabled": False}}
    args, two = parse(own(tmp_path, **parts)), T.Devices("localhost:0,1", 2, on_gpu=False)
    assert args.gradient_accum_steps == 16 and args.pairs_per_forward == 4
    assert T.ds_config_problems(args, two) == []
    config = T.deepspeed_config(args, on_gpu=False)
    assert {config[name] for name in numbers} == {"auto"} and config["bf16"] == {"enabled": False}
    one = T.Devices("localhost:0", 1, on_gpu=False)
    (problem,) = T.ds_config_problems(args, one)
    assert problem.endswith(
        'train_batch_size is 32, but the settings make it 16; set it to "auto" or leave it out, and set '
        "GRADIENT_ACCUM_STEPS"
    )


IN_FILE = "but in {} (DS_CONFIG) zero_optimization."
# flags and zero_optimization of one's own → the words of the only problem
REFUSED = {
    "another stage": (
        ["--zero_stage=3"],
        {"stage": 1},
        f"ZERO_STAGE (--zero_stage) is '3', {IN_FILE}stage is 1; empty ZERO_STAGE, or change that or leave it out",
    ),
    "another place for the optimizer": (
        ["--offload=optimizer"],
        {"stage": 2, "offload_optimizer": {"device": "nvme"}},
        f"OFFLOAD (--offload) is 'optimizer', {IN_FILE}offload_optimizer is {{'device': 'nvme'}}; empty OFFLOAD, or",
    ),
    "more in the file": (
        ["--offload=optimizer"],
        {"stage": 3, "offload_param": {"device": "cpu"}},
        f"OFFLOAD (--offload) is 'optimizer', {IN_FILE}offload_param is {{'device': 'cpu'}}; empty OFFLOAD, or",
    ),
    "parameters that are not divided": (
        ["--offload=both"],
        {"stage": 2},
        "OFFLOAD (--offload) is 'both': offload_param needs at least ZeRO stage 3, and this is 2; choose",
    ),
    "parameters that are not divided, in the file": (
        [],
        {"stage": 1, "offload_param": {"device": "cpu"}},
        "DS_CONFIG (--ds_config) is '{}': offload_param needs at least ZeRO stage 3, and this is 1; choose",
    ),
    "an optimizer without ZeRO": (
        ["--zero_stage=0", "--offload=optimizer"],
        {},
        "OFFLOAD (--offload) is 'optimizer': offload_optimizer needs at least ZeRO stage 1, and this is 0;",
    ),
    "gradients that lose their digits": (
        ["--zero_stage=0", "--precision=bf16"],
        {},
        "ZERO_STAGE (--zero_stage) is '0', but the model will be in bfloat16, in which DeepSpeed without ZeRO would",
    ),
    "gradients that lose their digits, by the file": (
        ["--precision=bf16"],
        {"stage": 0},
        "DS_CONFIG (--ds_config) is '{}': its ZeRO stage is 0, but the model will be in bfloat16, in which DeepSpeed",
    ),
    "a stage that there is not": ([], {"stage": 4}, "DS_CONFIG (--ds_config) is '{}': there is no ZeRO stage 4; use 0"),
    "no number for a stage": ([], {"stage": True}, "DS_CONFIG (--ds_config) is '{}': there is no ZeRO stage True"),
    "no whole number for a stage": ([], {"stage": 2.0}, "DS_CONFIG (--ds_config) is '{}': there is no ZeRO stage 2.0"),
    "a name of old": (
        [],
        {"stage": 2, "cpu_offload": True},
        "DS_CONFIG (--ds_config) is '{}': zero_optimization.cpu_offload is a name of old; leave it out and set OFFLOAD",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_problems(case, tmp_path):
    flags, zero, words = REFUSED[case]
    args = parse([*own(tmp_path, zero_optimization=zero), *flags])
    (problem,) = T.ds_config_problems(args, T.Devices("localhost:0", 1, on_gpu=False))
    assert problem.startswith(words.replace("{}", args.ds_config)), problem


def test_bf16_in_the_configuration_must_be_what_precision_is(tmp_path):
    parts = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    args, cpu = parse(own(tmp_path, **parts)), T.Devices("localhost:0", 1, on_gpu=False)
    (problem,) = T.ds_config_problems(args, cpu)
    assert 'bf16 is {\'enabled\': True}; set it to {"enabled": "auto"} or leave it out, and set PRECISION' in problem
    args.precision = "bf16"
    assert T.ds_config_problems(args, cpu) == []


def test_how_fp16_scales_the_loss_may_stand_in_the_configuration(tmp_path):
    scaling = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
    parts = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto", **scaling, "min_loss_scale": 1}}
    args = parse(own(tmp_path, **parts))
    assert T.ds_config_problems(args, T.Devices("localhost:0", 1, on_gpu=False)) == []
    assert T.deepspeed_config(args, on_gpu=False)["fp16"] == parts["fp16"]


PLANNED = {
    (): "ZeRO-2 divides gradients and AdamW's state among the ranks",
    ("--zero_stage=0",): "ZeRO-0 divides nothing among the ranks",
    ("--zero_stage=1", "--offload=optimizer"): (
        "ZeRO-1 divides AdamW's state among the ranks; AdamW's state in CPU memory"
    ),
    ("--zero_stage=3", "--offload=both"): (
        "ZeRO-3 divides model, gradients and AdamW's state among the ranks; AdamW's state in CPU memory; the model in "
        "CPU memory"
    ),
}


@pytest.mark.parametrize("flags", PLANNED)
def test_the_plan_shows_stage_and_offloading(flags):
    assert T.describe_zero(parse(list(flags))) == PLANNED[flags]


# --- parts


def test_parameters_that_are_not_divided_are_whole():
    layer = torch.nn.Linear(2, 3)
    with T.whole(layer.parameters()), T.whole(layer.parameters(), changed=True), T.computable(layer):
        assert layer(torch.ones(1, 2)).shape == (1, 3) and not layer._forward_hooks and not layer._forward_pre_hooks
    values = T.trained_values(layer)
    assert values.keys() == {"weight", "bias"} and torch.equal(values["weight"], layer.weight)
    assert values["weight"].data_ptr() != layer.weight.data_ptr()


def test_a_module_computes_another_function_for_a_while():
    """With its hooks around it, which give ZeRO-3's weights; its own function comes back, also after an error."""
    layer, seen = torch.nn.Linear(2, 3), []
    layer.register_forward_hook(lambda *call: seen.append("hook"))
    with T.computing(layer, lambda x: x + layer.weight.sum()) as computing:
        assert torch.equal(computing(torch.zeros(1)), layer.weight.sum()[None])
    with pytest.raises(ValueError), T.computing(layer, len):
        raise ValueError
    assert seen == ["hook"] and layer(torch.ones(1, 2)).shape == (1, 3) and "forward" not in vars(layer)
