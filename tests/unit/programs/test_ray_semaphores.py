"""What Ray leaves behind after ``bench step`` goes; what lives, is older, or is called otherwise stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from zspmd.runtime.programs.bench.sides.ray_semaphores import remove_semaphores


def test_only_semaphores_of_processes_that_ended_since_then_go(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    gone = int(ended.stdout)
    stays = [f"sem.hdr{os.getpid()}-2000", f"sem.obj{gone}-999", f"sem.other{gone}-2000", f"hdr{gone}-2000", f"sem.hdr{gone}-2000.old"]
    for name in (*stays, f"sem.hdr{gone}-2000", f"sem.obj{gone}-1000"):
        (tmp_path / name).touch()
    assert remove_semaphores(1000, tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stays)
