"""Prints what the wire costs: bytes, and codec times beside pickle. Asserts nothing.

Whatever is compared is measured in turns in one run, so that a busy machine slows both sides; the ratio is the figure to read.
"""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack
import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from zspmd.transport.batch import BatchStep, decode_batch_step, encode_batch_step
from zspmd.transport.codec import ValueEncoder, decode_value, pack_tensor_meta
from zspmd.transport.frames import StepKind, pack_step_header

BATCH = 256
NEW_BLOCKS = 16
ROUNDS = 12  # turns of each side
CODEC_CALLS = 500  # a turn


def decode_step() -> BatchStep:
    """Return a steady decode step of the whole batch that appends some blocks."""
    return BatchStep(block_slots=np.arange(NEW_BLOCKS, dtype=np.uint16), block_ids=np.arange(NEW_BLOCKS, dtype=np.uint32) + 1000)


def named_step() -> dict[str, Any]:
    """Return the same step as engines pickle it: each request by its name, with its token, position and new blocks."""
    return {
        "request_ids": [f"cmpl-{number:032x}" for number in range(BATCH)],
        "new_token_ids": [[number] for number in range(BATCH)],
        "num_computed_tokens": [500 + number for number in range(BATCH)],
        "new_block_ids": [[1000 + number] if number < NEW_BLOCKS else [] for number in range(BATCH)],
        "num_scheduled_tokens": {f"cmpl-{number:032x}": 1 for number in range(BATCH)},
    }


def packed_frame(encoder: ValueEncoder, step: BatchStep) -> bytes:
    return pack_step_header(StepKind.STEP, 1, 1) + encoder.encode(encode_batch_step(step))[0]


def print_sizes(console: Console) -> None:
    encoder = ValueEncoder()
    frame = packed_frame(encoder, decode_step())
    empty_frame = packed_frame(encoder, BatchStep())
    blocks_alone = len(encode_batch_step(decode_step())) - 6 * NEW_BLOCKS
    tensors = encoder.encode([np.zeros((0, 2), np.int64)] * 3)[0]
    table = Table("bytes on the wire", "pickled", "must reach", "measured", title="Sizes")
    table.add_row("tensor metadata, dims 256 x 1 x 128", "120, then 52 (vLLM)", "8", str(len(pack_tensor_meta(10, (256, 1, 128), 0, True))))
    table.add_row("block metadata of a step", "260, then 107 (vLLM)", "16", str(blocks_alone))
    table.add_row("  the same as a plain value: three (n, 2) tensors", "", "", str(len(tensors)))
    table.add_row(
        f"decode step, batch {BATCH}, header and all", f"{len(pickle.dumps(named_step(), 5))} (here)", "64", str(len(empty_frame))
    )
    table.add_row(f"  with {NEW_BLOCKS} new blocks", "", str(64 + 6 * NEW_BLOCKS), str(len(frame)))
    console.print(table)


def print_codec_times(console: Console) -> None:
    encoder, step, named = ValueEncoder(), decode_step(), named_step()

    def ours() -> None:
        body, buffers = encoder.encode(encode_batch_step(step))
        decode_batch_step(decode_value(body, buffers))

    def pickled(value: object) -> None:
        pickle.loads(pickle.dumps(value, 5))

    sides: dict[str, Callable[[], None]] = {
        "zspmd, packed": ours,
        "pickle, the same BatchStep": partial(pickled, step),
        "pickle, each request by its name": partial(pickled, named),
    }
    times = {name: list[float]() for name in sides}
    for _ in range(ROUNDS):
        for name, function in sides.items():
            times[name] += timed(function, CODEC_CALLS)
    table = Table(
        "codec", "median us", "p99 us", "must reach", title=f"Encode and decode of the decode step, batch {BATCH}, {NEW_BLOCKS} new blocks"
    )
    for name, samples in times.items():
        table.add_row(name, *figures(samples), "10" if name.startswith("zspmd") else "")
    console.print(table)


def timed(function: Callable[[], object], count: int) -> list[float]:
    """Return microseconds of each call."""
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        function()
        samples.append((time.perf_counter() - began) * 1e6)
    return samples


def figures(samples: list[float]) -> tuple[str, str]:
    """Return median and 99th percentile."""
    return f"{statistics.median(samples):.1f}", f"{statistics.quantiles(samples, n=100)[98]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    console = Console()
    load = os.getloadavg()[0]
    libraries = f"pyzmq {zmq.__version__} over libzmq {zmq.zmq_version()}, msgpack {'.'.join(map(str, msgpack.version))}"
    versions = f"Python {platform.python_version()}, {libraries}"
    console.print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before the start; {versions}")
    console.print(f"command: {shlex.join(sys.argv)}")
    print_sizes(console)
    print_codec_times(console)


def processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
