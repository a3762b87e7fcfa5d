"""Which events of a socket's monitor mean that its connection to the driver is lost for good. No I/O."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import zmq

_FAILURES = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
MONITORED = (
    sum(_FAILURES) | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
)
_MONITOR_EVENT = struct.Struct("=HI")  # pyzmq's own reader of it imports asyncio


def read_event(message: Sequence[bytes]) -> int:
    """Return which event a monitor's message tells of."""
    event, _ = _MONITOR_EVENT.unpack(message[0])
    return int(event)


class ConnectionLosses:
    """Tells a connection that is lost for good from an attempt that failed, by the events of one socket's monitor.

    Args:
        name: of the socket: step, result or control.
        owner: what ends with it, "rank" or "relay".
    """

    def __init__(self, name: str, owner: str = "rank") -> None:
        self._name = name
        self._owner = owner
        self._is_made = False  # its handshake is done: whatever ends it from here on, also bytes that break the protocol, is a loss

    def reason(self, event: int) -> str:
        """Take an event, and return why the connection is lost for good, or nothing."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            refused = f"the driver refused the {self._name} connection"
            return f"{refused}: this {self._owner}'s key is none of its launch, or has been used before"
        self._is_made |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self._is_made and (event in _FAILURES or event == zmq.EVENT_DISCONNECTED):
            return f"the {self._name} connection to the driver broke; what was on its way is lost, so this {self._owner} ends"
        return ""
