"""Ending a live launch from outside: whoever drives it is asked, and its lock tells when all is over.

A launcher gets SIGTERM and ends its ranks in order. A program that embeds a launch gets no signal at all: the guards of its agents do,
which end the ranks, so that the program learns of it by an error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress

from ...errors import ConfigError, LaunchError
from .launch_record import LaunchRecord, RecordedNode, process_start
from .live_launches import LiveLaunch

POLL_S = 0.02
_REPEAT_S = 0.3
_KILL_AFTER_S = 5.0
_RSH_S = 20.0


async def stop_launch(launch: LiveLaunch, *, is_now: bool, timeout_s: float) -> float | None:
    """Have a launch ended; return how many seconds it took until nobody held its lock, None where that is not so after ``timeout_s``.

    Args:
        is_now: ranks get no time of their own.

    Raises:
        ConfigError: what drives it is not known.
        LaunchError: another node cannot be told.
    """
    if launch.record is None:
        raise ConfigError(f"launch {launch.name} cannot be stopped: {launch.trouble}; end the process that has started it")
    begun = time.monotonic()
    if launch.record.kind == "embedded":
        await _end_agents(launch.record, signal.SIGQUIT if is_now else signal.SIGTERM)
        return await _wait_free(launch, begun, timeout_s)
    pidfd = _open_driver(launch.record)
    if pidfd is None:  # its agents are ending everything already
        return await _wait_free(launch, begun, timeout_s)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if is_now and await _insist(launch, pidfd):
            return time.monotonic() - begun
        return await _wait_free(launch, begun, timeout_s)
    finally:
        os.close(pidfd)


def _open_driver(record: LaunchRecord) -> int | None:
    """Return a descriptor of the very process that drives the launch; None where it has ended."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    if process_start(record.pid) == record.pid_start:  # and the descriptor keeps to it, whoever gets the number next
        return pidfd
    os.close(pidfd)
    return None


async def _insist(launch: LiveLaunch, pidfd: int) -> bool:
    """Signal until it ends: the second has the ranks ended, the third at once, and then the launcher itself, after which they end too."""
    begun = time.monotonic()
    while time.monotonic() - begun < _KILL_AFTER_S:
        with suppress(ProcessLookupError):  # it has ended, and its agents may still be at it
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if await _wait_free(launch, time.monotonic(), _REPEAT_S) is not None:
            return True
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return False


async def _wait_free(launch: LiveLaunch, begun: float, timeout_s: float) -> float | None:
    deadline = time.monotonic() + timeout_s
    while launch.is_live:
        if time.monotonic() > deadline:
            return None
        await asyncio.sleep(POLL_S)
    return time.monotonic() - begun


async def _end_agents(record: LaunchRecord, number: int) -> None:
    """Signal the guards of a launch: those here, or where there is none the first that another node has. The driver ends the others."""
    here = [node for node in record.nodes if node.is_local and _is_guard(node.guard_pid, record.pid)]
    for node in here:
        os.kill(node.guard_pid, number)
    others = [node for node in record.nodes if node.rsh and node.guard_pid]
    if not here and not others:
        raise ConfigError(f"none of the agents of launch {record.launch_id} can be told to end; end its driver, pid {record.pid}")
    if not here:
        await _kill_over(others[0], number)


def _is_guard(pid: int, driver_pid: int) -> bool:
    """Say whether a process is still the child of the driver that it was."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1]) == driver_pid
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _kill_over(node: RecordedNode, number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *node.rsh, f"kill -{number} {node.guard_pid}", stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = await asyncio.wait_for(process.wait(), _RSH_S)
    except asyncio.TimeoutError:
        raise LaunchError(f"{node.rsh[0]} {node.target} did not answer within {_RSH_S:g} s; end the launch's driver") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        raise LaunchError(f"{node.rsh[0]} {node.target}: kill {node.guard_pid} failed with {code}; see the lines above")
