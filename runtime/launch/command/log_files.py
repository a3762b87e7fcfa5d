"""The log files of a launch, live or ended, on whichever node they are, and reading them to their end or for as long as they grow."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ....errors import ConfigError, LaunchError, describe_exit
from ..live_launches import LiveLaunch, choose_name, live_launches
from .log_directory import LATEST, log_path, state_path

STREAMS = ("out", "err")
_NAME = re.compile(r"r([0-9]{5,6})\.(out|err)")
_CHUNK_BYTES = 1 << 16
_PERIOD_S = 0.1


@dataclass(frozen=True)
class LogFile:
    """One stream of one rank; ``rsh`` is the command that reaches its node, empty for this one."""

    rank: int
    stream: str
    path: str
    host: str = ""
    rsh: tuple[str, ...] = ()

    async def read(self, is_growing: Callable[[], bool]) -> AsyncIterator[bytes]:
        """Yield what is in the file, and what comes while ``is_growing()``; nothing of a file that is not there.

        Raises:
            LaunchError: another node does not show it.
        """
        chunks = _read_over(self, is_growing) if self.rsh else _read_here(self.path, is_growing)
        async for chunk in chunks:
            yield chunk


def find_log_files(name: str) -> tuple[list[LogFile], LiveLaunch | None]:
    """Return the files of the launch of this id, or whose id begins so, and the launch if it lives; "latest" is the newest with files.

    Raises:
        ConfigError: there is none of that name, it keeps no files, or they are where nothing reaches them.
    """
    launches = live_launches()
    if name == LATEST and os.path.islink(state_path() / LATEST):
        name = os.path.basename(os.readlink(state_path() / LATEST))
    chosen = choose_name(name, [*(launch.name for launch in launches), *_ended(launches)], "launch with log files")
    for launch in launches:
        if launch.name == chosen:
            return _files_of(launch), launch
    return _files_in(str(log_path(chosen))), None


def _ended(launches: Sequence[LiveLaunch]) -> list[str]:
    """Return the ids of launches that have files here and live no more."""
    state, live = state_path(), {launch.name for launch in launches}
    names = os.listdir(state) if state.is_dir() else []
    return sorted(name for name in names if name not in live and (state / name).is_dir() and not (state / name).is_symlink())


def _files_of(launch: LiveLaunch) -> list[LogFile]:
    record = launch.record
    if record is None:
        raise ConfigError(f"launch {launch.name}: {launch.trouble}; look into {state_path()}")
    if not record.log_dir:
        raise ConfigError(f"launch {launch.name} keeps no log files; start it with a log_dir")
    files = []
    for node in record.nodes:
        if not node.is_local and not node.rsh:
            raise ConfigError(
                f"node {node.host} has called in by itself, and nothing reaches its files; they are in {record.log_dir} there"
            )
        for rank in node.ranks:
            files += [LogFile(rank.rank, stream, getattr(rank, stream), node.host, node.rsh) for stream in STREAMS]
    return files


def _files_in(directory: str) -> list[LogFile]:
    found = [match for name in sorted(os.listdir(directory)) if (match := _NAME.fullmatch(name))]
    if not found:
        raise ConfigError(f"{directory} has no log files: no rank was started on this node")
    return sorted(
        (LogFile(int(match[1]), match[2], os.path.join(directory, match[0])) for match in found),
        key=lambda file: (file.rank, STREAMS.index(file.stream)),
    )


async def _read_here(path: str, is_growing: Callable[[], bool]) -> AsyncIterator[bytes]:
    fd = await _open(path, is_growing)
    if fd is None:
        return
    try:
        while True:
            was_growing = is_growing()  # asked first: what was written before the end is read after it
            while chunk := os.read(fd, _CHUNK_BYTES):
                yield chunk
            if not was_growing:
                return
            await asyncio.sleep(_PERIOD_S)
    finally:
        os.close(fd)


async def _open(path: str, is_growing: Callable[[], bool]) -> int | None:
    """Open a file, once there is one; None where there is none, and none will come."""
    while True:
        was_growing = is_growing()
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not was_growing:
            return None
        await asyncio.sleep(_PERIOD_S)


async def _read_over(file: LogFile, is_growing: Callable[[], bool]) -> AsyncIterator[bytes]:
    follows = is_growing()
    line = f"tail -c +1 {'-F ' if follows else ''}-- {shlex.quote(file.path)}"
    process = await asyncio.create_subprocess_exec(
        *file.rsh, line, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    if process.stdout is None:
        raise LaunchError("a pipe was asked for and there is none")
    try:
        while True:
            try:
                chunk = await asyncio.wait_for(process.stdout.read(_CHUNK_BYTES), _PERIOD_S * 10)
            except asyncio.TimeoutError:
                if follows and not is_growing():
                    return
                continue
            if not chunk:
                break
            yield chunk
        if await process.wait():
            raise LaunchError(
                f"{' '.join(file.rsh[:1])} {file.host}: tail {describe_exit(process.returncode or 0)}; its lines above say why"
            )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
