"""The layers: who may import whom, and that neither the package nor a running driver loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.package import PACKAGES, ROOT, SOURCES, imports_of, module_name

LEAVES = (
    "backends",
    "errors",
    "config",
    "topology",
    "model_config",
    "mixture_config",
    "latent_config",
    "rope_config",
    "model_sizes",
    "transformers_config",
    "expert_placement",
    "expert_dispatch",
    "speculation_config",
    "config_fields",
    "safetensors_files",
    "process",
    "descriptors",
)
FORBIDDEN = {
    "transport": {"torch", "zspmd.runtime", "zspmd.workers", "zspmd.models", "transformers"},
    "runtime": {"torch", "zspmd.workers", "zspmd.models", "transformers", "zspmd.runtime.programs"},
    "workers": {"asyncio", "zspmd.runtime", "uvloop"},
    "models": {"zmq", "asyncio", "zspmd.runtime", "zspmd.transport", "zspmd.workers"},
}


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


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
