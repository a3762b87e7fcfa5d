"""What no module of the package may do: run what it reads, unpickle, trust the clock of the wall, or check input with ``assert``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.audited import loaded_files, watch_events
from support.groups import DEADLINES
from support.leaks import LeakCheck
from support.package import ROOT, SOURCES, imports_of, module_name

import zspmd

UNSAFE_MODULES = {
    *("pickle", "_pickle", "pickletools", "copyreg", "marshal", "shelve", "dbm", "dill", "cloudpickle", "joblib"),
    *("multiprocessing", "xmlrpc", "code", "codeop", "runpy", "yaml"),
}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
UNSAFE_ATTRIBUTES = {
    *("recv_pyobj", "send_pyobj", "recv_json", "send_json", "recv_serialized", "send_serialized"),  # pyzmq's own; the first two pickle
    *(
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    ),  # torch's
    *("allow_pickle", "read_pickle", "to_pickle", "weights_only", "trust_remote_code", "auto_map"),
}
LOADERS = {"torch", "np", "numpy", "torch.jit", "torch.hub", "torch.package", "torch.export", "joblib", "yaml"}
CHOOSES_NAMES = {"torch", "np", "numpy", "builtins", "os", "sys"}  # whose attributes no text from elsewhere may choose
WALL_CLOCKS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "datetime.now", "datetime.utcnow", "date.today"}

MAY_IMPORT_BY_NAME = {
    "zspmd": "its own public names",
    "zspmd.runtime.launch.cli": "programs, out of the list of those in the package",
    "zspmd.workers.communicators.registry": "built-in communicators, out of a table",
    "zspmd.workers.main": "the worker class, which the driver's program chose",
    "zspmd.workers.zygote": "modules that the driver's program chose, over a pair of sockets that nobody else holds",
}
MAY_TELL_THE_TIME = {
    "zspmd.runtime.engine.chat_template": "templates print today's date",
    "zspmd.runtime.launch.launch_record": "when a launch was started, for people; nothing is decided by it",
    "zspmd.runtime.programs.bench.sides.keeper": "Ray names its semaphores by the wall clock",
}
# Where asserts stand for the type checker or an invariant of the code around them. Whatever reads bytes of others has none.
MAY_ASSERT = {
    "zspmd.models.deepseek": "built for models with a latent alone",
    "zspmd.models.latent_attention": "a model's layers are of the kind that its backend is for",
    "zspmd.models.llama": "what a stage is asked for is what it has",
    "zspmd.runtime.driver.faults": "what was seen of a rank fits its kind",
    "zspmd.runtime.driver.launch_site": "started only once prepared",
    "zspmd.runtime.driver.processes": "a rank that is welcomed has a connection",
    "zspmd.runtime.driver.script_launch": "used only once started",
    "zspmd.runtime.engine.blocks": "a full block has a digest",
    "zspmd.runtime.engine.engine": "its loop runs only once it is started",
    "zspmd.runtime.engine.scheduler": "one sequence alone fits",
    "zspmd.runtime.engine.wakeup": "one task waits",
    "zspmd.runtime.launch.dial.byte_tunnel": "used only once open",
    "zspmd.runtime.launch.dial.dial": "libzmq tells where it has bound",
    "zspmd.runtime.launch.dial.dial_link": "one agent at a time",
    "zspmd.runtime.launch.dial.dial_nodes": "a node that is awaited has called",
    "zspmd.runtime.launch.dial.dial_out": "an agent that runs has a stream",
    "zspmd.runtime.launch.nodes.agent_link": "pipes that it has asked for itself",
    "zspmd.runtime.launch.nodes.assembly": "every node was examined before",
    "zspmd.runtime.launch.rank_starting": "used only while open",
    "zspmd.runtime.launch.supervisor": "used only once started",
    "zspmd.runtime.programs.bench.start": "pipes that it has asked for itself",
    "zspmd.runtime.programs.generate": "a finished request has an output",
    "zspmd.workers.sampler": "shapes that this package computes itself",
    "zspmd.workers.speculation.rejection": "numbers of rows that its caller has counted",
    "zspmd.workers.zygote": "what the agent, the same program, sends",
}

every_source = pytest.mark.parametrize("path", SOURCES, ids=module_name)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for such an expression, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def unsafe_uses(source: str) -> list[str]:
    """Return what a source does that could run, or be made to build, what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            if (
                node.attr in UNSAFE_ATTRIBUTES
                or (node.attr == "load" and owner in LOADERS)
                or (owner == "os" and node.attr in ("system", "popen"))
            ):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword) and (node.arg in UNSAFE_ATTRIBUTES or (node.arg == "shell" and not is_false(node.value))):
            found.append(f"{node.arg}=")
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "auto_map"):
            found.append(repr(node.value))
        elif isinstance(node, ast.ImportFrom) and node.module in LOADERS and any(alias.name == "load" for alias in node.names):
            found.append(f"from {node.module} import load")
        elif isinstance(node, ast.Call) and chooses_a_name(node):
            found.append(f"getattr({dotted(node.args[0])}, ...)")
    return found


def chooses_a_name(call: ast.Call) -> bool:
    """Whether this is a ``getattr`` by which a text picks something out of a module that holds more than it should get."""
    if dotted(call.func) != "getattr" or isinstance(call.args[1], ast.Constant):
        return False
    return dotted(call.args[0]).split(".")[0] in CHOOSES_NAMES


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@every_source
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    unsafe = {name for name in imports_of(path, with_typing=True) if name.partition(".")[0] in UNSAFE_MODULES}
    assert not unsafe
    assert not unsafe_uses(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "run = exec",
        "torch.load(x)",
        "from torch import load",
        "np.load(x)",
        "np.frombuffer(x, allow_pickle=True)",
        "socket.recv_pyobj()",
        "dist.all_gather_object(x, y)",
        "getattr(torch, name)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "config['auto_map']",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert unsafe_uses(source)


@every_source
def test_modules_are_imported_by_name_only_where_the_name_is_the_users(path: Path) -> None:
    by_name = {"import_module", "exec_module", "spec_from_file_location"}
    uses = [node for node in nodes(path) if isinstance(node, ast.Attribute) and node.attr in by_name]
    assert not uses or module_name(path) in MAY_IMPORT_BY_NAME


@every_source
def test_time_is_monotonic_in_logic(path: Path) -> None:
    calls = {dotted(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
    names = {
        f"time.{alias.name}" for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.module == "time" for alias in node.names
    }
    wall = {clock for clock in WALL_CLOCKS if any(name == clock or name.endswith(f".{clock}") for name in calls | names)}
    assert not wall or module_name(path) in MAY_TELL_THE_TIME


@every_source
def test_asserts_check_no_input(path: Path) -> None:
    lines = [node.lineno for node in nodes(path) if isinstance(node, ast.Assert)]
    assert not lines or module_name(path) in MAY_ASSERT


@pytest.mark.parametrize("allowed", [MAY_IMPORT_BY_NAME, MAY_TELL_THE_TIME, MAY_ASSERT], ids=["imports", "clocks", "asserts"])
def test_the_exceptions_name_modules_of_the_package(allowed: dict[str, str]) -> None:
    assert set(allowed) <= {module_name(path) for path in SOURCES}


def assert_read(files: list[str]) -> None:
    """Every module of ours that a process has loaded is one that the tests above have read."""
    assert {Path(file).resolve() for file in files} <= {path.resolve() for path in SOURCES}


async def test_neither_driver_nor_ranks_unpickle_or_compile_anything_in_a_step(leak_check: LeakCheck) -> None:
    """Seen by the interpreter's own audit events, in libraries too; after a first step, which makes the imports."""
    async with zspmd.launch("support.audited:Audited", world_size=2, output_ranks="all", preload=("torch",), deadlines=DEADLINES) as group:
        await group.step({"x": np.ones(5000)})
        await group.call("told")
        seen = watch_events()
        for _ in range(3):
            outputs = await group.step({"x": np.ones(5000)})
        told = await group.call("told")
        ours = list(seen)
    assert [float(output["total"][0]) for output in outputs] == [2.0, 2.0]
    assert (ours, [answer["events"] for answer in told]) == ([], [[], []])
    for answer in told:
        assert_read(answer["files"])
        assert any(file.endswith("workers/main.py") for file in answer["files"])
    assert_read(loaded_files())


@pytest.mark.parametrize("program", ["generate", "replay", "doctor"])
def test_what_zspmd_run_loads_has_been_read(program: str) -> None:
    code = f"""
import contextlib, sys
from zspmd.runtime.launch import cli
with contextlib.suppress(SystemExit):
    cli.main([{program!r}, "--help"])
print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "zspmd"), sep="\\n", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    files = done.stderr.split()
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "runtime" / "programs" / f"{program}.py") in files
    assert_read(files)
