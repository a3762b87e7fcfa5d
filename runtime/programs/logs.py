"""Show what ranks of a launch have printed, from their log files: of a live launch or one that has ended, on whichever node they are."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..launch.command.folding import fold_numbers
from ..launch.command.log_files import STREAMS, LogFile, find_log_files

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("launch", metavar="ID", help="a launch id, its beginning, or latest")
    parser.add_argument("--rank", type=int, metavar="K", help="one rank alone (all, behind [rank K])")
    parser.add_argument("--stream", choices=STREAMS, help="standard output or standard error alone (both)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the launch lives")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Find the files; returns how many there are."""
    return f"{len(_chosen(arguments)[0])} log files of {arguments.launch}"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the reading of the files as a coroutine."""
    files, is_growing = _chosen(arguments)
    return _show(files, is_growing, is_following=arguments.follow)


def _chosen(arguments: argparse.Namespace) -> tuple[list[LogFile], Callable[[], bool]]:
    files, launch = find_log_files(arguments.launch)
    ranks = sorted({file.rank for file in files})
    if arguments.rank is not None and arguments.rank not in ranks:
        raise ConfigError(f"--rank is {arguments.rank}; the launch has ranks {fold_numbers(ranks)}")
    chosen = [file for file in files if arguments.rank in (None, file.rank) and arguments.stream in (None, file.stream)]
    return chosen, lambda: arguments.follow and launch is not None and launch.is_live


async def _show(files: Sequence[LogFile], is_growing: Callable[[], bool], *, is_following: bool) -> int:
    """Show files one after the other, or as they grow; a single one byte for byte, several line by line behind a prefix."""
    if len(files) == 1:
        await _copy(files[0], is_growing)
    elif is_following:
        readers = [asyncio.ensure_future(_copy_lines(file, _prefix(file, files), is_growing)) for file in files]
        try:
            await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    else:
        for file in files:
            await _copy_lines(file, _prefix(file, files), is_growing)
    return 0


async def _copy(file: LogFile, is_growing: Callable[[], bool]) -> None:
    async for chunk in file.read(is_growing):
        _write(chunk)


async def _copy_lines(file: LogFile, prefix: bytes, is_growing: Callable[[], bool]) -> None:
    rest = b""
    async for chunk in file.read(is_growing):
        *lines, rest = (rest + chunk).split(b"\n")
        _write(b"".join(prefix + line + b"\n" for line in lines))
    if rest:
        _write(prefix + rest + b"\n")


def _prefix(file: LogFile, files: Sequence[LogFile]) -> bytes:
    """Return rank and stream, as far as there are several."""
    has_ranks, has_streams = (len({getattr(other, name) for other in files}) > 1 for name in ("rank", "stream"))
    width = len(str(max(other.rank for other in files)))
    parts = [f"rank {file.rank:>{width}}"] * has_ranks + [file.stream] * has_streams
    return f"[{' '.join(parts)}] ".encode()


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
