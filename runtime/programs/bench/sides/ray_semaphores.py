"""Named semaphores that Ray leaves in ``/dev/shm``: some for each channel of each compiled graph whose raylet was killed.

Ray 2.60 calls them ``hdr`` or ``obj``, then the pid of their maker, a dash and the nanosecond of their making, and unlinks them with the
objects that they guard; those of a raylet that is ended have nobody.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"sem\.(?:hdr|obj)(\d{1,10})-(\d{1,20})")


def remove_semaphores(since_ns: int, directory: Path = SHARED_MEMORY) -> int:
    """Remove those of this user that were made after ``since_ns`` (of ``time.time_ns``) by processes that are gone; returns how many."""
    num_removed = 0
    for path in list(directory.glob("sem.*-*")):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[2]) < since_ns or _is_alive(int(match[1])):
            continue
        try:
            if path.stat().st_uid == os.getuid():
                path.unlink()
                num_removed += 1
        except FileNotFoundError:  # another benchmark has removed it meanwhile
            continue
    return num_removed


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
