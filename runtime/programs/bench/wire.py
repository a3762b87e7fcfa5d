"""Bytes of a step on the wire, and the time of its codec, by batch size; beside pickle.

The step is the steady decode step of a whole batch that appends some blocks. It is encoded and decoded as driver and rank do it, beside
pickling the same object, and pickling what engines pickle: each request by its name, with its token, position and blocks.
"""

from __future__ import annotations

import argparse
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ....errors import ConfigError
from ....transport.batch import BatchStep, decode_batch_step, encode_batch_step
from ....transport.codec import ValueEncoder, decode_value, pack_tensor_meta
from ....transport.frames import StepKind, pack_step_header
from .report import Report
from .rivals import Rival
from .rows import Row, TakeTurn, Value, take_turns
from .side_process import SideProcess
from .side_server import timed_us

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 12
OURS = "zspmd"
PICKLED, BY_NAME = "pickle, the same object", "pickle, requests by name"
_PICKLE = Rival("pickle", "pickled_step")
_MAX_BATCH = 1 << 16
_BLOCK_SHARE = 16  # one in so many sequences needs a new block
_TURN_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256], metavar="N", help="sequences of a step (1 16 256)")
    parser.add_argument("--calls", type=int, default=500, metavar="N", help="of a turn (500)")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    for batch in arguments.batch:
        if not 1 <= batch <= _MAX_BATCH:
            raise ConfigError(f"--batch is {batch}; it must be from 1 to {_MAX_BATCH}")
    if arguments.calls < 1:
        raise ConfigError(f"--calls is {arguments.calls}; it must be at least 1")
    return f"batches of {', '.join(map(str, arguments.batch))}, {arguments.turns} turns of {arguments.calls} calls"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure sizes, then times."""
    report.baseline, report.title, report.x_axis = OURS, "A steady decode step on the wire", "batch"
    _add_metadata_sizes(report)
    async with AsyncExitStack() as stack:
        pickled = None
        if why := _PICKLE.why_not():
            report.note(f"left out: {why}")
        else:
            pickled = await stack.enter_async_context(SideProcess(_PICKLE.name, _PICKLE.argv()))
        for batch in arguments.batch:
            report.say(f"batch {batch}")
            await _measure_batch(batch, arguments, report, pickled)


async def _measure_batch(batch: int, arguments: argparse.Namespace, report: Report, pickled: SideProcess | None) -> None:
    num_blocks = new_blocks(batch)
    encoder, step = ValueEncoder(), decode_step(num_blocks)
    empty, whole = (len(packed_frame(encoder, each)) for each in (BatchStep(), step))
    case: dict[str, Value] = {"what": "bytes", "batch": batch, "new blocks": num_blocks}
    report.add(Row(case, OURS, "B", [[float(whole)]], {"must reach": 64 + 6 * num_blocks, "without new blocks": empty}))

    def ours() -> None:
        body, buffers = encoder.encode(encode_batch_step(step))
        decode_batch_step(decode_value(body, buffers))

    async def take_ours() -> list[float]:
        return timed_us(ours, arguments.calls, _TURN_S)

    sides: dict[Any, TakeTurn] = {OURS: take_ours}
    if pickled is not None:
        for side, is_named in ((PICKLED, False), (BY_NAME, True)):
            request = {"batch": batch, "num_blocks": num_blocks, "is_named": is_named, "calls": arguments.calls, "limit_s": _TURN_S}
            answer = await pickled.turn(request)  # a first, which fills caches
            report.add(Row(case, side, "B", [[float(answer["bytes"])]]))
            sides[side] = _turn_of(pickled, request)
    for side, turns in (await take_turns(sides, arguments.turns)).items():
        facts: dict[str, Value] = {"must reach": 10} if side == OURS and batch == 256 else {}
        report.add(Row({**case, "what": "encode and decode"}, side, "us", turns, facts))


def _turn_of(side: SideProcess, request: dict[str, Any]) -> TakeTurn:
    async def take() -> list[float]:
        return list((await side.turn(request))["times_us"])

    return take


def _add_metadata_sizes(report: Report) -> None:
    """Add what describes tensors."""
    dims = pack_tensor_meta(10, (256, 1, 128), 0, True)
    report.add(Row({"what": "tensor of 256 x 1 x 128, metadata"}, OURS, "B", [[float(len(dims))]], {"must reach": 8}))
    blocks = new_blocks(256)
    alone = len(encode_batch_step(decode_step(blocks))) - 6 * blocks
    report.add(Row({"what": "block metadata of a step"}, OURS, "B", [[float(alone)]], {"must reach": 16}))


def new_blocks(batch: int) -> int:
    """Return how many sequences of a batch need a new block in a step, with blocks of 16 tokens."""
    return -(-batch // _BLOCK_SHARE)


def decode_step(num_blocks: int) -> BatchStep:
    """Return a steady decode step that appends some blocks; what it weighs does not depend on the batch."""
    return BatchStep(block_slots=np.arange(num_blocks, dtype=np.uint16), block_ids=np.arange(num_blocks, dtype=np.uint32) + 1000)


def packed_frame(encoder: ValueEncoder, step: BatchStep) -> bytes:
    """Return a step as it goes to the ranks, header and all."""
    return pack_step_header(StepKind.STEP, 1, 1) + encoder.encode(encode_batch_step(step))[0]
