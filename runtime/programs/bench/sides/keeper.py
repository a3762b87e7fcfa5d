"""The parent of a side: ends all that the side has started, when that ends, at SIGTERM, and when the benchmark is gone.

Whatever the side starts, in whatever session, becomes this process's own child once its parent has ended. Ray's servers outlive a driver
that is killed by seconds otherwise, or for good, and their semaphores outlive them. Arguments: the parent's pid, then what this interpreter
is to run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

from zspmd import process
from zspmd.runtime.programs.bench.sides.ray_semaphores import remove_semaphores

_END_S = 10.0


def keep(parent: int, argv: list[str]) -> int:
    """Run the side to its end and return its exit code, 128 + N after signal N."""
    started_ns = time.time_ns()
    signal.signal(signal.SIGTERM, _end)
    ctypes.CDLL(None).prctl(process.PR_SET_PDEATHSIG, signal.SIGTERM)
    process.become_subreaper()
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    try:
        bound = [sys.executable, "-I", "-S", str(process.__file__), str(os.getpid()), os.getcwd(), sys.executable]
        code = subprocess.Popen([*bound, *argv]).wait()
        return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if left := process.end_children(_END_S):
            print(f"pids {', '.join(map(str, left))} did not end even after SIGKILL", file=sys.stderr)
        remove_semaphores(started_ns)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
