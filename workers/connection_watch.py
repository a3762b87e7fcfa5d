"""What ends a rank whose connection to the driver broke: over TCP nothing is taken up again.

When a link breaks, what lay in the buffers of both sides is gone without an error, and a connection made anew would hide that. So the
rank says which connection it was and ends at once, with an exit code of its own; the driver learns of it as of any other end.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import zmq

from ..process import CONNECTION_LOST
from ..transport.connection_losses import MONITORED, ConnectionLosses, read_event

_WAKE_ENDPOINT = "inproc://zspmd-connection-watch"


class ConnectionWatch:
    """A thread that follows the connections of this rank's sockets, and ends the process when one is lost or refused.

    A connection that fails before its handshake is done is libzmq's to make again. The thread ends with the context: until then each
    monitor needs its reader, without which libzmq would wait for ever.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        # of its own, so that whoever destroys the other does not close sockets that the thread is reading
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._lock = threading.Lock()
        self._added: list[tuple[str, str]] = []  # (address, name) of monitors that the thread has not seen yet
        self._num_added = 0
        self._is_stopped = False
        self._wake_reader = self._open_pair()
        self._wake_reader.bind(_WAKE_ENDPOINT)
        self._wake_writer = self._open_pair()
        self._wake_writer.connect(_WAKE_ENDPOINT)
        threading.Thread(target=self._run, name="zspmd-connection-watch", daemon=True).start()

    def follow(self, socket: zmq.Socket[bytes], name: str) -> None:
        """Follow the connection that ``socket`` is about to make, called ``name`` in what is said of it, by its own thread."""
        with self._lock:
            address = f"inproc://zspmd-monitor-{self._num_added}"
            self._num_added += 1
            socket.monitor(address, MONITORED)
            self._added.append((address, name))
            self._wake_writer.send(b"")

    def stop(self) -> None:
        """Take no connection's end for a loss any more; before the sockets are closed."""
        self._is_stopped = True

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_reader, zmq.POLLIN)
        followed: dict[Any, ConnectionLosses] = {}
        try:
            while True:
                for ready, _ in poller.poll():
                    if ready is self._wake_reader:
                        ready.recv()
                        for monitor, connection in self._open_added():
                            followed[monitor] = connection
                            poller.register(monitor, zmq.POLLIN)
                    elif self._take_event(followed[ready], ready):
                        poller.unregister(ready)
                        del followed[ready]
                        ready.close(0)
        except zmq.ContextTerminated:
            pass
        except Exception as error:  # such as no descriptor left for a monitor: from here on nobody would see a loss
            self._end(f"the watch over its connections to the driver failed, so this rank ends: {type(error).__name__}: {error}")
        finally:
            for pair in [self._wake_reader, self._wake_writer, *followed]:
                pair.close(0)

    def _take_event(self, losses: ConnectionLosses, monitor: zmq.Socket[Any]) -> bool:
        """Take one event; returns whether its socket has been closed. Ends the process for a lost connection."""
        event = read_event(monitor.recv_multipart())
        if reason := losses.reason(event):
            self._end(reason)
        return bool(event == zmq.EVENT_MONITOR_STOPPED)

    def _end(self, reason: str) -> None:
        if not self._is_stopped:
            print(f"zspmd: {reason}", file=sys.stderr, flush=True)
            os._exit(CONNECTION_LOST)  # whatever the main thread is in

    def _open_added(self) -> list[tuple[zmq.Socket[Any], ConnectionLosses]]:
        with self._lock:
            added, self._added = self._added, []
        opened = []
        for address, name in added:
            monitor = self._open_pair()
            monitor.connect(address)
            opened.append((monitor, ConnectionLosses(name)))
        return opened

    def _open_pair(self) -> zmq.Socket[bytes]:
        pair = self._context.socket(zmq.PAIR)
        pair.setsockopt(zmq.LINGER, 0)
        return pair
