"""Forward: packed trees give the log-probabilities, loss and gradients of a plain padded computation."""

import pytest
import torch
from conftest import make_model
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
    return T.preference_guided_loss(policy, reference, teacher, beta=0.1, alpha=0.5, loss_type="sigmoid")["loss"].mean()


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
    monkeypatch.setattr(T, "HEAD_CHUNK", 7)
    torch.testing.assert_close(T.policy_logps(model, pack(tokenized)), whole, **CLOSE)


def test_no_more_logits_than_a_chunk(model, tokenized, monkeypatch):
    monkeypatch.setattr(T, "HEAD_CHUNK", 7)
    T.enable_packed_forward(model).train()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    T.policy_logps(model, pack(tokenized)).sum().backward()
    assert len(shapes) > 2 and all(shape[0] <= 7 for shape in shapes)


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


def test_text_still_goes_through_the_models_own_forward(model, tokenized):
    ids = torch.tensor([tokenized[0].prompt_ids])
    expected = model(input_ids=ids).logits
    T.enable_packed_forward(model)
    with T.text_attention(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
        assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
