"""Replayed answers against recorded ones: equal, or where they first differ."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadFrameError
from .codec import BFLOAT16, AnyArray, as_array, bfloat16_to_float32, decode_value
from .frames import Buffer, ResultKind, StepKind
from .recorded_launch import Recording, read_call, read_value
from .recording import Entry
from .records import Failure, unpack_record

ANSWERS = (ResultKind.OUTPUT, ResultKind.REPLY, ResultKind.CALL_ERROR)
_SHOWN = 60  # characters of a value


@dataclass
class RankComparison:
    """What was compared of one rank. ``unrecorded`` answers have no counterpart, since the recording ends before them.

    ``ignored`` are those to calls that were not to be compared.
    """

    rank: int
    steps: int = 0
    calls: int = 0
    equal: int = 0
    unrecorded: int = 0
    ignored: int = 0
    first_difference: str = ""

    @property
    def is_equal(self) -> bool:
        return not self.first_difference

    def differs(self, difference: str) -> None:
        """Note a difference; the first counts."""
        self.first_difference = self.first_difference or difference


class Comparison:
    """Takes the answers of a replay as they come, and compares each with the recorded one.

    Args:
        recording: what is replayed.
        ranks: whose answers count.
        ignored: methods whose answers no replay repeats, such as how much memory is free; and places in the answers of steps, such as
            ``answer[4][1]``, where there are such values.
    """

    def __init__(self, recording: Recording, ranks: Sequence[int], ignored: Collection[str] = ()) -> None:
        self._recording = recording
        self._ignored = ignored
        self.rows = {rank: RankComparison(rank) for rank in ranks}
        self._compared: set[tuple[int, int]] = set()

    @property
    def is_equal(self) -> bool:
        return all(row.is_equal for row in self.rows.values())

    def answered(self, rank: int, seq: int, kind: ResultKind, body: Buffer, buffers: Sequence[Buffer]) -> None:
        """Compare one answer; what is no answer to a step or call is passed over."""
        row = self.rows.get(rank)
        if row is None or kind not in ANSWERS:
            return
        recorded = self._recording.answer(rank, seq)
        if recorded is None:
            row.unrecorded += 1
            return
        self._compared.add((rank, seq))
        if self._ignored and _method(self._recording.frame(seq)) in self._ignored:
            row.ignored += 1
            return
        if kind is ResultKind.OUTPUT:
            row.steps += 1
        else:
            row.calls += 1
        difference = compare_answers(recorded, kind, body, buffers, self._ignored if kind is ResultKind.OUTPUT else ())
        if difference is None:
            row.equal += 1
        elif row.is_equal:
            row.differs(f"{frame_label(self._recording, seq)}: {difference}")

    def finish(self) -> None:
        """Note as a difference what was recorded and has not been answered."""
        for rank, seq in self._recording.answers():
            row = self.rows.get(rank)
            if row is None or not row.is_equal or (rank, seq) in self._compared:
                continue
            recorded = self._recording.answer(rank, seq)
            if recorded is not None and recorded.code in ANSWERS:
                row.differs(f"{frame_label(self._recording, seq)}: was answered when it was recorded, and not in the replay")

    def table(self) -> list[str]:
        """Return a line for each rank, under a heading."""
        lines = ["rank  steps  calls  equal  first difference"]
        for row in self.rows.values():
            lines.append(f"{row.rank:<6}{row.steps:<7}{row.calls:<7}{row.equal:<7}{row.first_difference or 'none'}")
            if row.ignored:
                lines[-1] += f" ({row.ignored} answers ignored)"
            if row.unrecorded:
                lines[-1] += f" ({row.unrecorded} more answers, which the recording has not)"
        return lines


def compare_answers(
    recorded: Entry, kind: ResultKind, body: Buffer, buffers: Sequence[Buffer] = (), ignored: Collection[str] = ()
) -> str | None:
    """Return None where an answer is the recorded one, bit for bit but for what stands at ``ignored`` places, else what differs first."""
    if recorded.code != kind:
        return f"recorded {_describe(recorded.code, recorded.body)}, replayed {_describe(kind, body)}"
    if kind in (ResultKind.CALL_ERROR, ResultKind.ERROR):
        ours, theirs = _read_failure(recorded.body), _read_failure(body)
        is_same = (ours.exception_type, ours.message) == (theirs.exception_type, theirs.message)
        return None if is_same else f"recorded {_describe(kind, recorded.body)}, replayed {_describe(kind, body)}"
    if bytes(recorded.body) == bytes(body) and len(recorded.buffers) == len(buffers) and all(map(_is_same, recorded.buffers, buffers)):
        return None
    return first_difference(read_value(recorded), decode_value(body, buffers), ignored=ignored)


def first_difference(recorded: Any, replayed: Any, path: str = "answer", *, ignored: Collection[str] = ()) -> str | None:
    """Return where two values first differ in any bit, and how; None if nowhere, or only at the ``ignored`` paths of items.

    The path reads like Python: ``answer["logits"][2, 5]: recorded 1.0, replayed 1.5``.
    """
    if path in ignored:
        return None
    arrays = as_array(recorded), as_array(replayed)
    if type(recorded) is not type(replayed):
        return f"{path}: recorded {_kind(recorded)}, replayed {_kind(replayed)}"
    if arrays[0] is not None and arrays[1] is not None:
        return _array_difference(arrays[0], arrays[1], path)
    if isinstance(recorded, dict):
        return _dict_difference(recorded, replayed, path, ignored)
    if isinstance(recorded, list):
        return _list_difference(recorded, replayed, path, ignored)
    if isinstance(recorded, (str, bytes)) and recorded != replayed:
        at = next((i for i, (a, b) in enumerate(zip(recorded, replayed)) if a != b), min(len(recorded), len(replayed)))
        return f"{path}, from {at} on: recorded {_shown(recorded[at:])}, replayed {_shown(replayed[at:])}"
    if _bits(recorded) != _bits(replayed):
        return f"{path}: recorded {_shown(recorded)}, replayed {_shown(replayed)}"
    return None


def _dict_difference(recorded: dict[Any, Any], replayed: dict[Any, Any], path: str, ignored: Collection[str]) -> str | None:
    for key, value in recorded.items():
        if key not in replayed:
            return f"{path} has no {_shown(key)} in the replay"
        if difference := first_difference(value, replayed[key], f"{path}[{_quoted(key)}]", ignored=ignored):
            return difference
    for key in replayed:
        if key not in recorded:
            return f"{path} has a {_shown(key)} in the replay only"
    if list(recorded) != list(replayed):
        return f"{path}: its keys are in another order"
    return None


def _list_difference(recorded: list[Any], replayed: list[Any], path: str, ignored: Collection[str]) -> str | None:
    for index, (one, other) in enumerate(zip(recorded, replayed)):
        if difference := first_difference(one, other, f"{path}[{index}]", ignored=ignored):
            return difference
    if len(recorded) != len(replayed):
        return f"{path}: recorded {len(recorded)} items, replayed {len(replayed)}"
    return None


def _array_difference(recorded: AnyArray, replayed: AnyArray, path: str) -> str | None:
    if (recorded.dtype, recorded.shape) != (replayed.dtype, replayed.shape):
        return f"{path}: recorded {_kind(recorded)}, replayed {_kind(replayed)}"
    if not recorded.size:
        return None
    ours, theirs = (np.ascontiguousarray(array).reshape(-1) for array in (recorded, replayed))
    differs = (ours.view(np.uint8) != theirs.view(np.uint8)).reshape(ours.size, -1).any(axis=1)
    if not differs.any():
        return None
    at = int(differs.argmax())
    index = f"[{', '.join(map(str, np.unravel_index(at, recorded.shape)))}]" if recorded.ndim else ""
    return f"{path}{index}: recorded {_number(ours, at)}, replayed {_number(theirs, at)} ({int(differs.sum())} of {ours.size} differ)"


def _number(array: AnyArray, at: int) -> str:
    one = array[at : at + 1]
    return repr((bfloat16_to_float32(one) if array.dtype == BFLOAT16 else one).item())


def _bits(value: object) -> object:
    """Return what tells apart any two scalars that are encoded differently: 0.0 and -0.0, but not two equal NaNs."""
    return struct.pack("<d", value) if isinstance(value, float) else value


def _kind(value: object) -> str:
    array = as_array(value)
    if array is None:
        return f"the {type(value).__name__} {_shown(value)}"
    return f"{type(value).__name__} of shape {list(array.shape)} and dtype {'bfloat16' if array.dtype == BFLOAT16 else array.dtype}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _quoted(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def _is_same(one: Buffer, other: Buffer) -> bool:
    """Compare two buffers; NumPy does it at the speed of memory, memoryview byte by byte."""
    return np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))


def _describe(kind: int, body: Buffer) -> str:
    if kind not in (ResultKind.CALL_ERROR, ResultKind.ERROR):
        return "an answer"
    failure = _read_failure(body)
    return f"{failure.exception_type}: {_shown(failure.message)}"


def _read_failure(body: Buffer) -> Failure:
    record = unpack_record(body)
    if not isinstance(record, Failure):
        raise BadFrameError(f"the body of an error is a {type(record).__name__}, not a Failure")
    return record


def _method(frame: Entry) -> str | None:
    """Return the method that a frame calls; None for a step."""
    return read_call(frame)[0] if frame.code == StepKind.CALL else None


def frame_label(recording: Recording, seq: int) -> str:
    """Return a name for a frame: its step id, or the method that it calls."""
    step_id = 0
    for frame in recording.frames():
        if frame.seq == seq and frame.code == StepKind.CALL:
            return f"call of {_method(frame)!r} (frame {seq})"
        if frame.seq == seq:
            break
        step_id += frame.code == StepKind.STEP
    return f"step {step_id}"
