"""An installed distribution that adds communicators, without pip: what ``importlib.metadata`` reads of one."""

from __future__ import annotations

from pathlib import Path


def install_distribution(directory: Path, name: str, communicators: dict[str, str]) -> None:
    """Make ``directory``, which is on the path, hold a distribution with entry points ``name -> module:factory``."""
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in communicators.items())
    (info / "entry_points.txt").write_text(f"[zspmd.communicators]\n{lines}")
