"""A ZeroMQ context for tests that leave sockets to it."""

from __future__ import annotations

from typing import Any

import zmq


class KeepingContext(zmq.Context[zmq.Socket[bytes]]):
    """Keeps its sockets until it is destroyed: pyzmq warns of a socket that is collected before it is closed."""

    kept: list[zmq.Socket[bytes]]

    def __init__(self) -> None:
        object.__setattr__(self, "kept", [])
        super().__init__()

    def socket(self, *args: Any, **kwargs: Any) -> zmq.Socket[bytes]:
        self.kept.append(super().socket(*args, **kwargs))
        return self.kept[-1]
