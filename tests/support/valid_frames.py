"""Valid bytes of every kind that zspmd reads, drawn from a seeded generator, and ways to damage them."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import fields
from typing import Any

import numpy as np
from support.batches import PlainBatch
from support.recordings import build_launch

from zspmd.runtime.launch.agent_protocol import AgentRecord, encode_record
from zspmd.transport.batch import encode_batch_step
from zspmd.transport.codec import ValueEncoder
from zspmd.transport.frames import ResultKind, StepKind, pack_result_header, pack_step_header, rank_topic
from zspmd.transport.recorded_launch import RecordingRecord
from zspmd.transport.recording import EntryKind
from zspmd.transport.records import ControlRecord
from zspmd.transport.schema import Record, pack_record

Rng = random.Random


def any_value(rng: Rng, depth: int = 0) -> Any:
    """Return a value that may travel; once in a while a bulky one."""
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 2:
        return rng.choice([None, True, False, 0, -1, 1 << 40, -(1 << 63), 1.5, ""])
    if kind < 4:
        return rng.choice(["text", "ö\N{GRINNING FACE}", rng.randbytes(rng.randrange(40)), "x" * rng.choice([3, 300, 30_000])])
    if kind < 6:
        return rng.getrandbits(rng.randrange(1, 64))
    if kind < 8:
        dtype = rng.choice(["u1", "i4", "f4", "f8", "bool", "c16"])
        return np.zeros([rng.randrange(5) for _ in range(rng.randrange(4))], dtype)
    if kind < 10:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {rng.choice(["a", "b", 7, b"c"]): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def value_body(rng: Rng) -> bytes:
    return ValueEncoder().encode(any_value(rng))[0]


def value_message(rng: Rng) -> list[bytes]:
    """Return a body and the buffers of its large arrays."""
    arrays = [np.full(rng.choice([4097, 5000]), number, np.uint8) for number in range(rng.randrange(1, 4))]
    body, buffers = ValueEncoder().encode([any_value(rng), *arrays])
    return [body, *map(bytes, buffers)]


def step_message(rng: Rng) -> list[bytes]:
    body, *buffers = value_message(rng)
    topic = rank_topic(rng.randrange(1 << 16)) if rng.random() < 0.3 else b""
    return [topic + pack_step_header(rng.choice(list(StepKind)), rng.getrandbits(32), rng.getrandbits(64)) + body, *buffers]


def result_message(rng: Rng) -> list[bytes]:
    body, *buffers = value_message(rng)
    kind = rng.choice(list(ResultKind))
    return [pack_result_header(kind, rng.getrandbits(32), rng.getrandbits(64), rng.getrandbits(16), 5, 6) + body, *buffers]


def batch_step(rng: Rng) -> bytes:
    batch = PlainBatch(rng.getrandbits(30))
    for _ in range(rng.randrange(4)):
        batch.next_step()
        batch.finish_step(dict.fromkeys(batch.sampled_slots(), 1))
    return encode_batch_step(batch.next_step())


def control_record(rng: Rng) -> bytes:
    return pack_record(any_record(rng, ControlRecord))


def recording_record(rng: Rng) -> bytes:
    return pack_record(any_record(rng, RecordingRecord))


def agent_stream(rng: Rng) -> bytes:
    records = [any_record(rng, AgentRecord) for _ in range(rng.randrange(1, 4))]
    return b"".join(encode_record(record) for record in records if isinstance(record, AgentRecord))


def any_record(rng: Rng, family: type[Record]) -> Record:
    """Return a record of any kind of a family, every field within its bounds."""
    return filled(rng, family.kinds[rng.choice(sorted(family.kinds))])


def filled(rng: Rng, kind: type[Record]) -> Record:
    return kind(**{f.name: _field(rng, f.metadata) for f in fields(kind)})  # type: ignore[arg-type]  # each record is a dataclass


def _field(rng: Rng, bounds: Any) -> Any:
    wanted = bounds["type"]
    if wanted is tuple:
        return tuple(_item(rng, bounds["item"]) for _ in range(min(rng.randrange(3), bounds["high"])))
    if wanted is bool:
        return rng.random() < 0.5
    if wanted is dict:
        return {f"name{number}": "value" for number in range(rng.randrange(3))}
    if wanted is int:
        return rng.choice([bounds["low"], bounds["high"], rng.randint(bounds["low"], bounds["high"])])
    if wanted is float:
        return float(min(max(rng.choice([0.5, 1.0, 30.0]), bounds["low"]), bounds["high"]))
    if bounds.get("choices"):
        return rng.choice(bounds["choices"])
    length = rng.randrange(min(bounds["high"], 40) + 1)
    return rng.randbytes(length) if wanted is bytes else "é" * length


def _item(rng: Rng, wanted: type) -> Any:
    if issubclass(wanted, Record):
        return filled(rng, wanted)
    return {int: 3, str: "item", bytes: b"item"}[wanted]


Parts = list[tuple[bytes, bytes]]
CODES = {EntryKind.FRAME: (int(StepKind.STEP), 0, 0, 1)}  # code, rank, buffers, seq


def recording_parts(rng: Rng) -> Parts:
    """Return the entries of a recording as heads, up to their checksums, and bodies."""
    bodies = [
        (EntryKind.LAUNCH, pack_record(build_launch())),
        (EntryKind.ARGUMENTS, ValueEncoder().encode({"a": any_value(rng)})[0]),
        (EntryKind.FRAME, value_body(rng)),
        (EntryKind.FAULT, pack_record(filled(rng, RecordingRecord.kinds["RecordedFault"]))),
        (EntryKind.END, b""),
    ]
    return [(struct.pack("<BBHIQI", kind, *CODES.get(kind, (0, 0, 0, 0)), len(body)), body) for kind, body in bodies]


def recording_file(parts: Parts) -> bytes:
    """Return a recording with its checksums, which fit whatever the parts hold."""
    data = struct.pack("<8sHH", b"zspmdrec", 1, 0)
    for head, body in parts:
        head += struct.pack("<I", zlib.crc32(body))
        data += head + struct.pack("<I", zlib.crc32(head)) + body
    return data


def mutate_recording(rng: Rng, parts: Parts) -> bytes:
    """Return a recording with damage that no checksum shows: in the head or body of an entry."""
    damaged = list(parts)
    at = rng.randrange(len(damaged))
    head, body = damaged[at]
    size = len(head)
    damaged[at] = (head, mutate(rng, body)) if rng.random() < 0.5 else (mutate(rng, head)[:size].ljust(size, b"\0"), body)
    return recording_file(damaged)


def mutate(rng: Rng, data: bytes) -> bytes:
    """Return the data with some bytes changed, cut, put in, doubled or swapped, or a length somewhere made huge."""
    damaged = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(damaged) + 1)
        way = rng.randrange(7)
        if way == 0 and damaged:
            damaged[at % len(damaged)] ^= 1 << rng.randrange(8)
        elif way == 1:
            damaged[at : at + 1] = bytes((rng.choice([0x00, 0x7F, 0x80, 0xC1, 0xC7, 0xC9, 0xD9, 0xDB, 0xDD, 0xDF, 0xFF]),))
        elif way == 2:
            del damaged[at : at + rng.randrange(1, 9)]
        elif way == 3:
            damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif way == 4:
            damaged[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\x10\0\0"])
        elif way == 5:
            damaged[at:at] = damaged[at : at + rng.randrange(1, 64)]
        else:
            del damaged[at:]
    return bytes(damaged)


def mutate_message(rng: Rng, message: list[bytes]) -> list[bytes]:
    """Return the message with its first frame mutated, or its buffers changed, dropped, doubled or moved."""
    head, *buffers = message
    way = rng.randrange(5)
    if way < 3 or not buffers:
        return [mutate(rng, head), *buffers]
    if way == 3:
        at = rng.randrange(len(buffers))
        buffers[at] = mutate(rng, buffers[at])
    else:
        rng.shuffle(buffers)
        buffers = rng.choice([buffers[1:], buffers * 2, buffers])
    return [head, *buffers]
