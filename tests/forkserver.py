"""Starts the program in a fork of a process that has imported the libraries already: at once, instead of after 6 s.

The program is run by its file as `__main__`, with its own arguments, environment, folder, output and exit status.
"""

import atexit
import contextlib
import functools
import gc
import itertools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NUMBERS = itertools.count()
PROGRAM = Path(__file__).resolve().parent.parent / "train_with_preference_prompt.py"


class Run:
    """One start of the program, in a process group of its own."""

    def __init__(self, pid: int, stdout: Path, stderr: Path, port: str):
        self.pid, self.stdout, self.stderr, self.port = pid, stdout, stderr, port

    def kill(self, sent: int = signal.SIGKILL) -> None:
        os.killpg(self.pid, sent)

    def wait(self, timeout: float = 400) -> subprocess.CompletedProcess:
        """The finished run; one that takes longer is killed.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        ask({"wait": self.pid})
        in_time = select.select([server().stdout], [], [], timeout)[0]
        if not in_time:
            self.kill()
        status = answer()
        RUNNING.remove(self)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self.stdout, self.stderr))
        for buffer in Path("/dev/shm").glob(
            f"deepspeed_*_{self.port}_*"
        ):  # of a killed run; the launcher does the same
            buffer.unlink()
        if not in_time:
            raise subprocess.TimeoutExpired("the program", timeout, out, err)
        return subprocess.CompletedProcess("the program", status, out, err)


RUNNING: list[Run] = []


@functools.cache
def server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, __file__], text=True, bufsize=1, **pipes)
    atexit.register(process.kill)
    return process


@functools.cache
def logs() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="forkserver-")


def ask(request: Mapping[str, Any]) -> None:
    print(json.dumps(request), file=server().stdin, flush=True)


def answer() -> int:
    return int(server().stdout.readline())


def start(argv: Sequence[str], environment: Mapping[str, str], cwd: Path, program: Path = PROGRAM) -> Run:
    """Starts the program; what it prints can be read while it runs."""
    number = next(NUMBERS)
    stdout, stderr = (Path(logs().name, f"{number}.{stream}") for stream in ("stdout", "stderr"))
    request = {"argv": [str(program), *argv], "environment": dict(environment), "cwd": str(cwd)}
    ask({**request, "outputs": [os.devnull, str(stdout), str(stderr)]})
    RUNNING.append(Run(answer(), stdout, stderr, environment["MASTER_PORT"]))
    return RUNNING[-1]


def end_what_is_left() -> None:
    """Ends the runs that a test which failed has left."""
    for left in list(RUNNING):
        with contextlib.suppress(ProcessLookupError):
            left.kill()
        left.wait()


def prepare() -> None:
    """Does what every run begins with, and its forks need not do again: imports, and tables that are made once."""
    import accelerate.utils.deepspeed  # noqa: F401
    import deepspeed  # noqa: F401
    import peft
    import torch.utils.cpp_extension
    import torch.utils.tensorboard
    import transformers.hf_argparser
    import transformers.integrations.deepspeed
    import transformers.trainer  # noqa: F401
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    torch.compile(len)  # DeepSpeed's optimizers do something like it, which imports for seconds
    lora = peft.LoraConfig(target_modules="all-linear")
    with torch.device("meta"):  # the first adapter's tables hold the names of every architecture's layers
        peft.get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), lora)
    gc.freeze()


def serve() -> None:
    """Answers on stdin each request to start the program with the process number, and to wait with the exit status."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    prepare()
    sys.modules["matplotlib"] = None  # not installed here: most tests look at no picture, which takes seconds to draw
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), file=answers)
            continue
        child = os.fork()
        if child == 0:
            return become(request)
        print(child, file=answers)


def become(request: Mapping[str, Any]) -> None:
    """Turns this process into the program."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for number, path in enumerate(request["outputs"]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    leave(status)


def leave(status: int) -> None:
    """Ends the process as the interpreter would, but for tidying up all memory, of which each page would be copied."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
