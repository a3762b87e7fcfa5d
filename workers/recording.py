"""What a rank was told by its peers, on file: written while a launch is recorded, handed out again when the rank is replayed alone.

That is what the collectives of its mesh returned, and what the store answered to its main thread, by which its coordinator works too.

Torch is imported with the first communicator, as by every mesh.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, InternalError, RecordingError, ReplayDivergedError
from ..transport.codec import ValueEncoder
from ..transport.control_sockets import ControlClient
from ..transport.recorded_launch import RecordedRank, rank_path, read_recorded, read_value
from ..transport.recording import Entry, EntryFile, EntryKind, EntryWriter
from ..transport.records import Hello, StoreReply, StoreRequest, unpack_record
from ..transport.schema import pack_record
from .mesh import Mesh
from .store_client import StoreClient

if TYPE_CHECKING:
    from .communicators.communicator import Communicator


class EndOfRecording(BaseException):  # no error: a launch that failed ends for its ranks within a collective
    """A rank that is replayed alone has come to where its launch ended; no ``except Exception`` of the worker's is to catch it."""


class PeerLog:
    """Writes what a rank is told, beside the recording of its launch. As large as all of that together."""

    def __init__(self, writer: EntryWriter, rank: int) -> None:
        self._writer = writer
        self._rank = rank
        self._encoder = ValueEncoder()
        self._lock = threading.Lock()  # communicators may be used by a thread each

    @classmethod
    def create(cls, recording: str, rank: int, *, epoch: int) -> PeerLog:
        """Make the file.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            writer = EntryWriter.create(rank_path(recording, rank))
        except OSError as error:
            raise ConfigError(f"rank {rank} cannot record its collectives: {error}") from error
        writer.write(EntryKind.RANK, pack_record(RecordedRank(epoch=epoch, rank=rank)))
        return cls(writer, rank)

    def write(self, name: str, operation: str, details: list[Any], result: Any) -> None:
        """Append one operation.

        Args:
            name: of the communicator, or of the store.
            details: what it was called with beside tensors; plain values.
            result: the tensor that it has filled, or bytes, or None.
        """
        if not self._writer.is_open:
            return
        with self._lock:
            body, buffers = self._encoder.encode([name, operation, details, result])
            self._writer.write(EntryKind.PEERS, body, buffers, rank=self._rank)

    def close(self) -> None:
        """Mark the file as complete."""
        self._writer.close()


class RecordedPeers:
    """Hands out what a rank was told, to each communicator in its own order."""

    def __init__(self, path: str, file: EntryFile, rank: int, *, epoch: int, has_failed: bool) -> None:
        self._file = file
        self._rank = rank
        entries = iter(file)
        first = next(entries, None)
        if first is None or first.kind is not EntryKind.RANK or read_recorded(first) != RecordedRank(epoch=epoch, rank=rank):
            raise RecordingError(f"{path} does not belong to rank {rank} of this recording; restore the file")
        self._offsets: dict[str, list[int]] = defaultdict(list)
        for entry in entries:
            if entry.kind is EntryKind.PEERS:
                self._offsets[_read_peers(entry)[0]].append(entry.offset)
        self._taken: dict[str, int] = defaultdict(int)
        self._may_end = has_failed or bool(file.note)

    @classmethod
    def open(cls, recording: str, rank: int, *, epoch: int, has_failed: bool) -> RecordedPeers:
        """Read a rank's file.

        Args:
            has_failed: whether the launch ended otherwise than by its driver, so that the rank may have been inside a collective.

        Raises:
            RecordingError: it is not there, damaged, or of another launch.
        """
        path = rank_path(recording, rank)
        return cls(path, EntryFile.open(path), rank, epoch=epoch, has_failed=has_failed)

    def take(self, name: str, operation: str, details: list[Any], result: Any) -> Any:
        """Return what the next operation of ``name`` gave.

        Args:
            details, result: as in ``PeerLog.write``; of ``result`` dtype and shape count.

        Raises:
            ReplayDivergedError: that was another one; names both.
            EndOfRecording: there is none, since the launch ended here.
        """
        count, offsets = self._taken[name], self._offsets[name]
        asked = _describe(operation, details, result)
        if count == len(offsets):
            if self._may_end:
                raise EndOfRecording(f"in {asked}, number {count} on {name}, which the launch did not finish")
            raise ReplayDivergedError(f"rank {self._rank} asks for {asked} as number {count} on {name}; recorded are {count} in all")
        entry = self._file.entry(offsets[count])
        _, made, made_with, recorded = _read_peers(entry)
        if asked != (then := _describe(made, made_with, recorded)):
            raise ReplayDivergedError(f"rank {self._rank} asks for {asked} as number {count} on {name}; recorded is {then}")
        self._taken[name] = count + 1
        return recorded


def _read_peers(entry: Entry) -> tuple[str, str, list[Any], Any]:
    """Return what ``PeerLog.write`` wrote: who was asked, the operation, its details, and the result."""
    value = read_value(entry)
    if not isinstance(value, list) or [type(item) for item in value[:3]] != [str, str, list] or len(value) != 4:
        raise RecordingError(f"the entry at offset {entry.offset} holds no result of a collective; restore the file")
    name, operation, details, result = value
    return name, operation, details, result


class RecordingMesh(Mesh):
    """A mesh whose communicators write what they return."""

    def __init__(self, log: PeerLog, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._log = log

    def _create(self, axis: str) -> Communicator:
        from .communicators.recorded import RecordingCommunicator

        communicator = super()._create(axis)
        return communicator if communicator.size == 1 else RecordingCommunicator(communicator, axis, self._log)


class ReplayedMesh(Mesh):
    """The mesh of a rank that is replayed alone: its communicators return what was recorded."""

    def __init__(self, peers: RecordedPeers, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._peers = peers

    def _create(self, axis: str) -> Communicator:
        from .communicators.recorded import ReplayedCommunicator

        group = self.group(axis)
        return super()._create(axis) if group.size == 1 else ReplayedCommunicator(group, self._device, axis, self._peers)


class RecordingStore(StoreClient):
    """A store that writes what it answers to the main thread: other threads have no order that a replay could keep to."""

    def __init__(self, log: PeerLog, store: StoreClient) -> None:
        super().__init__(store._connect, store._hello, timeout_s=store.timeout_s)
        self._log = log

    def _exchange(self, request: StoreRequest) -> StoreReply:
        reply = super()._exchange(request)
        if threading.current_thread() is threading.main_thread():
            self._log.write(_STORE, request.op, list(request.keys), pack_record(reply))
        return reply


def _never_connects() -> ControlClient:
    raise InternalError("a replayed store has nobody to connect to")


class ReplayedStore(StoreClient):
    """The store of a rank that is replayed alone: answers as it did, and keeps nothing."""

    def __init__(self, peers: RecordedPeers, *, timeout_s: float) -> None:
        nobody = Hello(token=b"", rank=0, pid=0, host="", version="", purpose="store")
        super().__init__(_never_connects, nobody, timeout_s=timeout_s)
        self._peers = peers

    def _exchange(self, request: StoreRequest) -> StoreReply:
        if threading.current_thread() is not threading.main_thread():
            raise RecordingError(f"store operation {request.op} of a second thread: only the main thread's are recorded; replay all ranks")
        reply = unpack_record(self._peers.take(_STORE, request.op, list(request.keys), b""))
        if not isinstance(reply, StoreReply):
            raise RecordingError(f"a {type(reply).__name__} is recorded as the store's answer to {request.op}; restore the file")
        return reply


_STORE = "the store"


def _describe(operation: str, details: list[Any], result: Any) -> str:
    filled = f" of {str(result.dtype).removeprefix('torch.')} {list(result.shape)}" if hasattr(result, "dtype") else ""
    return f"{operation}({', '.join(map(str, details))}){filled}"
