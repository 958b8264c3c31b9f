"""Saving: what is read back must be what was trained; test_run looks at the files of a whole run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

import train_with_preference_prompt as T


@pytest.fixture
def saved(tokenizer, tmp_path):
    policy = T.add_adapter(make_model("llama", len(tokenizer)), T.ScriptArguments(lora_r=2))
    T.save_adapter(policy, tmp_path)
    return policy, tmp_path


def test_a_saved_adapter_passes(saved):
    policy, folder = saved
    T.verify_adapter(policy, folder)


@pytest.mark.parametrize("change", ["another value", "a missing tensor", "an extra tensor"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_file_that_differs_is_named(saved, file, change):
    policy, folder = saved
    path = folder / file
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    name = next(iter(state))
    if change == "another value":
        state[name] = state[name] + 1e-7
    elif change == "a missing tensor":
        del state[name]
    else:
        state["extra"] = torch.zeros(1)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(T.SelfCheckError, match=f"{file} differs from the trained model in 1 tensors"):
        T.verify_adapter(policy, folder)


def test_another_adapter_config_is_named(saved):
    policy, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(T.SelfCheckError, match="adapter_config.json differs"):
        T.verify_adapter(policy, folder)


def test_names_that_json_turns_into_a_list_are_the_same(saved):
    """PEFT keeps them as a set, such as those of the fused experts that it adapts by itself."""
    policy, folder = saved
    policy.peft_config["default"].target_parameters = {"b", "a"}
    T.save_adapter(policy, folder)
    T.verify_adapter(policy, folder)
    policy.peft_config["default"].target_parameters = {"b"}
    with pytest.raises(T.SelfCheckError, match="adapter_config.json differs"):
        T.verify_adapter(policy, folder)


def test_a_published_generation_config_that_is_not_valid_is_kept(tokenizer, tmp_path):
    """transformers saves it unchanged only, and the Trainer has put the tokenizer's special tokens into it."""
    model = make_model("llama", len(tokenizer))
    model.generation_config.temperature, model.generation_config.pad_token_id = 0.9, 7
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.generation_config.save_pretrained(tmp_path)
    T.save_merged(model, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.9


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_embeddings_that_a_model_shares_are_not_adapted(module, tokenizer):
    args = T.ScriptArguments(lora_target_modules=f"q_proj,{module}")
    with pytest.raises(T.InputError, match=f"is 'q_proj,{module}': it adapts embeddings that this model shares"):
        T.add_adapter(T.lay_out(make_model("llama", len(tokenizer)).config), args)
    assert T.add_adapter(T.lay_out(make_model("qwen2", len(tokenizer)).config), args)


def test_tied_weights_are_written_once(tokenizer, tmp_path):
    model = make_model("llama", len(tokenizer))
    T.save_merged(model, tmp_path)
    state = torch.load(tmp_path / T.MERGED_WEIGHTS, weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    bytes_in_memory = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / T.MERGED_WEIGHTS).stat().st_size < bytes_in_memory * 1.2


def test_merged_links_leave_the_adapter_out(tmp_path):
    for name in ("config.json", "pytorch_model.bin", "tokenizer.json", "adapter_config.json", "trainer_state.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-3").mkdir()
    T.link_merged(tmp_path)
    linked = {path.name: path.read_text() for path in (tmp_path / "merged").iterdir()}
    assert linked == {name: name for name in ("config.json", "pytorch_model.bin", "tokenizer.json")}


def test_without_links_the_merged_model_is_copied(tmp_path, monkeypatch):
    """As on FAT, or on some network file systems."""
    (tmp_path / "config.json").write_text("{}")

    def symlink_to(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    T.link_merged(tmp_path)
    assert (tmp_path / "merged/config.json").read_text() == "{}"


def test_merged_links_leave_card_and_soft_prompt_out(tmp_path):
    for name in ("config.json", T.MODEL_CARD, T.SOFT_PROMPT, T.RUN_SETTINGS, T.METRICS_FILE, T.CURVES_FILE):
        (tmp_path / name).write_text(name)
    T.link_merged(tmp_path)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["config.json"]


# --- soft prompts


def soft_prompt(dtype=torch.float32):
    return nn.Embedding.from_pretrained(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_prompt_is_saved_in_fp32_as_embedding_mode_reads_it(tmp_path, dtype):
    soft = soft_prompt(dtype)
    T.save_soft_prompt(soft, tmp_path)
    saved = torch.load(tmp_path / "prompt_embeddings.pt", weights_only=True)
    assert saved.keys() == {"prompt_embeddings"} and saved["prompt_embeddings"].dtype == torch.float32
    assert torch.equal(saved["prompt_embeddings"], soft.weight.float())
    assert torch.equal(T.read_soft_prompt(str(tmp_path / "prompt_embeddings.pt"), 32), soft.weight.float())


def test_a_soft_prompt_that_was_written_wrongly_is_noticed(tmp_path, monkeypatch):
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda tensors, path: write({n: t + 1e-6 for n, t in tensors.items()}, path))
    with pytest.raises(T.SelfCheckError, match="prompt_embeddings.pt differs from the trained model"):
        T.save_soft_prompt(soft_prompt(), tmp_path)


def test_the_prompt_tuning_adapter_opens_with_peft(tokenizer, tmp_path):
    soft = soft_prompt()
    T.save_adapter(T.add_soft_prompt(make_model("llama", len(tokenizer)), soft), tmp_path)
    opened = PeftModel.from_pretrained(make_model("llama", len(tokenizer)), tmp_path)
    assert torch.equal(opened.prompt_encoder["default"].embedding.weight, soft.weight)
    assert opened.peft_config["default"].peft_type == "PROMPT_TUNING"
    assert torch.equal(T.read_soft_prompt(str(tmp_path), 32), soft.weight)  # the folder serves embedding mode too
