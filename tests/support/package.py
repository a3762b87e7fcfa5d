"""The package's own sources, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import zspmd

ROOT = Path(zspmd.__file__).parent
PACKAGES = ("transport", "runtime", "workers", "models")


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


SOURCES = _sources()
"""Every module of the package, neither tests nor scripts."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("zspmd", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports_of(path: Path, *, with_typing: bool = False) -> set[str]:
    """Return the full names of what a module imports, at any depth: modules, and names that may be modules."""
    name, found = module_name(path), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if with_typing else _walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those that only type checkers see."""
    yield node
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.orelse:
                yield from _walk(statement)
        else:
            yield from _walk(child)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
