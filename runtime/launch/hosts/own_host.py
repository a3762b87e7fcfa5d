"""Whether a host of a list is this machine, and by which address it reaches another."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
_ANY_PORT = 9
_MAX_THREADS = 32
AnswerT = TypeVar("AnswerT")


def resolve(name: str) -> list[str]:
    """Return the IP addresses of a name, those of IPv4 first; none for a name that only ssh knows. May wait for a name server."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)))


def is_own_address(address: str) -> bool:
    """Say whether an IP address is this machine's: whether it would reach it from there. Some may bind addresses that they lack."""
    return ipaddress.ip_address(address).is_loopback or source_address(address) == address


async def find_own(names: Sequence[str]) -> list[bool]:
    """Say of each name whether it is this machine's: its host name, a name of loopback, or one of an address that it has."""
    return await _in_threads(_is_own, names)


async def resolve_all(names: Sequence[str]) -> list[list[str]]:
    """Return for each name what ``resolve`` does, without holding up the loop."""
    return await _in_threads(resolve, names)


def source_address(destination: str) -> str:
    """Return the address of this machine from which it reaches an IP address, "" where there is no way to it; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in destination else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, _ANY_PORT))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


async def _in_threads(look: Callable[[str], AnswerT], names: Sequence[str]) -> list[AnswerT]:
    """Look each name up in a thread that ends with that; those of the loop's own executor would stay as long as the user's loop."""
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(min(_MAX_THREADS, len(names)), "zspmd-names")
    try:
        return list(await asyncio.gather(*(loop.run_in_executor(threads, look, name) for name in names)))
    finally:
        threads.shutdown(wait=False)


def _is_own(name: str) -> bool:
    if name in _LOCAL_NAMES or name == os.uname().nodename:
        return True
    return any(map(is_own_address, resolve(name)))
