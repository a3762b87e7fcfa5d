"""From the raw output of a process to lines that a terminal would have shown."""

from __future__ import annotations

MAX_LINE_BYTES = 64 << 10


class LineSplitter:
    """Cuts a byte stream into lines of text; no I/O.

    Of a line that carriage returns overwrote, such as a progress bar, only the last state counts. Bytes that are not UTF-8 become
    U+FFFD. A line of more than 64 KiB is cut there, and each part but the last ends with an ellipsis.
    """

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that ``data`` completes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        texts: list[str] = []
        for line in lines:
            parts, rest = _cut(line)
            texts += [*parts, _decode(rest)]
        parts, self._partial = _cut(self._partial)
        return texts + parts

    @property
    def is_overwritten(self) -> bool:
        """Whether the line that is not complete yet has been begun anew by a carriage return."""
        return b"\r" in self._partial

    def take_state(self) -> list[str]:
        """Return the state that was overwritten last, which is the newest that is surely complete."""
        overwritten, _, self._partial = self._partial.rpartition(b"\r")
        state = _decode(overwritten)
        return [state] if state else []

    def flush(self) -> list[str]:
        """Return the last line when it did not end with a newline."""
        partial, self._partial = self._partial, b""
        return [_decode(partial)] if partial else []


def _cut(line: bytes) -> tuple[list[str], bytes]:
    """Return full parts of an overlong line and what is left of it, at most 64 KiB."""
    if len(line) <= MAX_LINE_BYTES:
        return [], line
    shown = line.rstrip(b"\r").rpartition(b"\r")[2]
    parts = []
    while len(shown) > MAX_LINE_BYTES:
        parts.append(_decode(shown[:MAX_LINE_BYTES]) + "…")
        shown = shown[MAX_LINE_BYTES:]
    return parts, shown


def _decode(line: bytes) -> str:
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
