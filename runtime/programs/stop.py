"""End a live launch: its launcher is asked as Ctrl-C asks it, a program of one's own gets the error of ranks that are gone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..launch.live_launches import LiveLaunch, find_launch, live_launches
from ..launch.stopping import stop_launch

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

WAIT_S = 45.0  # more than ranks have by default: 30 s by themselves, and what follows
NOW_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("launch", metavar="ID", help="a launch id, or its beginning")
    parser.add_argument("--now", action="store_true", help="give the ranks no time of their own")
    parser.add_argument("--wait", type=float, metavar="S", help=f"seconds until it is given up ({WAIT_S:g}, with --now {NOW_S:g})")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Find the launch; returns its id."""
    if arguments.wait is not None and not 0 <= arguments.wait <= 1e6:
        raise ConfigError(f"--wait is {arguments.wait!r} s; it must be from 0 to 1e+06")
    return find_launch(arguments.launch, live_launches()).name


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the end of the launch as a coroutine."""
    timeout_s = arguments.wait if arguments.wait is not None else NOW_S if arguments.now else WAIT_S
    return _stop(find_launch(arguments.launch, live_launches()), is_now=arguments.now, timeout_s=timeout_s)


async def _stop(launch: LiveLaunch, *, is_now: bool, timeout_s: float) -> int:
    took_s = await stop_launch(launch, is_now=is_now, timeout_s=timeout_s)
    if took_s is not None:
        print(f"launch {launch.name} has ended after {took_s:.1f} s", flush=True)
        return 0
    advice = "see what `zspmd-run ps` tells of it" if is_now else "--now ends it by force"
    print(f"zspmd-run: launch {launch.name} is still there after {timeout_s:g} s; {advice}", file=sys.stderr)
    return 1
