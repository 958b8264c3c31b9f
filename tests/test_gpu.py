"""What only a GPU can show; skipped where there is none. All of it: ./tests/run.sh -m gpu

Everything runs in processes of its own, which alone may see the GPU.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import HAS_GPU, PROJECT, VISIBLE, free_port, history, launch, output_of, series, train
from test_around import sabotaged
from test_memory import LOWERED

import train_with_preference_prompt as T

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="there is no NVIDIA GPU (/dev/nvidiactl)"),
    pytest.mark.skipif(not VISIBLE[:1].isdecimal(), reason="CUDA_VISIBLE_DEVICES names no GPU by its number"),
]

FIRST = VISIBLE.split(",")[0]
EXACT = {"LORA_DROPOUT": "0", "PRECISION": "fp32"}


def environment(**variables: str) -> dict[str, str]:
    """That of a process which sees the GPUs that the tests were started with, or the first."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": VISIBLE} | variables


def on_gpu(variables: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    """A run through ./fast_train.sh on the first GPU that the tests may see."""
    given = {"GPU_NODES": f"localhost:{FIRST}", "CUDA_VISIBLE_DEVICES": VISIBLE, **variables}
    result = launch(given, cwd=cwd, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"1 GPU(s), localhost:{FIRST}" in result.stderr
    return result


def rank_on_gpu(program: Path, variables: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    """A program in the place of the module, as the only rank on the GPU."""
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    group |= {"LOCAL_SIZE": "1", "MASTER_PORT": str(free_port())}
    flags = [f"--{name.lower()}={value}" for name, value in variables.items()]
    return subprocess.run(
        [sys.executable, str(program), *flags], cwd=cwd, env=environment(**group), capture_output=True, text=True
    )


def run_script(text: str, cwd: Path) -> dict:
    """What a script that sees the GPU prints as JSON in its last line; it may import the module as T."""
    script = cwd / "script.py"
    script.write_text(
        f"import json, sys\nsys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / 'tests')!r}]\n"
        "import torch\nimport train_with_preference_prompt as T\n" + textwrap.dedent(text)
    )
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- the default run

REPORT_SEGMENTS = """
import atexit, json, os, sys
def report():
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        segments = [segment["is_expandable"] for segment in torch.cuda.memory_snapshot()]
        with open(os.environ["SEGMENTS"], "w") as file:
            json.dump(segments, file)
atexit.register(report)
"""


@pytest.fixture(scope="module")
def default_run(bundled_model, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("default")
    (cwd / "sitecustomize.py").write_text(REPORT_SEGMENTS)
    return cwd, on_gpu({"PYTHONPATH": str(cwd), "SEGMENTS": str(cwd / "segments.json")}, cwd)


def test_the_default_run_learns_in_bf16(default_run):
    cwd, result = default_run
    assert "bfloat16" in result.stderr and "peak memory" in result.stdout
    losses = series(cwd, "loss/eval")
    assert losses[-1] < 0.8 * losses[0] and series(cwd, "rewards_eval/accuracy")[-1] > 0.7
    weights = torch.load(output_of(cwd) / "pytorch_model.bin", weights_only=True, map_location="cpu")
    assert weights["model.norm.weight"].dtype == torch.bfloat16


def test_expandable_segments_are_active(default_run):
    segments = json.loads((default_run[0] / "segments.json").read_text())
    assert segments and all(segments)


# --- every mode and stage beside the CPU


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    path = tmp_path_factory.mktemp("soft") / "soft.pt"
    torch.save(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), path)
    return {"PROMPT_EMBEDDING_PATH": str(path)}


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("mode", ["text", "embedding", "ptuning"])
def test_a_gpu_gives_the_losses_of_a_cpu(mode, stage, soft, tiny_run, tmp_path):
    """In fp32 nearly the same ones, from data to saved weights; in bf16 near them.

    The gradient's norm in bf16 only at the first update: P-tuning's steps of 3e-2 take the rounding of the weights alone
    (fp32 arithmetic on them: 0.643 for 0.796) further apart than anything a GPU does.
    """
    variables = {**tiny_run, **EXACT, "TRAINING_MODE": mode, **(soft if mode == "embedding" else {})}
    folders = {name: tmp_path / name for name in ("cpu", "fp32", "bf16")}
    for folder in folders.values():
        folder.mkdir()
    assert train(variables, folders["cpu"]).returncode == 0
    for precision in ("fp32", "bf16"):
        on_gpu({**variables, "PRECISION": precision, "ZERO_STAGE": stage}, folders[precision])
    for tag in ("loss/train", "loss/eval", "optim/grad_norm"):
        expected = series(folders["cpu"], tag)
        assert series(folders["fp32"], tag) == pytest.approx(expected, rel=2e-3, abs=1e-4), tag
        near = slice(1 if tag == "optim/grad_norm" else None)
        assert series(folders["bf16"], tag)[near] == pytest.approx(expected[near], rel=0.1, abs=0.05), tag


@pytest.mark.parametrize(
    "given",
    [{"LOAD_IN_4BIT": "true"}, {"OFFLOAD": "optimizer"}, {"ZERO_STAGE": "3", "OFFLOAD": "both"}],
    ids=["4-bit", "offloaded optimizer", "offloaded model"],
)
def test_less_memory_changes_nothing(given, tiny_run, tmp_path):
    """The losses of a CPU with the same settings: its base is in 4 bits too, or what lies in its memory already."""
    variables = {**tiny_run, **EXACT, **given}
    folders = {name: tmp_path / name for name in ("cpu", "gpu")}
    for folder in folders.values():
        folder.mkdir()
    expected = train(variables, folders["cpu"])
    assert expected.returncode == 0, expected.stderr[-3000:]
    on_gpu(variables, folders["gpu"])
    for tag in ("loss/train", "loss/eval"):
        assert series(folders["gpu"], tag) == pytest.approx(series(folders["cpu"], tag), rel=5e-3), tag


def test_fp16_learns(tiny_run, tmp_path):
    """The first evaluation is that of fp32; from there on updates are left out until the loss scale fits."""
    variables = {**tiny_run, "LORA_DROPOUT": "0", "NUM_EPOCHS": "4", "LEARNING_RATE": "3e-3"}
    folders = {name: tmp_path / name for name in ("fp32", "fp16")}
    for precision, folder in folders.items():
        folder.mkdir()
        on_gpu({**variables, "PRECISION": precision}, folder)
    losses = series(folders["fp16"], "loss/eval")
    assert losses[0] == pytest.approx(series(folders["fp32"], "loss/eval")[0], rel=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    weights = torch.load(output_of(folders["fp16"]) / "pytorch_model.bin", weights_only=True, map_location="cpu")
    assert weights["model.norm.weight"].dtype == torch.float16


def test_a_resumed_run_goes_on_as_the_whole_one(tiny_run, tmp_path):
    """A GPU adds in any order, hence no equality of bits."""
    variables = {**tiny_run, **EXACT}
    on_gpu(variables, tmp_path)
    whole = {tag: series(tmp_path, tag) for tag in ("loss/train", "loss/eval")}
    output = output_of(tmp_path)
    (output / T.MODEL_CARD).unlink()
    (T.newest_checkpoint(output) / T.CHECKPOINT_FILES).unlink()
    resumed = on_gpu({**variables, "RESUME": "true"}, tmp_path)
    assert "resumed from checkpoint-" in resumed.stderr
    for tag, values in whole.items():
        assert series(tmp_path, tag) == pytest.approx(values, rel=1e-3), tag


# --- attention and memory


def test_a_batch_goes_to_the_gpu_without_waiting_for_it(tmp_path):
    """PyTorch raises an error at whatever would; the batch arrives whole."""
    found = run_script(
        """
        pair = T.TokenizedPair([5, 6, 7], [4, 5, 6, 7], [8, 9], [10, 11, 12], T.Pair("a", "b", "c", 1))
        batch = T.collate_pairs([T.PairDataset([pair, pair])[index, 1.0] for index in range(2)])
        gpu = torch.device("cuda")
        torch.zeros(1, device=gpu)
        torch.cuda.set_sync_debug_mode("error")
        there = T.on_device(batch, gpu)
        sequences = T.TreeSequences.of(there["base"].trees, gpu)
        torch.cuda.set_sync_debug_mode("default")
        same = [torch.equal(there[name].cpu(), batch[name]) for name in ("weights", "indices", "lengths")]
        same += [torch.equal(there[name].input_ids.cpu(), batch[name].input_ids) for name in ("base", "pref")]
        there = [value.is_cuda for value in (there["base"].target_ids, there["weights"], sequences.keys)]
        print(json.dumps({"same": all(same), "there": all(there)}))
        """,
        tmp_path,
    )
    assert found == {"same": True, "there": True}


def test_the_trees_attention_on_a_gpu_is_the_cpus(tmp_path):
    """Log-probabilities and gradients, in bf16 by FlashAttention and by PyTorch's attention of each tree."""
    found = run_script(
        """
        from transformers import Qwen2Config, Qwen2ForCausalLM
        torch.manual_seed(0)
        sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
        config = Qwen2Config(vocab_size=512, num_key_value_heads=2, initializer_range=0.1, **sizes)
        model = T.enable_packed_forward(Qwen2ForCausalLM(config)).eval()
        draw = lambda n: torch.randint(0, 512, (n,)).tolist()
        row = T.pack_row([(draw(70), draw(40), draw(1)), (draw(5), draw(130), draw(90)), (draw(300), draw(9), draw(33))])
        found, calls, flash, has_flash = {}, [], T.flash_attention, T.has_flash_attention
        T.flash_attention = lambda *x: calls.append(x[0].dtype) or flash(*x)
        for device, dtype, fast in (
            ("cpu", torch.float32, True), ("cuda", torch.float32, True), ("cuda", torch.bfloat16, False),
            ("cuda", torch.bfloat16, True),
        ):
            T.has_flash_attention = has_flash if fast else lambda *x: False
            model.to(device=device, dtype=dtype).zero_grad()
            logps = T.policy_logps(model, row.to(torch.device(device)))
            logps.sum().backward()
            gradient = model.model.layers[0].self_attn.q_proj.weight.grad.float()
            name = f"{device} {dtype}{'' if fast else ' by tree'}"
            found[name] = [logps.flatten().tolist(), gradient.norm().item()]
        assert calls == [torch.bfloat16] * 2, calls  # one a layer
        print(json.dumps(found))
        """,
        tmp_path,
    )
    exact, norm = found["cpu torch.float32"]
    assert found["cuda torch.float32"][0] == pytest.approx(exact, rel=1e-3)
    assert found["cuda torch.float32"][1] == pytest.approx(norm, rel=1e-2)
    # bf16 has 8 bits: about 2⁻⁸ of the logits' size a token, so that sums over up to 130 tokens are off by nats.
    for by in ("", " by tree"):
        assert found["cuda torch.bfloat16" + by][0] == pytest.approx(exact, rel=2e-2), by
        assert found["cuda torch.bfloat16" + by][1] == pytest.approx(norm, rel=0.1), by


LIMIT = """
    import torch
    build = T.build_policy_in_memory
    def build_policy_in_memory(*arguments):
        built = build(*arguments)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + {more}) / total)
        return built
    T.build_policy_in_memory = build_policy_in_memory
"""


@pytest.fixture(scope="module")
def wide_run(tiny_run, bundled_model):
    """The bundled model on eight short pairs in one forward, whose activations take some hundred MiB."""
    changed = {
        "REFERENCE_CACHE": "off",
        "POLICY_MODEL_PATH": "",
        "GRADIENT_ACCUM_STEPS": "8",
        "PAIRS_PER_FORWARD": "8",
        "EVAL_STEPS": "0",
    }
    return {**tiny_run, **EXACT, **changed}


def test_the_probe_lowers_pairs_per_forward(wide_run, tmp_path):
    """It is found out how much a forward of all eight pairs takes; then there is three quarters of that."""
    measured, limited = tmp_path / "measured", tmp_path / "limited"
    measured.mkdir(), limited.mkdir()
    peak = """
        import torch
        probe = T.probe
        def measured(args, policy, pairs, reserved):
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            probe(args, policy, pairs, reserved)
            print("TAKES", torch.cuda.max_memory_allocated() - held, reserved, flush=True)
        T.probe = measured
    """
    whole = rank_on_gpu(sabotaged(peak, measured), wide_run, measured)
    assert whole.returncode == 0, whole.stderr[-3000:]
    takes, reserved = map(int, whole.stdout.split("TAKES ")[1].split()[:2])
    less = reserved + (takes - reserved) * 3 // 4
    lowered = rank_on_gpu(sabotaged(LIMIT.format(more=less), limited), wide_run, limited)
    assert lowered.returncode == 0, lowered.stderr[-3000:]
    said = [LOWERED.replace("from 4", "from 8").format(size) in lowered.stdout for size in (4, 2, 1)]
    assert said.count(True) == 1
    assert series(limited, "loss/train") == pytest.approx(series(measured, "loss/train"), rel=1e-3)


def test_too_little_memory_is_one_message(wide_run, tmp_path):
    result = rank_on_gpu(sabotaged(LIMIT.format(more=0), tmp_path), wide_run, tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    message = result.stderr.split("error:\n")[1]
    assert "one pair does not fit into memory" in message and "GRADIENT_CHECKPOINTING (now false): true" in message
    assert not output_of(tmp_path).exists()


def test_the_peak_that_is_reported_is_the_gpus(default_run):
    """SmolLM2 in bf16 is 0.25 GiB; the machine's memory, which a CPU run reports, would be above 1 GiB more."""
    peaks = [logs["throughput/peak_memory_gib"] for logs in history(default_run[0]) if "loss/train" in logs]
    assert all(0.25 < peak < 12 for peak in peaks) and peaks == sorted(peaks)
