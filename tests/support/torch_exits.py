"""Running programs that end with gloo groups of torch, in spite of an abort of torch's own.

Now and then, mostly on a busy machine, a thread of gloo asks for the interpreter while that is being taken down, and the process aborts
after its work is done. It happens under torchrun and ``zspmd-run`` alike, and is nothing that these tests are after.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

ABORT = "terminate called without an active exception"
ATTEMPTS = 4


def run_to_its_end(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured; again where torch aborted a process on its way out."""
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        if ABORT not in done.stderr:
            break
    return done
