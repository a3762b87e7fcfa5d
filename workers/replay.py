"""One rank of a recording, alone in this process: ``zspmd-run replay FILE --rank R`` becomes this program.

The worker gets the recorded frames, and from its mesh and store what the recording has; so it may be stepped through in a debugger
for as long as one likes. Its answers are compared with the recorded ones. Nothing else runs: no driver, no peers, no threads.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence

from ..errors import ConfigError, ZspmdError
from ..transport.comparison import Comparison, RankComparison, compare_answers
from ..transport.frames import Buffer, ResultKind, StepFrame, StepKind
from ..transport.recorded_launch import Recording
from ..transport.schema import pack_record
from .context import RankFacts, RankStatus, WorkerContext
from .loop import StepLoop, describe_failure
from .main import import_worker
from .recording import EndOfRecording, RecordedPeers, ReplayedMesh, ReplayedStore
from .torch_bridge import register_torch
from .worker import Worker


class RecordedFrames:
    """A ``FrameSource``: the frames of a recording, then STOP."""

    def __init__(self, recording: Recording) -> None:
        self._frames = recording.frames()
        self._stop_seq = recording.num_frames + 1

    def receive(self, timeout_ms: int) -> StepFrame:
        """Return the next frame, with buffers of its own: those of the file lie at any address, which slows arithmetic down."""
        frame = next(self._frames, None)
        if frame is None:
            return StepFrame(StepKind.STOP, 0, self._stop_seq, memoryview(b""), ())
        return StepFrame(StepKind(frame.code), 0, frame.seq, frame.body, [bytes(buffer) for buffer in frame.buffers])


class ComparedAnswers:
    """An ``AnswerSink`` that compares what it is given."""

    def __init__(self, rank: int, comparison: Comparison) -> None:
        self.rank = rank
        self._comparison = comparison

    def push(
        self,
        kind: ResultKind,
        seq: int,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
        *,
        busy_us: int = 0,
        received_ns: int = 0,
    ) -> None:
        """Compare an answer."""
        self._comparison.answered(self.rank, seq, kind, body, buffers)


def main(argv: Sequence[str] | None = None) -> int:
    """Replay one rank and return the exit code: 0 if its answers are the recorded ones, 1 if not, 2 if it cannot be replayed."""
    parser = argparse.ArgumentParser(prog="python -m zspmd.workers.replay", description="Replay one rank of a recording alone.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--rank", type=int, metavar="R", required=True)
    parser.add_argument("--ignore", action="append", default=[], metavar="WHAT")
    arguments = parser.parse_args(argv)
    faulthandler.enable()
    register_torch()
    try:
        return _replay(Recording.open(os.path.abspath(arguments.file)), arguments.rank, arguments.ignore)
    except ZspmdError as error:
        print(f"zspmd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _replay(recording: Recording, rank: int, ignored: Sequence[str]) -> int:
    launch = recording.launch
    peers = RecordedPeers.open(recording.path, rank, epoch=launch.epoch, has_failed=recording.fault is not None)
    comparison, status, notes = Comparison(recording, [rank], ignored), RankStatus(), [f"note: {note}" for note in recording.notes]
    has_failed_alike = False
    try:
        worker = _create_worker(recording, rank, peers)
        worker.setup(**recording.worker_args())
        answers = ComparedAnswers(rank, comparison)
        StepLoop(worker, RecordedFrames(recording), answers, status, output_ranks=launch.output_ranks, check_parent=lambda: None).run()
        worker.teardown()
    except EndOfRecording as end:
        notes.append(f"ends where the launch did, {end}: {recording.fault or 'this rank was ended there'}")
    except Exception as error:  # of the worker's code, or its divergence: either is the result of this program
        has_failed_alike = _compare_failure(recording, comparison.rows[rank], status, error)
    comparison.finish()
    if recording.fault is not None and recording.fault.rank == rank and not has_failed_alike:
        comparison.rows[rank].differs(f"failed when it was recorded, and not in the replay: {recording.fault}")
    if rank not in launch.output_ranks:
        notes.append(f"rank {rank} answers no steps: {status.step_id + 1} were run and have nothing to be compared with")
    notes.append("equal" if comparison.is_equal else "different")
    print("\n".join([*comparison.table(), *notes]), flush=True)
    return 0 if comparison.is_equal else 1


def _create_worker(recording: Recording, rank: int, peers: RecordedPeers) -> Worker:
    launch = recording.launch
    world_size, device = launch.parallel.world_size, launch.devices[rank]
    host = os.uname().nodename
    facts = RankFacts(launch.launch_id, rank, world_size, rank, world_size, host, device)
    store = ReplayedStore(peers, timeout_s=launch.collective_s)
    mesh = ReplayedMesh(
        peers, launch.parallel, rank, device=device, backend=launch.communicator, address="", store=store, timeout_s=launch.collective_s
    )
    worker = import_worker(launch.worker, launch.main_path)()
    worker.ctx = WorkerContext(facts, mesh, store, lambda progress: None)
    return worker


def _compare_failure(recording: Recording, row: RankComparison, status: RankStatus, error: Exception) -> bool:
    """Say whether the rank failed here, and in this way, when it was recorded; if not, note that and print the traceback."""
    failure = describe_failure(error, status)
    recorded = recording.answer(row.rank, max(status.seq, 0))
    if recorded is not None and recorded.code == ResultKind.ERROR:
        difference = compare_answers(recorded, ResultKind.ERROR, pack_record(failure))
    else:
        difference = f"raised {failure.exception_type}: {failure.message}"
    if difference is None:
        print(f"failed as recorded: {failure.exception_type}: {failure.message}")
        return True
    traceback.print_exception(type(error), error, error.__traceback__)
    row.differs(f"{failure.phase}, step {failure.step_id}: {difference}")
    return False


if __name__ == "__main__":
    sys.exit(main())
