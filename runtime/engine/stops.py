"""Stop texts, found in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on, save what may be the start of a stop text; the stop that is complete first ends it.

    The outcome does not depend on how the text is cut into pieces. Of stops that are complete at the same character, the longest
    counts, so that none of it is shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._first_letters = frozenset(stop[0] for stop in self._stops)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return the text that can be shown now, and the stop text that was completed, if any.

        Args:
            text: the next piece.
            may_stop: False ignores stops that are complete within this piece, as ``min_tokens`` asks.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        if may_stop:
            found = self._earliest(text, len(self._held))
            if found is not None:
                end, stop = found
                self._held = ""
                return text[: end - len(stop)], stop
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _earliest(self, text: str, seen: int) -> tuple[int, str] | None:
        """End and text of the match that ends first beyond ``seen``; the longest of several."""
        found = None
        for stop in self._stops:
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), -len(stop), stop)
                found = candidate if found is None else min(found, candidate)
        return None if found is None else (found[0], found[2])

    def _possible_start(self, text: str) -> int:
        """Index of the longest ending of ``text`` that begins a stop, ``len(text)`` where none does."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_letters:
                tail = text[start:]
                if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stops):
                    return start
        return len(text)
