"""Evaluation: intervals and yardsticks by hand, and the very figures of a run's last held-out evaluation."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import forkserver
import pytest
import torch
import yaml
from conftest import PREFERENCE, PROJECT, output_of, parse, series, train
from test_trainer import finished

import train_with_preference_prompt as T

# --- statistics


@pytest.mark.parametrize("count", [0, 1, 5, 13, 19, 20])
def test_wilsons_interval_holds_the_shares_that_a_score_test_does_not_reject(count):
    """Its ends p solve (k/n − p)² = z² p (1 − p) / n, which is how it is defined; 0 and 1 where there is no such end."""
    low, high = T.wilson_interval(count, 20)
    assert 0 <= low < high <= 1 and low <= count / 20 <= high
    for p in (low, high):
        if p not in (0.0, 1.0):
            assert (count / 20 - p) ** 2 == pytest.approx(T.Z_95**2 * p * (1 - p) / 20, rel=1e-9)
    assert (low == 0) == (count == 0) and (high == 1) == (count == 20)


def test_wilsons_interval_of_a_known_case():
    """55 of 60: centre (55 + z²/2) / (60 + z²), z² = 3.8415: 56.921 / 63.841 = 0.8916, half width 0.0723."""
    assert T.wilson_interval(55, 60) == pytest.approx((0.8193, 0.9639), abs=1e-4)


def test_the_length_baseline_takes_the_better_rule_and_ties_are_not_right():
    found = T.length_baseline(torch.tensor([3, 1, -2, 0, 0, -5, -1]))  # 2 longer, 3 shorter, 2 as long
    assert [found[name]["count"] for name in ("longer", "shorter", "same")] == [2, 3, 2]
    assert found["better"] == "shorter" and found["shorter"]["share"] == pytest.approx(3 / 7)
    assert T.length_baseline(torch.tensor([3, -1, 0]))["better"] == "longer"  # of equals the usual one


def shares(value, low, high):
    return {"share": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.71, 0.9, 0.7, []),
        (0.7, 0.9, 0.7, ["not shown to be better than always taking the longer answer (0.700)"]),
        (0.5, 0.69, 0.7, ["not shown to be better than a coin", "worse than always taking the longer answer (0.700)"]),
        (0.3, 0.49, 0.2, ["worse than a coin (0.500)"]),
    ],
)
def test_an_accuracy_that_shows_nothing_is_said_to(low, high, better, expected):
    length = {"better": "longer", "longer": {"share": better}}
    found = T.evaluation_remarks(shares((low + high) / 2, low, high), length)
    assert len(found) == len(expected) and all(words in line for words, line in zip(expected, found, strict=True))


def pair(chosen: int, rejected: int) -> T.TokenizedPair:
    return T.TokenizedPair([1], [1, 2], [5] * chosen, [6] * rejected, T.Pair("p", "c", "r", 1))


def test_results_by_hand():
    """Six pairs whose answers differ by −60, −51, −11, −10, 10 and 51 tokens; β is 2."""
    differences = [-60, -51, -11, -10, 10, 51]
    dataset = T.PairDataset([pair(70 + d, 70) for d in differences])
    zero = torch.zeros(6, 2)
    plain, reference, prefixed = zero.clone(), zero.clone(), zero.clone()
    plain[:, 0] = torch.tensor([1.0, -1.0, 2.0, 0.0, 3.0, 4.0])  # rewards 2 · this: right in 1, 3, 5, 6; a tie in 4
    reference[:, 1] = 0.5  # and −1 for the rejected, so that the tie is broken
    reference[3, 1] = 0.0
    prefixed[:, 1] = -1.0
    args = T.ScriptArguments(evaluate_only=True, adapter_path="a", beta=2.0)
    found = T.evaluation_results(args, {"base": plain, "pref": prefixed, "reference": reference}, dataset)
    assert found["plain"]["reward_accuracy"]["count"] == 4 and found["accuracy"]["share"] == pytest.approx(4 / 6)
    assert found["plain"]["chosen_reward"] == pytest.approx(2 * 9 / 6)
    assert found["plain"]["rejected_reward"] == pytest.approx(-5 / 6)
    assert found["plain"]["reward_margin"] == pytest.approx(3 + 5 / 6)
    assert found["plain"]["margin"] == pytest.approx(1.5) and found["plain"]["margin_above_0"]["count"] == 4
    assert found["with_prefix"]["reward_accuracy"]["count"] == 6 and found["with_prefix"]["margin"] == 1.0
    assert found["pref_advantage_ratio"] == pytest.approx(math.exp(1.0 - 1.5))
    by_length = found["accuracy_by_length_difference"]
    assert [share and (share["count"], share["of"]) for share in by_length.values()] == [
        (1, 2),
        (1, 1),
        (1, 2),
        None,
        (1, 1),
    ]
    assert list(by_length) == list(T.LENGTH_BINS)
    assert found["length_only"]["better"] == "shorter" and found["length_only"]["shorter"]["count"] == 4
    table = T.evaluation_table(found)
    assert "4 pairs" not in table and "6 pairs" in table
    assert re.search(r"^reward accuracy +0\.667 \(0\.300 to 0\.903\) +1\.000 \(0\.610 to 1\.000\)$", table, re.M)
    assert re.search(r"^length alone +0\.667 \(0\.300 to 0\.903\) +always the shorter answer$", table, re.M)
    assert re.search(r"^  shorter by > 50 +0\.500 \(0\.095 to 0\.905\) +2$", table, re.M)
    assert re.search(r"^  longer by 11 to 50 +– +0$", table, re.M)


# --- runs


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Mode → the folder in which a run of it was made."""
    made = {}
    soft = tmp_path_factory.mktemp("soft") / "soft.pt"
    torch.save(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), soft)
    short = {"EVAL_STEPS": "0", "LEARNING_RATE": "0.01", "BETA": "0.1"}
    modes = {"text": {}, "embedding": {"PROMPT_EMBEDDING_PATH": str(soft)}, "ptuning": {"NUM_VIRTUAL_TOKENS": "4"}}
    for mode, settings in modes.items():
        made[mode] = tmp_path_factory.mktemp(mode)
        finished(train({**tiny_run, **short, "TRAINING_MODE": mode, **settings}, made[mode]))
    return made


def evaluate(cwd, *flags: str):
    """The evaluation through the program's command line, without any launcher: result and what it wrote."""
    command = ["--evaluate_only", *flags, f"--evaluation_file={cwd / 'found.json'}"]
    result, found = forkserver.start(command, {"MASTER_PORT": "0"}, cwd).wait(), cwd / "found.json"
    return result, json.loads(found.read_text(encoding="utf-8")) if found.exists() else None


def settings_of(mode, tiny_run, runs):
    flags = [f"--adapter_path={output_of(runs[mode])}", f"--test_dataset_path={tiny_run['TEST_DATASET_PATH']}"]
    flags += ["--beta=0.1", "--pairs_per_forward=2"]
    if mode == "text":
        flags += [f"--preference_text={PREFERENCE}"]
    if mode == "embedding":
        soft = output_of(runs[mode]) / T.SOFT_PROMPT
        flags += ["--training_mode=embedding", f"--prompt_embedding_path={soft}"]
    return flags


@pytest.mark.parametrize("mode", ["text", "embedding", "ptuning"])
def test_it_gives_the_figures_of_the_runs_last_evaluation(mode, runs, tiny_run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in runs[mode].rglob("*")}
    result, found = evaluate(tmp_path, *settings_of(mode, tiny_run, runs))
    assert result.returncode == 0, result.stderr
    compared = {tag: value for tag, value in found["metrics"].items() if series(runs[mode], tag)}
    assert {"rewards_eval/accuracy", "rewards_eval/margin", "preference_metrics/pref_advantage_ratio_eval"} <= set(
        compared
    )
    for tag, value in compared.items():
        assert value == pytest.approx(series(runs[mode], tag)[-1], rel=1e-12), tag
        if tag in ("rewards_eval/margin", "logps_eval/pref_chosen"):
            assert value != pytest.approx(series(runs[mode], tag)[0], rel=1e-3), tag
    judged = found["with_prefix" if mode == "ptuning" else "plain"]
    assert judged["reward_accuracy"] == found["accuracy"]
    assert judged["reward_accuracy"]["share"] == compared["rewards_eval/accuracy"]
    assert f"{judged['reward_margin']:.4f}" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in runs[mode].rglob("*")} == before
    assert "notice" not in result.stderr


def test_the_model_alone_and_another_setting(runs, tiny_run, tmp_path):
    """Without an adapter there is no reference: only margins; they are those from before the run's training."""
    flags = [flag for flag in settings_of("text", tiny_run, runs) if "adapter" not in flag and "beta" not in flag]
    result, found = evaluate(tmp_path, *flags, f"--policy_model_path={tiny_run['POLICY_MODEL_PATH']}", "--lora_r=3")
    assert result.returncode == 0, result.stderr
    assert "reward_accuracy" not in found["plain"] and "reward accuracy" not in result.stdout
    for tag in ("preference_metrics/base_margin_eval", "preference_metrics/pref_margin_eval"):
        assert found["metrics"][tag] == pytest.approx(series(runs["text"], tag)[0], rel=1e-6)
    assert found["accuracy"] == found["plain"]["margin_above_0"]
    assert "not used          LORA_R (no part in this evaluation)" in result.stderr
    assert "none: the model alone" in result.stderr


def test_another_setting_than_the_runs_is_said(runs, tiny_run, tmp_path):
    flags = [flag for flag in settings_of("text", tiny_run, runs) if "beta" not in flag]
    said = evaluate(tmp_path, *flags, "--plan")[0].stderr
    assert "it had BETA 0.1, not 0.05" in said and list(tmp_path.iterdir()) == []
    settings = {"evaluate_only": True, "adapter_path": str(output_of(runs["embedding"])), "beta": 0.1}
    (difference,) = T.run_differences(T.ScriptArguments(**settings, preference_text=PREFERENCE), [])
    assert difference == "TRAINING_MODE 'embedding', not 'text'"


def test_pairs_that_the_run_may_have_been_trained_on_are_no_held_out_ones_in_silence(runs, tiny_run):
    """Held out of the run's own training data here: the run had test data of its own."""
    settings = {"adapter_path": str(output_of(runs["text"])), "train_dataset_path": tiny_run["TRAIN_DATASET_PATH"]}
    args = T.ScriptArguments(evaluate_only=True, **settings, beta=0.1, preference_text=PREFERENCE)
    pairs = T.read_pairs(Path(tiny_run["TEST_DATASET_PATH"]))[0]
    found = T.run_differences(args, pairs[1:])
    assert [line for line in found if "trained on pairs" in line] == [
        "other test data, so that it may have been trained on pairs that are held out here"
    ]
    assert not any("trained on pairs" in line for line in T.run_differences(args, pairs))
    named = dataclasses.replace(args, test_dataset_path=tiny_run["TEST_DATASET_PATH"])
    assert not any("trained on pairs" in line for line in T.run_differences(named, pairs[1:]))


def test_an_evaluation_says_what_became_of_the_rows(runs, tiny_run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(tiny_run["TEST_DATASET_PATH"], folder / "test.jsonl")
    (folder / "notes.txt").write_text("mine")
    flags = [flag for flag in settings_of("text", tiny_run, runs) if "test_dataset" not in flag]
    said = evaluate(tmp_path, *flags, f"--test_dataset_path={folder}", "--max_length=81", "--max_prompt_length=80")[0]
    assert "notes.txt" in said.stderr and "data format       plain" in said.stderr
    assert "test data: 5 rows read, 5 pairs used, dropped: none" in said.stderr and "answers cut: " in said.stderr


def test_a_list_is_no_sweep_of_evaluations(runs):
    flags = ["--evaluate_only", f"--adapter_path={output_of(runs['text'])}", "--beta=0.01 0.05", "--plan=true"]
    with pytest.raises(T.InputError, match="a list is a sweep"):
        T.main(flags)


def test_nothing_is_overwritten_and_all_problems_are_listed(runs, tiny_run, tmp_path):
    (tmp_path / "found.json").write_text("{}")
    flags = [flag for flag in settings_of("text", tiny_run, runs) if "test_dataset" not in flag]
    result, _ = evaluate(tmp_path, *flags, "--test_dataset_path=none.jsonl", "--beta=-1")
    assert result.returncode == 2 and (tmp_path / "found.json").read_text() == "{}"
    message = result.stderr.split("error:\n")[1]
    for words in ("EVALUATION_FILE (--evaluation_file)", "is there already; name another", "none.jsonl", "BETA ("):
        assert words in message
    assert message.count("\n- ") == 2 and "Traceback" not in message


WRONG = {  # flags → the line
    "no base model": (["--adapter_path={lost}"], "POLICY_MODEL_PATH (--policy_model_path) is '', and the base model"),
    "no adapter": (["--adapter_path=none"], "ADAPTER_PATH (--adapter_path) is 'none': there is no such folder"),
    "LoRA for a soft prompt": (
        ["--adapter_path={lora}", "--training_mode=ptuning"],
        "ADAPTER_PATH (…: is no soft prompt",
    ),
    "two soft prompts": (
        ["--adapter_path={soft}", "--training_mode=embedding", "--prompt_embedding_path=x.pt"],
        "ADAPTER_PATH (…: is a soft prompt itself, beside that of TRAINING_MODE=embedding; set it to ptuning",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_cannot_be_evaluated(what, runs, tmp_path):
    flags, words = WRONG[what]
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"})
    )
    places = {"lost": tmp_path / "lost", "lora": output_of(runs["text"]), "soft": output_of(runs["ptuning"])}
    args = parse(["--evaluate_only", *(flag.format(**places) for flag in flags)])
    with pytest.raises(T.InputError) as caught:
        T.evaluation_settings(args)
    assert re.match("- " + re.escape(words).replace("…", ".*"), str(caught.value))


def test_an_adapter_that_names_no_base_is_not_put_on_the_bundled_model(tmp_path, monkeypatch):
    """Not even where the working folder is that of a model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(T.InputError, match="the base model that the adapter names, '', is no model folder here"):
        T.evaluation_settings(parse(["--evaluate_only", f"--adapter_path={tmp_path}"]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--evaluation_file=x.json"],
            "EVALUATION_FILE (--evaluation_file) is 'x.json': only --evaluate_only writes it",
        ),
        (["--evaluate_only", "--training_mode=ptuning"], "ADAPTER_PATH (--adapter_path) is '', but TRAINING_MODE is"),
        (
            ["--evaluate_only", "--adapter_path=a", "--adapter_reference=adapter"],
            "ADAPTER_REFERENCE (--adapter_reference) is 'adapter': an evaluation compares with the model without",
        ),
    ],
)
def test_settings_that_do_not_go_together(flags, words):
    with pytest.raises(T.InputError) as caught:
        parse(flags)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"- {words}")


def test_log_probabilities_that_are_not_finite_name_their_row():
    dataset = T.PairDataset([T.TokenizedPair([1], [1], [1], [1], T.Pair("p", "c", "r", row)) for row in (4, 9)])
    logps = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, math.nan]])
    with pytest.raises(T.RunError, match="what is scored are not finite for row 9; look at the pairs"):
        T.require_finite_logps("what is scored", logps, dataset)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--evaluate_only", True),
        ("--evaluate_only true --beta 1", True),
        ("--beta 1 --evaluate_only=1", True),
        ("--evaluate_only false", False),
        ("--evaluate_only=No --beta 1", False),
        ("--beta 1", False),
    ],
)
def test_the_launcher_sees_the_flag(arguments, expected):
    function = re.search(r"^evaluates\(\) \{.*?^\}", (PROJECT / "fast_train.sh").read_text(), re.M | re.S)[0]
    result = subprocess.run(["bash", "-c", f"{function}\nevaluates {arguments}"])
    assert (result.returncode == 0) == expected


def test_the_launcher_evaluates_with_its_variables(runs, tiny_run, tmp_path):
    variables = {**tiny_run, "BETA": "0.1", "ADAPTER_PATH": str(output_of(runs["text"])), "DRY_RUN": "1"}
    command = ["bash", str(PROJECT / "fast_train.sh"), "--evaluate_only"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for words in (
        f"adapter           the LoRA adapter in {output_of(runs['text'])} (r 16, α 32)",
        "5 pairs",
        PREFERENCE,
    ):
        assert words in result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


# --- the model card


@pytest.mark.parametrize("mode", ["text", "ptuning"])
def test_the_model_cards_snippet_runs_as_it_stands(mode, runs, capsys):
    card = (output_of(runs[mode]) / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(snippet, {})
    assert T.CARD_PROMPT in capsys.readouterr().out


def test_the_model_cards_front_matter_and_figures(runs, tiny_run):
    for mode, method in {"text": "lora", "embedding": "lora", "ptuning": "prompt-tuning"}.items():
        card = (output_of(runs[mode]) / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["base_model"] == tiny_run["POLICY_MODEL_PATH"] and front["library_name"] == "peft"
        assert front["tags"][-1] == method and "dpo" in front["tags"]
        tags = [tag for tag in series_tags(runs[mode]) if tag in {tags[1] for tags in T.TAGS.values()}]
        for tag in tags:
            values = series(runs[mode], tag)
            assert f"| {tag} | {values[0]:.4f} | {values[-1]:.4f} |" in card
        reference = "the same model without the soft prompt" if mode == "ptuning" else "the base model, adapter off"
        assert f"| reference | {reference} |" in card and "| updates | 3, 12 pairs |" in card
        assert f"torch {torch.__version__.split('+')[0]}" in card and "| pairs per update | 5 (1 × 5) |" in card
        assert len(tags) >= 12


def series_tags(cwd):
    history = json.loads((output_of(cwd) / "trainer_state.json").read_text())["log_history"]
    return {tag for logs in history for tag in logs}


@pytest.mark.parametrize("mode", ["text", "embedding", "ptuning"])
def test_the_model_cards_commands_are_understood(mode, runs):
    """The first evaluates as the run did; the second's variables are the launcher's."""
    card = (output_of(runs[mode]) / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", card, re.S)
    evaluation, training = (line for line in block.splitlines() if not line.startswith("#"))
    args = parse(shlex.split(evaluation)[1:])
    settled = T.evaluation_settings(args)
    assert settled.training_mode == mode and T.run_differences(settled, []) == []
    flags = [word.split("=", 1) for word in shlex.split(training)[:-1]]
    parse([f"--{name.lower()}={value}" for name, value in flags])


def test_a_snippet_without_a_template():
    assert "apply_chat_template" not in T.card_snippet("base", "out", False)
    compile(T.card_snippet("base", "out", False), "snippet", "exec")
