"""A base in 4 bits: trained, scored, merged and saved as what its weights stand for; bitsandbytes computes that on the CPU."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import history, make_model, output_of, series, train, two_ranks
from peft import PeftModel
from test_forward import CLOSE, pack
from test_layers import compare_with_peft
from test_plan import CPU, GPUS, plan
from test_trainer import adapter, finished
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

import train_with_preference_prompt as T

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes is not installed (tests/run.sh does it)"
)
HERE = torch.device("cpu")
LINEAR = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture(params=["llama", "qwen2"])
def folder(request, tokenizer, tmp_path):
    """A saved model: the output embeddings tied, and not; the second one's layers have biases."""
    model = make_model(request.param, len(tokenizer))
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(bias)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def load(folder, dtype=torch.float32):
    return T.load_base_model(folder, dtype, in_4bit_on=HERE)


def trained_policy(folder, args=None):
    """A policy on the base in 4 bits that is no longer its reference."""
    torch.manual_seed(0)
    policy = T.add_adapter(T.enable_packed_forward(load(folder)), args or T.ScriptArguments(lora_r=4, lora_dropout=0.0))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return policy


def quantised_names(model):
    return {name for name, module in model.named_modules() if T.quant_state(module) is not None}


def dense_by_hand(folder, dtype=torch.float32):
    """The model of the folder, each linear layer's weight rounded to NF4 with double quantisation and back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, module in model.named_modules():
        if name.removeprefix("model.layers.")[2:] in LINEAR:
            packed, state = functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            module.weight.data = functional.dequantize_4bit(packed, state)
    return model


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_layers_are_in_4_bits_and_nothing_else_is(folder, dtype):
    model = load(folder, dtype)
    assert quantised_names(model) == {f"model.layers.{n}.{name}" for n in (0, 1) for name in LINEAR}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {model.dtype} == {dtype}
    assert type(model.lm_head) is nn.Linear
    state = T.quant_state(model.model.layers[0].mlp.up_proj)
    assert (state.quant_type, state.nested, state.blocksize, state.dtype) == ("nf4", True, 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_its_weights_stand_for(folder, dtype):
    """And not what the folder's weights do."""
    ids = torch.tensor([[5, 60, 7, 300, 12]])
    with torch.no_grad():
        quantised = load(folder, dtype)(ids).logits.float()
        by_hand = dense_by_hand(folder, dtype)(ids).logits.float()
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits.float()
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.1}
    torch.testing.assert_close(quantised, by_hand, **tolerance)
    assert (quantised - full).abs().max() > 0.3


def test_no_cpu_packs_the_weights_anew(folder, monkeypatch):
    """Those with AVX512-BF16 would, in the first forward without gradient, and have none from then on."""
    from bitsandbytes.nn import modules

    packed = []
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *x: packed.append(1) or x)
    ids = torch.tensor([[5, 60, 7]])
    with torch.no_grad():
        load(folder).eval()(ids)
        assert not packed
        stock = T.four_bits(torch.float32)
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=stock).eval()(ids)
        assert packed


def test_targets_are_found_as_on_the_meta_device(folder):
    def adapted(model):
        return {name for name, module in model.named_modules() if isinstance(module, T.LoraLayer)}

    config = transformers.AutoConfig.from_pretrained(folder)
    args = T.ScriptArguments()
    laid_out, loaded = (adapted(T.add_adapter(model, args)) for model in (T.lay_out(config), load(folder)))
    assert laid_out == loaded == {f"base_model.model.model.layers.{n}.{name}" for n in (0, 1) for name in LINEAR}


# --- identity


def test_the_identity_tells_bases_apart(folder):
    """4 bits from 16 and 32, and weights whose 4 bits are the same but for their scales."""
    dense, quantised = T.load_base_model(folder, torch.float32), load(folder)
    twice = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in twice.named_modules():
        if name.removeprefix("model.layers.")[2:] in LINEAR:
            module.weight.data *= 2
    twice.save_pretrained(f"{folder}/twice")
    scaled = load(f"{folder}/twice")
    same = [(a, b) for (_, a), (_, b) in zip(quantised.named_parameters(), scaled.named_parameters(), strict=True)]
    assert all(map(torch.equal, *zip(*same, strict=True)))
    digests = {T.weights_digest(model) for model in (dense, quantised, scaled, load(folder, torch.bfloat16))}
    assert len(digests) == 4 and T.weights_digest(load(folder)) in digests
    one, other = (T.reference_identity(model, "", HERE) for model in (dense, quantised))
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == {
        "config",
        "bitsandbytes",
    }


# --- LoRA


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("adapter_on", "checkpointed"), [(True, True), (True, False), (False, False)])
def test_lora_layers_compute_what_pefts_do(folder, tokenized, training, adapter_on, checkpointed):
    """Log-probabilities and gradients; with the adapter off those of the base alone, bit for bit."""
    policy = trained_policy(folder).train(training)

    def speed_up():
        T.speed_up(policy)
        if checkpointed:
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    fast_logps = compare_with_peft(policy, tokenized, adapter_on, speed_up)
    if not adapter_on:
        alone = T.enable_packed_forward(load(folder)).requires_grad_(False)  # a head that is trained scores otherwise
        assert torch.equal(T.policy_logps(alone, pack(tokenized)), fast_logps)


def test_they_are_computed_together(folder, tokenized, monkeypatch):
    """Not left to PEFT's forward."""
    policy, calls = trained_policy(folder), []
    T.speed_up(policy)
    monkeypatch.setattr(T, "frozen_linear", lambda *x, compute=T.frozen_linear: calls.append(x[2]) or compute(*x))
    T.policy_logps(policy, pack(tokenized))
    assert len(calls) == 14 and None not in calls  # two layers of seven


# --- merging


def by_hand(folder, state, scaling):
    """Name → weight of a layer: what its 4 bits stand for, and ΔW = α / r · B A."""
    weights = {
        name: module.weight.data for name, module in dense_by_hand(folder).named_modules() if hasattr(module, "weight")
    }
    for name in [name for name in state if name.endswith("lora_A.weight")]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weights[layer] = weights[layer] + scaling * state[name.replace("lora_A", "lora_B")] @ state[name]
    return weights


def test_merged_weights_are_what_the_policy_computed_with(folder, tokenized):
    policy = trained_policy(folder)
    T.speed_up(policy)
    state = {name: tensor.clone() for name, tensor in T.get_peft_model_state_dict(policy).items()}
    expected = T.teacher_logps(policy, pack(tokenized))
    merged = T.merged_model(policy)
    assert not any("forward" in vars(layer) for layer in merged.model.layers)  # else they would be those in 4 bits
    assert not T.is_quantised(merged) and "quantization_config" not in merged.config.to_dict()
    found = dict(merged.named_modules())
    for name, weight in by_hand(folder, state, scaling=32 / 4).items():
        torch.testing.assert_close(found[name].weight.data, weight, rtol=0, atol=1e-6)
        assert type(found[name]) is not nn.Linear or found[name].weight.dtype == torch.float32
    torch.testing.assert_close(T.teacher_logps(merged, pack(tokenized)), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_negative_control_pefts_own_merge_is_another_model(folder, tokenized):
    policy = trained_policy(folder)
    expected = T.teacher_logps(policy, pack(tokenized))
    merged = policy.merge_and_unload()
    assert (T.teacher_logps(merged, pack(tokenized)) - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_gpt2s_layers_keep_their_matrix_the_other_way_round(tmp_path, tokenizer, tokenized):
    sizes = dict(
        n_embd=64, n_layer=1, n_head=4, n_positions=512, vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1
    )
    AutoModelForCausalLM.from_config(GPT2Config(**sizes, initializer_range=0.3)).save_pretrained(tmp_path)
    policy = trained_policy(str(tmp_path))
    assert len(quantised_names(policy)) == 4
    T.speed_up(policy)
    expected = T.teacher_logps(policy, pack(tokenized))
    merged = T.merged_model(policy)
    torch.testing.assert_close(T.teacher_logps(merged, pack(tokenized)), expected, **CLOSE)
    T.save_merged(merged, tmp_path / "merged")
    opened = T.enable_packed_forward(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(T.teacher_logps(opened, pack(tokenized)), expected, **CLOSE)


@pytest.mark.parametrize(("free", "place"), [(100.0, "cpu"), (120.0, "cuda")])
def test_what_a_gpu_has_no_room_for_is_merged_on_the_cpu(free, place, monkeypatch):
    """50 weights of 2 bytes each; a tenth of what is free stays so."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    layer, base = nn.Linear(1, 1), SimpleNamespace(dtype=torch.bfloat16)
    layer.weight.quant_state = SimpleNamespace(shape=(5, 10))
    modules = [layer, SimpleNamespace(weight=layer.weight), nn.Linear(90, 10), nn.Sequential()]  # PEFT's shows it again
    policy = SimpleNamespace(device=torch.device("cuda"), modules=lambda: modules, get_base_model=lambda: base)
    assert T.merge_place(policy).type == place
    policy.device = HERE
    assert T.merge_place(policy) == HERE


# --- whole runs

SETTINGS = {"LOAD_IN_4BIT": "true", "LORA_DROPOUT": "0.1"}


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("quantised")
    return cwd, finished(train({**tiny_run, **SETTINGS}, cwd))


def test_the_saved_weights_are_the_trained_policy(run, tiny_run):
    cwd, _ = run
    saved = AutoModelForCausalLM.from_pretrained(output_of(cwd) / T.MERGED_FOLDER)
    found, base = dict(saved.named_modules()), AutoModelForCausalLM.from_pretrained(tiny_run["POLICY_MODEL_PATH"])
    expected = by_hand(tiny_run["POLICY_MODEL_PATH"], adapter(cwd), scaling=32 / 16)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].weight.data, weight, rtol=0, atol=1e-6)
    layer = "model.layers.1.mlp.up_proj"
    assert (found[layer].weight - base.get_submodule(layer).weight).abs().max() > 0.01  # not on the full weights


def test_the_model_card_says_so_and_its_code_opens_the_trained_model(run, tiny_run, tokenized):
    card = (output_of(run[0]) / T.MODEL_CARD).read_text()
    assert "float32, base model in 4 bits (NF4) |" in card and ", bitsandbytes 0.50" in card
    assert "--load_in_4bit=True" in card and "LOAD_IN_4BIT=true" in card and "and are dense" in card
    code, names = card.split("```python\n")[1].split("question =")[0], {}
    exec(code, names)
    opened = names["model"].eval()
    merged = AutoModelForCausalLM.from_pretrained(output_of(run[0]) / T.MERGED_FOLDER)
    ids = torch.tensor([tokenized[0].prompt_ids])
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, merged(ids).logits, rtol=0, atol=1e-3)


def test_a_resumed_run_is_bit_equal(run, tiny_run, tmp_path):
    cwd, _ = run
    resumed = shutil.copytree(output_of(cwd), output_of(tmp_path), symlinks=True)
    (resumed / T.MODEL_CARD).unlink()
    shutil.rmtree(resumed / "checkpoint-3")
    finished(train({**tiny_run, **SETTINGS, "RESUME": "true"}, tmp_path))
    assert series(tmp_path, "loss/train") == series(cwd, "loss/train")
    for file in (T.MERGED_WEIGHTS, T.ADAPTER_FILES[1]):
        one, other = (torch.load(output_of(place) / file, weights_only=True) for place in (cwd, tmp_path))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_base_is_not_resumed(run, tiny_run, tmp_path):
    resumed = shutil.copytree(output_of(run[0]), output_of(tmp_path), symlinks=True)
    (resumed / T.MODEL_CARD).unlink()
    result = train({**tiny_run, "RESUME": "true"}, tmp_path)
    assert result.returncode == 2 and "LOAD_IN_4BIT True, not False; set it back" in result.stderr


def evaluate(tiny_run, adapter_path, folder, **settings):
    data = {name: tiny_run[name] for name in ("TEST_DATASET_PATH", "PREFERENCE_TEXT", "PAIRS_PER_FORWARD")}
    data |= {"POLICY_MODEL_PATH": tiny_run["POLICY_MODEL_PATH"], "ADAPTER_PATH": str(adapter_path)}
    variables = {**data, "EVALUATE_ONLY": "true", "EVALUATION_FILE": str(folder / "results.json"), **settings}
    result = finished(train(variables, folder))
    return json.loads((folder / "results.json").read_text())["metrics"], result.stderr


def test_an_evaluation_gives_what_the_run_gave(run, tiny_run, tmp_path):
    """And on the base's full weights something else, of which it warns."""
    last = [logs for logs in history(run[0]) if "loss/eval" in logs][-1]
    folders = [tmp_path / "quantised", tmp_path / "full"]
    for folder in folders:
        folder.mkdir()
    found, said = evaluate(tiny_run, output_of(run[0]), folders[0], LOAD_IN_4BIT="true")
    full, warned = evaluate(tiny_run, output_of(run[0]), folders[1])
    for tag in ("logps_eval/chosen", "logps_eval/pref_rejected", "rewards_eval/margin"):
        assert found[tag] == pytest.approx(last[tag], rel=1e-5)
        assert full[tag] != pytest.approx(last[tag], rel=1e-3)
    assert "base model in 4 bits (NF4)" in said and "other figures" not in said
    assert "it had LOAD_IN_4BIT True, not False" in warned


def test_the_cache_serves_4_bits_alone(tiny_run, tmp_path):
    """The reference is the base in 4 bits: what is kept of it is not taken for that of the full weights."""
    printed = {}
    for name, settings in {"first": SETTINGS, "again": SETTINGS, "full": {}}.items():
        (tmp_path / name).mkdir()
        variables = {**tiny_run, **settings, "REFERENCE_CACHE": str(tmp_path / "cache"), "NUM_EPOCHS": "0.3"}
        printed[name] = finished(train(variables, tmp_path / name)).stdout
    lines = {
        name: [line for line in text.splitlines() if line.startswith("reference log-")]
        for name, text in printed.items()
    }
    assert [all("computed" in line for line in lines[name]) for name in lines] == [True, False, True]
    assert not any("computed" in line for line in lines["again"]) and len(lines["again"]) == 3


def test_an_adapter_is_continued_in_4_bits(run, tiny_run, tmp_path):
    """From what it was; its rewards are counted from the base in 4 bits."""
    last = [logs for logs in history(run[0]) if "loss/eval" in logs][-1]
    settings = {"ADAPTER_PATH": str(output_of(run[0])), "ADAPTER_REFERENCE": "base", "NUM_EPOCHS": "0.3"}
    finished(train({**tiny_run, **SETTINGS, **settings}, tmp_path))
    first = [logs for logs in history(tmp_path) if "loss/eval" in logs][0]
    for tag in ("logps_eval/chosen", "rewards_eval/margin"):
        assert first[tag] == pytest.approx(last[tag], rel=1e-5) and first[tag] != 0


def test_a_soft_prompt_is_trained_and_guides(tiny_run, tmp_path):
    """P-tuning on the base in 4 bits, then embedding mode with what it gives."""
    soft, guided = tmp_path / "soft", tmp_path / "guided"
    for folder in (soft, guided):
        folder.mkdir()
    rate = {"PTUNING_LEARNING_RATE": "0.05"}
    finished(train({**tiny_run, **SETTINGS, **rate, "TRAINING_MODE": "ptuning"}, soft))
    losses = series(soft, "loss/eval")
    assert losses[-1] != losses[0] and not (output_of(soft) / T.MERGED_WEIGHTS).exists()
    base = AutoModelForCausalLM.from_pretrained(
        tiny_run["POLICY_MODEL_PATH"], quantization_config=T.four_bits(torch.float32)
    )
    opened = PeftModel.from_pretrained(base, output_of(soft))
    trained = T.read_soft_prompt(str(output_of(soft) / T.SOFT_PROMPT), 32)
    assert torch.equal(opened.prompt_encoder["default"].embedding.weight.data, trained)
    settings = {"TRAINING_MODE": "embedding", "PROMPT_EMBEDDING_PATH": str(output_of(soft) / T.SOFT_PROMPT)}
    finished(train({**tiny_run, **SETTINGS, **settings}, guided))
    assert (output_of(guided) / T.MERGED_WEIGHTS).exists()


@pytest.mark.skipif(T.CORES < 2, reason="two ranks need two cores")
def test_two_ranks_train_as_one(tiny_run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    variables = {**tiny_run, **SETTINGS, "LORA_DROPOUT": "0", "GRADIENT_ACCUM_STEPS": "4"}
    finished(train(variables, one))
    for status, _, error in two_ranks({**variables, "GRADIENT_ACCUM_STEPS": "2"}, two):
        assert status == 0, error[-2000:]
    assert series(two, "loss/train") == pytest.approx(series(one, "loss/train"), rel=1e-5)


# --- what is checked before anything is loaded

QUANTISED = T.ScriptArguments(load_in_4bit=True)
INSTALL = f"run {sys.executable} -m pip install 'bitsandbytes>=0.50,<0.51'"


def version(monkeypatch, number):
    def found(name):
        if name == "bitsandbytes" and number is None:
            raise T.importlib.metadata.PackageNotFoundError
        return number

    monkeypatch.setattr(T.importlib.metadata, "version", found)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (None, "bitsandbytes, which does it, is not installed"),
        ("0.49.2", "bitsandbytes 0.49.2 is installed, and this program knows another one"),
        ("0.51.0", "bitsandbytes 0.51.0 is installed, and this program knows another one"),
        ("0.50.7", None),
    ],
)
def test_the_package_that_is_needed_is_named(number, said, monkeypatch):
    version(monkeypatch, number)
    expected = [f"LOAD_IN_4BIT (--load_in_4bit) is True: {said}; {INSTALL}, or set it to false"] if said else []
    assert T.device_problems(QUANTISED, CPU) == expected
    assert T.device_problems(T.ScriptArguments(), CPU) == []


def test_a_package_that_cannot_be_loaded_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    (problem,) = T.device_problems(QUANTISED, CPU)
    assert "bitsandbytes cannot be loaded (ModuleNotFoundError: " in problem and INSTALL in problem


@pytest.mark.parametrize("for_cuda", [True, False])
def test_a_gpu_needs_its_library(for_cuda, monkeypatch):
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", SimpleNamespace(compiled_with_cuda=for_cuda))
    problems = T.device_problems(QUANTISED, GPUS)
    assert len(problems) == (not for_cuda) and all(
        "has no library for this PyTorch's CUDA" in line for line in problems
    )
    assert T.device_problems(QUANTISED, CPU) == []


@pytest.mark.parametrize("stage", range(4))
def test_zero_3_divides_no_4_bits(stage):
    problems = T.zero_problems(QUANTISED, {"stage": stage}, None)
    assert len(problems) == (stage == 3) and all("ZeRO stage 3 divides the model" in line for line in problems)
    assert T.zero_problems(T.ScriptArguments(), {"stage": stage}, None) == []


def test_the_plan_says_it():
    assert plan(load_in_4bit=True)["devices"] == f"{CPU}, float32, base model in 4 bits (NF4)"
    assert plan()["devices"] == f"{CPU}, float32"


def test_a_model_that_does_not_fit_on_the_gpu_is_an_error_of_memory(tiny_run, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(T.AutoModelForCausalLM, "from_pretrained", lambda *arguments, **options: full())
    with pytest.raises(T.InputError, match="^- the model does not fit into memory. Change, .*MAX_LENGTH"):
        T.load_in_memory(QUANTISED, tiny_run["POLICY_MODEL_PATH"], False, HERE)
