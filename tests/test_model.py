"""Model: what a model path may be, and the bundled model's conversion."""

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_unknown_target_modules_are_named(tokenizer):
    with pytest.raises(T.InputError, match="LORA_TARGET_MODULES.*no_such_layer"):
        T.add_adapter(make_model("llama", len(tokenizer)), T.ScriptArguments(lora_target_modules="no_such_layer"))


def test_the_adapter_starts_at_zero_and_alone_is_trained(tokenizer):
    policy = T.add_adapter(make_model("llama", len(tokenizer)), T.ScriptArguments())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.abs().max() == 0 for name, p in trained.items() if "lora_B" in name)


def test_a_pair_longer_than_the_context(tokenize, tokenized):
    config = make_model("llama", 300).config
    config.max_position_embeddings = 20
    (problem,) = T.context_problems(config, tokenize, tokenized)
    assert "MAX_LENGTH" in problem and "context is 20 tokens" in problem
    config.max_position_embeddings = 1024
    assert T.context_problems(config, tokenize, tokenized) == []


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
        (folder / "half").parent.mkdir(exist_ok=True)
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion.model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        conversion.run()
    assert conversion.files() == []


def test_a_conversion_that_comes_second_keeps_the_first(conversion):
    conversion.target.mkdir(parents=True)
    (conversion.target / "config.json").write_text("first")
    conversion.run()
    assert (conversion.target / "config.json").read_text() == "first"
    assert [path.name for path in conversion.target.parent.iterdir()] == ["Small"]


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
