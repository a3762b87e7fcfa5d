"""The launches of this user that live on this machine, found by their run directories, and how one of them is named."""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from .launch_record import LaunchRecord, process_start, uptime_s
from .run_directory import LOCK_NAME, run_directory_path

_OF_A_NODE = "@"  # in the name of a directory that another machine's launch has here


@dataclass(frozen=True)
class LiveLaunch:
    """A launch whose run directory is held.

    Attributes:
        name: its launch id, or the directory's name where there is no record.
        record: None where there is none yet, or none that can be read: ``trouble`` says why.
    """

    directory: Path
    name: str
    record: LaunchRecord | None = None
    trouble: str = ""

    @property
    def is_live(self) -> bool:
        """Whether somebody holds the directory's lock: driver, agent or guard."""
        return is_held(self.directory)

    @property
    def age_s(self) -> float | None:
        """Seconds since its start."""
        return None if self.record is None else max(0.0, uptime_s() - self.record.started_uptime_s)

    @property
    def has_driver(self) -> bool:
        """Whether the process that drives it lives; without it the agents are ending everything."""
        return self.record is not None and process_start(self.record.pid) == self.record.pid_start


def live_launches() -> list[LiveLaunch]:
    """Return the live launches of this user, the oldest first."""
    parent = run_directory_path("any").parent
    found = [_look(Path(entry.path)) for entry in (os.scandir(parent) if parent.is_dir() else []) if _is_of_a_launch(entry)]
    launches = [launch for launch in found if launch is not None]
    return sorted(launches, key=lambda launch: (launch.record.started_uptime_s if launch.record else float("inf"), launch.name))


def find_launch(name: str, launches: Sequence[LiveLaunch]) -> LiveLaunch:
    """Return the launch of this id, or the only one whose id begins so.

    Raises:
        ConfigError: there is none, or more than one.
    """
    chosen = choose_name(name, [launch.name for launch in launches], "live launch")
    return next(launch for launch in launches if launch.name == chosen)


def choose_name(name: str, known: Sequence[str], what: str) -> str:
    """Return the one of several names that is ``name``, or the only one that begins so; raises ConfigError as ``find_launch``."""
    begun = [name] if name in known else [other for other in known if name and other.startswith(name)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise ConfigError(f"{name!r} begins the ids of {len(begun)} launches: {', '.join(begun)}; write more of it")
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    there = f"are {len(known)}: {', '.join(known)}" if len(known) > 1 else f"is {known[0]}" if known else "is none"
    raise ConfigError(f"there is no {what} {name!r}; there {there}{hint}")


def is_held(directory: Path) -> bool:
    """Say whether a live process holds the lock of a run directory."""
    try:
        lock_fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone, or not made yet
        return False
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, which whoever wants it for itself allows for
    except BlockingIOError:
        return True
    finally:
        os.close(lock_fd)
    return False


def _is_of_a_launch(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and _OF_A_NODE not in entry.name


def _look(directory: Path) -> LiveLaunch | None:
    if not is_held(directory):
        return None
    try:
        record = LaunchRecord.read(directory)
    except FileNotFoundError:
        return LiveLaunch(directory, directory.name, trouble="it has no record yet")
    except ConfigError as error:
        return LiveLaunch(directory, directory.name, trouble=str(error))
    return LiveLaunch(directory, record.launch_id, record)
