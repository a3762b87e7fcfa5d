"""Worker groups, scripts and programs over processes that torchrun and Open MPI have started; both are the real ones."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from support.external_launchers import LAUNCHERS, PROGRAM, Started, command, run_json
from support.leaks import LeakCheck

import zspmd

each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS)
SECRET = "a secret that no rank may see"


def drivers(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [told for told in said if "ranks" in told]


@each_launcher
def test_rank_0_drives_and_each_rank_is_below_the_process_of_its_number(
    leak_check: LeakCheck, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSPMD_SECRET", SECRET)
    names = ["OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID", "ZSPMD_SECRET", "RANK", "LOCAL_WORLD_SIZE", "NNODES", "MASTER_ADDR"]
    said = run_json(command(launcher, 3, PROGRAM, "step", *names))
    (driver,) = drivers(said)
    assert driver["launch_id"].startswith(f"{launcher}-")
    assert [(rank["rank"], rank["local_rank"], rank["local_world_size"]) for rank in driver["ranks"]] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    for rank in driver["ranks"]:
        assert rank["environment"] == {
            "OMPI_COMM_WORLD_RANK": None,
            "TORCHELASTIC_RUN_ID": None,
            "ZSPMD_SECRET": None,
            "RANK": str(rank["rank"]),
            "LOCAL_WORLD_SIZE": "3",
            "NNODES": "3",
            "MASTER_ADDR": "127.0.0.1",
        }
    assert [told for told in said if "ended" in told] == [{"ended": True}]  # the others never come that far


@each_launcher
def test_a_rank_that_fails_is_told_by_the_driver_and_every_process_fails(leak_check: LeakCheck, launcher: str) -> None:
    started = Started(command(launcher, 2, PROGRAM, "fail"))
    code, errors = started.finish()
    assert code == 1
    assert "WorkerRaisedError: rank 1 on " in errors
    assert "raised builtins.ValueError in its step: rank 1 was asked to" in errors


@each_launcher
def test_a_killed_process_of_the_launcher_is_the_first_cause(leak_check: LeakCheck, launcher: str) -> None:
    """mpirun ends all others at once when one is killed, so that the driver may have no time to tell."""
    started = Started(command(launcher, 3, PROGRAM, "wait"))
    started.read_until("ranks")
    killed, begun = started.pid_of(2), time.monotonic()
    os.kill(killed, signal.SIGKILL)
    code, errors = started.finish()
    assert code != 0
    assert time.monotonic() - begun < 20.0
    if launcher == "torchrun":
        assert f": node 2 ({os.uname().nodename}) is lost, with ranks 2: node 2, pid {killed} on" in errors
        assert "its connection was lost" in errors
    leak_check.wait_gone(10.0)


@each_launcher
def test_a_killed_driver_leaves_nothing(leak_check: LeakCheck, launcher: str) -> None:
    started = Started(command(launcher, 2, PROGRAM, "wait"))
    started.read_until("ranks")
    os.kill(started.pid_of(0), signal.SIGKILL)
    code, _ = started.finish()
    assert code != 0
    leak_check.wait_gone(10.0)


@each_launcher
def test_launches_at_once_do_not_meet(leak_check: LeakCheck, launcher: str) -> None:
    both = [Started(command(launcher, 2, PROGRAM, "step")) for _ in range(2)]
    for started in both:
        code, errors = started.finish()
        assert code == 0, errors
    ids = [drivers(started.said)[0]["launch_id"] for started in both]
    assert len(set(ids)) == 2
    assert all(len(drivers(started.said)[0]["ranks"]) == 2 for started in both)


def test_outside_a_launcher_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    with pytest.raises(zspmd.ConfigError, match="not started by torchrun, mpirun or srun"):
        zspmd.launch("support.workers:Echo", launcher="external")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "world_size is 3, and env has started 2 processes"),
        ({"hosts": ["node1"]}, "leave hosts out"),
        ({"record": "recording"}, "a recording is of ranks on one node"),
        ({"launcher": "other"}, "launcher is 'other'; choose one of agents, external"),
    ],
    ids=["world size", "hosts", "record", "launcher"],
)
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    facts = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(zspmd.ConfigError, match=message):
        zspmd.launch("support.workers:Echo", **{"launcher": "external", **options})


def test_several_machines_need_a_secret_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ZSPMD_SECRET", raising=False)
    with pytest.raises(zspmd.ConfigError, match=r"env has started 2 ranks, of which 1 are here; .* `openssl rand -hex 32`"):
        zspmd.launch("support.workers:Echo", launcher="external")
    monkeypatch.setenv("ZSPMD_SECRET", SECRET)
    place = zspmd.launch("support.workers:Echo", launcher="external").config.dial
    assert place is not None
    assert (place.master_addr, place.secret, "ZSPMD_SECRET" in os.environ) == ("192.0.2.1", SECRET.encode(), False)
    assert SECRET not in repr(place)


async def test_a_process_that_never_comes_is_named(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    group = zspmd.launch("support.workers:Echo", launcher="external", deadlines=zspmd.Deadlines(ready_s=1.0))
    with pytest.raises(zspmd.LaunchError, match=r"nodes 1, 2 have not called in at 127.0.0.1:\d+ within 0.9 s"):
        await group.start()


def test_an_engine_does_not_restart_what_it_did_not_start() -> None:
    with pytest.raises(zspmd.ConfigError, match="processes that another launcher has started serve one launch"):
        zspmd.Engine("demo", launcher="external", restart=zspmd.RestartPolicy())
