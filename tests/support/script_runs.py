"""``zspmd-run`` from the shell's side, with the scripts of ``support/scripts``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.torch_exits import run_to_its_end

RUN = (sys.executable, "-m", "zspmd.runtime.launch.cli")
SCRIPTS = Path(__file__).parent / "scripts"


def script(name: str) -> str:
    """Return the path of a script."""
    return str(SCRIPTS / f"{name}.py")


def run(*arguments: str, timeout_s: float = 60.0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``zspmd-run`` to its end."""
    return run_to_its_end([*RUN, *arguments], timeout=timeout_s, cwd=cwd)


def begin(*arguments: str, num_ready: int = 0) -> subprocess.Popen[str]:
    """Start ``zspmd-run`` and return once so many ranks have printed "ready"."""
    process = subprocess.Popen([*RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while num_ready and (line := _read_line(process.stdout.fileno())):
        num_ready -= line.rstrip().endswith(b"ready")
    return process


def _read_line(fd: int) -> bytes:
    """Return one line, and leave what follows it to ``communicate``, which does not know what a file object has read ahead."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(fd, 1)):
        line += byte
    return line
