"""The nodes of a launch that call in, as its driver has them: whom it waits for, and what becomes hosts and links."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace

from ..hosts.host import Host
from ..nodes.nodes_request import NodesRequest
from ..run_directory import RunDirectory
from .dial import DialIn, DialInLink
from .dial_file import DIRECTORY_NUMBER, DialFile, make_secret
from .dial_place import DialPlace, is_loopback

_LATE_S = 5.0


class DialNodes:
    """``open`` listens and waits for all; ``aclose`` has their processes end. Node 0 is this process's.

    Args:
        on_signal: called with node rank and number when a node's process got a signal, which asks for the end of the launch.
        on_refused: called with a text for a call that was refused, and ``on_late`` with one when nodes let this one wait.
    """

    def __init__(
        self,
        place: DialPlace,
        *,
        on_signal: Callable[[int, int], None],
        on_refused: Callable[[str], None],
        on_late: Callable[[str], None],
    ) -> None:
        self.place = place
        self.address = ""
        self.hosts: tuple[Host, ...] = ()
        self._links: dict[int, DialInLink] = {}
        self._on_signal = on_signal
        self._on_refused = on_refused
        self._on_late = on_late
        self._dial: DialIn | None = None
        self._cleanups = contextlib.ExitStack()

    async def open(self, timeout_s: float) -> None:
        """Listen, and wait until every node has called; then ``hosts`` are there, by node rank, for ``complete``.

        Raises:
            ConfigError: no address of this machine.
            EndpointInUseError: another launch has the launch id, or the port.
            LaunchError: nodes did not call within ``timeout_s``; names them. Those that did are let go.
        """
        place = self.place
        try:
            secret = place.secret
            directory = None
            if secret is None:
                directory = RunDirectory.create(place.launch_id, DIRECTORY_NUMBER)
                self._cleanups.callback(directory.remove)
                secret = make_secret().encode()
            self._dial = DialIn(
                place.launch_id,
                place.keys(secret),
                num_nodes=place.num_nodes,
                on_signal=self._on_signal,
                on_refused=self._on_refused,
                silence_s=place.lease_s,
            )
            self.address = place.own_address()
            self._dial.open(self.address, 0 if place.has_file else place.port)
            if directory is not None:
                DialFile.create(self.address, self._dial.port, secret.decode()).write(directory.path)
            await self._wait_called(self._dial, timeout_s)
            if directory is not None:
                directory.remove()  # all have read it: from here on there is nothing that could stay
        except BaseException:
            await self.aclose(1)
            raise
        own = Host(socket.gethostname(), slots=place.num_slots, addr=self.address, devices=place.devices or None, where="this process")
        self.hosts = (own, *(self._host(link) for link in self._dial.links.values()))
        self._links = self._dial.links

    def complete(self, request: NodesRequest) -> NodesRequest:
        """Return the request with these nodes in it."""
        calls = [link.call for link in self._links.values() if link.call is not None]
        own = (self.place.local_rank, self.place.local_world_size)
        places = (own, *((call.local_rank, call.local_world_size) for call in calls))
        return replace(
            request,
            hosts=self.hosts,
            links=(None, *self._links.values()),
            local_places=places if any(size > 1 for _, size in places) else (),
            is_one_machine=is_loopback(self.address),
            config=replace(request.config, allow_same_host=True),
        )

    async def aclose(self, exit_code: int) -> None:
        """Have the process of every node end with ``exit_code``; idempotent."""
        if self._dial is not None:
            await self._dial.aclose(exit_code)
        self._cleanups.close()

    async def _wait_called(self, dial: DialIn, timeout_s: float) -> None:
        late = asyncio.get_running_loop().call_later(_LATE_S, lambda: self._on_late(f"{dial.describe_missing()} yet"))
        try:
            await dial.wait_called(timeout_s)
        finally:
            late.cancel()

    def _host(self, link: DialInLink) -> Host:
        """Return a node as a host: its data go by the network by which it called."""
        call = link.call
        assert call is not None, "all have called"
        where = f"the call of pid {call.pid}"
        return Host(call.host, slots=call.num_slots, addr=link.address or self.address, devices=call.devices or None, where=where)
