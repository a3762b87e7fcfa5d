"""Pipelines whose stages exchange by gloo, which holds nothing for a receiver that is not there: as between nodes and beside NCCL."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest
from support.engines import assert_idle, build_engine
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd

NUM_REQUESTS, BLOCK_SIZE, NUM_BLOCKS = 24, 4, 30
LIMIT_S = 60.0


async def request(engine: zspmd.Engine, number: int) -> list[int]:
    """Return the tokens of a request that joins when there are as many tokens as its number, and leaves early if that says so."""
    chance = random.Random(number)
    prompt = [chance.randrange(100) for _ in range(chance.randint(1, 30))]
    way: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0, "repetition_penalty": 1.3}
    params = zspmd.SamplingParams(max_tokens=chance.randint(1, 24), ignore_eos=bool(number % 3), **way)
    await wait_until(lambda: engine.statistics().num_generated_tokens >= number)  # joins whatever step is running by then
    tokens: list[int] = []
    async with aclosing(engine.generate(prompt, params)) as outputs:  # type: ignore[type-var]  # it is a generator
        async for output in outputs:
            tokens = output.token_ids
            if number % 5 == 4 and len(tokens) >= 3:
                return tokens[:3]
    return tokens


async def tokens_of(pp: int, communicator: str) -> tuple[list[list[int]], int]:
    """Return the tokens of all requests, and how often one gave way to another."""
    engine = build_engine("demo", pp=pp, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_model_len=64, max_num_batched_tokens=64)  # type: ignore[arg-type]  # a name
    engine._launch_options["communicator"] = communicator
    async with engine:
        found = await asyncio.wait_for(asyncio.gather(*(request(engine, number) for number in range(NUM_REQUESTS))), LIMIT_S)
        await wait_until(lambda: not engine.statistics().num_steps_in_flight)
        assert_idle(engine)
        return list(found), engine.statistics().num_preemptions


@pytest.mark.parametrize("pp", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
async def test_tokens_are_those_of_one_stage(leak_check: LeakCheck, pp: int) -> None:
    (alone, _), (tokens, num_preemptions) = await asyncio.gather(tokens_of(1, "auto"), tokens_of(pp, "gloo"))
    assert tokens == alone
    assert num_preemptions, "nobody was preempted"
