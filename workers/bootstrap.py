"""What this process was handed as a rank of a zspmd launch: where the driver is, the launch's secret, and the rank's facts."""

from __future__ import annotations

import os
from collections.abc import Callable

import zmq

from .. import __version__
from ..errors import BadFrameError, ConfigError
from ..process import BOOTSTRAP_FD, take_bootstrap
from ..transport.control_sockets import ControlClient
from ..transport.records import Bootstrap, Hello, unpack_record
from .context import RankFacts
from .store_client import StoreClient

_taken: tuple[int, Bootstrap] | None = None  # pid and record: a fork of this process is no rank


def is_launched() -> bool:
    """Say whether this process was started as a rank of a zspmd launch, or by one that was."""
    if _taken is None and "TORCHELASTIC_RUN_ID" in os.environ:
        return False  # torchrun was started below a rank: a launch takes its variables away
    return _taken is not None or BOOTSTRAP_FD in os.environ or "ZSPMD_LAUNCH_ID" in os.environ


def read_bootstrap() -> Bootstrap:
    """Return the record that the launcher handed to this rank; the first call takes it from the inherited fd.

    Raises:
        ConfigError: there is none, as in a child process of a rank.
    """
    global _taken
    if _taken is None:
        _taken = (os.getpid(), _take())
    pid, record = _taken
    if pid != os.getpid():
        raise ConfigError(f"this process was forked by rank {os.environ.get('RANK')} (pid {pid}), which alone may speak for the rank")
    return record


def hello(bootstrap: Bootstrap, rank: int, purpose: str) -> Hello:
    """Return the record with which a control connection begins."""
    host = os.uname().nodename[:256]
    return Hello(token=bootstrap.token, rank=rank, pid=os.getpid(), host=host, version=__version__, purpose=purpose)


def open_store(*, timeout_s: float) -> tuple[StoreClient, Callable[[], None]]:
    """Return a client of the launch's store, and what closes it; connects when it is first used.

    Raises:
        ConfigError: as ``read_bootstrap`` and ``read_number``.
    """
    bootstrap = read_bootstrap()
    greeting = hello(bootstrap, read_number("RANK"), "store")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    store = StoreClient(lambda: ControlClient(context, bootstrap.control_endpoint, bootstrap.keys), greeting, timeout_s=timeout_s)
    return store, lambda: context.destroy(linger=0)


def rank_facts(device: str | None = None) -> RankFacts:
    """Return the facts that the launcher has put into the environment; ``device`` is the launcher's unless it is given.

    Raises:
        ConfigError: as ``read_bootstrap`` and ``read_number``.
    """
    return RankFacts(
        launch_id=read_bootstrap().launch_id,
        rank=read_number("RANK"),
        world_size=read_number("WORLD_SIZE"),
        local_rank=read_number("LOCAL_RANK"),
        local_world_size=read_number("LOCAL_WORLD_SIZE"),
        host=os.uname().nodename,
        device=os.environ.get("ZSPMD_DEVICE", "cpu") if device is None else device,
    )


def read_number(name: str) -> int:
    """Return an environment variable as a whole number; raises ConfigError that names it."""
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"the environment variable {name} is {value!r}; a launcher sets it to a whole number: start with `zspmd-run`")
    return int(value)


def _take() -> Bootstrap:
    """Take the record from the fd, which must be the launcher's file and not what a child has under the same number."""
    number = os.environ.get(BOOTSTRAP_FD, "")
    try:
        is_there = os.readlink(f"/proc/self/fd/{int(number)}").startswith("/memfd:zspmd-bootstrap")
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        raise ConfigError(
            f"this process was started by a rank (of launch {os.environ.get('ZSPMD_LAUNCH_ID')!r}) and is none itself: "
            f"{BOOTSTRAP_FD} is {number!r}, which is not the launcher's file here; use the coordinator in the rank's own process, "
            "or start ranks of its own with `zspmd-run`"
        )
    try:
        record = unpack_record(take_bootstrap())
    except BadFrameError as error:
        raise ConfigError(f"the launcher's bootstrap cannot be read: {error}") from error
    if not isinstance(record, Bootstrap):
        raise ConfigError(f"the launcher's bootstrap is a {type(record).__name__}")
    return record
