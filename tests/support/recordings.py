"""Small recordings, written without a launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zspmd
from zspmd.transport.codec import ValueEncoder
from zspmd.transport.frames import ResultKind, StepKind
from zspmd.transport.recorded_launch import RecordedFault, RecordedLaunch
from zspmd.transport.recording import EntryKind, EntryWriter
from zspmd.transport.schema import pack_record


def build_launch(**fields: Any) -> RecordedLaunch:
    """Return the first record of a recording of two ranks."""
    defaults: dict[str, Any] = {
        "zspmd_version": zspmd.__version__,
        "launch_id": "recorded",
        "epoch": 5,
        "worker": "support.workers:Echo",
        "main_path": "",
        "cwd": "/",
        "sys_path": (),
        "preload": (),
        "start_method": "fork",
        "tp": 2,
        "pp": 1,
        "dp": 1,
        "ep": 1,
        "output_ranks": (0, 1),
        "devices": ("cpu", "cpu"),
        "communicator": "shm",
        "window": 4,
        "omp_num_threads": "1",
        "beat_s": 1.0,
        "ready_s": 60.0,
        "step_s": 30.0,
        "collective_s": 60.0,
        "drain_s": 5.0,
        "kill_s": 2.0,
    }
    return RecordedLaunch(**{**defaults, **fields})


def write_recording(
    path: Path,
    *,
    frames: Sequence[Any] = (),
    answers: Sequence[tuple[int, int, Any]] = (),
    fault: RecordedFault | None = None,
    version: str = zspmd.__version__,
) -> Path:
    """Write a recording; lists in ``frames`` are calls, all else steps, and ``answers`` are (rank, seq, value)."""
    encoder, writer = ValueEncoder(), EntryWriter.create(str(path))
    writer.write(EntryKind.LAUNCH, pack_record(build_launch(zspmd_version=version)))
    writer.write(EntryKind.ARGUMENTS, *encoder.encode({"scale": 2.0}))
    for seq, value in enumerate(frames, 1):
        writer.write(EntryKind.FRAME, *encoder.encode(value), code=StepKind.CALL if isinstance(value, list) else StepKind.STEP, seq=seq)
    for rank, seq, value in answers:
        code = ResultKind.REPLY if isinstance(frames[seq - 1], list) else ResultKind.OUTPUT
        writer.write(EntryKind.ANSWER, *encoder.encode(value), code=code, rank=rank, seq=seq)
    if fault is not None:
        writer.write(EntryKind.FAULT, pack_record(fault))
    writer.close()
    return path
