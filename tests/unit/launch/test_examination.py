"""What ``doctor`` finds out about hosts: real agents behind a command that stands for ssh, and behaves differently for each host."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.holdings import Holdings

from zspmd.config import NodesConfig
from zspmd.errors import ConfigError
from zspmd.runtime.launch.checks import examined_host
from zspmd.runtime.launch.checks.check_records import FAIL, OK, WARN, Check
from zspmd.runtime.launch.checks.examination import DRIVER, examine_nodes
from zspmd.runtime.launch.checks.machine import MACHINE_CHECKS
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.nodes.node_facts import own_addresses

# By what their names do; addresses, so that nobody asks a name server.
PLAIN, LOUD, DOWN, BARE, MUTE, WEAK = (f"198.51.100.{number}" for number in range(1, 7))
RSH = f"""#!/bin/sh
host=${{1#*@}}; shift
case $host in
  {LOUD}) echo "Welcome to $host" ;;
  {DOWN}) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255 ;;
  {BARE}) echo "sh: 1: exec: python: not found" >&2; exit 127 ;;
  {MUTE}) exec sleep 60 ;;
  {WEAK}) ulimit -n 300 ;;
esac
exec sh -c "$*"
"""


@pytest.fixture
def rsh(tmp_path: Path) -> str:
    path = tmp_path / "rsh"
    path.write_text(RSH)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def quick_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print what torch would, without the seconds that its import takes."""
    told = {"version": "2.13.0", "cuda": None, "available": False, "devices": 0, "gloo": True, "nccl": False}
    monkeypatch.setattr(examined_host, "ASK_TORCH", f"print({json.dumps(told)!r})")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = Holdings.now()
    yield
    before.check()


def own_network() -> str:
    """Return an address of this machine that other machines could use, as a network."""
    found = [entry.partition(" ")[2] for entry in own_addresses()]
    usable = [address for address in found if not address.startswith(("127.", "169.254.", "fe80:")) and address != "::1"]
    if not usable:
        pytest.skip("this machine has no address but loopback ones")
    return f"{usable[0]}/{128 if ':' in usable[0] else 32}"


async def examine(rsh: str, *names: str, iface: str | None = None, **options: Any) -> dict[str, list[Check]]:
    config = NodesConfig(rsh=rsh, allow_same_host=True, iface=iface or own_network())
    return dict(await examine_nodes([Host(name) for name in names], config, **options))


def named(checks: Sequence[Check], name: str) -> list[Check]:
    return [check for check in checks if check.name == name]


async def test_every_host_has_a_line_for_each_check(rsh: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    told = await examine(rsh, PLAIN, LOUD, cwd=str(tmp_path), script="x.py")
    assert list(told) == [PLAIN, LOUD]
    for host, checks in told.items():
        names = [check.name for check in checks if check.name not in ("login", "name")]
        assert names[:5] == ["agent", "versions", "files", "address", "tcp"]
        assert names[5:] == [*(check().name for check in MACHINE_CHECKS), "torch", "clock"]
        assert not [check for check in checks if check.status == FAIL], host
    (login,) = named(told[LOUD], "login")
    assert (login.status, login.text) == (WARN, f"prints a line before its agent speaks, such as 'Welcome to {LOUD}'")
    assert not named(told[PLAIN], "login")
    (tcp,) = named(told[PLAIN], "tcp")
    assert tcp.text == f"reaches the driver, {LOUD}"
    (files,) = named(told[PLAIN], "files")
    assert files == Check("files", OK, f"{tmp_path}, x.py")


@pytest.mark.parametrize(
    ("name", "words", "advice"),
    [
        (DOWN, "No route to host", f"this must print 'works' and ask nothing: RSH {DOWN} 'echo works'"),
        (BARE, "exec: python: not found", "there is no such interpreter"),
    ],
    ids=["unreachable", "no interpreter"],
)
async def test_a_host_without_an_agent_fails_alone(rsh: str, name: str, words: str, advice: str) -> None:
    started = time.monotonic()
    told = await examine(rsh, name, PLAIN)
    assert time.monotonic() - started < 30.0
    (failed,) = told[name]
    assert (failed.name, failed.status) == ("agent", FAIL)
    assert words in failed.text
    assert failed.advice.startswith(advice.replace("RSH", rsh))
    (tcp,) = named(told[PLAIN], "tcp")
    assert tcp.text == "reaches the driver"


async def test_a_host_that_says_nothing_is_given_up(rsh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined_host, "_ATTACH_S", 0.3)
    started = time.monotonic()
    (failed,) = (await examine(rsh, MUTE))[MUTE]
    assert (failed.status, failed.text) == (FAIL, "no word of an agent within 0.3 s")
    assert time.monotonic() - started < 15.0


async def test_the_checks_run_on_the_host_itself(rsh: str) -> None:
    told = await examine(rsh, WEAK, PLAIN)
    (weak,), (plain,) = named(told[WEAK], "limits"), named(told[PLAIN], "limits")
    assert (weak.status, weak.advice) == (WARN, "many ranks may not fit: ulimit -n 4096")
    assert weak.text.startswith("files 300, ")
    assert not plain.text.startswith("files 300, ")


async def test_what_is_missing_there_is_told_and_the_rest_goes_on(rsh: str, tmp_path: Path) -> None:
    told = await examine(rsh, PLAIN, cwd=f"{tmp_path}/gone", script="x.py")
    failed = [(check.name, check.text) for check in told[PLAIN] if check.status == FAIL]
    assert failed == [
        ("cwd", f"{tmp_path}/gone: No such file or directory"),
        ("script", f"{tmp_path}/gone/x.py: No such file or directory"),
    ]
    assert named(told[PLAIN], "torch")


async def test_two_entries_on_one_machine_are_told(rsh: str) -> None:
    told = dict(await examine_nodes([Host(PLAIN), Host(LOUD, user="lee")], NodesConfig(rsh=rsh, iface=own_network())))
    assert [(host, check.text.partition(" (")[0]) for host, checks in told.items() for check in checks if check.status == FAIL] == [
        (f"lee@{LOUD}", f"is the same machine as {PLAIN}")
    ]


async def test_this_machine_needs_no_command_and_is_not_checked_twice(tmp_path: Path) -> None:
    told = await examine(f"{tmp_path}/no-such-command", os.uname().nodename)
    (checks,) = told.values()
    assert [check.name for check in checks if check.name != "name"] == ["agent", "versions", "address", "tcp"]
    assert checks[0].text.startswith("on this machine, without ssh, after ")


async def test_no_interface_fits(rsh: str) -> None:
    told = await examine(rsh, PLAIN, iface="198.51.100.0/24")
    assert [(host, check.name) for host, checks in told.items() for check in checks if check.status == FAIL] == [
        (PLAIN, "address"),
        (DRIVER, "address"),
    ]


async def test_a_command_that_is_not_there_is_wrong_input() -> None:
    with pytest.raises(ConfigError, match="'/no/such/rsh' is not installed"):
        await examine("/no/such/rsh", PLAIN)


async def test_an_agent_that_ends_meanwhile_fails_its_host(rsh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined_host, "ASK_TORCH", "import os, signal; os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    told = await examine(rsh, PLAIN)
    (failed,) = [check for check in told[PLAIN] if check.status == FAIL]
    assert (failed.name, failed.advice) == ("agent", "see what the node does, and run this again")
    assert not named(told[PLAIN], "torch")


async def test_a_torch_that_cannot_be_imported_is_told(rsh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined_host, "ASK_TORCH", "import no_such_torch")
    (torch,) = named((await examine(rsh, PLAIN))[PLAIN], "torch")
    assert (torch.status, torch.text) == (FAIL, "cannot be imported: ModuleNotFoundError: No module named 'no_such_torch'")


async def test_a_torch_that_hangs_is_given_up(rsh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examined_host, "ASK_TORCH", "import signal; signal.pause()")
    monkeypatch.setattr(examined_host, "TORCH_S", 0.2)
    (torch,) = named((await examine(rsh, PLAIN))[PLAIN], "torch")
    assert (torch.status, torch.text) == (FAIL, "was not imported within 120 s")
