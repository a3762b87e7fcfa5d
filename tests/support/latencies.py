"""How long something took in many runs: each within its bound, all of them as one line of figures."""

from __future__ import annotations

import pytest


class Latencies:
    """Collects times of one kind.

    Args:
        name: what is timed, from where to where.
        bound_s: what no single one may pass.
    """

    def __init__(self, name: str, bound_s: float) -> None:
        self._name = name
        self._bound_s = bound_s
        self._seconds: list[float] = []

    def add(self, seconds: float, run: object) -> None:
        """Take one time; ``run`` says in the assertion how to have it again."""
        assert seconds < self._bound_s, f"{self._name}: {seconds:.3f} s, above {self._bound_s:g} s, in {run}"
        self._seconds.append(seconds)

    def publish(self, request: pytest.FixtureRequest) -> None:
        """Have the figures shown at the end of the test run, if anything was timed."""
        if self._seconds:
            request.node.user_properties.append(("figures", str(self)))

    def quantile(self, share: float) -> float:
        """Return the smallest time that ``share`` of all do not pass, in seconds."""
        ordered = sorted(self._seconds)
        return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]

    def __str__(self) -> str:
        p50, p99 = self.quantile(0.5) * 1e3, self.quantile(0.99) * 1e3
        return f"{self._name}: n {len(self._seconds)}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {max(self._seconds) * 1e3:.0f} ms"
