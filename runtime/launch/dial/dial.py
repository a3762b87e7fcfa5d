"""Nodes that call in by themselves, at the driver: a ``ROUTER`` with CURVE, and for each node an ``AgentLink``.

    driver                                        node's process (``dial_out``)
      RemoteAgent ──socketpair── DialInLink         DialOut ──socketpair── guard --stdio ── agent ── ranks
                                     └─ DialIn ══ CURVE ══┘

One connection for each node carries what ``dial_records`` declares. The secret admits to the launch, not to a node's place in it: whoever
has it may be any node that has not called yet. A connection that is lost is the end of its node.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from .... import __version__
from ....errors import BadFrameError, EndpointInUseError, LaunchError
from ....transport.door import ZAP_ENDPOINT
from ....transport.reader import SocketReader
from ....transport.schema import pack_record, read_record
from ....transport.security import BACKLOG, SERVER_HANDSHAKE_MS, check_key, limit_socket
from ..ports import FIRST_PORT, LAST_PORT, ReservedPort, first_candidate, hold_port
from .dial_keys import DialKeys
from .dial_link import DialInLink as DialInLink
from .dial_records import Accepted, Call, DialRecord, Farewell, Refused, Signalled

NUM_CANDIDATES = 8
SILENCE_S = 15.0
_PROBE_S = 1.0
_DOMAIN = "dial"
_NUM_QUEUED = 64  # of each connection and way: more than the window lets through
_CLOSE_S = 2.0


class DialIn:
    """Lets the nodes of a launch call in: ``open``, ``wait_called``, ``links``, ``aclose``.

    Args:
        on_signal: called with (node rank, signal) when somebody has sent a node's process a signal.
        on_refused: called with a text for each call, and each connection with another key, that was refused.
        silence_s: how long a node may not answer the probes of libzmq and kernel, until its connection is lost.

    Attributes:
        links: by node rank, for each node but 0.
        address, port: where it listens, once it is open.
    """

    def __init__(
        self,
        launch_id: str,
        keys: DialKeys,
        *,
        num_nodes: int,
        on_signal: Callable[[int, int], None],
        on_refused: Callable[[str], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        self._launch_id = launch_id
        self._keys = keys
        self._num_nodes = num_nodes
        self._on_signal = on_signal
        self._on_refused = on_refused
        self._silence_s = silence_s
        self.links = {rank: DialInLink(rank, self._sender(rank)) for rank in range(1, num_nodes)}
        self._identities: dict[int, bytes] = {}  # by node rank; and who is who by identity and by descriptor
        self._nodes: dict[bytes, int] = {}
        self._descriptors: dict[int, int] = {}
        self._change = asyncio.Event()
        self._cleanups = contextlib.ExitStack()
        self.address, self.port = "", 0

    def open(self, address: str, port: int | None = None) -> None:
        """Listen at ``address``: at ``port``, which 0 leaves to the kernel, or at the first free candidate where it is None.

        Raises:
            ConfigError: no address of this machine.
            EndpointInUseError: the port, or each of the candidates, is taken.
        """
        with contextlib.ExitStack() as stack:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, linger=0)
            loop = asyncio.get_running_loop()
            self._zap = context.socket(zmq.REP)
            self._zap.bind(ZAP_ENDPOINT)
            stack.callback(SocketReader(loop, self._zap, self._admit, self._on_error).close)
            self._router = self._make_router(context)
            monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            stack.callback(monitor.close, 0)
            stack.callback(self._router.disable_monitor)
            self.address, self.port = address, self._bind(stack, address, port)
            self._monitor = SocketReader(loop, monitor, lambda: self._read_event(monitor), self._on_error)
            stack.callback(self._monitor.close)
            self._reader = SocketReader(loop, self._router, self._read_one, self._on_error)
            stack.callback(self._reader.close)
            self._cleanups = stack.pop_all()

    async def wait_called(self, timeout_s: float) -> dict[int, Call]:
        """Wait until every node has called; return their calls by node rank.

        Raises:
            LaunchError: some have not within ``timeout_s``, or one has and was lost; says which.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.missing:
            try:
                await asyncio.wait_for(self._change.wait(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise LaunchError(
                    f"{self.describe_missing()} within {timeout_s:g} s; start the same command there, with the same secret and launch id, "
                    "or see whether a firewall keeps it out"
                ) from None
            self._change.clear()
            for link in self.links.values():
                if link.loss:
                    raise LaunchError(f"{link.name}: {link.loss}")
        return {rank: link.call for rank, link in self.links.items() if link.call is not None}

    @property
    def missing(self) -> list[int]:
        """The nodes that have not called."""
        return [rank for rank, link in self.links.items() if link.call is None]

    async def aclose(self, exit_code: int) -> None:
        """Have every node's process end with ``exit_code``, wait a moment for them to leave, and listen no more; idempotent."""
        deadline = asyncio.get_running_loop().time() + _CLOSE_S
        for rank in list(self._identities):
            self._send(rank, Farewell(exit_code))
        try:
            while self._identities:
                self._change.clear()
                await asyncio.wait_for(self._change.wait(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            pass  # they find the connection lost
        finally:
            self.close()

    def close(self) -> None:
        """Listen no more; nodes that are there find their driver gone. Idempotent."""
        for link in self.links.values():
            link.close()
        self._cleanups.close()

    # --- sockets ---

    def _make_router(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        router = context.socket(zmq.ROUTER)
        check_key("driver's", self._keys.server_secret)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else what is for a node that has gone would be dropped in silence
        router.setsockopt(zmq.SNDHWM, _NUM_QUEUED)
        router.setsockopt(zmq.RCVHWM, _NUM_QUEUED)
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.server_secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        router.setsockopt(zmq.HANDSHAKE_IVL, SERVER_HANDSHAKE_MS)
        router.setsockopt(zmq.BACKLOG, BACKLOG)
        return router

    def _bind(self, stack: contextlib.ExitStack, address: str, port: int | None) -> int:
        if port != 0:
            holder = hold_port(address, port) if port is not None else self._hold_candidate(address)
            stack.enter_context(holder)
            port = holder.port
        endpoint = f"tcp://{dial_host(address)}:{port or '*'}"
        limit_socket(self._router, endpoint)
        limit_silence(self._router, self._silence_s)
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            raise EndpointInUseError(f"cannot listen at {endpoint}: {error}") from error
        bound = self._router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return int(bound.rpartition(b":")[2].rstrip(b"\0"))

    def _hold_candidate(self, address: str) -> ReservedPort:
        candidates = dial_ports(self._launch_id)
        for port in candidates:
            with contextlib.suppress(EndpointInUseError):
                return hold_port(address, port)
        raise EndpointInUseError(
            f"each of the ports {candidates[0]} to {candidates[-1]} of {address}, at which nodes look for launch {self._launch_id}, is "
            "taken; give every node the same --master-port that is free here"
        )

    def _admit(self) -> None:
        """Answer one question of libzmq about a connection; raises ``zmq.Again`` where there is none."""
        _, request_id, _, address, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
        is_ours = mechanism == b"CURVE" and credentials == [z85.decode(self._keys.node_public)]
        if not is_ours:
            self._on_refused(f"a connection from {address.decode(errors='replace')}: its key is none of this launch")
        self._zap.send_multipart([b"1.0", request_id, b"200" if is_ours else b"400", b"OK" if is_ours else b"no key", b"", b""])

    # --- what arrives ---

    def _read_one(self) -> None:
        identity, head, *rest = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
        self._monitor.drain()  # whoever had this descriptor before is lost first
        sender = self._nodes.get(identity.bytes)
        try:
            record = read_record(DialRecord, head.buffer)
            if sender is None:
                self._answer_call(identity.bytes, head, record)
            elif isinstance(record, Signalled):
                self._on_signal(sender, record.number)
            else:
                self.links[sender].handle(record, rest[0].bytes if rest else b"")
        except BadFrameError as error:
            if sender is None:
                self._refuse(identity.bytes, f"its call cannot be read: {error}")
            else:
                self._lose(sender, f"it broke the protocol: {error}")
        self._reader.poke()

    def _answer_call(self, identity: bytes, frame: zmq.Frame, record: DialRecord) -> None:
        if not isinstance(record, Call):
            return self._refuse(identity, f"its first record is a {type(record).__name__}")
        if reason := self._why_refused(record):
            return self._refuse(identity, f"node {record.node_rank}, pid {record.pid} on {record.host}: {reason}")
        rank = record.node_rank
        self._identities[rank], self._nodes[identity], self._descriptors[int(frame.get(zmq.SRCFD))] = identity, rank, rank
        self._send(rank, Accepted(socket.gethostname(), os.getpid()))
        self.links[rank].accept(record, str(frame.get("Peer-Address")))
        self._change.set()

    def _why_refused(self, call: Call) -> str:
        if call.version != __version__:
            return f"it runs zspmd {call.version}, the driver {__version__}; install the same version everywhere"
        if call.launch_id != self._launch_id:
            return f"it belongs to launch {call.launch_id}, and this is {self._launch_id}"
        if call.num_nodes != self._num_nodes:
            return f"it was told of {call.num_nodes} nodes, the driver of {self._num_nodes}; give all the same --nnodes"
        if call.node_rank not in self.links:
            return f"nodes that call in have the numbers 1 to {self._num_nodes - 1}"
        other = self.links[call.node_rank].call
        return "" if other is None else f"a node {call.node_rank} has called already, pid {other.pid} on {other.host}"

    def _refuse(self, identity: bytes, reason: str) -> None:
        self._on_refused(reason)
        with contextlib.suppress(zmq.ZMQError):  # it has left
            self._router.send_multipart([identity, pack_record(Refused(reason))], zmq.NOBLOCK)

    def _read_event(self, monitor: zmq.Socket[bytes]) -> None:
        event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
        rank = self._descriptors.pop(event["value"], None)
        if rank is not None:
            self._lose(rank, "its connection was lost, so its process or its network ended")

    def _lose(self, rank: int, way: str) -> None:
        self._identities.pop(rank, None)
        self.links[rank].lose(way)
        self._change.set()

    # --- what is sent ---

    def _sender(self, rank: int) -> Callable[[DialRecord, bytes | None], None]:
        return lambda record, chunk: self._send(rank, record, chunk)

    def _send(self, rank: int, record: DialRecord, chunk: bytes | None = None) -> None:
        identity = self._identities.get(rank)
        if identity is None:
            return  # it is lost
        try:
            self._router.send_multipart([identity, pack_record(record), *([] if chunk is None else [chunk])], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # no such connection, or its queue is full, which the window excludes
            self._lose(rank, f"nothing can be sent to it any more: {error}")
        self._reader.poke()

    def _on_error(self, error: Exception) -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "a socket on which nodes call in", "exception": error})

    def describe_missing(self) -> str:
        """Say which nodes have not called, and where they are awaited."""
        missing = self.missing
        shown = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
        who = f"node {shown} has" if len(missing) == 1 else f"nodes {shown} have"
        return f"{who} not called in at {dial_host(self.address)}:{self.port}"


def limit_silence(socket: zmq.Socket[bytes], silence_s: float) -> None:
    """Have the connections of a socket lost when nothing is heard for so long; after ``limit_socket``, which allows more."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * min(_PROBE_S, silence_s / 4)))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * silence_s))
    socket.setsockopt(zmq.TCP_MAXRT, int(1000 * silence_s))


def dial_host(address: str) -> str:
    """Return an IP address as it stands before a port."""
    return f"[{address}]" if ":" in address else address


def dial_ports(launch_id: str) -> list[int]:
    """Return the ports at which a launch's driver may listen, the most likely one first."""
    first = first_candidate(launch_id, "dial")
    return [FIRST_PORT + (first - FIRST_PORT + offset) % (LAST_PORT - FIRST_PORT + 1) for offset in range(NUM_CANDIDATES)]
