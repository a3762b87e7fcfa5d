"""The public names: complete, documented, and resolved only when they are used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import zspmd
from zspmd import errors

NAMES = [name for name in zspmd.__all__ if name != "__version__"]


def test_all_is_sorted_and_complete() -> None:
    assert zspmd.__all__ == sorted(set(zspmd.__all__))
    assert dir(zspmd) == zspmd.__all__
    raised = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}
    assert raised <= set(NAMES)
    assert {"launch", "Worker", "rpc", "Engine", "SamplingParams", "ParallelConfig", "Deadlines", "WorkerGroup"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented_where_it_lives(name: str) -> None:
    value = getattr(zspmd, name)
    assert inspect.getdoc(value)
    assert value.__name__ == name
    assert value.__module__.startswith("zspmd.")
    assert getattr(zspmd, name) is value


@pytest.mark.parametrize("name", NAMES)
def test_its_methods_are_documented(name: str) -> None:
    value = getattr(zspmd, name)
    methods = inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else []
    assert [key for key, method in methods if not key.startswith("_") and not inspect.getdoc(method)] == []


def test_type_checkers_see_the_same_names() -> None:
    (block,) = (node for node in ast.parse(Path(zspmd.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # what makes it a re-export
            seen[alias.name] = "." + (node.module or "")
    assert seen == zspmd._HOMES


def test_an_unknown_name_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"zspmd has no public name 'lunch'; it has .*, launch, "):
        _ = zspmd.lunch


def test_importing_resolves_nothing() -> None:
    program = "import sys, zspmd; print([n for n in sys.modules if n.startswith(('zspmd.', 'torch', 'numpy', 'zmq', 'asyncio'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_every_public_name_of_a_driver_resolves_without_torch() -> None:
    """``Communicator`` is for ranks, and takes tensors."""
    names = "[name for name in zspmd.__all__ if name != 'Communicator']"
    program = f"import sys, zspmd; [getattr(zspmd, name) for name in {names}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
