"""One copy of each step for all ranks of a node: its agent takes it over TCP, and publishes it again in the run directory.

    driver   XPUB ──TCP, CURVE──> XSUB ─ a thread in zmq.proxy ─ XPUB ──ipc──> SUB   each rank of the node

The driver encrypts and sends once a node instead of once a rank. The ranks' subscriptions go the other way, so that the driver sees each
of them; results and control records have their own connections. Nothing is changed on the way, and frames stay in parts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

import zmq

from ....config import RELAY_MODES
from ....errors import ConfigError, LaunchError
from ....transport.connection_losses import MONITORED, ConnectionLosses, read_event
from ....transport.messages import bind_socket, connect_socket, open_socket
from ....transport.reader import SocketReader
from ....transport.security import RankKeys
from ..agent_protocol import RelayOrder

BREAK_EVEN_RANKS = 4  # docs/performance.md
_MONITOR = "inproc://zspmd-relay-monitor"


def choose_relay(mode: str, num_local_ranks: int) -> bool:
    """Say whether a node with this many ranks takes its steps by a relay; ``mode`` is ``NodesConfig.relay``."""
    if mode not in RELAY_MODES:
        raise ConfigError(f"relay is {mode!r}; choose one of {', '.join(RELAY_MODES)}")
    return num_local_ranks >= BREAK_EVEN_RANKS if mode == "auto" else mode == "on"


class Relay:
    """Takes steps for the ranks of this node from ``start`` to ``close``, in a thread and a ZeroMQ context of its own.

    A rank that reads nothing holds up the others of its node, once 1,024 messages wait for it: far more than may be in flight.

    Args:
        on_lost: called once, on the loop that runs at ``start``, with the reason why no more steps come: the connection broke after its
            handshake, or was refused. What was on its way is gone, so it is not taken up again.
    """

    def __init__(self, order: RelayOrder, on_lost: Callable[[str], None]) -> None:
        self._order = order
        self._on_lost = on_lost
        self._losses = ConnectionLosses("step", "relay")
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None  # once it runs
        self._is_over = False
        self._is_unread = threading.Event()  # the loop has let go of the monitor

    def start(self) -> None:
        """Bind, connect and let the thread begin.

        Raises:
            LaunchError: the endpoint cannot be bound, or the system has no descriptors left.
            InsecureEndpointError: a key is none.
        """
        order = self._order
        self._loop = asyncio.get_running_loop()
        keys = RankKeys(order.public_key, order.secret_key, order.server_key)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        upstream, downstream, monitor = sockets = _open(context, zmq.XSUB, zmq.XPUB, zmq.PAIR)
        for option in (zmq.XPUB_NODROP, zmq.XPUB_VERBOSE):
            downstream.setsockopt(option, 1)
        for socket in (upstream, downstream):
            socket.setsockopt(zmq.SNDTIMEO, -1)  # a step waits for a rank that is stopped as long as its deadline lets it
        try:
            bind_socket(downstream, order.endpoint, "step", None)
            upstream.monitor(_MONITOR, MONITORED)
            monitor.connect(_MONITOR)
            connect_socket(upstream, order.upstream, "step", keys)
        except Exception:
            _close(sockets)
            context.term()
            raise
        self._context, self._monitor = context, monitor
        self._reader = SocketReader(self._loop, monitor, self._take_event, lambda error: self._lose(f"its watch failed: {error!r}"))
        self._thread = threading.Thread(target=self._run, args=(upstream, downstream), name="zspmd-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End thread and sockets at once; idempotent. Call it when the ranks have ended: what they have not read is gone."""
        self._is_over = True
        if self._context is not None and not self._context.closed:
            self._reader.close()
            self._is_unread.set()
            self._context.term()  # the thread is told by it, and closes the sockets
            self._thread.join()

    def _take_event(self) -> None:
        reason = self._losses.reason(read_event(self._monitor.recv_multipart(zmq.NOBLOCK)))
        if reason:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_lost(reason)

    def _run(self, upstream: zmq.Socket[bytes], downstream: zmq.Socket[bytes]) -> None:
        try:
            zmq.proxy(upstream, downstream)
        except zmq.ContextTerminated:
            pass
        except zmq.ZMQError as error:
            self._loop.call_soon_threadsafe(self._lose, f"the relay ended: {error}")
        finally:
            _close((upstream, downstream))
            self._is_unread.wait()  # libzmq waits for ever to tell a monitor whose reader is gone
            _close((self._monitor,))


def _open(context: zmq.Context[zmq.Socket[bytes]], *kinds: int) -> list[zmq.Socket[bytes]]:
    try:
        return [open_socket(context, kind) for kind in kinds]
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise LaunchError(f"a relay needs {len(kinds)} sockets and some threads: {error}; see ulimit -n") from error


def _close(sockets: Iterable[zmq.Socket[bytes]]) -> None:
    for socket in sockets:
        socket.close(0)
