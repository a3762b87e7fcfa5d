"""``launcher="external"``: the processes are there already, one for each rank, and the one of rank 0 is to drive."""

from __future__ import annotations

import os

from ...errors import TopologyError
from ..launch.dial.dial_keys import take_secret
from ..launch.dial.dial_place import DialPlace, external_place, find_driver
from ..launch.dial.external import read_external


def find_place(*, world_size: int | None, launch_id: str | None, master_addr: str | None, lease_s: float) -> DialPlace:
    """Return the place of this process, by its environment, out of which ZSPMD_SECRET is taken.

    Raises:
        ConfigError: no launcher has started it, or what it says does not suffice.
        TopologyError: it has started another number of ranks than ``world_size``.
    """
    rank = read_external(os.environ)
    if world_size not in (None, rank.world_size):
        raise TopologyError(f"world_size is {world_size}, and {rank.launcher} has started {rank.world_size} processes; make them agree")
    secret = take_secret(os.environ, None)
    return external_place(rank, os.environ, secret=secret, launch_id=launch_id, master_addr=master_addr or "", port=None, lease_s=lease_s)


async def serve_driver(place: DialPlace, timeout_s: float) -> int:
    """Serve the driver as one of its nodes until the launch ends; return the exit code that it names.

    Raises:
        LaunchError: no driver within ``timeout_s``, or it has refused this process.
        PeerLostError: its connection was lost; what ran here has been ended.
    """
    dial = await find_driver(place, timeout_s=timeout_s)
    return await dial.run()
