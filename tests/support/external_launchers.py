"""Other launchers, real ones, that start programs under test, and what those print as JSON lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROGRAM = str(Path(__file__).parent / "external_program.py")
RUN = "zspmd.runtime.launch.cli"
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n")
LAUNCHERS = ("torchrun", "openmpi")


def command(launcher: str, num_ranks: int, *arguments: str) -> list[str]:
    """Return what starts ``python ARGUMENTS`` so many times; skips the test where there is no mpirun."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *arguments]
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun on this machine; Debian has it in openmpi-bin")
    return [*MPIRUN, str(num_ranks), sys.executable, *arguments]


class Started:
    """A launcher that runs; ``said`` are the JSON lines that it has printed so far."""

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        self.said: list[dict[str, Any]] = []

    def read_until(self, key: str) -> dict[str, Any]:
        """Return the first line that says ``key``; raises RuntimeError where the program ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.append(json.loads(line))
                if key in self.said[-1]:
                    return self.said[-1]
        raise RuntimeError(f"it ended: {self.process.communicate()[1]}")

    def pid_of(self, rank: int) -> int:
        """Return the pid of the process that the launcher has started for a rank."""
        return next(int(said["pid"]) for said in self.said if said.get("process") == rank)

    def finish(self, timeout_s: float = 60.0) -> tuple[int, str]:
        """Wait for the end; return exit code and standard error, and read what it still says."""
        out, errors = self.process.communicate(timeout=timeout_s)
        self.said += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return self.process.returncode, errors


def run_json(arguments: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Run to a good end; return what was printed as JSON."""
    started = Started(arguments, **options)
    code, errors = started.finish()
    assert code == 0, errors
    return started.said
