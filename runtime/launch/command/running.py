"""Running a launch until it ends, is ended by a signal, or has had its time; and the report of one that an error has ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from ....errors import WorkerError, ZspmdError
from ....process import child_pids
from ..guard import GUARD_NAME
from .exit_codes import TIMED_OUT, cause_kind, exit_code
from .launcher_process import ignore_stop_signals, on_stop_signals
from .options import LaunchOptions, ScriptOptions
from .report import build_report, write_report

if TYPE_CHECKING:
    from ..dial.dial_place import DialPlace


async def run_script(options: ScriptOptions) -> int:
    """Run the launch of a script; SIGINT, SIGTERM, SIGHUP and ``--timeout`` end it in steps, as ``ScriptLaunch.interrupt`` says."""
    from ...driver.script_launch import ScriptLaunch

    launch = ScriptLaunch(options)
    on_stop_signals(launch.interrupt)
    overdue: list[asyncio.Future[None]] = []
    timer = _Timer(options.timeout_s, lambda: overdue.append(asyncio.ensure_future(launch.time_out())))
    code = 1
    try:
        code = await launch.run()
        await asyncio.gather(*overdue)
        return code
    except ZspmdError as error:
        code = exit_code(error)
        _report_error(options, error)
        raise
    finally:
        timer.cancel()
        await launch.leave_callers(code)
        ignore_stop_signals()


async def run_node(place: DialPlace) -> int:
    """Serve the driver's process as one of its nodes; the first signal is told to it, and a second ends this node at once."""
    from ..dial.dial_place import CALL_S, find_driver

    dial = await find_driver(place, timeout_s=CALL_S)
    on_stop_signals(dial.signal)
    try:
        return await dial.run()
    finally:
        ignore_stop_signals()


async def run_program(program: Coroutine[Any, Any, int], options: LaunchOptions) -> int:
    """Run a program; SIGINT, SIGTERM and SIGHUP end it and become the exit code 128 + N, ``--timeout`` ends it with 124.

    The first cancels it, so that it can drain. The second has its agents end their ranks by SIGTERM, the third by SIGKILL; either
    way the program still runs to its end, and nothing is left when this returns.
    """
    task = asyncio.ensure_future(program)
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            name = signal.Signals(number).name
            print(f"zspmd-run: {name}: ending; a signal more ends the ranks in 2 s, yet another at once", file=sys.stderr, flush=True)
            task.cancel()
            return
        for pid in filter(_is_guard, child_pids()):
            os.kill(pid, signal.SIGTERM if len(received) == 2 else signal.SIGQUIT)

    on_stop_signals(end)
    timer = _Timer(options.timeout_s, task.cancel)
    try:
        code = await task
        _report(options, code, {"kind": "none" if code == 0 else "error"})
        return code
    except asyncio.CancelledError:
        if not received and not timer.has_passed:
            raise
    except ZspmdError as error:
        if len(received) < 2:
            _report_error(options, error)
            raise
        print(f"zspmd-run: {error}", file=sys.stderr)  # what ending its ranks by force has made of it
    finally:
        timer.cancel()
        ignore_stop_signals()
    if timer.has_passed and not received:
        print(f"zspmd-run: not done within {options.timeout_s:g} s (--timeout)", file=sys.stderr)
        return _report(options, TIMED_OUT, {"kind": "timeout", "timeout_s": options.timeout_s})
    name = signal.Signals(received[0]).name
    print(f"zspmd-run: ended by {name}", file=sys.stderr)
    return _report(options, 128 + received[0], {"kind": "stopped", "signal": name})


def _is_guard(pid: int) -> bool:
    """Whether a child is the guard of this node's agent: another is what reaches an agent elsewhere, whose ranks end in order without."""
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/comm") as file:
        return file.read().rstrip() == GUARD_NAME
    return False


class _Timer:
    """Calls ``on_passed`` once after so many seconds; 0 for never."""

    def __init__(self, timeout_s: float, on_passed: Any) -> None:
        self.has_passed = False
        self._on_passed = on_passed
        self._handle = asyncio.get_running_loop().call_later(timeout_s, self._pass) if timeout_s else None

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _pass(self) -> None:
        self.has_passed = True
        self._on_passed()


def _report_error(options: LaunchOptions | ScriptOptions, error: ZspmdError) -> None:
    cause: dict[str, Any] = {"kind": cause_kind(error), "error": type(error).__name__, "text": str(error)}
    if isinstance(error, WorkerError):
        cause |= {"rank": error.rank, "host": error.host, "pid": error.pid}
    _report(options, exit_code(error), cause)


def _report(options: LaunchOptions | ScriptOptions, code: int, cause: dict[str, Any]) -> int:
    if options.report is not None:
        report = build_report(launch_id=options.launch_id, exit_code=code, cause=cause, argv=sys.argv, log_dir=options.log_dir)
        if trouble := write_report(options.report, report):
            print(f"zspmd-run: {trouble}", file=sys.stderr)
    return code
