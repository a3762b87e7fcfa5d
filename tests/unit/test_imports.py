"""The layers: who may import whom, and that neither the package nor a running driver loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zspmd

ROOT = Path(zspmd.__file__).parent
PACKAGES = ("transport", "runtime", "workers", "models")
LEAVES = ("backends", "errors", "config", "topology", "model_config", "safetensors_files", "process")
FORBIDDEN = {
    "transport": {"torch", "zspmd.runtime", "zspmd.workers", "zspmd.models", "transformers"},
    "runtime": {"torch", "zspmd.workers", "zspmd.models", "transformers", "zspmd.runtime.programs"},
    "workers": {"asyncio", "zspmd.runtime", "uvloop"},
    "models": {"zmq", "asyncio", "zspmd.runtime", "zspmd.transport", "zspmd.workers"},
}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
TORCH_LOADS = {"load"}  # torch.load unpickles; safetensors' functions have longer names


def sources() -> list[Path]:
    """Return every module of the package, neither tests nor scripts."""
    return sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("zspmd", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that only type checkers see."""
    yield node
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.orelse:
                yield from walk(statement)
        else:
            yield from walk(child)


def imports_of(path: Path, *, with_typing: bool = False) -> set[str]:
    """Return the full names of what a module imports, at any depth: modules, and names that may be modules."""
    name, found = module_name(path), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if with_typing else walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


SOURCES = sources()
every_source = pytest.mark.parametrize("path", SOURCES, ids=module_name)


def test_the_whole_package_is_read() -> None:
    names = {module_name(path) for path in SOURCES}
    assert {"zspmd", "zspmd.errors", "zspmd.transport.codec", "zspmd.runtime.driver.group", "zspmd.workers.main", "zspmd.models"} <= names
    assert not [directory.name for directory in ROOT.iterdir() if (directory / "__init__.py").exists() and directory.name not in PACKAGES]


@every_source
def test_layers(path: Path) -> None:
    """``runtime`` and ``workers`` meet only in ``transport``; ``models`` know neither."""
    name = module_name(path)
    layer = name.split(".")[1] if name != "zspmd" else ""
    forbidden = FORBIDDEN.get(layer, set())
    if is_below(name, "zspmd.runtime.programs") or is_below(name, "zspmd.runtime.launch.cli"):
        forbidden = forbidden - {"zspmd.runtime.programs", "zspmd.workers", "zspmd.models"}
    broken = {found for found in imports_of(path) for rule in forbidden if is_below(found, rule)}
    assert not broken, f"{name} must not import {', '.join(sorted(broken))}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_use_the_standard_library_and_each_other(leaf: str) -> None:
    used = imports_of(ROOT / f"{leaf}.py", with_typing=True)
    allowed = {*sys.stdlib_module_names, *(f"zspmd.{name}" for name in LEAVES)}
    assert not {name for name in used if name.partition(".")[0] not in allowed and not any(is_below(name, ok) for ok in allowed)}


@every_source
def test_nothing_unpickles_or_runs_what_it_reads(path: Path) -> None:
    unsafe = {name for name in imports_of(path, with_typing=True) if name.partition(".")[0] in UNSAFE_MODULES}
    assert not unsafe
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in UNSAFE_CALLS, f"line {node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TORCH_LOADS:
            assert not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"), f"line {node.lineno} calls torch.load"


@every_source
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


DRIVE = """
import asyncio, sys
import zspmd
assert "torch" not in sys.modules and "numpy" not in sys.modules and "zmq" not in sys.modules, "import zspmd"

async def main():
    async with zspmd.launch("support.workers:Echo", world_size=1, preload=()) as group:
        print(await group.step({"x": 1}))

asyncio.run(main())
loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers")]
assert not loaded, loaded
"""


def test_a_running_driver_never_loads_torch() -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{DRIVE}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "[{'rank': 0, 'inputs': {'x': 1}}]\n"), done.stderr
