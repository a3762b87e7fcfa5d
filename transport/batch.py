"""The packed step of a running batch: what changed since the last step, and nothing else.

Every rank holds the batch state (slots, tokens, block tables) and applies the same deltas in the same order, so a steady decode
step names no sequence, no token and no block that it already knows. Slots are small integers that the sender hands out; this module
knows nothing of requests. Little endian, no padding:

    fixed part, 16 B    flags u8 | max_drafts u8 | n_delete u16 | n_chunk u16 | n_decode u16 | n_block u32 | adds_bytes u32
    delete              u16 slot * n_delete
    chunk               u16 slot * n_chunk, u32 num_tokens * n_chunk
    block               u16 slot * n_block, u32 block * n_block
    decode              u16 slot * n_decode         absent with the flag SAME_DECODE
    decode counts       u8 count * n_decode         with the flag DECODE_COUNTS only, which asks for the next one
    decode tokens       i32 token * n_decode        with the flag DECODE_TOKENS only; with counts, as many as they sum to
    costs               u32 n_cost, then u32 bucket, u32 depth, u32 microseconds * n_cost     with the flag COSTS only
    adds                msgpack: a list of one list a sequence, in the order of ``SlotAdd``'s fields

Order of application: delete, add, block, then the rows are the chunks in order followed by the decode slots in order.
A row is sampled when it reaches the end of the tokens known for its slot; each rank appends the sampled token itself, on stages of a
pipeline that do not sample a placeholder. Where the drafts of speculation are verified by the last stage of a pipeline, nobody does: each
decode slot comes with its newest tokens, which are appended before the rows are chosen.

A decode row may hold draft tokens behind its newest one, ``max_drafts`` at most, for which the sender has set blocks aside. How many there
are and which, every rank works out for itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import BadFrameError
from .step_cost import StepCost

U8Array = npt.NDArray[np.uint8]
U16Array = npt.NDArray[np.uint16]
U32Array = npt.NDArray[np.uint32]
I32Array = npt.NDArray[np.int32]

FIXED = struct.Struct("<BBHHHII")
SAME_DECODE = 1
DECODE_TOKENS = 2
DECODE_COUNTS = 4
COSTS = 8
MAX_SLOT = (1 << 16) - 1
MAX_DRAFTS = 16
_MAX_COSTS = 1024
_U8, _U16, _U32, _I32 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")
_COUNT = struct.Struct("<I")
_COST = struct.Struct("<III")
_NO_U16: U16Array = np.empty(0, np.uint16)
_NO_U32: U32Array = np.empty(0, np.uint32)


@dataclass(frozen=True)
class SlotAdd:
    """A sequence that joins the batch (again, after a preemption).

    Args:
        slot: a slot that no live sequence holds.
        tokens: int32 [n], the prompt and whatever was generated before a preemption.
        num_prompt: how many of ``tokens`` are prompt.
        num_computed: how many of ``tokens`` already have their KV in ``blocks`` (prefix reuse); below ``n``.
        blocks: uint32 [b], its block table so far.
        seed: of its sampling noise, below 2**63.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in ``SamplingParams``.
        logprobs: how many top log-probabilities to report; -1 for none at all.
        min_tokens: generated tokens before which none of ``end_token_ids`` may be sampled.
        end_token_ids: int32 [e], tokens that end the sequence; none where ranks have no use for them.
        max_num_tokens: prompt and output at most; read where a decode row holds drafts, of which none may go beyond it.
    """

    slot: int
    tokens: I32Array
    num_prompt: int
    num_computed: int
    blocks: U32Array
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = -1
    min_tokens: int = 0
    end_token_ids: I32Array = field(default_factory=lambda: np.empty(0, np.int32))
    max_num_tokens: int = 1 << 31


@dataclass(frozen=True)
class BatchStep:
    """One step of the batch as deltas against the step before.

    Args:
        deletes: slots that leave (finished, aborted, preempted); free for this step's adds.
        adds: sequences that join.
        block_slots, block_ids: uint16 [k], uint32 [k]; each block is appended to its slot's block table.
        chunk_slots, chunk_tokens: uint16 [c], uint32 [c]; prompt parts to compute, with their token counts.
        decode_slots: uint16 [d], one token each, and drafts; None stands for the same slots in the same order as in
            the step before; before the first step there were none.
        decode_tokens: int32 [d], the newest token of each of ``decode_slots``; None where ranks know what was sampled.
        decode_counts: uint8 [d], how many of ``decode_tokens`` are each slot's, one after another; None stands for one each.
        max_drafts: draft tokens that a decode row may hold, 0 to ``MAX_DRAFTS``.
        costs: what such steps took, as the sender has measured it; each replaces what was known of its bucket and depth.
    """

    deletes: Sequence[int] = ()
    adds: Sequence[SlotAdd] = ()
    block_slots: U16Array = field(default_factory=lambda: _NO_U16)
    block_ids: U32Array = field(default_factory=lambda: _NO_U32)
    chunk_slots: U16Array = field(default_factory=lambda: _NO_U16)
    chunk_tokens: U32Array = field(default_factory=lambda: _NO_U32)
    decode_slots: U16Array | None = None
    decode_tokens: I32Array | None = None
    decode_counts: U8Array | None = None
    max_drafts: int = 0
    costs: Sequence[StepCost] = ()


SAME_BATCHES = tuple(BatchStep(max_drafts=limit) for limit in range(MAX_DRAFTS + 1))
"""By ``max_drafts``, the step that changes nothing, which most steps are: who has it in hand need not look further."""

_SAME_BYTES = tuple(FIXED.pack(SAME_DECODE, limit, 0, 0, 0, 0, 0) for limit in range(MAX_DRAFTS + 1))
_SAME_BY_BYTES = dict(zip(_SAME_BYTES, SAME_BATCHES))

_ADD_FIELDS = tuple(f.name for f in fields(SlotAdd))
_ADD_ARRAYS = {"tokens": np.dtype("<i4"), "blocks": np.dtype("<u4"), "end_token_ids": np.dtype("<i4")}
_ADD_FLOATS = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}


def encode_batch_step(step: BatchStep) -> bytes:
    """Return the packed bytes of a step: 16 B when nothing changed, and 6 B per appended block beyond that."""
    if step is SAME_BATCHES[step.max_drafts]:
        return _SAME_BYTES[step.max_drafts]
    decode = step.decode_slots
    adds = msgpack.packb([_add_to_list(add) for add in step.adds]) if step.adds else b""
    fixed = FIXED.pack(
        _flags_of(step),
        step.max_drafts,
        len(step.deletes),
        len(step.chunk_slots),
        0 if decode is None else len(decode),
        len(step.block_slots),
        len(adds),
    )
    parts = [fixed]
    if step.deletes:
        parts.append(np.asarray(step.deletes, "<u2").tobytes())
    if len(step.chunk_slots):
        parts += (step.chunk_slots.astype("<u2", copy=False).tobytes(), step.chunk_tokens.astype("<u4", copy=False).tobytes())
    if len(step.block_slots):
        parts += (step.block_slots.astype("<u2", copy=False).tobytes(), step.block_ids.astype("<u4", copy=False).tobytes())
    if decode is not None:
        parts.append(decode.astype("<u2", copy=False).tobytes())
        if step.decode_counts is not None:
            parts.append(step.decode_counts.astype("u1", copy=False).tobytes())
        if step.decode_tokens is not None:
            parts.append(step.decode_tokens.astype("<i4", copy=False).tobytes())
    if step.costs:
        parts += (_COUNT.pack(len(step.costs)), *(_COST.pack(*cost) for cost in step.costs))
    if adds:
        parts.append(adds)
    return b"".join(parts)


def decode_batch_step(data: bytes | memoryview) -> BatchStep:
    """Read what ``encode_batch_step`` wrote; arrays are read-only views of ``data`` where that is possible.

    Where nothing changed it returns the one of ``SAME_BATCHES`` itself.

    Raises:
        BadFrameError: the lengths do not add up, or a field of an added sequence has the wrong type.
    """
    if len(data) == FIXED.size and (same := _SAME_BY_BYTES.get(bytes(data))) is not None:
        return same
    if len(data) < FIXED.size:
        raise BadFrameError(f"a batch step has {len(data)} B; its fixed part alone has {FIXED.size}")
    flags, max_drafts, n_delete, n_chunk, n_decode, n_block, adds_bytes = FIXED.unpack_from(data)
    _check_fixed(flags, max_drafts, n_decode)
    ends = FIXED.size + 2 * n_delete + 6 * n_chunk + 6 * n_block + 2 * n_decode  # where the lengths are known from the fixed part
    n_token, counts = (n_decode if flags & DECODE_TOKENS else 0), None
    _check_room(data, ends + n_decode * bool(flags & DECODE_COUNTS))
    if flags & DECODE_COUNTS:
        counts = np.frombuffer(data, _U8, n_decode, ends)
        n_token, ends = int(counts.sum()), ends + n_decode
    n_cost = 0
    if flags & COSTS:
        _check_room(data, ends + 4 * n_token + _COUNT.size)
        (n_cost,) = _COUNT.unpack_from(data, ends + 4 * n_token)
        if not 1 <= n_cost <= _MAX_COSTS:
            raise BadFrameError(f"a batch step has {n_cost} costs; it has 1 to {_MAX_COSTS} or no such part")
    wanted = ends + 4 * n_token + (_COUNT.size + _COST.size * n_cost if n_cost else 0) + adds_bytes
    if wanted != len(data):
        raise BadFrameError(f"a batch step has {len(data)} B where its counts ask for {wanted}")
    at = FIXED.size
    deletes: list[int] = []
    if n_delete:
        deletes, at = np.frombuffer(data, _U16, n_delete, at).tolist(), at + 2 * n_delete
    chunk_slots, chunk_tokens, at = _pairs(data, n_chunk, at)
    block_slots, block_ids, at = _pairs(data, n_block, at)
    decode = None if flags & SAME_DECODE else np.frombuffer(data, _U16, n_decode, at)
    tokens = np.frombuffer(data, _I32, n_token, ends) if flags & DECODE_TOKENS else None
    costs = tuple(map(StepCost._make, _COST.iter_unpack(data[wanted - adds_bytes - _COST.size * n_cost : wanted - adds_bytes])))
    adds = _adds_from_bytes(data[len(data) - adds_bytes :]) if adds_bytes else ()
    return BatchStep(deletes, adds, block_slots, block_ids, chunk_slots, chunk_tokens, decode, tokens, counts, max_drafts, costs)


def _flags_of(step: BatchStep) -> int:
    flags = COSTS if step.costs else 0
    if step.decode_slots is None:
        return flags | SAME_DECODE
    if step.decode_tokens is None:
        return flags
    return flags | (DECODE_TOKENS if step.decode_counts is None else DECODE_TOKENS | DECODE_COUNTS)


def _check_fixed(flags: int, max_drafts: int, n_decode: int) -> None:
    kind = flags & ~COSTS
    if kind not in (0, SAME_DECODE, DECODE_TOKENS, DECODE_TOKENS | DECODE_COUNTS) or (kind == SAME_DECODE and n_decode):
        raise BadFrameError(f"a batch step has flags {flags:#x} and {n_decode} decode slots, which no sender writes")
    if max_drafts > MAX_DRAFTS:
        raise BadFrameError(f"a batch step lets a row hold {max_drafts} drafts; {MAX_DRAFTS} is the most")


def _check_room(data: bytes | memoryview, wanted: int) -> None:
    if len(data) < wanted:
        raise BadFrameError(f"a batch step has {len(data)} B where its counts ask for {wanted} or more")


def _pairs(data: bytes | memoryview, count: int, at: int) -> tuple[U16Array, U32Array, int]:
    """Return slots and numbers that begin at ``at``, and where they end. Most steps have none, which is worth not asking NumPy."""
    if not count:
        return _NO_U16, _NO_U32, at
    middle = at + 2 * count
    return np.frombuffer(data, _U16, count, at), np.frombuffer(data, _U32, count, middle), middle + 4 * count


def _add_to_list(add: SlotAdd) -> list[object]:
    return [
        value.astype(_ADD_ARRAYS[name], copy=False).tobytes() if name in _ADD_ARRAYS else value
        for name, value in ((name, getattr(add, name)) for name in _ADD_FIELDS)
    ]


def _adds_from_bytes(data: bytes | memoryview) -> list[SlotAdd]:
    """Read the added sequences one field after the other: nothing is built that a SlotAdd does not hold."""
    unpacker = msgpack.Unpacker(read_size=len(data), max_buffer_size=len(data), max_array_len=0, max_map_len=0, max_ext_len=0)
    unpacker.feed(data)
    try:
        count = unpacker.read_array_header()
        if count > MAX_SLOT + 1:
            raise BadFrameError(f"a batch step adds {count} sequences; there are {MAX_SLOT + 1} slots")
        adds = [_read_add(unpacker) for _ in range(count)]
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrameError(f"the added sequences of a batch step are no msgpack list: {error}") from error
    if unpacker.tell() != len(data):
        raise BadFrameError(f"the added sequences of a batch step end after {unpacker.tell()} of {len(data)} B")
    return adds


def _read_add(unpacker: Any) -> SlotAdd:
    count = unpacker.read_array_header()
    if count != len(_ADD_FIELDS):
        raise BadFrameError(f"an added sequence is a list of {count}, not of the {len(_ADD_FIELDS)} fields of SlotAdd")
    values: dict[str, object] = {}
    for name in _ADD_FIELDS:
        value = _read_plain(unpacker, name)
        if name in _ADD_ARRAYS:
            dtype = _ADD_ARRAYS[name]
            if not isinstance(value, bytes) or len(value) % dtype.itemsize:
                raise BadFrameError(f"field {name} of an added sequence is not a whole number of {dtype.itemsize}-byte values")
            values[name] = np.frombuffer(value, dtype)
        elif name in _ADD_FLOATS:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadFrameError(f"field {name} of an added sequence is a {type(value).__name__}, not a number")
            values[name] = float(value)
        elif isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 1 << 63:
            shown = value if type(value) is int else f"a {type(value).__name__}"
            raise BadFrameError(f"field {name} of an added sequence is {shown}, not a whole number below 2**63")
        else:
            values[name] = value
    return SlotAdd(**values)  # type: ignore[arg-type]  # each field was checked above


def _read_plain(unpacker: Any, name: str) -> object:
    try:
        return unpacker.unpack()
    except ValueError as error:
        raise BadFrameError(f"field {name} of an added sequence is no plain value: {error}") from error
