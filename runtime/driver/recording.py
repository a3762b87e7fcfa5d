"""Recording a launch: what a group tells of its frames, and the file that keeps it."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ... import __version__
from ...errors import ConfigError, WorkerError, WorkerRaisedError, ZspmdError
from ...transport.frames import Buffer, ResultFrame, ResultKind, StepKind
from ...transport.recorded_launch import RecordedFault, RecordedLaunch
from ...transport.recording import EntryKind, EntryWriter
from ...transport.schema import pack_record

if TYPE_CHECKING:
    from .launching import GroupConfig

_ANSWERS = (ResultKind.OUTPUT, ResultKind.REPLY, ResultKind.CALL_ERROR, ResultKind.ERROR)
_MAX_MESSAGE = 65_536


class GroupRecorder(Protocol):
    """Is told what passes between a group and its ranks, on the event loop's thread, as it is encoded.

    Attributes:
        path: where ranks record their collectives, beside this file; empty if they are not to.
    """

    path: str

    def starting(self, config: GroupConfig, epoch: int, worker_args: tuple[bytes, Sequence[Buffer]], *, omp_num_threads: str) -> None:
        """The ranks are about to be started."""

    def published(self, kind: StepKind, seq: int, body: Buffer, buffers: Sequence[Buffer]) -> None:
        """A frame was published."""

    def answered(self, frame: ResultFrame) -> None:
        """A rank has sent something; its body and buffers are valid during the call."""

    def failed(self, error: ZspmdError) -> None:
        """The first cause is known."""

    def close(self) -> None:
        """The group is closed, or could not be started."""


class FileRecorder:
    """Writes a recording; ``transport.recording`` has its format, and what happens when the disk is full."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._writer: EntryWriter | None = None

    def starting(self, config: GroupConfig, epoch: int, worker_args: tuple[bytes, Sequence[Buffer]], *, omp_num_threads: str) -> None:
        """Make the file and write how the launch is started.

        Raises:
            ConfigError: the file cannot be made.
        """
        launch = RecordedLaunch(
            zspmd_version=__version__,
            launch_id=config.launch_id,
            epoch=epoch,
            worker=config.worker,
            main_path=os.path.abspath(config.main_path) if config.main_path else "",
            cwd=os.getcwd(),
            sys_path=tuple(map(os.path.abspath, sys.path)),
            preload=config.preload,
            start_method=config.start_method,
            output_ranks=config.output_ranks,
            devices=tuple(config.devices),
            communicator=config.communicator,
            window=config.window,
            omp_num_threads=omp_num_threads,
            **asdict(config.parallel),
            **asdict(config.deadlines),
        )
        try:
            self._writer = EntryWriter.create(self.path)
        except OSError as error:
            raise ConfigError(f"record is {self.path!r}, which cannot be made: {error}") from error
        self._writer.write(EntryKind.LAUNCH, pack_record(launch))
        self._writer.write(EntryKind.ARGUMENTS, *worker_args)

    def published(self, kind: StepKind, seq: int, body: Buffer, buffers: Sequence[Buffer]) -> None:
        """Keep a step or call; what else is published, a replay publishes by itself."""
        if self._writer is not None and kind in (StepKind.STEP, StepKind.CALL):
            self._writer.write(EntryKind.FRAME, body, buffers, code=kind, seq=seq)

    def answered(self, frame: ResultFrame) -> None:
        """Keep an answer or an error."""
        if self._writer is not None and frame.kind in _ANSWERS:
            self._writer.write(EntryKind.ANSWER, frame.body, frame.buffers, code=frame.kind, rank=frame.rank, seq=frame.seq)

    def failed(self, error: ZspmdError) -> None:
        """Keep the first cause."""
        if self._writer is not None:
            self._writer.write(EntryKind.FAULT, pack_record(describe_fault(error)))

    def close(self) -> None:
        """Mark the file as complete."""
        if self._writer is not None:
            self._writer.close()


def describe_fault(error: ZspmdError) -> RecordedFault:
    """Return what a recording keeps of a first cause."""
    has_step = isinstance(error, WorkerRaisedError) and error.step_id is not None  # of others it is what the last beat said
    return RecordedFault(
        error=type(error).__name__,
        rank=error.rank if isinstance(error, WorkerError) else -1,
        step_id=error.step_id if has_step else -1,  # type: ignore[attr-defined]  # as has_step says
        message=str(error.args[0])[:_MAX_MESSAGE],
    )


def check_recording_path(record: str | os.PathLike[str]) -> str:
    """Return where to record, as an absolute path.

    Raises:
        ConfigError: no directory that can be written, or a recording, or a rank's file of one, is there.
    """
    path = Path(os.path.abspath(record))
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"record is {str(record)!r}, but {path.parent} is no directory that can be written; make it first")
    there = [path] if path.exists() else sorted(path.parent.glob(f"{glob.escape(path.name)}.r[0-9]*"))
    if there:
        raise ConfigError(f"record is {str(record)!r}, but {there[0]} is there; remove it, or choose another name")
    return str(path)
