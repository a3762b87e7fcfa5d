"""What is really sent, in bytes: the sizes that the design promises, read from the far end of a socket."""

from __future__ import annotations

from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
import zmq

from zspmd.config import EngineConfig, SamplingParams
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.transport.batch import FIXED, BatchStep, encode_batch_step
from zspmd.transport.codec import _DTYPES, INLINE_BYTES, NUMPY, TORCH, ValueEncoder, pack_tensor_meta
from zspmd.transport.frames import STEP_HEADER, STEP_TOPIC, StepKind
from zspmd.transport.sockets import StepPublisher

MAX_META_BYTES = 8
MAX_BLOCK_META_BYTES = 16
MAX_STEADY_BYTES = 64
BLOCK_BYTES = 6
BLOCK_SIZE = 16
Context = zmq.Context[zmq.Socket[bytes]]


class Wire:
    """Publishes values as a worker group does; ``send`` returns the parts of the message as a rank's socket has them."""

    def __init__(self, context: Context) -> None:
        self._publisher = StepPublisher(context, ["inproc://step"], epoch=0xFFFF_FFFF)
        self._subscriber = context.socket(zmq.SUB)
        self._subscriber.subscribe(STEP_TOPIC)
        self._subscriber.connect("inproc://step")
        self._publisher.sockets[0].recv()
        self._encoder = ValueEncoder()

    def send(self, value: object) -> list[bytes]:
        self._publisher.publish(StepKind.STEP, *self._encoder.encode(value))
        assert self._subscriber.poll(5000)
        return self._subscriber.recv_multipart()

    def close(self) -> None:
        self._publisher.close()
        self._subscriber.close(0)


@pytest.fixture
def wire(context: Context) -> Iterator[Wire]:
    made = Wire(context)
    yield made
    made.close()


@pytest.mark.parametrize("family", [NUMPY, TORCH], ids=["NumPy", "torch"])
@pytest.mark.parametrize("shape", [(), (8192,), (8192, 4096), (256, 1, 128), (16_383, 16_383, 16_383)], ids=str)
def test_metadata_of_three_dims_is_small(shape: tuple[int, ...], family: int) -> None:
    sizes = {len(pack_tensor_meta(code, shape, family, inline)) for code in range(len(_DTYPES)) for inline in (False, True)}
    assert max(sizes) <= MAX_META_BYTES


def test_a_large_tensor_adds_its_metadata_to_the_message(wire: Wire, no_bridges: None) -> None:
    array = np.zeros((16, 127, 3), np.float32)
    assert array.nbytes > INLINE_BYTES
    empty, head, buffer = *wire.send([]), *wire.send([array])
    ext_bytes = len(msgpack.packb(msgpack.ExtType(1, b"12345"))) - 5  # what msgpack puts in front of five bytes
    assert len(buffer) == array.nbytes
    assert len(head) - len(empty) - ext_bytes == 5 <= MAX_META_BYTES


@pytest.mark.parametrize("num_blocks", [0, 1, 40, 1000])
def test_the_metadata_of_blocks_is_the_fixed_part_of_a_step(num_blocks: int) -> None:
    blocks = np.arange(num_blocks)
    data = encode_batch_step(BatchStep(block_slots=blocks.astype(np.uint16), block_ids=blocks.astype(np.uint32)))
    assert len(data) - BLOCK_BYTES * num_blocks == FIXED.size <= MAX_BLOCK_META_BYTES


def decoding(num_sequences: int) -> Scheduler:
    """Return a scheduler whose sequences, with prompts of different lengths, have their first tokens."""
    config = EngineConfig(max_num_seqs=num_sequences, max_num_batched_tokens=1 << 16, block_size=BLOCK_SIZE, enable_prefix_cache=False)
    scheduler = Scheduler(config, num_blocks=1 + num_sequences * 8, max_model_len=8 * BLOCK_SIZE, eos_token_ids=[1])
    for number in range(num_sequences):
        prompt = np.arange(2, 3 + number % 40, dtype=np.int32)
        scheduler.add(Sequence(f"s{number}", "request", prompt, SamplingParams(max_tokens=60), seed=number))
    for _ in range(2):  # the prompts; then the step that names the decode slots
        publish_and_answer(scheduler)
    return scheduler


def publish_and_answer(scheduler: Scheduler) -> BatchStep:
    step = scheduler.schedule()
    assert step is not None
    scheduler.apply(step, [7] * len(step.sampled))
    return step.batch


@pytest.mark.parametrize("num_sequences", [1, 256, 1024])
def test_a_steady_decode_step_is_small_whatever_the_batch(wire: Wire, num_sequences: int) -> None:
    scheduler = decoding(num_sequences)
    num_new = []
    for _ in range(2 * BLOCK_SIZE):
        batch = publish_and_answer(scheduler)
        (message,) = wire.send(encode_batch_step(batch))
        num_new.append(len(batch.block_ids))
        assert len(message) <= MAX_STEADY_BYTES + BLOCK_BYTES * num_new[-1]
    assert sum(num_new) == 2 * num_sequences  # each has filled two blocks


def test_a_step_that_appends_no_block_has_34_bytes(wire: Wire) -> None:
    scheduler = decoding(1)
    sizes = [len(wire.send(encode_batch_step(publish_and_answer(scheduler)))[0]) for _ in range(BLOCK_SIZE)]
    without = STEP_HEADER.size + 2 + FIXED.size  # msgpack puts two bytes in front of the fixed part
    assert sorted(sizes) == [without] * (BLOCK_SIZE - 1) + [without + BLOCK_BYTES]
    assert without == 34
