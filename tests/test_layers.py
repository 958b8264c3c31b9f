"""Layers: what is computed in fewer steps, and kept less, is what PEFT and transformers compute."""

import contextlib
import copy
import importlib

import pytest
import torch
import transformers
from conftest import make_model
from peft import LoraConfig, get_peft_model
from test_forward import CLOSE, lora_model, pack
from torch import nn

import train_with_preference_prompt as T


def compare_with_peft(policy, tokenized, adapter_on, speed_up) -> torch.Tensor:
    """Log-probabilities after `speed_up()`; these and the gradients must be those of PEFT's own layers before it."""
    trained = [p for p in policy.parameters() if p.requires_grad]

    def score():
        with contextlib.nullcontext() if adapter_on else policy.disable_adapter():
            logps = T.policy_logps(policy, pack(tokenized))
        return logps, torch.autograd.grad(logps[:, 0].sum() - logps[:, 1].sum(), trained) if adapter_on else []

    logps, gradients = score()
    speed_up()
    fast_logps, fast_gradients = score()
    torch.testing.assert_close(fast_logps, logps, **CLOSE)
    for fast, slow in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * slow.abs().max().item())
    if adapter_on:
        assert max(gradient.abs().max() for gradient in gradients) > 0.1
    return fast_logps


def lora_policy(model, **settings):
    """No longer its reference, and without dropout."""
    policy = T.add_adapter(model, T.ScriptArguments(lora_r=4, lora_dropout=0.0, **settings))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return policy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("adapter_on", "checkpointed"), [(True, True), (True, False), (False, False)])
def test_lora_layers_compute_what_pefts_do(model, tokenized, training, adapter_on, checkpointed):
    """Log-probabilities and gradients, in whole layers of a usual kind and one by one."""
    T.enable_packed_forward(model)
    policy = lora_policy(model).train(training)

    def speed_up():
        T.speed_up(policy)
        if checkpointed:
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    compare_with_peft(policy, tokenized, adapter_on, speed_up)
    layers = model.model.layers
    assert all(isinstance(vars(layer)["forward"], T.UsualLayer) for layer in layers)

    def leave_groups():
        for layer in layers:
            del layer.forward

    compare_with_peft(policy, tokenized, adapter_on, leave_groups)  # whose layers the model calls one by one


FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}}


def model_of(family: str, vocab_size: int, **changes):
    """Two layers of one of transformers' families, biases and norms no zeros and ones."""
    config = getattr(transformers, f"{family}Config")(
        **make_model("llama", vocab_size).config.to_dict() | {"model_type": family.lower()} | FAMILIES[family] | changes
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean="norm" in name, std=0.1)
    return T.enable_packed_forward(model)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "up_proj,o_proj"])
@pytest.mark.parametrize("family", FAMILIES)
def test_usual_layers_compute_what_transformers_do(family, targets, tokenizer, tokenized, monkeypatch):
    """Of every family in `USUAL_LAYERS`, whichever of its linear layers are adapted."""
    attended, calls = T.UsualLayer.attended, []
    monkeypatch.setattr(T.UsualLayer, "attended", lambda *x: calls.append(x[0].layer) or attended(*x))
    model = model_of(family, len(tokenizer))
    policy = lora_policy(model, lora_target_modules=targets)
    compare_with_peft(policy, tokenized, True, lambda: T.speed_up(policy))
    assert calls == [*model.model.layers]


def test_every_usual_layer_is_tested():
    assert {f"{family}DecoderLayer" for family in FAMILIES} == set(T.USUAL_LAYERS)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"trained": True}, {"other": True}])
def test_other_layers_stay_as_they_are(changes, tokenizer, tokenized):
    """Another activation, a linear layer that is trained as a whole, another class."""
    model = model_of("Llama", len(tokenizer), **{"hidden_act": changes.get("hidden_act", "silu")})
    policy = lora_policy(model, lora_target_modules="q_proj,v_proj")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.requires_grad_(changes.get("trained", False))
        if changes.get("other"):
            layer.__class__ = type("OtherDecoderLayer", (type(layer),), {})
    compare_with_peft(policy, tokenized, True, lambda: T.speed_up(policy))
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_text_goes_through_a_usual_layers_own_forward(tokenizer, tokenized):
    """Sample answers are generated with a cache of keys and values."""
    model = model_of("Llama", len(tokenizer))
    policy, ids = lora_policy(model), torch.tensor([tokenized[0].prompt_ids])
    with T.text_attention(model):
        expected = policy(input_ids=ids).logits
        T.speed_up(policy)
        torch.testing.assert_close(policy(input_ids=ids).logits, expected, **CLOSE)


def test_checkpointed_layers_drop_the_same_entries(model, tokenized):
    """What is computed again in the backward pass draws its dropout again, bit for bit."""
    state = copy.deepcopy(model.state_dict())
    found = []
    for checkpointed in (False, True):
        fresh = make_model(model.config.model_type, model.config.vocab_size)
        fresh.load_state_dict(state)
        T.enable_packed_forward(fresh)
        torch.manual_seed(0)
        policy = T.add_adapter(fresh, T.ScriptArguments(lora_dropout=0.3)).train()
        T.speed_up(policy)
        trained = [p for p in policy.parameters() if p.requires_grad]
        for parameter in trained:
            nn.init.normal_(parameter, std=0.05)
        if checkpointed:
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        found.append(torch.autograd.grad(T.policy_logps(policy, pack(tokenized))[:, 0].sum(), trained))
    assert all(map(torch.equal, *found)) and max(gradient.abs().max() for gradient in found[0]) > 0.1


def kept_by(policy, forward):
    """What a forward gives, and the bytes of the tensors that it keeps for its backward pass.

    Each storage counts once, and parameters do not.
    """
    parameters, storages = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}, {}

    def count(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = forward()
    return found, sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in parameters)


def test_checkpointed_layers_keep_their_input_alone(tokenizer, tokenized):
    """As transformers' own forward does, in whose place a usual layer's stands."""
    row, kept = pack(tokenized), []
    for checkpointed in (False, True):
        model = model_of("Llama", len(tokenizer))
        policy = lora_policy(model).train()
        T.speed_up(policy)
        if checkpointed:
            policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "trees": row.trees}
        hidden, size = kept_by(policy, lambda model=model, inputs=inputs: model.model(**inputs, use_cache=False))
        kept.append(size)
        assert kept[-1] >= hidden.last_hidden_state.nbytes
    assert kept[1] < kept[0] / 5


def mask_as_on_a_gpu(x, stock):
    return T.Dropout(
        torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.bool).bernoulli_(1 - stock.p), stock.p
    )


@pytest.mark.parametrize("draw", [T.Dropout.drawn, mask_as_on_a_gpu], ids=["bits", "mask"])
def test_lora_dropout(draw, monkeypatch):
    """The share asked for, the expectation kept, the same entries for all that read them, also in the backward pass."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules=["wide", "narrow"])
    stock = nn.ModuleDict({"wide": nn.Linear(64, 48), "narrow": nn.Linear(64, 8, bias=False)})
    layers = list(get_peft_model(stock, config).train().base_model.model.values())
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    drawn = []
    monkeypatch.setattr(T.Dropout, "drawn", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    group, x = T.LoRAGroup(layers), torch.randn(1, 4000, 64, requires_grad=True)
    outputs = [group.one(layer, x) for layer in layers]
    (dropout,) = drawn
    noise = dropout.noise
    kept = (noise if noise.dtype == torch.bool else noise >= round(0.3 * 2**16) - 2**15).float()
    assert abs(kept.mean() - 0.7) < 0.005 and abs(kept.mean(0) - 0.7).max() < 0.04
    trained = [layer.get_parameter(f"lora_{part}.default.weight") for layer in layers for part in "AB"]
    expected = [
        layer.base_layer(x[0]) + 2 * (x[0] * kept / 0.7) @ a.T @ b.T
        for layer, a, b in zip(layers, trained[::2], trained[1::2], strict=True)
    ]
    weights = [torch.randn_like(output) for output in expected]
    found, wanted = (
        torch.autograd.grad(sum((one * w).sum() for one, w in zip(ones, weights, strict=True)), (x, *trained))
        for ones in ([output[0] for output in outputs], expected)
    )
    for one, other in zip((*(output[0] for output in outputs), *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    outputs[0].clamp_(-1, 1)  # as some models do
    again = [group.one(layer, x) for layer in layers]  # drawn anew
    assert len(drawn) == 2 and not any(map(torch.equal, outputs, again))
    assert not group.outputs and group.input is None


@pytest.mark.parametrize("name", T.RMS_NORMS)
def test_fused_norms_are_the_models_own(name):
    family = name.removesuffix("RMSNorm").lower()
    norm = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(16, eps=1e-4)
    nn.init.normal_(norm.weight)
    x = torch.randn(1, 7, 16, requires_grad=True)
    expected = norm(x)
    (gradient,) = torch.autograd.grad(expected.pow(2).sum(), x)
    T.fuse_norms(nn.ModuleList([norm]))
    assert "forward" in vars(norm)
    found = norm(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(found.pow(2).sum(), x)[0], gradient, **CLOSE)


def test_modes_are_switched_as_pytorch_does(tokenizer):
    policy = lora_model(tokenizer, dropout=0.5)
    T.speed_up(policy)
    assert "train" in vars(policy)
    for switch, mode in ((policy.eval, False), (policy.train, True), (lambda: policy.train(False), False)):
        assert switch() is policy and {module.training for module in policy.modules()} == {mode}


def test_a_model_that_does_more_than_switch_is_left_to_it(tokenizer):
    policy = lora_model(tokenizer, dropout=0.5)

    class Own(nn.Identity):
        def train(self, mode=True):
            self.called = mode
            return super().train(mode)

    policy.own = Own()
    T.speed_up(policy)
    policy.eval()
    assert policy.own.called is False and not policy.own.training
