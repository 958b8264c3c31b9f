"""Model: what a model path may be, what fits the model, and the bundled model's conversion."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PREFERENCE, make_model
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)

import train_with_preference_prompt as T


@pytest.mark.parametrize(
    ("files", "phrase"),
    [
        (["config.json"], None),
        (["adapter_config.json"], "holds an adapter, not a model"),
        (["notes.txt"], "has no config.json"),
    ],
)
def test_folders(tmp_path, files, phrase):
    for name in files:
        (tmp_path / name).write_text("{}")
    problems = T.model_problems(str(tmp_path))
    assert (problems == []) if phrase is None else (len(problems) == 1 and phrase in problems[0])


@pytest.mark.parametrize(
    ("path", "usable"),
    [("Qwen/Qwen2.5-1.5B", True), ("gpt2", True), ("./models/x", False), ("/nowhere", False), ("a/b/c", False)],
)
def test_hub_ids_and_missing_folders(path, usable):
    problems = T.model_problems(path)
    assert (problems == []) == usable
    assert usable or "there is no such folder" in problems[0]


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    assert "there is no such folder" in T.model_problems(str(tmp_path / "weights.bin"))[0]


def test_a_model_that_is_no_causal_language_model(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(T.InputError, match="POLICY_MODEL_PATH"):
        T.load_config_and_tokenizer(str(tmp_path))


def test_a_model_without_a_tokenizer(tmp_path):
    make_model("llama", 300).config.save_pretrained(tmp_path)
    with pytest.raises(T.InputError, match="POLICY_MODEL_PATH.*cannot be loaded"):
        T.load_config_and_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_the_base_model_has_no_dropout_of_its_own(kind, tmp_path):
    """The policy in training is the reference at the start, as in TRL; the configuration stays as it was."""
    config = {
        "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "opt": OPTConfig(vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    }[kind]
    published = AutoModelForCausalLM.from_config(config)
    published.save_pretrained(tmp_path)
    row = T.pack_row([([5, 6, 7], [8, 9, 10, 11], [12, 13])])

    def in_training(model):
        """How far the model in training mode is from itself in evaluation mode."""
        T.enable_packed_forward(model)
        exact = T.teacher_logps(model, row)
        return (T.policy_logps(model.train(), row) - exact).abs().max()

    model = T.load_base_model(str(tmp_path), torch.float32)
    assert in_training(model) == 0 < in_training(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert T.noise_of(model.config) == T.noise_of(published.config) != {}


def test_layers_that_are_no_attention_are_refused_before_weights_load(tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    Lfm2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, layer_types=["conv", "full_attention"], **sizes
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        T.InputError, match="its layers of kind conv carry what they have read from one text of a packed"
    ):
        T.load_config_and_tokenizer(str(tmp_path))


def test_layers_that_are_no_attention_are_noticed_in_the_forward(tokenizer, tokenized):
    """Also in bf16, where what they carry from pair to pair is less than the rounding of a long answer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(vocab_size=len(tokenizer), num_hidden_layers=2, layer_types=["conv", "full_attention"], **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with pytest.raises(
        NotImplementedError, match="Lfm2ForCausalLM cannot compute packed trees: only 1 of its 2 layers"
    ):
        T.build_policy(T.ScriptArguments(precision="bf16"), model, None, T.PairDataset(tokenized))


def test_the_forward_of_another_kind_of_model_is_named(model, tokenized, monkeypatch):
    T.enable_packed_forward(model)
    monkeypatch.setattr(type(model), "get_decoder", lambda self: lambda **inputs: None)
    with pytest.raises(NotImplementedError, match="cannot compute packed trees: 'NoneType' object has no attribute"):
        T.teacher_logps(model, T.pack_row([([5], [6, 7], [8])]))


def test_what_limits_a_models_length():
    """A window or a chunk counts where a layer has one, and LongRoPE up to where its factors change, for a whole row."""
    window = "sliding attention window"
    config = Qwen2Config(use_sliding_window=True, sliding_window=50, num_hidden_layers=2, max_window_layers=1)
    assert T.context_limits(config)[window] == 50
    config.layer_types = ["full_attention"] * 2
    assert window not in T.context_limits(config)
    chunked = T.context_limits(Llama4TextConfig(attention_chunk_size=64, max_position_embeddings=512))
    assert chunked == {"context": 512, "chunk that attention sees": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(hidden_size=32, num_attention_heads=4, max_position_embeddings=512, pad_token_id=0)
    config.rope_parameters = rope | {"original_max_position_embeddings": 64}
    assert T.context_limits(config) == {"context": 512, "range of the short LongRoPE factors": 64}


def test_unknown_target_modules_are_named(tokenizer):
    with pytest.raises(T.InputError, match="LORA_TARGET_MODULES.*no_such_layer"):
        T.add_adapter(make_model("llama", len(tokenizer)), T.ScriptArguments(lora_target_modules="no_such_layer"))


def test_the_adapter_starts_at_zero_and_alone_is_trained(tokenizer):
    policy = T.add_adapter(make_model("llama", len(tokenizer)), T.ScriptArguments())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.abs().max() == 0 for name, p in trained.items() if "lora_B" in name)


MODES = {  # mode → what the error calls the prefix, with K soft embeddings
    "text": "PREFERENCE_TEXT",
    "embedding": "PROMPT_EMBEDDING_PATH with {} embeddings",
    "ptuning": "NUM_VIRTUAL_TOKENS with {} embeddings",
}


def text_tokens(tokenizer, preference: str, pair) -> int:
    """Tokens of the guided prompt and the longer answer with its end token, from the template itself."""
    system = [{"role": "system", "content": preference}] if preference else []
    prompt = [*system, {"role": "user", "content": pair.prompt}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return max(len(tokenizer(f"{text}{answer}<|im_end|>").input_ids) for answer in (pair.chosen, pair.rejected))


@pytest.mark.parametrize(
    ("limit", "name"), [("max_position_embeddings", "context"), ("sliding_window", "sliding attention window")]
)
@pytest.mark.parametrize("soft", [1, 50])
@pytest.mark.parametrize("mode", MODES)
def test_the_longest_pair_with_its_prefix_must_fit_the_model(tokenizer, pairs, mode, soft, limit, name):
    args = T.ScriptArguments(training_mode=mode, max_length=77)
    args.prompt_embedding_path = "soft.pt" if mode == "embedding" else ""
    prefix = T.Prefix(PREFERENCE * soft) if mode == "text" else T.Prefix(num_virtual_tokens=soft)
    tokenize = T.PairTokenizer(tokenizer, prefix, max_length=120, max_prompt_length=80)
    done = T.tokenize_pairs(pairs, T.DataReport(Path("memory")), tokenize)
    longest = prefix.num_virtual_tokens + max(text_tokens(tokenizer, prefix.text, pair) for pair in pairs)
    config = Qwen2Config(use_sliding_window=True)
    config.max_position_embeddings = config.sliding_window = 10_000
    setattr(config, limit, longest)
    assert T.context_problems(config, args, prefix, done) == []
    setattr(config, limit, longest - 1)
    assert T.context_problems(config, args, prefix, done) == [
        f"MAX_LENGTH (--max_length) is 77: with the prefix ({MODES[mode].format(soft)}) a sequence has {longest} "
        f"tokens, but the model's {name} is {longest - 1}; lower MAX_LENGTH or use a shorter prefix"
    ]


def test_what_guides_in_each_mode(tmp_path, tokenizer, model):
    args, config = T.ScriptArguments(preference_text="Be kind.", num_virtual_tokens=5), model.config
    assert T.choose_prefix(args, config, tokenizer) == (T.Prefix("Be kind."), None)
    prefix, ids = T.choose_prefix(dataclasses.replace(args, training_mode="ptuning"), config, tokenizer)
    assert prefix == T.Prefix(num_virtual_tokens=5) and len(ids) == 5
    torch.save(torch.ones(3, 32), tmp_path / "soft.pt")
    changes = {"training_mode": "embedding", "prompt_embedding_path": str(tmp_path / "soft.pt")}
    prefix, embeddings = T.choose_prefix(dataclasses.replace(args, **changes), config, tokenizer)
    assert prefix == T.Prefix(num_virtual_tokens=3) and torch.equal(embeddings, torch.ones(3, 32))


def test_ptuning_of_a_model_with_narrow_embeddings_writes_what_peft_can_open(tmp_path):
    """OPT-350m's shape: PEFT takes the hidden size for the embeddings' unless it is told."""
    sizes = dict(hidden_size=64, word_embed_proj_dim=24, ffn_dim=48, num_attention_heads=4, num_hidden_layers=1)
    base = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=300, max_position_embeddings=64, **sizes))
    soft = T.soft_prompt_from(base, [5, 6, 7])
    T.add_soft_prompt(base, soft).save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(base.config), tmp_path)
    assert torch.equal(opened.prompt_encoder["default"].embedding.weight, soft.weight)


def test_a_soft_prompt_that_fills_the_context_is_refused_before_anything_is_tokenised(tmp_path, tokenizer):
    """A whole embedding table given by mistake must not become a list of ids for every pair."""
    torch.save(torch.zeros(1025, 32), tmp_path / "table.pt")
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=1024)
    args = T.ScriptArguments(training_mode="embedding", prompt_embedding_path=str(tmp_path / "table.pt"))
    with pytest.raises(T.InputError, match=r"PROMPT_EMBEDDING_PATH .*table.pt': holds 1025 .* context of 1024 tokens"):
        T.choose_prefix(args, config, tokenizer)


@pytest.mark.parametrize(("size", "fits"), [(1023, True), (1024, False)])
def test_a_soft_prompt_without_room_is_found_in_the_check(tiny_run, size, fits):
    """The tiny model takes 1024 tokens; its configuration is on this machine."""
    model = tiny_run["POLICY_MODEL_PATH"]
    args = T.ScriptArguments(training_mode="ptuning", num_virtual_tokens=size, policy_model_path=model)
    if fits:
        assert T.soft_prompt_size(args) == size
    else:
        with pytest.raises(
            T.InputError, match=r"NUM_VIRTUAL_TOKENS \(--num_virtual_tokens\) is 1024: they leave no room"
        ):
            T.soft_prompt_size(args)
    elsewhere = dataclasses.replace(args, policy_model_path="someone/some-model")
    assert T.soft_prompt_size(elsewhere) == size


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=1), 48),
        (OPTConfig(hidden_size=64, word_embed_proj_dim=24, num_attention_heads=4, num_hidden_layers=1), 24),
        (LlamaConfig(hidden_size=16384, num_hidden_layers=126, vocab_size=128256), 16384),  # too large to allocate
    ],
)
def test_the_size_of_an_embedding(config, size):
    assert T.embedding_size(config) == size


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/some-kernel"])
def test_a_configuration_chooses_no_attention(name, tiny_run):
    """Neither one that is not installed nor one whose code would be fetched."""
    config = T.local_model(tiny_run["POLICY_MODEL_PATH"])[0]
    config._attn_implementation_internal = name
    assert T.lay_out(config).config._attn_implementation == "sdpa"


def test_the_configuration_of_a_local_model(tiny_run, tmp_path, monkeypatch):
    assert T.local_model(tiny_run["POLICY_MODEL_PATH"])[0].hidden_size == 32
    assert T.local_model("Qwen/Qwen2.5-1.5B") == (None, None)
    make_model("llama", 300).config.save_pretrained(tmp_path / "no tokenizer")
    with pytest.raises(T.InputError, match="it cannot be loaded .tokenizer.json."):
        T.local_model(str(tmp_path / "no tokenizer"))
    monkeypatch.setattr(T, "BUNDLED_MODEL_DIR", tmp_path / "not converted")
    assert T.local_model("") == (None, None)
    monkeypatch.setattr(T, "BUNDLED_MODEL_DIR", Path(tiny_run["POLICY_MODEL_PATH"]))
    assert T.local_model("")[0].hidden_size == 32


class Conversion:
    """`convert_bundled_model` with the two slow loaders replaced by ready-made small ones."""

    def __init__(self, tokenizer, monkeypatch, target):
        self.model, self.target = make_model("llama", len(tokenizer)), target
        self.model.config.quantization_config = {"quant_method": "gguf"}
        monkeypatch.setattr(T.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
        monkeypatch.setattr(T.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: self.model)

    def run(self):
        T.convert_bundled_model(self.target.parent / "model.gguf", self.target)

    def files(self):
        return sorted(path.name for path in self.target.parent.rglob("*"))


@pytest.fixture(params=["quantised config", "plain config"])
def conversion(request, tokenizer, monkeypatch, tmp_path):
    import copy

    made = Conversion(copy.deepcopy(tokenizer), monkeypatch, tmp_path / "models" / "Small")
    if request.param == "plain config":
        del made.model.config.quantization_config
    return made


def test_a_conversion_leaves_one_complete_folder(conversion):
    conversion.run()
    assert [path.name for path in conversion.target.parent.iterdir()] == ["Small"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(conversion.files())
    assert "quantization_config" not in (conversion.target / "config.json").read_text()


def test_an_interrupted_conversion_leaves_nothing(conversion, monkeypatch):
    def full_disk(folder):
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion.model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        conversion.run()
    assert conversion.files() == []


def test_a_killed_conversion_is_done_again(conversion):
    half = conversion.target.with_name(".Small")
    half.mkdir(parents=True)
    (half / "junk").write_text("half a file")
    conversion.run()
    assert [path.name for path in conversion.target.parent.iterdir()] == ["Small"]
    assert "junk" not in conversion.files()


def test_two_runs_convert_the_bundled_model_once(monkeypatch, tmp_path, capsys):
    """The second waits for the first one's lock and then finds the model."""
    target, calls = tmp_path / "models" / "Small", []

    def convert(gguf_file, folder):
        calls.append(folder)
        time.sleep(0.3)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(T, "BUNDLED_MODEL_DIR", target)
    monkeypatch.setattr(T, "bundled_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(T, "convert_bundled_model", convert)
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(T.resolve_model_path, ["", "", ""])) == {str(target)}
    assert calls == [target] and capsys.readouterr().out.count("converting the bundled model") == 1


def test_a_conversion_without_room_names_the_folder(monkeypatch, tmp_path):
    (tmp_path / "models").write_text("a file in the way")
    monkeypatch.setattr(T, "BUNDLED_MODEL_DIR", tmp_path / "models" / "Small")
    with pytest.raises(T.RankError, match=r"models/Small cannot be written: .*MiB are free there. Make room"):
        T.resolve_model_path("")


def test_the_bundled_tokenizer_splits_digits(bundled_model):
    tokenizer = AutoTokenizer.from_pretrained(bundled_model)
    assert tokenizer.convert_ids_to_tokens(tokenizer("2026").input_ids) == ["2", "0", "2", "6"]
    assert tokenizer.model_max_length == 8192 and tokenizer.chat_template


def test_the_bundled_model_knows_a_capital(bundled_model):
    tokenizer = AutoTokenizer.from_pretrained(bundled_model)
    model = AutoModelForCausalLM.from_pretrained(bundled_model)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
