"""Launches of the workers in ``support.workers``, quick to start and with deadlines that suit a busy machine."""

from __future__ import annotations

from typing import Any

import zspmd

DEADLINES = zspmd.Deadlines(beat_s=0.2, ready_s=60.0, step_s=30.0, collective_s=60.0, drain_s=5.0, kill_s=2.0)


def launch(worker: str, world_size: int = 2, **options: Any) -> zspmd.WorkerGroup:
    """Return a group of ``support.workers.<worker>``; no torch is imported before the ranks are forked, and all ranks answer."""
    defaults: dict[str, Any] = {"output_ranks": "all", "preload": (), "deadlines": DEADLINES}
    return zspmd.launch(f"support.workers:{worker}", world_size=world_size, **{**defaults, **options})
