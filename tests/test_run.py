"""A whole run through ./fast_train.sh: outputs, TensorBoard, inference with what was saved, and a second start."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, launch, output_of, train
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_logging import CONTRACT_EVAL, CONTRACT_TRAIN
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import train_with_preference_prompt as T

ODD_TEXT = 'Be "plain",  it\'s $HOME `date` \\n*\nund höflich — 请简短。'
REMAINING_TAGS = {
    "optim/learning_rate",
    "optim/grad_norm",
    "throughput/pairs_per_second",
    "throughput/tokens_per_second",
    "throughput/peak_memory_gib",
}
FILES = {
    "pytorch_model.bin",
    "config.json",
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "training_args.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "README.md",
    "run_settings.json",
    "metrics.jsonl",
}


@pytest.fixture(scope="module")
def run(talking_run, tmp_path_factory):
    """One finished run with awkward values, started twice: (working folder, first result, second result)."""
    cwd = tmp_path_factory.mktemp("a folder with spaces")
    variables = {**talking_run, "PREFERENCE_TEXT": ODD_TEXT, "LEARNING_RATE": "0.01"}
    first = launch(variables, cwd=cwd)
    assert first.returncode == 0, first.stderr[-3000:]
    kept = {path.name: path.read_bytes() for path in output_of(cwd).iterdir() if path.is_file()}
    second = launch({**variables, "NUM_EPOCHS": "0.1", "DRY_RUN": "1"}, cwd=cwd)
    result = train({**variables, "NUM_EPOCHS": "0.1"}, cwd)
    assert second.returncode == result.returncode == 0, second.stderr[-3000:] + result.stderr[-3000:]
    second.stdout += result.stdout
    (aside,) = cwd.glob("model_output/Preference_Guided_DPO-*")
    third = train({**variables, "NUM_EPOCHS": "0.1", "OVERWRITE": "true", "SEED": "7"}, cwd)
    assert third.returncode == 0, third.stderr[-3000:]
    return {"cwd": cwd, "first": first, "second": second, "output": aside, "kept": kept, "variables": variables}


def events(folder: Path) -> EventAccumulator:
    (file,) = folder.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def first_events(run):
    folders = sorted((run["cwd"] / "logs" / "Preference_Guided_DPO" / "runs").iterdir())
    assert len(folders) == 2
    return events(folders[0])


def test_every_file_of_the_contract_is_there(run):
    assert FILES <= {path.name for path in run["output"].iterdir()}
    assert T.newest_checkpoint(run["output"]).name == "checkpoint-3"


def test_a_second_start_moves_the_finished_run_aside_unchanged(run):
    assert {path.name: path.read_bytes() for path in run["output"].iterdir() if path.is_file()} == run["kept"]
    assert re.fullmatch(r"Preference_Guided_DPO-\d{8}-\d{6}", run["output"].name)
    assert "moved aside" in run["second"].stderr and str(run["output"].name) in run["second"].stdout
    assert len(list((run["cwd"] / "logs" / "Preference_Guided_DPO").glob("events.*"))) == 1


def test_overwrite_replaces_the_second_run_and_leaves_the_first(run):
    assert list(run["cwd"].glob("model_output/Preference_Guided_DPO-*")) == [run["output"]]
    assert json.loads((output_of(run["cwd"]) / "run_settings.json").read_text(encoding="utf-8"))["seed"] == 7


def test_tags_are_exactly_those_of_the_contract(first_events):
    assert set(first_events.Tags()["scalars"]) == CONTRACT_TRAIN | CONTRACT_EVAL | REMAINING_TAGS


def test_scalars_have_one_finite_value_per_update_and_evaluation(first_events):
    for tag in CONTRACT_TRAIN | REMAINING_TAGS:
        assert [e.step for e in first_events.Scalars(tag)] == [1, 2, 3], tag
    for tag in CONTRACT_EVAL:
        assert [e.step for e in first_events.Scalars(tag)] == [0, 2, 3], tag
    values = [e.value for tag in first_events.Tags()["scalars"] for e in first_events.Scalars(tag)]
    assert all(map(math.isfinite, values))


def test_loss_is_its_components(first_events):
    """alpha is the default 0.1"""
    for tag in ("loss/train", "loss/eval"):
        suffix = "_eval" if tag == "loss/eval" else ""
        parts = (first_events.Scalars(f"loss_components/{name}_loss{suffix}") for name in ("dpo", "aligned"))
        for total, dpo, aligned in zip(first_events.Scalars(tag), *parts, strict=True):
            assert total.value == pytest.approx(dpo.value + 0.1 * aligned.value, rel=1e-5)


def test_samples_and_hyperparameters(first_events, run):
    (sample,) = first_events.Tensors("samples/before_and_after/text_summary")
    text = sample.tensor_proto.string_val[0].decode()
    assert text.startswith("**Tell me: How do I boil an egg?**\n\n| plain, before | plain, after |\n| --- | --- |\n| ")
    assert [text.count(part) for part in ("\n| plain, before | ", "\n| with the prefix, before | ")] == [
        T.SAMPLE_PROMPTS
    ] * 2
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    content = first_events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["preference_text"].string_value == ODD_TEXT  # quotes, $, newline and Chinese arrive unchanged
    assert shown["beta"].number_value == 0.05 and shown["gradient_accum_steps"].number_value == 5
    assert "ptuning_learning_rate" not in shown  # it has no part in text mode
    columns = first_events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(columns).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} <= set(first_events.Tags()["scalars"]) and len(metrics) == 5
    ended = first_events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    assert plugin_data_pb2.HParamsPluginData.FromString(ended).session_end_info.status == api_pb2.STATUS_SUCCESS


def test_the_layout_is_written_with_the_events(first_events):
    from tensorboard.plugins.custom_scalar import layout_pb2

    (config,) = first_events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert charts == {category: list(charts) for category, charts in T.CHARTS.items()}
    scalars = set(first_events.Tags()["scalars"])
    for pattern in (tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag):
        assert len([tag for tag in scalars if re.match(pattern, tag)]) == 1, pattern


def test_metrics_jsonl_holds_what_tensorboard_shows(first_events, run):
    lines = [json.loads(line) for line in (run["output"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert [list(line)[:2] for line in lines] == [["update", "epoch"]] * 6 and lines[-1]["epoch"] == 1
    for tag in first_events.Tags()["scalars"]:
        shown = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in first_events.Scalars(tag)]
        assert [(line["update"], line[tag]) for line in lines if tag in line] == shown, tag
    assert {tag for line in lines for tag in line} - {"update", "epoch"} == set(first_events.Tags()["scalars"])


def test_the_summary_at_the_end(first_events, run):
    said = run["first"].stdout
    summary = said[said.index("held-out ") :].splitlines()
    assert len(summary) <= 25
    rows = {line.split()[0]: line.split()[1:] for line in summary}
    for name, tags in (("loss", ("loss/eval", "loss/train")), ("pref_accuracy", T.TAGS["pref_accuracy"][::-1])):
        events = [first_events.Scalars(tag) for tag in tags]
        assert rows[name] == [f"{found[place].value:.4f}" for found in events for place in (0, -1)]
    assert rows["updates"] == ["3,", "12", "pairs"] and "pairs/s," in rows["speed"] and "all" in rows["time"]


def test_the_picture_of_the_curves(run):
    """The program is another process, so whether it can draw is asked of one, too."""
    found = subprocess.run([sys.executable, "-c", "import matplotlib"], capture_output=True).returncode == 0
    assert (run["output"] / "training_curves.png").exists() == found
    assert ("no training_curves.png: matplotlib is not installed" in run["first"].stdout) != found
    assert not {"metrics.jsonl", "training_curves.png"} & {path.name for path in (run["output"] / "merged").iterdir()}


def test_what_the_launcher_says(run):
    said = run["first"].stderr
    for phrase in ("12 pairs", "5 pairs", "1 × 5, 2 in a forward", "CPU, 1 rank(s)", "--include=localhost:0"):
        assert phrase in said, phrase
    assert "tensorboard --logdir" in said and "the trained model is in" in said
    assert said.rstrip().splitlines()[-1] == "then open http://localhost:6006/#custom_scalars"
    assert "only 3 updates" in said
    shown = run["first"].stdout
    assert "12 rows read, 12 pairs used" in shown and "⟦Eight minutes in boiling water.<|im_end|>⟧" in shown
    assert "equals what was trained" in shown and "loss=" in said and "accuracy=" in said


def readme_snippet() -> str:
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S) if "peft" in b)
    return block


def test_the_readmes_inference_snippet(run, capsys, monkeypatch):
    """As it stands in the README, with the paths of this run in the place of the bundled ones."""
    snippet = readme_snippet()
    assert "PeftModel.from_pretrained(base_model" in snippet and "model.generate" in snippet
    snippet = snippet.replace("./models/SmolLM2-135M-Instruct", run["variables"]["POLICY_MODEL_PATH"])
    monkeypatch.chdir(run["cwd"])
    exec(snippet, {})
    question, answer = capsys.readouterr().out.split("assistant\n", 1)
    assert question.endswith("windowsill?\n") and answer.strip()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def test_adapter_and_merged_weights_agree(run):
    base = run["variables"]["POLICY_MODEL_PATH"]
    adapted = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run["output"]))
    merged = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run["output"]))
    merged.load_state_dict(torch.load(run["output"] / "pytorch_model.bin", weights_only=True))
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-4)
    assert (logits_of(AutoModelForCausalLM.from_pretrained(base)) - adapted).abs().max() > 1e-2
    loaded = AutoModelForCausalLM.from_pretrained(run["output"] / "merged")
    torch.testing.assert_close(logits_of(loaded), adapted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run["output"] / "merged").chat_template


def test_the_two_adapter_files_are_equal(run):
    binary = torch.load(run["output"] / "adapter_model.bin", weights_only=True)
    tensors = load_file(run["output"] / "adapter_model.safetensors")
    assert binary.keys() == tensors.keys() and all(torch.equal(binary[name], tensors[name]) for name in binary)
    assert json.loads((run["output"] / "adapter_config.json").read_text())["r"] == 16


def test_tokenizer_and_training_args_reload(run):
    text = "How do I boil an egg? 你好"
    base = AutoTokenizer.from_pretrained(run["variables"]["POLICY_MODEL_PATH"])
    assert AutoTokenizer.from_pretrained(run["output"])(text).input_ids == base(text).input_ids
    saved = torch.load(run["output"] / "training_args.bin", weights_only=False)  # written by this test's own run
    assert isinstance(saved, TrainingArguments) and saved.learning_rate == 0.01


def test_no_shared_memory_stays_behind(run):
    """DeepSpeed's communication buffer on a CPU would take 69 MB of RAM after every run."""
    port = re.search(r"--master_port=(\d+)", run["first"].stderr)[1]
    assert list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")) == []


def test_the_model_card_says_what_was_done(run):
    card = (run["output"] / "README.md").read_text(encoding="utf-8")
    for phrase in ("library_name: peft", "train.jsonl", "| beta | 0.05 |", "rewards_eval/accuracy", "请简短"):
        assert phrase in card, phrase
    assert str(run["variables"]["POLICY_MODEL_PATH"]) in card
