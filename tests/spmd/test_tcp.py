"""Worker groups over TCP: what a group promises over ipc holds there too, and nothing listens but what is documented."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.groups import DEADLINES, launch
from support.leaks import LeakCheck
from support.listening import listening
from zmq.utils import z85

import zspmd
from zspmd.errors import BackpressureError, ConfigError, InsecureEndpointError, WorkerRaisedError, WorkerStalledError
from zspmd.runtime.engine.checkpoint import DEMO_MODEL
from zspmd.transport.chunks import CHUNK_BYTES

LOOPBACK = "127.0.0.1"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "bind", [LOOPBACK, pytest.param("::1", marks=pytest.mark.skipif(not _has_ipv6(), reason="no IPv6")), "localhost"], ids=str
)
async def test_steps_and_calls_in_order(leak_check: LeakCheck, bind: str) -> None:
    async with launch("Echo", 2, window=8, bind=bind) as group:
        pending = [await group.submit(number) for number in range(20)]
        infos = await group.call("info")
        assert [info["num_steps"] for info in infos] == [20, 20]
        assert [await reply for reply in pending] == [[{"rank": rank, "inputs": number} for rank in range(2)] for number in range(20)]
        assert (group.statistics().impostor_frames, group.statistics().foreign_frames) == (0, 0)


SIZES = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 << 20)


@pytest.mark.parametrize("sizes", [SIZES, pytest.param((100_000_000,), marks=pytest.mark.long)], ids=["around a part", "100 MB"])
async def test_values_of_any_size_go_both_ways(leak_check: LeakCheck, sizes: tuple[int, ...]) -> None:
    async with launch("Echo", 2, bind=LOOPBACK) as group:
        for size in sizes:
            array, text = np.arange(size, dtype=np.uint8), b"b" * size
            for answer in await group.step({"array": array, "bytes": text}):
                np.testing.assert_array_equal(answer["inputs"]["array"], array)
                assert answer["inputs"]["bytes"] == text


async def test_collectives_meet_through_the_store(leak_check: LeakCheck) -> None:
    async with launch("Reducer", 3, bind=LOOPBACK, preload=("torch",)) as group:  # once, not by each rank
        assert [float(np.asarray(answer).sum()) for answer in await group.step({"x": np.ones(4)})] == [24.0] * 3


async def test_errors_of_the_worker_arrive(leak_check: LeakCheck) -> None:
    async with launch("Echo", 2, bind=LOOPBACK) as group:
        with pytest.raises(WorkerRaisedError, match="as asked"):
            await group.call("fail", "as asked")
        assert await group.call("add", 1, b=2) == [3, 3]


async def test_a_step_that_is_late_and_one_that_finds_no_room(leak_check: LeakCheck) -> None:
    deadlines = zspmd.Deadlines(beat_s=0.2, ready_s=60.0, step_s=1.0, collective_s=60.0, drain_s=1.0, kill_s=2.0)
    group = launch("Troubled", 2, window=1, bind=LOOPBACK, deadlines=deadlines)
    await group.start()
    pending = await group.submit({1: "sleep"}, timeout_s=2.0)
    with pytest.raises(BackpressureError):
        await group.submit({})
    with pytest.raises(WorkerStalledError) as caught:
        await pending
    assert caught.value.missing == (1,)
    await group.aclose(abort=True)


async def test_a_worker_that_fails_in_setup_is_named(leak_check: LeakCheck) -> None:
    with pytest.raises(WorkerRaisedError, match="unexpected keyword argument 'wrong'"):
        async with launch("Echo", 2, bind=LOOPBACK, worker_args={"wrong": 1}):
            pass


@pytest.mark.parametrize(("bind", "num_ports"), [(None, 0), (LOOPBACK, 3)], ids=["ipc", "tcp"])
async def test_the_ports_of_a_run_are_the_documented_ones(leak_check: LeakCheck, bind: str | None, num_ports: int) -> None:
    before = set(listening([os.getpid()]))
    async with launch("Echo", 2, bind=bind) as group:
        await group.step(None)
        found = set(listening([os.getpid(), *leak_check.processes()])) - before
        assert len(found) == num_ports
        assert {address for address, _ in found} <= {"0100007F"}
    assert set(listening([os.getpid()])) == before


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "*", ""], ids=repr)
def test_every_interface_is_refused_before_anything_starts(leak_check: LeakCheck, bind: str) -> None:
    with pytest.raises(InsecureEndpointError, match="name the one IP address"):
        launch("Echo", 2, bind=bind)


def test_an_address_of_another_host_is_refused_before_anything_starts(leak_check: LeakCheck) -> None:
    with pytest.raises(ConfigError, match="no address of this host"):
        launch("Echo", 2, bind="192.0.2.7")


async def test_eight_launches_at_once_do_not_meet(leak_check: LeakCheck) -> None:
    async def one(number: int) -> None:
        async with launch("Echo", 1, bind=LOOPBACK) as group:
            assert await group.step(number) == [{"rank": 0, "inputs": number}]

    await asyncio.gather(*(one(number) for number in range(8)))


async def test_an_engine_says_the_same_over_tcp(leak_check: LeakCheck) -> None:
    async with zspmd.Engine(DEMO_MODEL, parallel=zspmd.ParallelConfig(tp=2), devices="cpu", deadlines=DEADLINES, bind=LOOPBACK) as engine:
        outputs = [output async for output in engine.generate("123+456=", zspmd.SamplingParams(max_tokens=8, temperature=0))]
    assert outputs[-1].text == "579"


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("generate", "--bind", LOOPBACK, "999+1="), 0, "999+1=1000"),
        (("--dry-run", "generate", "--bind", LOOPBACK), 0, "socket   tcp://127.0.0.1:*"),
        (("generate", "--bind", "0.0.0.0", "999+1="), 2, "bind is '0.0.0.0', which means every interface"),
    ],
    ids=["runs", "dry run", "refused"],
)
def test_the_command_line_binds(leak_check: LeakCheck, arguments: tuple[str, ...], code: int, shown: str) -> None:
    command = [sys.executable, "-m", "zspmd.runtime.launch.cli", "--devices", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert shown in done.stdout + done.stderr


async def test_keys_are_in_no_place_that_others_read(leak_check: LeakCheck, tmp_path: Path) -> None:
    async with launch("Echo", 2, bind=LOOPBACK, log_dir=str(tmp_path)) as group:
        await group.step(None)
        secrets = _secrets(group)
        texts = _readable_by_others(leak_check, tmp_path)
    texts += [repr(event).encode() for event in [event async for event in group.events()]]
    texts.append(f"{group.config!r}".encode())
    assert len(secrets) == 9
    assert [text for text in texts for secret in secrets if secret in text] == []


def _secrets(group: zspmd.WorkerGroup) -> list[bytes]:
    processes = group._processes
    assert processes._site.door is not None
    keys = [processes._site.door.rank_keys(rank) for rank in range(group.world_size)]
    own = [key for pair in keys for key in (pair.public, pair.secret, z85.decode(pair.secret))]
    return [*own, processes._site.door._secret, keys[0].server, processes._site.token]


def _readable_by_others(leak_check: LeakCheck, logs: Path) -> list[bytes]:
    """Return the command line, environment and name of every process of the launch, and all files that it has made."""
    pids = [os.getpid(), *leak_check.processes()]
    facts = [Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ", "comm")]
    return facts + [path.read_bytes() for place in (logs, leak_check.runtime_dir) for path in place.rglob("*") if path.is_file()]
