"""A terminal on which a program runs, and whoever sits before it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

CTRL_C = b"\x03"
DEADLINE_S = 10.0
_CHUNK_BYTES = 65536
# Before a program's words: a session of its own, whose terminal is standard input. The pid stays the same.
IN_ITS_OWN_SESSION = ("setsid", "--ctty")


class Terminal:
    """Both ends of a pseudo-terminal; ``text`` is what was read of it so far."""

    def __init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        os.set_blocking(self._ours, False)
        self._data = bytearray()

    @property
    def streams(self) -> dict[str, Any]:
        """What ``Popen`` takes, for a program whose command begins with ``IN_ITS_OWN_SESSION``."""
        return dict.fromkeys(("stdin", "stdout", "stderr"), self._theirs)

    @property
    def text(self) -> str:
        return self._data.decode(errors="replace").replace("\r\n", "\n")

    @property
    def size(self) -> int:
        """How many bytes were read so far."""
        return len(self._data)

    def let_go(self) -> None:
        """Leave the program's end to the program."""
        os.close(self._theirs)
        self._theirs = -1

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._ours, keys)

    def read(self, size: int = _CHUNK_BYTES) -> bytes:
        """Read at most so much of what is there; nothing at the end too."""
        with contextlib.suppress(BlockingIOError, OSError):  # EIO: nobody has the other end
            data = os.read(self._ours, size)
            self._data += data
            return data
        return b""

    def read_until(self, is_enough: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
        """Read on until a condition holds; raises AssertionError with what was shown."""
        deadline = time.monotonic() + timeout_s
        while not is_enough():
            assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s; the terminal shows: {self.text[-3000:]}"
            if not self.read():
                time.sleep(0.002)

    def close(self) -> None:
        """Turn the terminal off; idempotent."""
        for fd in (self._ours, self._theirs):
            if fd >= 0:
                os.close(fd)
        self._ours = self._theirs = -1


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """Hand out a terminal, which is off at the end."""
    made = Terminal()
    try:
        yield made
    finally:
        made.close()
