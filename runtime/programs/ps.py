"""List the launches of this user that live on this machine: what drives each, since when, and where its ranks are."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..launch.live_launches import LiveLaunch, live_launches

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

_COLUMNS = ("LAUNCH", "KIND", "PID", "UP", "RANKS", "NODES", "COMMAND")
_MAX_HOSTS = 4
_MAX_COMMAND = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON list, with every rank's pid, device and log files")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Return what the program is about."""
    return "live launches of this user"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the list as a coroutine."""
    return _list(arguments.json)


async def _list(is_json: bool) -> int:
    launches = live_launches()
    print(json.dumps([_as_json(launch) for launch in launches], indent=2) if is_json else _table(launches), flush=True)
    return 0


def _as_json(launch: LiveLaunch) -> dict[str, Any]:
    facts = {"launch_id": launch.name, "run_directory": str(launch.directory), "age_s": launch.age_s, "has_driver": launch.has_driver}
    return {**facts, "trouble": launch.trouble} if launch.record is None else {**asdict(launch.record), **facts}


def _table(launches: Sequence[LiveLaunch]) -> str:
    if not launches:
        return "no launch lives"
    rows = [_COLUMNS, *map(_row, launches)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS) - 1)]
    return "\n".join("  ".join((*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[-1])) for row in rows)


def _row(launch: LiveLaunch) -> tuple[str, ...]:
    record = launch.record
    if record is None:
        return (launch.name, "?", "?", "?", "?", "?", launch.trouble)
    hosts = [node.host for node in record.nodes]
    nodes = ",".join(hosts[:_MAX_HOSTS]) + (f",... ({len(hosts)})" if len(hosts) > _MAX_HOSTS else "")
    command = shlex.join([os.path.basename(record.argv[0]), *record.argv[1:]]) if record.argv else "?"
    command = command if len(command) <= _MAX_COMMAND else f"{command[: _MAX_COMMAND - 3]}..."
    state = record.kind if launch.has_driver else f"{record.kind}, ending: its driver is gone"
    return (launch.name, state, str(record.pid), describe_age(launch.age_s or 0.0), str(record.world_size), nodes, command)


def describe_age(age_s: float) -> str:
    """Return a duration as people read it: 3:12, 1:00:05, 2d 3:00:00."""
    minutes, seconds = divmod(int(age_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    short = f"{hours}:{minutes:02}:{seconds:02}" if hours or days else f"{minutes}:{seconds:02}"
    return f"{days}d {short}" if days else short
