"""Forward: packed trees give the log-probabilities, loss and gradients of a plain padded computation."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import train_with_preference_prompt as T

CLOSE = dict(rtol=1e-5, atol=1e-5)


def padded_logps(causal_lm, tokenized, prompt="prompt_ids"):
    """(P, 2) the ordinary way: one right-padded row per answer, logits of every position, no sharing of any kind."""
    rows = [(getattr(p, prompt), ids) for p in tokenized for ids in (p.chosen_ids, p.rejected_ids)]
    input_ids = pad_sequence([torch.tensor(a + b) for a, b in rows], batch_first=True, padding_value=0)
    mask = pad_sequence([torch.ones(len(a) + len(b)) for a, b in rows], batch_first=True).long()
    logits = causal_lm(input_ids=input_ids, attention_mask=mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    scored = torch.zeros_like(logps, dtype=torch.bool)
    for i, (a, b) in enumerate(rows):
        scored[i, len(a) - 1 : len(a) + len(b) - 1] = True
    return logps.masked_fill(~scored, 0).sum(-1).view(-1, 2)


def pack(tokenized, prompt="prompt_ids"):
    return T.pack_row((getattr(p, prompt), p.chosen_ids, p.rejected_ids) for p in tokenized)


def guided_mean(policy, teacher):
    reference = torch.full_like(policy, -20.0)
    return T.preference_guided_loss(policy, reference, teacher, None, beta=0.1, alpha=0.5)["loss"].mean()


@pytest.mark.parametrize("prompt", ["prompt_ids", "pref_prompt_ids"])
def test_packed_logps_equal_padded(model, tokenized, prompt):
    expected = padded_logps(model, tokenized, prompt)
    T.enable_packed_forward(model)
    torch.testing.assert_close(T.policy_logps(model, pack(tokenized, prompt)), expected, **CLOSE)


def test_negative_control_one_causal_row_differs(model, tokenized):
    """The same row with its trees run together (ordinary causal attention) must not pass as equal."""
    expected = padded_logps(model, tokenized)
    T.enable_packed_forward(model)
    row = pack(tokenized)
    length = row.input_ids.shape[1]
    joined = T.dataclasses.replace(row, trees=(T.Tree(0, length, length, length),) * len(row.trees))
    with pytest.raises(RuntimeError):  # the joined tree is not one per pair, so the model's output has another length
        T.policy_logps(model, joined)
    one_tree = T.dataclasses.replace(row, trees=(T.Tree(0, length, length, length),))
    hidden = model.get_decoder()(
        input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, trees=one_tree.trees
    ).last_hidden_state[0, row.score_positions]
    per_token = T.chunked_logps(model.get_output_embeddings(), hidden, row.target_ids)
    wrong = torch.zeros(2 * len(row.trees)).index_add(0, row.answer_index, per_token).view(-1, 2)
    assert (wrong - expected).abs().max() > 0.1


def test_negative_control_branches_that_see_each_other_differ(model, tokenized):
    """Within one pair: a rejected branch that also sees the chosen one must change the rejected answer only."""
    pair = tokenized[0]
    expected = padded_logps(model, [pair])[0]
    T.enable_packed_forward(model)
    row = pack([pair])
    (tree,) = row.trees
    leaky = T.dataclasses.replace(row, trees=(tree._replace(rejected_start=tree.end),))
    wrong = T.policy_logps(model, leaky)[0].detach()
    torch.testing.assert_close(wrong[0], expected[0], **CLOSE)
    assert (wrong[1] - expected[1]).abs() > 0.1


def test_loss_and_gradients_equal_padded(model, tokenized):
    padded = guided_mean(padded_logps(model, tokenized), padded_logps(model, tokenized, "pref_prompt_ids").detach())
    padded.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    T.enable_packed_forward(model)
    teacher = T.teacher_logps(model, pack(tokenized, "pref_prompt_ids"))
    packed = guided_mean(T.policy_logps(model, pack(tokenized)), teacher)
    packed.backward()
    torch.testing.assert_close(packed, padded, **CLOSE)
    assert max(g.abs().max() for g in expected.values()) > 0.1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradient_checkpointing_changes_no_gradient(model, tokenized):
    T.enable_packed_forward(model).train()
    T.policy_logps(model, pack(tokenized)).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    T.policy_logps(model, pack(tokenized)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)


def test_one_token_answers_have_empty_branches(model, tokenized):
    short = [T.dataclasses.replace(p, chosen_ids=p.chosen_ids[:1], rejected_ids=[5]) for p in tokenized]
    expected = padded_logps(model, short)
    T.enable_packed_forward(model)
    torch.testing.assert_close(T.policy_logps(model, pack(short)), expected, **CLOSE)


def test_chunks_change_nothing(model, tokenized, monkeypatch):
    T.enable_packed_forward(model)
    whole = T.policy_logps(model, pack(tokenized))
    monkeypatch.setitem(T.HEAD_CHUNK, "cpu", 7)
    torch.testing.assert_close(T.policy_logps(model, pack(tokenized)), whole, **CLOSE)


def test_no_more_logits_than_a_chunk(model, tokenized, monkeypatch):
    monkeypatch.setitem(T.HEAD_CHUNK, "cpu", 7)
    T.enable_packed_forward(model).train()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    T.policy_logps(model, pack(tokenized)).sum().backward()
    assert len(shapes) > 2 and all(shape[0] <= 7 for shape in shapes)


def test_a_frozen_heads_logits_exist_once(model, tokenized, monkeypatch):
    """Its gradient is taken along: chunk by chunk, in the forward pass only, and it is autograd's."""
    T.enable_packed_forward(model)
    whole = T.policy_logps(model, pack(tokenized))
    weights = torch.linspace(-1, 2, whole.numel()).view_as(whole)
    others = [p for p in model.get_decoder().parameters() if p is not model.get_input_embeddings().weight]
    expected = torch.autograd.grad((whole * weights).sum(), others)
    monkeypatch.setitem(T.HEAD_CHUNK, "cpu", 7)
    model.get_output_embeddings().weight.requires_grad_(False)
    shapes, linear = [], T.F.linear

    def watched(hidden, weight, bias=None):
        if len(weight) == model.config.vocab_size:
            shapes.append(hidden.shape[0])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(T.F, "linear", watched)
    logps = T.policy_logps(model, pack(tokenized))
    before = len(shapes)
    found = torch.autograd.grad((logps * weights).sum(), others)
    torch.testing.assert_close(logps, whole, **CLOSE)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert max(shapes) == 7 and len(shapes) == before == math.ceil(pack(tokenized).target_ids.numel() / 7)


def test_the_order_of_pairs_is_irrelevant(model, tokenized):
    T.enable_packed_forward(model)
    forwards = T.policy_logps(model, pack(tokenized))
    backwards = T.policy_logps(model, pack(tokenized[::-1])).flip(0)
    torch.testing.assert_close(forwards, backwards, **CLOSE)


def test_unpacked_logps_is_the_models_own_forward(model, tokenized):
    expected = padded_logps(model, tokenized[:1])[0, 0]
    T.enable_packed_forward(model)
    pair = tokenized[0]
    torch.testing.assert_close(T.unpacked_logps(model, pair.prompt_ids, pair.chosen_ids), expected, **CLOSE)


def lora_model(tokenizer, dropout):
    args = T.ScriptArguments(lora_r=4, lora_dropout=dropout)
    policy = T.add_adapter(T.enable_packed_forward(make_model("llama", len(tokenizer))), args)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy.train()


def test_teacher_and_reference_have_no_dropout_and_no_gradient(tokenizer, tokenized):
    policy, row = lora_model(tokenizer, dropout=0.5), pack(tokenized)
    assert not torch.equal(T.policy_logps(policy, row), T.policy_logps(policy, row))  # dropout is there
    for scored in (T.teacher_logps, T.reference_logps):
        first, again = scored(policy, row), scored(policy, row)
        assert torch.equal(first, again) and not first.requires_grad
        assert policy.training and all(module.training for module in policy.modules())


def test_reference_is_the_base_model(tokenizer, tokenized):
    policy, row = lora_model(tokenizer, dropout=0.5), pack(tokenized)
    base = T.policy_logps(T.enable_packed_forward(make_model("llama", len(tokenizer))), row)
    torch.testing.assert_close(T.reference_logps(policy, row), base, **CLOSE)
    assert (T.teacher_logps(policy, row) - base).abs().max() > 0.1


def test_unsupported_attention_is_refused():
    query = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        T.tree_attention(None, query, query, query, None, trees=[T.Tree(0, 1, 1, 1)], softcap=30.0)
    with pytest.raises(NotImplementedError, match="mask"):
        T.tree_attention(None, query, query, query, torch.ones(1, 1, 1, 1), trees=[T.Tree(0, 1, 1, 1)])


def varlen_by_hand(query, key, value, query_bounds, key_bounds, max_q, max_k, window_size, scale, enable_gqa):
    """What FlashAttention computes, sequence by sequence: the causal mask is aligned at the sequences' ends."""
    assert window_size == (-1, 0) and enable_gqa
    assert {bounds.dtype for bounds in (query_bounds, key_bounds)} == {torch.int32}
    assert (query_bounds[-1], key_bounds[-1]) == (len(query), len(key)) and not query_bounds[0] and not key_bounds[0]
    assert (query_bounds.diff().max(), key_bounds.diff().max()) == (max_q, max_k)
    parts = []
    for q0, q1, k0, k1 in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:], strict=False):
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        states = (part.transpose(0, 1)[None] for part in (query[q0:q1], key[k0:k1], value[k0:k1]))
        part = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def test_flash_attention_sees_what_the_trees_see(monkeypatch):
    """One call for all trees: outputs and gradients; some branches are empty. (On a GPU: test_gpu.py.)"""
    monkeypatch.setattr(T, "varlen_attn", varlen_by_hand)
    torch.manual_seed(0)
    ids = [([1] * trunk, [2] * chosen, [3] * rejected) for trunk, chosen, rejected in ((5, 4, 3), (1, 1, 6), (7, 2, 1))]
    trees = T.pack_row(ids).trees
    shapes = [(1, heads, trees[-1].end, 8) for heads in (4, 2, 2)]
    states = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected, _ = T.tree_attention(None, *states, None, scaling=0.3, trees=trees)
    found = T.flash_attention(*states, 0.3, trees)
    weights = torch.randn_like(expected)
    for one, other in zip(
        (found, *torch.autograd.grad((found * weights).sum(), states)),
        (expected, *torch.autograd.grad((expected * weights).sum(), states)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **CLOSE)


def test_flash_attention_is_called_as_pytorch_declares_it():
    """On PyTorch's device without numbers, which stands for a GPU here: arguments, shapes and the way back."""
    with torch.device("meta"):
        trees = T.pack_row([([1] * 5, [2] * 4, [3] * 3), ([1], [2], [3] * 6)]).trees
        states = [torch.randn(1, heads, trees[-1].end, 8, requires_grad=True) for heads in (4, 2, 2)]
    found = T.flash_attention(*states, 0.3, trees)
    assert found.shape == (1, trees[-1].end, 4, 8)
    gradients = torch.autograd.grad(found.sum(), states)
    assert [gradient.shape for gradient in gradients] == [state.shape for state in states]


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"shape": (1, 4, 9, 256)}, False),
        ({"shape": (1, 4, 9, 36)}, False),
        ({"capability": (7, 5)}, False),
        ({"value_shape": (1, 4, 9, 128)}, False),
    ],
)
def test_flash_attention_is_taken_where_it_computes(changes, has, monkeypatch):
    tensor = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 9, 64), "device": "cuda:0"} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: changes.get("capability", (8, 0)))
    value = SimpleNamespace(shape=changes.get("value_shape", tensor["shape"]))
    assert T.has_flash_attention(SimpleNamespace(**tensor), value) is has


def test_text_still_goes_through_the_models_own_forward(model, tokenized):
    ids = torch.tensor([tokenized[0].prompt_ids])
    expected = model(input_ids=ids).logits
    T.enable_packed_forward(model)
    with T.text_attention(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
        assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


# --- soft prompts: in `pref_prompt_ids` −1 − k stands for the soft prompt's k-th embedding

K = 4


def soft_prompt_of(causal_lm):
    """K random embeddings (K, H), as wide as those of the tokens, fp32 and trainable."""
    embed = causal_lm.get_input_embeddings().weight
    start = torch.randn(K, embed.shape[1], generator=torch.Generator().manual_seed(3)) * embed.std().item()
    return nn.Embedding.from_pretrained(start, freeze=False)


def with_soft_prefix(tokenized, size=K):
    return [T.dataclasses.replace(p, pref_prompt_ids=[-1 - k for k in range(size)] + p.prompt_ids) for p in tokenized]


def padded_soft_logps(causal_lm, tokenized, soft, after_prompt=False, counted=True):
    """(P, 2) the ordinary way: the embeddings (K, H) in front of each right-padded row's token embeddings.

    For the controls: the soft prompt after the prompt, or not counted by the positions.
    """
    embed, rows = causal_lm.get_input_embeddings(), []
    answers = [(p, ids) for p in tokenized for ids in (p.chosen_ids, p.rejected_ids)]
    for pair, ids in answers:
        prompt, answer = embed(torch.tensor(pair.prompt_ids)), embed(torch.tensor(ids))
        rows.append(torch.cat((prompt, soft, answer) if after_prompt else (soft, prompt, answer)))
    inputs, mask = (pad_sequence(x, batch_first=True) for x in (rows, [torch.ones(len(row)) for row in rows]))
    positions = torch.arange(inputs.shape[1]) - (0 if counted else len(soft))
    positions = positions.clamp(min=0).expand(len(rows), -1)
    logits = causal_lm(inputs_embeds=inputs, attention_mask=mask.long(), position_ids=positions).logits
    logps = [
        of_row[len(row) - len(ids) - 1 : len(row) - 1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()
        for of_row, row, (_, ids) in zip(logits, rows, answers, strict=True)
    ]
    return torch.stack(logps).view(-1, 2)


def ptuning_mean(prefixed):
    reference = torch.full_like(prefixed, -20.0) + torch.tensor([1.0, 0.0])
    return T.ptuning_loss(prefixed, reference, None, beta=0.1)["loss"].mean()


def test_embeddings_of_a_text_are_that_text_as_prefix(model, tokenized):
    """Bit for bit, packed and unpacked."""
    text_ids = tokenized[3].chosen_ids
    soft = nn.Embedding.from_pretrained(model.get_input_embeddings().weight[text_ids].detach())
    guided = [T.dataclasses.replace(p, pref_prompt_ids=text_ids + p.prompt_ids) for p in tokenized]
    expected = T.teacher_logps(T.enable_packed_forward(copy.deepcopy(model)), pack(guided, "pref_prompt_ids"))
    T.enable_packed_forward(model, soft)
    soft_pairs = with_soft_prefix(tokenized, len(text_ids))
    assert torch.equal(T.teacher_logps(model, pack(soft_pairs, "pref_prompt_ids")), expected)
    for text, pair in zip(guided[:2], soft_pairs[:2], strict=True):
        by_ids, by_embeddings = (T.unpacked_logps(model, p.pref_prompt_ids, p.chosen_ids, soft) for p in (text, pair))
        assert torch.equal(by_ids, by_embeddings)
        assert by_ids != T.unpacked_logps(model, pair.prompt_ids, pair.chosen_ids)


def test_packed_soft_prompt_equals_padded(model, tokenized):
    soft = soft_prompt_of(model)
    expected = padded_soft_logps(model, tokenized, soft.weight)
    padded = ptuning_mean(expected)
    padded.backward()
    expected_gradient, soft.weight.grad = soft.weight.grad, None
    T.enable_packed_forward(model, soft)
    packed = T.policy_logps(model, pack(with_soft_prefix(tokenized), "pref_prompt_ids"))
    torch.testing.assert_close(packed, expected, **CLOSE)
    loss = ptuning_mean(packed)
    loss.backward()
    torch.testing.assert_close(loss, padded, **CLOSE)
    assert (expected_gradient.norm(dim=1) > 1e-2).all()
    torch.testing.assert_close(soft.weight.grad, expected_gradient, rtol=1e-4, atol=1e-5)


WRONG_SOFT_PROMPTS = {
    "reversed": lambda causal_lm, pairs, soft: padded_soft_logps(causal_lm, pairs, soft.flip(0)),
    "after the prompt": lambda causal_lm, pairs, soft: padded_soft_logps(causal_lm, pairs, soft, after_prompt=True),
    "not counted": lambda causal_lm, pairs, soft: padded_soft_logps(causal_lm, pairs, soft, counted=False),
    "left out": lambda causal_lm, pairs, soft: padded_logps(causal_lm, pairs),
}


@pytest.mark.parametrize("wrong", WRONG_SOFT_PROMPTS)
def test_negative_control_a_misplaced_soft_prompt_differs(model, tokenized, wrong):
    soft = soft_prompt_of(model)
    other = WRONG_SOFT_PROMPTS[wrong](model, tokenized, soft.weight)
    T.enable_packed_forward(model, soft)
    packed = T.policy_logps(model, pack(with_soft_prefix(tokenized), "pref_prompt_ids"))
    assert ((packed - other).abs().amax(dim=1) > 0.1).all()


def test_the_plain_prompt_does_not_see_the_soft_prompt(model, tokenized):
    expected = padded_logps(model, tokenized)
    T.enable_packed_forward(model, soft_prompt_of(model))
    torch.testing.assert_close(T.teacher_logps(model, pack(with_soft_prefix(tokenized))), expected, **CLOSE)


def test_ptuning_trains_the_soft_prompt_alone(model, tokenized):
    soft = soft_prompt_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = T.add_soft_prompt(T.enable_packed_forward(model, soft), soft).train()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert list(trained) == ["prompt_encoder.default.embedding.weight"] and trained.popitem()[1] is soft.weight
    ptuning_mean(T.policy_logps(policy, pack(with_soft_prefix(tokenized), "pref_prompt_ids"))).backward()
    assert (soft.weight.grad.norm(dim=1) > 1e-2).all()
    assert [name for name, p in policy.named_parameters() if p.grad is not None and p is not soft.weight] == []
    torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_peft_neither_adds_the_soft_prompt_again_nor_keeps_it_from_the_reference(model, tokenized):
    soft, rows = soft_prompt_of(model), with_soft_prefix(tokenized)
    prefixed, plain = padded_soft_logps(model, tokenized, soft.weight).detach(), padded_logps(model, tokenized)
    policy = T.add_soft_prompt(T.enable_packed_forward(model, soft), soft)
    torch.testing.assert_close(T.teacher_logps(policy, pack(rows, "pref_prompt_ids")), prefixed, **CLOSE)
    torch.testing.assert_close(T.reference_logps(policy, pack(rows)), plain.detach(), **CLOSE)


def test_the_guided_loss_gives_the_soft_prompt_no_gradient(tokenizer, tokenized):
    causal_lm = make_model("llama", len(tokenizer))
    soft = soft_prompt_of(causal_lm)  # one that would take a gradient
    T.enable_packed_forward(causal_lm, soft)
    policy = T.add_adapter(causal_lm, T.ScriptArguments(lora_r=4, lora_dropout=0.0)).train()
    teacher = T.teacher_logps(policy, pack(with_soft_prefix(tokenized), "pref_prompt_ids"))
    plain = T.policy_logps(policy, pack(tokenized))
    assert (T.margins_of(teacher) > T.margins_of(plain)).any()  # the consistency loss is active
    guided_mean(plain, teacher).backward()
    assert not soft.weight.grad.any() and all(p is not soft.weight for p in policy.parameters())
    assert max(p.grad.abs().max() for name, p in policy.named_parameters() if "lora_B" in name) > 1e-3


def test_gradient_checkpointing_gives_the_same_soft_prompt_gradient(model, tokenized):
    soft, row, calls = soft_prompt_of(model), pack(with_soft_prefix(tokenized), "pref_prompt_ids"), []
    policy = T.add_soft_prompt(T.enable_packed_forward(model, soft), soft).train()
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *hooked: calls.append(1))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        soft.weight.grad = None
        ptuning_mean(T.policy_logps(policy, row)).backward()
        gradients.append(soft.weight.grad)
    assert len(calls) == 1 + 2  # once, then once more for the backward pass
    torch.testing.assert_close(*gradients, **CLOSE)


def test_an_fp32_soft_prompt_in_a_bf16_model(model, tokenized):
    """bf16 keeps 8 bits, so every number is off by up to 2⁻⁸ of itself, and a sum of log-probabilities by about that.

    The control: the soft prompt in reversed order is further away, in every pair, and so is its gradient.
    """
    row, relative = pack(with_soft_prefix(tokenized), "pref_prompt_ids"), 2 * 2**-8

    def scored(dtype, order):
        soft = nn.Embedding.from_pretrained(soft_prompt_of(model).weight.detach()[order], freeze=False)
        logps = T.policy_logps(T.enable_packed_forward(copy.deepcopy(model).to(dtype), soft), row)
        ptuning_mean(logps).backward()
        assert logps.dtype == soft.weight.grad.dtype == torch.float32
        return logps.detach(), soft.weight.grad[order]

    in_order, reversed_order = [0, 1, 2, 3], [3, 2, 1, 0]
    exact, exact_gradient = scored(torch.float32, in_order)
    rounded, rounded_gradient = scored(torch.bfloat16, in_order)
    other, other_gradient = scored(torch.float32, reversed_order)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=relative, atol=0)
    assert ((other - exact).abs() > relative * exact.abs()).any(dim=1).all()
    tolerance = 0.2 * exact_gradient.norm()
    assert (rounded_gradient - exact_gradient).norm() < tolerance < (other_gradient - exact_gradient).norm()
