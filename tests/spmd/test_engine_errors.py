"""What goes wrong says so: input errors start nothing, request errors end one request, faults end every stream; nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file
from support import odd_processors
from support.checkpoints import SIZES, save_checkpoint
from support.engines import assert_idle, build_engine, complete, complete_all, process_starts
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOCAB_SIZE = SIZES["vocab_size"]
CONTEXT = SIZES["max_position_embeddings"]
SHORT = zspmd.SamplingParams(max_tokens=4, temperature=0)
ENDLESS = zspmd.SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoint: Path) -> AsyncIterator[zspmd.Engine]:
    async with build_engine(checkpoint, max_num_seqs=4, block_size=4, max_waiting=6, num_blocks=129) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def nothing_left() -> AsyncIterator[None]:
    """After the test there is no process, run directory, descriptor or shared memory that was not there before."""
    with LeakCheck() as leaks:
        yield
        leaks.check()


# input errors: nothing is started


def remove(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()

    return damage


def change_config(**fields: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def remove_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def cut_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 5000) + b"{")


def break_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(shutil.rmtree, "no model directory .*broken; give a local directory with config.json", id="missing directory"),
        pytest.param(remove("config.json"), "cannot read .*config.json", id="missing config"),
        pytest.param(
            change_config(architectures=["MambaForCausalLM"]),
            r"architectures is \['MambaForCausalLM'\]; supported are LlamaForCausalLM, .*Qwen3ForCausalLM",
            id="unknown architecture",
        ),
        pytest.param(
            remove("model.safetensors"), "has neither model.safetensors nor .*; give a directory that holds", id="missing weights"
        ),
        pytest.param(
            remove_tensor,
            "broken has no tensor model.layers.1.mlp.up_proj.weight; the checkpoint is incomplete",
            id="missing tensor",
        ),
        pytest.param(truncate, r"is truncated: \d+ B where its header asks for \d+ B; download it again", id="truncated data"),
        pytest.param(cut_header, "is truncated: 9 B where its header asks for 5008 B; download it again", id="truncated header"),
        pytest.param(change_config(hidden_size=128), "has shape .* where config.json asks for", id="another shape"),
        pytest.param(break_tokenizer, "tokenizer.json cannot be read", id="broken tokenizer"),
    ],
)
async def test_a_bad_checkpoint_is_named_before_anything_starts(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    damage(broken)
    await assert_refused(build_engine(broken), zspmd.CheckpointError, message)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        pytest.param(
            {"tp": 3}, zspmd.TopologyError, "tp 3 does not fit 8 heads, 4 KV heads .*; choose one of 1, 2, 4, 8", id="tp and heads"
        ),
        pytest.param(
            {"tp": 4, "devices": "cuda"}, zspmd.TopologyError, "4 ranks need 4 CUDA devices and this node shows 0; lower", id="no devices"
        ),
        pytest.param(
            {"tp": 4, "devices": ["cpu", "cpu"]},
            zspmd.TopologyError,
            r"devices lists 2 entries \(cpu, cpu\) for 4 ranks; list one per rank",
            id="short list of devices",
        ),
        pytest.param({"devices": "tpu"}, zspmd.ConfigError, "device 'tpu' is unknown; write \"auto\"", id="unknown device"),
        pytest.param(
            {"max_model_len": CONTEXT + 1},
            zspmd.ConfigError,
            "max_model_len is 257; the model in .* has 256 positions: lower it",
            id="context",
        ),
        pytest.param({"launch_id": "a/b"}, zspmd.ConfigError, "a/b", id="launch id"),
    ],
)
async def test_bad_options_are_named_before_anything_starts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[zspmd.ConfigError], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    await assert_refused(build_engine(checkpoint, **options), kind, message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pp": 3}, "pp 3 is more than the 2 layers of the model; choose at most 2"),
        ({"ep": 2, "dp": 2}, "ep is 2, and the model has no experts: with tp 1 and dp 2 choose 1"),
    ],
    ids=["pp", "ep"],
)
async def test_layouts_that_do_not_fit_are_refused(checkpoint: Path, sizes: dict[str, int], message: str) -> None:
    await assert_refused(zspmd.Engine(checkpoint, parallel=zspmd.ParallelConfig(**sizes)), zspmd.TopologyError, message)


async def assert_refused(engine: zspmd.Engine, kind: type[zspmd.ConfigError], message: str) -> None:
    """Check that the engine refuses to start, with exactly this class of error, and that no process was even begun."""
    with process_starts() as starts:
        with pytest.raises(kind, match=message) as caught:
            async with engine:
                pytest.fail("it started")
        assert starts == []
    assert type(caught.value) is kind
    with pytest.raises(zspmd.ClosedError):
        await complete(engine, [1], SHORT)


async def test_a_draft_on_ranks_of_different_kinds_is_refused(
    nothing_left: None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could propose differently in a near tie. A draft that they share asks for no such thing."""
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", odd_processors.WORKER)
    with pytest.raises(zspmd.ConfigError, match="rank 0 computes on 'kind 0' and rank 1 on 'kind 1'"):
        async with build_engine(checkpoint, tp=2, speculation=f"draft:{checkpoint},tp=1"):
            pytest.fail("it started")
    async with build_engine(checkpoint, tp=2, speculation=f"draft:{checkpoint},tp=2") as engine:
        assert len((await complete(engine, [1, 2, 3], SHORT)).token_ids) <= 4


async def test_starting_processes_would_be_noticed() -> None:
    with process_starts() as starts:
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()
    assert len(starts) >= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1 to .*: ask for at least one token"),
        ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 100: use 0 for greedy decoding"),
    ],
    ids=["max_tokens 0", "temperature -1"],
)
async def test_bad_sampling_parameters_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(zspmd.ConfigError, match=message):
        zspmd.SamplingParams(**fields)


# request errors: the engine lives


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        pytest.param([], SHORT, "the prompt is empty; give at least one token", id="empty"),
        pytest.param(
            [1] * CONTEXT, SHORT, "the prompt has 256 tokens, and max_model_len 256 must hold one more: shorten it", id="too long"
        ),
        pytest.param(
            [1, VOCAB_SIZE], SHORT, "token id 509 of the prompt is outside the vocabulary: give ids from 0 to 508", id="id too high"
        ),
        pytest.param([1, -1], SHORT, "token id -1 of the prompt is outside the vocabulary: give ids from 0 to 508", id="negative id"),
        pytest.param([1, 2.5], SHORT, "no text, list of token ids or list of chat messages: 'float'", id="no whole number"),
        pytest.param(["a", "b"], SHORT, "no text, list of token ids or list of chat messages: 'str'", id="list of texts"),
        pytest.param(b"ab", SHORT, "the prompt is a bytes; decode it to text", id="bytes"),
        pytest.param([True, 1], SHORT, "no text, list of token ids or list of chat messages: it holds a bool", id="bool"),
        pytest.param(None, SHORT, "no text, list of token ids or list of chat messages", id="None"),
        pytest.param("text", SHORT, "has no tokenizer.json; give the prompt as token ids", id="text without tokenizer"),
        pytest.param([{"role": "user", "content": "?"}], SHORT, "has no tokenizer.json; give the prompt as token ids", id="chat"),
        pytest.param([1], zspmd.SamplingParams(stop="x"), "stop texts need a tokenizer.json .*; use stop_token_ids", id="stop text"),
    ],
)
async def test_a_bad_request_is_refused_and_the_engine_goes_on(
    engine: zspmd.Engine, prompt: Any, params: zspmd.SamplingParams, message: str
) -> None:
    other = asyncio.create_task(complete(engine, [5, 6], SHORT))
    with pytest.raises(zspmd.RequestError, match=message) as caught:
        await complete(engine, prompt, params, request_id="bad")
    assert caught.value.request_id == "bad"
    assert len((await other).token_ids) == 4
    assert len((await complete(engine, [5, 6], SHORT, request_id="bad")).token_ids) == 4, "its name is free"
    assert_idle(engine)


async def test_a_full_queue_refuses_the_next_request(engine: zspmd.Engine) -> None:
    results = await asyncio.gather(*(complete(engine, [i], SHORT) for i in range(9)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    assert [type(error) for error in refused] == [zspmd.RequestError] * 3
    assert all("6 sequences are waiting, the limit max_waiting is 6: send the request again later" in str(error) for error in refused)
    assert_idle(engine)


async def test_without_a_tokenizer_outputs_are_token_ids(engine: zspmd.Engine) -> None:
    output = await complete(engine, (7, 8, 9), SHORT)
    assert (output.prompt, output.prompt_token_ids, output.text) == (None, [7, 8, 9], "")
    assert len(output.token_ids) == 4


# faults: every stream hears of it, nothing is left


@pytest.mark.usefixtures("nothing_left")
async def test_a_killed_worker_ends_every_stream_within_a_second(checkpoint: Path) -> None:
    async with build_engine(checkpoint, tp=2, max_num_seqs=4) as engine:
        streams = [asyncio.create_task(complete(engine, [i + 1], ENDLESS)) for i in range(6)]
        await wait_until(lambda: engine.statistics().num_generated_tokens > 8)
        victim = engine.group.health()[1].pid
        assert victim is not None
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        errors = await asyncio.gather(*streams, return_exceptions=True)
        elapsed_s = time.monotonic() - killed_at
        assert [type(error) for error in errors] == [zspmd.WorkerExitedError] * 6
        assert elapsed_s < 1.0
        with pytest.raises(zspmd.WorkerExitedError) as caught:
            await complete(engine, [1], SHORT)
    assert (caught.value.rank, caught.value.exit_code, caught.value.pid) == (1, -signal.SIGKILL, victim)


@pytest.mark.usefixtures("nothing_left")
async def test_a_step_that_raises_ends_every_stream_with_its_traceback(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    async with build_engine(broken) as engine:
        errors = await asyncio.gather(*(complete(engine, [i + 1], ENDLESS) for i in range(3)), return_exceptions=True)
    assert [type(error) for error in errors] == [zspmd.WorkerRaisedError] * 3
    for part in ("rank 0", "in step 0", "the best logit of slot 0 is nan: check the checkpoint for NaN", "remote traceback", "sampler.py"):
        assert part in str(errors[0])


@pytest.mark.usefixtures("nothing_left")
async def test_closing_ends_streams_that_run(checkpoint: Path) -> None:
    engine = build_engine(checkpoint, max_num_seqs=4)
    with pytest.raises(zspmd.ClosedError, match="has not been started; enter it with 'async with'"):
        await complete(engine, [1], SHORT)
    async with engine:
        streams = [asyncio.create_task(complete(engine, [i + 1], ENDLESS)) for i in range(6)]
        await wait_until(lambda: engine.statistics().num_generated_tokens > 8)
        with pytest.raises(zspmd.ClosedError, match="was started before; make a new one"):
            await engine.start()
    errors = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(error) for error in errors] == [zspmd.ClosedError] * 6
    with pytest.raises(zspmd.ClosedError, match="the engine is closed; make a new one"):
        await complete(engine, [1], SHORT)


@pytest.mark.usefixtures("nothing_left")
async def test_a_cancelled_program_leaves_nothing(checkpoint: Path) -> None:
    engine = build_engine(checkpoint)
    started = asyncio.Event()

    async def program() -> None:
        async with engine:
            started.set()
            await complete_all(engine, [[1], [2]], ENDLESS)

    task = asyncio.create_task(program())
    await started.wait()
    await wait_until(lambda: engine.statistics().num_generated_tokens > 8)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.usefixtures("nothing_left")
async def test_a_pool_beyond_the_memory_fails_the_start(checkpoint: Path) -> None:
    engine = build_engine(checkpoint, num_blocks=1 << 31, block_size=1024)
    with pytest.raises(zspmd.ConfigError, match=r"num_blocks is 2147483648, which takes [0-9,]+ B on rank 0, .*; lower it to [0-9]+"):
        async with engine:
            pytest.fail("it started")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("worker", "arguments", "patterns"),
    [
        pytest.param(
            "no_such_module:Worker",
            {},
            ["cannot import the worker 'no_such_module:Worker'", "No module named 'no_such_module'", "must be importable on every rank"],
            id="unknown module",
        ),
        pytest.param("support.workers:Absent", {}, ["cannot import .*:Absent'", "has no attribute 'Absent'"], id="unknown class"),
        pytest.param("json:JSONDecoder", {}, ["not a subclass of zspmd.Worker"], id="no worker"),
        pytest.param(
            "support.workers:Troubled",
            {"raise_on": 1},
            ["rank 1", "raised builtins.RuntimeError in its setup: set-up goes wrong here", "remote traceback", "workers.py"],
            id="setup raises",
        ),
    ],
)
async def test_a_worker_that_cannot_start_is_explained(worker: str, arguments: dict[str, Any], patterns: list[str]) -> None:
    group = zspmd.launch(worker, world_size=2, worker_args=arguments, preload=(), devices="cpu")
    with pytest.raises(zspmd.WorkerRaisedError) as caught:
        async with group:
            pytest.fail("it started")
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is missing in:\n{caught.value}"


@pytest.mark.usefixtures("nothing_left")
async def test_two_starts_at_once_are_one(checkpoint: Path) -> None:
    engine = build_engine(checkpoint)
    first, second = await asyncio.gather(engine.start(), engine.start(), return_exceptions=True)
    assert first is None
    assert isinstance(second, zspmd.ClosedError)
    await engine.aclose()


@pytest.mark.usefixtures("nothing_left")
async def test_a_made_up_request_id_avoids_those_in_use(checkpoint: Path) -> None:
    async with build_engine(checkpoint) as engine:
        named = engine.generate([1, 2], zspmd.SamplingParams(max_tokens=200, ignore_eos=True), request_id="request-0")
        async for first in named:
            other = await complete(engine, [1, 2], SHORT)
            assert (first.request_id, other.request_id) == ("request-0", "request-1")
            break
