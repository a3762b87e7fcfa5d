"""A node that calls in by itself: its process starts an agent when the driver asks for one, and carries its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from .... import __version__
from ....errors import BadFrameError, LaunchError, PeerLostError
from ....transport.reader import SocketReader
from ....transport.schema import pack_record, read_record
from ....transport.security import secure_client
from ..run_directory import remove_dead_directories
from .byte_tunnel import ByteTunnel
from .dial import SILENCE_S, dial_host, limit_silence
from .dial_keys import DialKeys
from .dial_records import Accepted, Call, Chunk, Cut, DialRecord, Ended, Farewell, Finished, Open, Refused, Signalled, Taken
from .guard_child import GuardChild

_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_NUM_QUEUED = 64
_CALL_PERIOD_S = 0.01
# By which a failed node ends behind its driver: a launcher kills all processes at the first failure, and the driver tells the cause.
_AFTER_DRIVER_S = 2.0


class DialOut:
    """Serves as one node of a launch until that ends: ``run`` once.

    Args:
        call: who this node is.
        address, ports: where the driver may listen; the first at which somebody has the right keys is taken.
        timeout_s: for finding it and being accepted; ``silence_s`` as of ``DialIn``.
    """

    def __init__(
        self, call: Call, keys: DialKeys, address: str, ports: Sequence[int], *, timeout_s: float, silence_s: float = SILENCE_S
    ) -> None:
        self._call = call
        self._keys = keys
        self.endpoints = [f"tcp://{dial_host(address)}:{port}" for port in ports]
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._connected = ""
        self._guard: GuardChild | None = None
        self._tunnel: ByteTunnel | None = None
        self._has_read_all = False
        self._agent_end = ""
        self._signals: list[int] = []
        self._is_sent = False

    async def run(self) -> int:
        """Call the driver and serve it; return the exit code that it names at the end of the launch, or 128 and a second signal.

        Raises:
            LaunchError: no driver answered in time, or it refused this node; says why.
            PeerLostError: the connection to the driver was lost; the agent has been ended.

        Cancellation: the agent is ended first.
        """
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[Accepted] = loop.create_future()
        self._concluded: asyncio.Future[int] = loop.create_future()
        with contextlib.ExitStack() as stack:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=0)
            self._connect(context, stack)
            try:
                await self._wait_accepted()
                exit_code = await self._concluded
            except PeerLostError:
                remove_dead_directories()  # of a driver on this machine that was killed while it waited for others
                raise
            finally:
                await self._end_agent()
        if exit_code != 0:
            await asyncio.sleep(_AFTER_DRIVER_S)
        return exit_code

    def signal(self, number: int) -> None:
        """Take a signal that this process got: the first is told to the driver, which ends the launch; a second ends this node now."""
        self._signals.append(number)
        if len(self._signals) == 1 and self._is_sent:
            self._send(Signalled(int(number)))
        else:
            self._conclude(128 + int(number))

    # --- the connection ---

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]], stack: contextlib.ExitStack) -> None:
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing waits for a connection whose other end has not proved its key
        self._dealer.setsockopt(zmq.SNDHWM, _NUM_QUEUED)
        self._dealer.setsockopt(zmq.RCVHWM, _NUM_QUEUED)
        loop = asyncio.get_running_loop()
        monitor = self._dealer.get_monitor_socket(_EVENTS)
        stack.callback(monitor.close, 0)
        stack.callback(self._dealer.disable_monitor)
        stack.callback(SocketReader(loop, monitor, lambda: self._read_event(monitor), self._on_error).close)
        for endpoint in self.endpoints:
            secure_client(self._dealer, endpoint, "dial", self._keys.node)
            limit_silence(self._dealer, self._silence_s)
            self._dealer.connect(endpoint)
        self._reader = SocketReader(loop, self._dealer, self._read_one, self._on_error)
        stack.callback(self._reader.close)

    async def _wait_accepted(self) -> None:
        try:
            await asyncio.wait_for(self._be_accepted(), self._timeout_s)
        except asyncio.TimeoutError:
            raise LaunchError(
                f"no driver of launch {self._call.launch_id} with this secret answered within {self._timeout_s:g} s at "
                f"{', '.join(self.endpoints)}; see that node 0 was started, with the same secret, launch id and --master-port, and that "
                "no firewall is between"
            ) from None

    async def _be_accepted(self) -> None:
        call = pack_record(self._call)
        while not self._is_sent and not self._concluded.done():
            try:
                self._dealer.send(call, zmq.NOBLOCK)
                self._is_sent = True
            except zmq.Again:  # no connection yet
                await asyncio.wait([self._concluded], timeout=_CALL_PERIOD_S)
        self._reader.poke()
        awaited: list[asyncio.Future[Any]] = [self._accepted, self._concluded]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if self._accepted.done():
            self._accepted.result()

    def _read_event(self, monitor: zmq.Socket[bytes]) -> None:
        event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
        endpoint = event["endpoint"].decode()
        if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = endpoint
        elif endpoint == self._connected and self._is_sent:
            self._fail(PeerLostError(f"the connection to the driver at {endpoint} was lost, so this node's ranks are ended"))

    # --- what arrives ---

    def _read_one(self) -> None:
        head, *rest = self._dealer.recv_multipart(zmq.NOBLOCK)
        try:
            self._handle(read_record(DialRecord, head), rest[0] if rest else b"")
        except (BadFrameError, LaunchError) as error:
            self._fail(error)
        self._reader.poke()

    def _handle(self, record: DialRecord, chunk: bytes) -> None:
        if isinstance(record, Accepted) and not self._accepted.done():
            self._accepted.set_result(record)
            for endpoint in self.endpoints:
                if endpoint != self._connected:
                    self._dealer.disconnect(endpoint)
        elif isinstance(record, Refused):
            self._fail(LaunchError(f"the driver has refused {record.reason}"))
        elif isinstance(record, Open) and self._guard is None:
            self._start_agent()
        elif isinstance(record, Farewell):
            self._conclude(record.exit_code)
        elif self._tunnel is not None and isinstance(record, (Chunk, Taken, Finished, Cut)):
            self._pass_on(self._tunnel, record, chunk)
        elif not isinstance(record, (Chunk, Taken, Finished, Cut)):  # these may be for an agent that has ended meanwhile
            raise BadFrameError(f"a {type(record).__name__} was not expected")

    def _pass_on(self, tunnel: ByteTunnel, record: DialRecord, chunk: bytes) -> None:
        if isinstance(record, Chunk):
            tunnel.receive(chunk)
        elif isinstance(record, Taken):
            tunnel.granted()
        elif isinstance(record, Finished):
            tunnel.finish()
        else:
            tunnel.close()

    # --- the agent ---

    def _start_agent(self) -> None:
        self._has_read_all, self._agent_end = False, ""
        guard = GuardChild(self._on_guard_end)
        stream = guard.open()
        self._guard = guard
        self._tunnel = ByteTunnel(
            stream,
            send=lambda data: self._send(Chunk(), data),
            grant=lambda: self._send(Taken()),
            on_read_end=self._on_read_end,
            on_written_out=lambda: None,
        )
        self._tunnel.open()

    def _on_read_end(self) -> None:
        self._has_read_all = True
        self._tell_end()

    def _on_guard_end(self, way: str) -> None:
        self._agent_end = way
        self._tell_end()

    def _tell_end(self) -> None:
        """Say that the agent has ended, behind the last of what it said; another may be asked for then."""
        assert self._tunnel is not None, "it was started"
        if self._has_read_all and self._agent_end:
            self._tunnel.close()
            self._guard = self._tunnel = None
            self._send(Ended(self._agent_end))

    async def _end_agent(self) -> None:
        """Have the agent find its driver gone, and wait until it has ended everything."""
        guard = self._guard
        if guard is not None:
            assert self._tunnel is not None, "it has one while it lives"
            self._tunnel.close()
            await guard.wait_ended()

    # --- the end ---

    def _conclude(self, exit_code: int) -> None:
        if not self._concluded.done():
            self._concluded.set_result(exit_code)

    def _fail(self, error: Exception) -> None:
        for future in (self._concluded, self._accepted):
            if not future.done():
                future.set_exception(error)
                future.exception()  # one of the two may have nobody who waits

    def _send(self, record: DialRecord, chunk: bytes | None = None) -> None:
        try:
            self._dealer.send_multipart([pack_record(record), *([] if chunk is None else [chunk])], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._fail(PeerLostError(f"nothing can be sent to the driver any more: {error}"))
        self._reader.poke()

    def _on_error(self, error: Exception) -> None:
        self._fail(error)


def describe_self(
    launch_id: str,
    node_rank: int,
    num_nodes: int,
    *,
    num_slots: int = 1,
    local_rank: int = 0,
    local_world_size: int = 1,
    devices: tuple[int, ...] = (),
) -> Call:
    """Return the call of this process."""
    return Call(
        version=__version__,
        launch_id=launch_id,
        node_rank=node_rank,
        num_nodes=num_nodes,
        host=socket.gethostname(),
        pid=os.getpid(),
        num_slots=num_slots,
        local_rank=local_rank,
        local_world_size=local_world_size,
        devices=devices,
    )
