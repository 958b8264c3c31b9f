"""Fuzzes the two readers of files that others wrote:  python tests/fuzz.py rows|embeddings --seconds 600 [--seed N]

rows: data files (`read_pairs`). embeddings: soft prompts as zip or legacy .pt, .safetensors or PEFT folder
(`read_soft_prompt`). Guided by coverage where atheris is installed (`pip install --no-deps atheris==3.0.0`: wheels for
Linux and CPython 3.11 to 3.13), else by random mutation of the same seeds. Pytest does not collect this file.

A finding is anything but a result or an InputError: another exception, a message that is not one brief and printable
line for each problem, more than 5 s or 1 GB of memory for a small file, a file written, a process started, a socket
opened, or a crash, after which the fuzzing goes on. Each kind is listed once with its input, which --replay FILE reads
again.
"""

import argparse
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_with_preference_prompt as T  # noqa: E402

GUIDED = importlib.util.find_spec("atheris") is not None
MODULES = (T, torch._weights_only_unpickler, torch.serialization, torch._utils, torch._tensor, json.decoder)
ROWS_FILES = ("a.jsonl", "a.json", "a.csv", "a.parquet")
K, H, MOST_SECONDS, MOST_MEMORY = 2, 4, 5.0, 2**30
FORBIDDEN = ("subprocess", "socket", "os.", "shutil.", "tempfile.", "pty.", "ctypes.dlopen")
watching, done = [], []  # not empty while a reader is at work · what it did that it must not do


def audit(event: str, arguments: tuple) -> None:
    """Notes all that reaches beyond the reader's own memory, but for reading files and listing folders."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if watching and (writes or event.startswith(FORBIDDEN)) and event not in ("os.listdir", "os.scandir"):
        done.append(f"did {event}: {str(arguments)[:80]}")


def zipped(content: bytes) -> bytes:
    """A zip .pt file with this as its data.pkl and with one storage of K × H fp32 numbers."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, data in (("data.pkl", content), ("data/0", bytes(4 * K * H)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def pickled(value) -> bytes:
    """What torch.save writes into the data.pkl of a zip file."""
    torch.save(value, buffer := io.BytesIO())
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def words(target: str) -> list[bytes]:
    """What mutations should know: field names, or the opcodes, calls and objects that torch.load allows."""
    if target == "rows":
        fields = [
            b'"prompt"',
            b'"chosen"',
            b'"rejected"',
            b'"role"',
            b'"content"',
            b'"user"',
            b'"assistant"',
            b'"system"',
        ]
        marks = [
            b"\\ud83d",
            b"\xef\xbb\xbf",
            b"\r\n",
            b"\0",
            b"NaN",
            b"1e999",
            b"\\n\\nHuman:",
            b"\\n\\nAssistant:",
            b'""',
        ]
        return [*fields, *marks, b"PAR1", b"\x1f\x8b", b'[{"', b'"tool_calls"', b'"images"', b'"type": "text"']
    allowed = (name.encode().rsplit(b".", 1) for name in torch._weights_only_unpickler._get_allowed_globals())
    names = [b"items", b"keys", b"dim", b"to", b"detach", b"numel", b"weight", b"storage"]
    texts = [b"X" + len(text).to_bytes(4, "little") + text for text in names]
    texts += [b"}" + text + b"K\5sb" for text in texts]  # an object's attribute of that name
    opcodes = [b"R", b"b", b"Q", b"(", b"t", b"u", b"s", b"}", b")", b"]", b"a", b"N", b"K\5", b"J\xff\xff\xff\x1f"]
    opcodes += [b"\x81", b"\x85", b"\x86", b"\x87", b"q\0", b"h\0", b"\x8a\1\x7f"]
    calls = [b"c%s\n%s\n" % (module, name) for module, name in allowed]
    return [*opcodes, *texts, *calls, pickled(torch.ones(K, H))[2:-1]]


PIECES = words("embeddings")


def write_input(target: str, data: bytes, folder: Path) -> Path:
    """Makes what a reader is to read. The first byte says what file the others belong in, so that mutations of a zip
    file's pickle, a safetensors header or a PEFT configuration leave the file around them whole; in the last kind each
    byte stands for a piece of a pickle."""
    kind, body = data[0] if target == "embeddings" and data else 0, data[1:]
    rows = ROWS_FILES[data[0] % len(ROWS_FILES)] if data else ROWS_FILES[0]
    files = (
        {rows if target == "rows" else "soft": body},
        {"soft": zipped(body)},
        {"soft": len(body).to_bytes(8, "little") + body + bytes(4 * K * H)},
        {"adapter_config.json": body, "adapter_model.bin": b""},
        {"adapter_config.json": b'{"peft_type": "PROMPT_TUNING"}', "adapter_model.bin": body},
        {"soft": zipped(b"\x80\2" + b"".join(PIECES[byte % len(PIECES)] for byte in body) + b".")},
    )[kind % 6]
    for file in folder.iterdir():
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / rows if rows in files else folder / "soft" if "soft" in files else folder


def seeds(target: str) -> list[bytes]:
    """Valid and nearly valid inputs."""
    if target == "rows":
        good = {"prompt": "Two plus two? 🥚\n", "chosen": "Four.", "rejected": "五。"}
        lines = [json.dumps(good), json.dumps(good, ensure_ascii=False), json.dumps({**good, "x": [1.5, None, {}]})]
        lines += ["\r\n\r\n".join(lines), "\ufeff" + lines[0], json.dumps({**good, "chosen": None}), "[" * 3000]
        lines += ['{"prompt": "\\ud83d"}', '{"prompt": 1' + "0" * 5000 + "}", '{"a": NaN, "a": 1e999}', "\0"]
        turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": [{"type": "text", "text": "B."}]}]
        other = {"chosen": [*turns, *turns], "rejected": [*turns, turns[0], {"role": "assistant", "content": "C."}]}
        lines += [json.dumps(other), json.dumps({name: json.dumps(value) for name, value in other.items()})]
        lines += [json.dumps({name: f"\n\nHuman: A?\n\nAssistant: {name}" for name in other})]
        table = 'prompt,chosen,rejected\r\n"a\nb",c,"d""e"\r\n'
        found = [bytes([kind]) + line.encode() for line in lines for kind in (0, 1)]
        found += [
            b"\1" + json.dumps([good, other]).encode(),
            b'\1{"data": [%s]}' % lines[0].encode(),
            b"\2" + table.encode(),
        ]
        pq.write_table(pa.Table.from_pylist([good, {**good, "chosen": None}]), parquet := io.BytesIO())
        return [*found, b"\3" + parquet.getvalue(), b"\0" + gzip.compress(lines[0].encode())]
    soft, noted = torch.ones(K, H), torch.ones(K, H)
    noted.note = 5
    objects = [soft, noted, {"embeddings": noted}, torch.nn.Parameter(soft), {"a": soft.half(), 1: None}]
    objects += [torch.nn.Embedding(K, H).state_dict(), soft.to("meta"), soft.to_sparse(), soft[:1].expand(K, H)]
    objects += [{"x": [1.5, (True, b"b")], "prompt_encoder.default.embedding.weight": soft}, {"s": {1}, "z": 1j}]
    safe = safetensors.torch.save({"prompt_embeddings": soft, "b": soft.bfloat16()}, {"format": "pt"})
    found = [b"\0" + safe, b"\2" + safe[8 : 8 + int.from_bytes(safe[:8], "little")], b'\3{"peft_type": "P_TUNING"}']
    for value in objects:
        torch.save(value, new := io.BytesIO())
        torch.save(value, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
        found += [b"\0" + new.getvalue(), b"\1" + pickled(value), b"\0" + legacy.getvalue(), b"\4" + legacy.getvalue()]
    ordered, weight = PIECES.index(b"ccollections\nOrderedDict\n"), PIECES.index(b"X\6\0\0\0weight")
    new, call, item = (PIECES.index(piece) for piece in (b")", b"R", b"s"))
    return [*found, bytes([5, ordered, new, call, weight, len(PIECES) - 1, item]), bytes([5, len(PIECES) - 1])]


def read(target: str, path: Path, hidden_size: int | None) -> str | None:
    """Reads an input as the program does: what is wrong with the outcome, or None."""
    try:
        if target == "rows":
            pairs, report = T.read_pairs(path)
            fits = (
                0 < len(pairs) == report.usable
                and "".join(map(str, pairs)).encode()
                and len(T.pairs_digest(pairs)) == 64
            )
        else:
            soft = T.read_soft_prompt(str(path), hidden_size)
            fits = soft is None or (soft.dtype == torch.float32 and soft.dim() == 2 and bool(soft.isfinite().all()))
        return None if fits else "wrong result"
    except T.InputError as error:
        lines = str(error).split("\n")
        clean = len(lines) == len(error.problems) and all(map(str.isprintable, lines)) and max(map(len, lines)) < 4000
        return None if clean else f"message: {str(error)[:200]!r}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame.name for frame in frames if frame.filename == T.__file__]
        return f"{type(error).__name__} from {own[-1]}, in {frames[-1].name}: {str(error)[:80]}"


def finding(target: str, data: bytes, folder: Path) -> str | None:
    """What is wrong with how an input is read, or None."""
    path, before = write_input(target, data, folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done.clear()
    watching.append(start := time.monotonic())
    wrong = read(target, path, H if len(data) % 2 else None)
    watching.clear()
    if (seconds := time.monotonic() - start) > MOST_SECONDS:
        wrong = f"slow: {seconds:.0f} s, {wrong}"
    if (more := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MOST_MEMORY:
        wrong = f"memory: {more / 2**20:.1f} GB, {wrong}"
    return done[0] if done else wrong


def work(args: argparse.Namespace, seconds: int, seed: int) -> None:
    """Runs inputs until the time is over, or one input alone."""
    start, folder = seeds(args.target), Path(tempfile.mkdtemp(dir=args.out))
    for data in start:  # what is imported at first use is imported before the watch begins
        read(args.target, write_input(args.target, data, folder), H)
    sys.addaudithook(audit)
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MOST_MEMORY,) * 2)

    def one(data: bytes) -> None:
        if wrong := finding(args.target, data, folder):
            file = args.out / f"finding-{hashlib.sha1(wrong.split(':')[0].encode()).hexdigest()[:8]}"
            if not file.exists():
                file.write_bytes(data)
                print(f"FINDING {file} {wrong}", flush=True)

    if args.replay:
        print(finding(args.target, args.replay.read_bytes(), folder) or "nothing wrong")
        return
    (guided if GUIDED else mutated)(args, seconds, seed, start, one)


def guided(args, seconds, seed, start, one) -> None:
    import atheris

    for module in MODULES:
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == module.__name__]
        own += [method for thing in own if inspect.isclass(thing) for method in vars(thing).values()]
        for function in filter(inspect.isfunction, own):
            atheris.instrument_func(function)
    corpus, dictionary = args.out / "corpus", args.out / "dictionary"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(start):
        (corpus / f"seed-{number}").write_bytes(data)
    dictionary.write_text("".join('"' + "".join(map(r"\x{:02x}".format, word)) + '"\n' for word in words(args.target)))
    options = {"max_total_time": seconds, "seed": seed, "dict": dictionary, "artifact_prefix": f"{args.out}/"}
    options |= {"max_len": 6000, "len_control": 0, "timeout": 60, "rss_limit_mb": 0}
    atheris.Setup([__file__, *(f"-{name}={value}" for name, value in options.items()), str(corpus)], one)
    atheris.Fuzz()


def mutated(args, seconds, seed, start, one) -> None:
    draw, end, runs, known = random.Random(seed), time.monotonic() + seconds, 0, words(args.target)
    while time.monotonic() < end:
        data = bytearray(draw.choice(start))
        for _ in range(draw.randint(0, 4)):
            at, size = draw.randrange(len(data) + 1), draw.randint(0, 8)
            data[at : at + size] = draw.choice([draw.randbytes(size), draw.choice(known), b""])
        (args.out / f"crash-{seed}").write_bytes(data)  # left behind by a crash
        one(bytes(data))
        runs += 1
    (args.out / f"crash-{seed}").unlink()
    print(f"#{runs} DONE cov: unknown", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("rows", "embeddings"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of corpus, log and findings; a new one in /tmp if not given")
    parser.add_argument("--replay", type=Path, help="read this one input and say what is wrong with it")
    args = parser.parse_args()
    args.out = (args.out or Path(tempfile.mkdtemp(prefix=f"fuzz_{args.target}_"))).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.replay:
        return work(args, 0, 0)
    print(f"{'atheris' if GUIDED else 'random mutation'} for {args.seconds} s, into {args.out}", flush=True)
    end, crashes = time.monotonic() + args.seconds, 0
    with (args.out / "log").open("w+", errors="replace") as log:
        while (left := round(end - time.monotonic())) > 0:
            if not (child := os.fork()):
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                work(args, left, args.seed + crashes)
                os._exit(0)
            if status := os.waitpid(child, 0)[1]:
                crashes += 1
                code = os.waitstatus_to_exitcode(status)
                os.write(log.fileno(), f"\nFINDING {args.out}/crash-* or timeout-*: exit status {code}\n".encode())
        text = (args.out / "log").read_text(errors="replace")
    print("\n".join(re.findall(r"^FINDING.*", text, re.M)) or "no findings")
    runs = [0, *map(int, re.findall(r"^#(\d+)\s", text, re.M))]
    total = sum(before for before, after in zip(runs, [*runs[1:], 0], strict=True) if after <= before)
    coverage = re.findall(r"cov: (\w+)", text)[-1:] or ["unknown"]
    print(f"{total} runs, coverage {coverage[0]} edges, {crashes} crashes")


if __name__ == "__main__":
    main()
