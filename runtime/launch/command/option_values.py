"""From the text of one option of ``zspmd-run`` to a value that is checked; each raises ConfigError with the text and what to give."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ....config import MAX_DEADLINE_S
from ....errors import ConfigError, TopologyError
from ..agent_protocol import MAX_RANKS
from ..devices import available_cores, num_cuda_devices

MAX_TAIL = 40  # what an agent keeps


def read_num_ranks(option: str, text: str | None) -> int | None:
    """Return the number of ranks that -n or --nproc-per-node names for this machine; None where it was not given."""
    if text is None:
        return None
    if text in ("gpu", "auto") and (count := num_cuda_devices()):
        return count
    if text == "gpu":
        raise TopologyError(f"{option} gpu: this node shows no CUDA device; check CUDA_VISIBLE_DEVICES, or give a number")
    if text in ("cpu", "auto"):
        return available_cores()
    return read_count(option, text)


def read_count(option: str, text: str) -> int:
    """Return the number that ``text`` is, for ranks."""
    try:
        number = int(text)
    except ValueError:
        raise TopologyError(f"{option} is {text!r}; give a number, gpu, cpu or auto") from None
    if not 1 <= number <= MAX_RANKS:
        raise TopologyError(f"{option} is {number}; it must be at least 1 and at most {MAX_RANKS}")
    return number


def read_address(name: str) -> str:
    """Return the IP address of a name, that of IPv4 where it has both."""
    try:
        if not name:  # the resolver takes it for this machine
            raise OSError("an empty name")
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--master-addr {name!r} has no address: {error}; give an IP address of node 0") from error
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def read_port(port: int | None) -> int:
    """Return the port; 0 for one that is to be chosen."""
    if port is not None and not 0 <= port <= 65_535:
        raise ConfigError(f"--master-port is {port}; it must be from 1 to 65535, or 0 for one that is chosen")
    return port or 0


def read_seconds(option: str, value: float | None, default: float) -> float:
    """Return a number of seconds that a wait may last."""
    if value is None:
        return default
    if not 0 <= value <= MAX_DEADLINE_S:
        raise ConfigError(f"{option} is {value!r} s; it must be from 0 to {MAX_DEADLINE_S:g}")
    return value


def read_tail(number: int) -> int:
    """Return how many lines to show of a rank that has failed."""
    if not 0 <= number <= MAX_TAIL:
        raise ConfigError(f"--tail is {number}; it must be from 0 to {MAX_TAIL}, all of which are in the log files")
    return number


def read_argv(command: Sequence[str], *, is_module: bool, is_command: bool) -> tuple[str, ...]:
    """Return what each rank executes, of a script, a module (-m) or a command (--no-python) and its arguments."""
    name, *rest = command
    if is_module and is_command:
        raise ConfigError("-m and --no-python exclude each other; give one of them")
    if not name:
        raise ConfigError("the command is empty; give a script's path, -m and a module, or --no-python and a command")
    if is_command:
        return (name, *rest)
    if is_module:
        return (sys.executable, "-u", "-m", name, *rest)
    _check_script(name)
    return (sys.executable, "-u", name, *rest)


def read_working_directory() -> str:
    """Return the directory in which the ranks are to run: this one."""
    try:
        return os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory is gone: {error}; change to one that exists") from error


def make_log_dir(path: str) -> None:
    """Make the directory for log files, unless it is there, and prove that files can be written in it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"--log-dir {path!r} cannot be written: {error}; give a directory, or one that can be made") from error


def _check_script(name: str) -> None:
    """Raise ConfigError where Python itself would find nothing to execute."""
    if not os.path.exists(name):
        where = f"there is no script {name!r} in {read_working_directory()}"
        raise ConfigError(f"{where}; give its path, -m for a module, --no-python for a command")
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "__main__.py")):
            raise ConfigError(f"{name!r} is a directory without a __main__.py; give the path of a script in it")
    elif not os.access(name, os.R_OK):
        raise ConfigError(f"the script {name!r} cannot be read; its mode is {os.stat(name).st_mode & 0o7777:o}")
