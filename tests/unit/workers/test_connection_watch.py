"""The watch over a rank's connections: which events are a loss, and that it ends with its context."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import zmq
from support.polling import block_until

from zspmd.workers.connection_watch import CONNECTION_LOST, ConnectionLosses, ConnectionWatch

FAILED, PROTOCOL = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
MADE, REFUSED = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH
GONE, STOPPED = zmq.EVENT_DISCONNECTED, zmq.EVENT_MONITOR_STOPPED


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([MADE, GONE], "the step connection to the driver broke"),
        ([FAILED, GONE], ""),
        ([PROTOCOL, GONE, FAILED, GONE], ""),
        ([FAILED, GONE, MADE, GONE], "the step connection to the driver broke"),
        ([MADE, PROTOCOL], "the step connection to the driver broke"),
        ([REFUSED], "the driver refused the step connection"),
        ([STOPPED], ""),
    ],
    ids=[
        "lost",
        "an attempt failed",
        "two attempts failed",
        "lost after a failed attempt",
        "broken bytes",
        "refused",
        "closed by its owner",
    ],
)
def test_what_is_a_loss(events: list[int], reason: str) -> None:
    losses = ConnectionLosses("step")
    found = [losses.reason(event) for event in events]
    assert found[-1].startswith(reason)
    assert bool(found[-1]) == bool(reason)
    assert not any(found[:-1])


@pytest.mark.parametrize("num_sockets", [0, 1, 5])
def test_it_ends_with_its_context_whatever_it_follows(num_sockets: int) -> None:
    before = set(threading.enumerate())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.PULL)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    watch = ConnectionWatch(context)
    sockets = [context.socket(zmq.PUSH) for _ in range(num_sockets)]
    for socket in sockets:
        watch.follow(socket, "result")
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send(b"there")
        server.recv()
    for socket in sockets[1:]:  # one is left to the context
        socket.close(0)
    watch.stop()
    context.destroy(linger=0)
    block_until(lambda: set(threading.enumerate()) <= before)


BROKEN_WATCH = """
import time, zmq
from zspmd.workers import connection_watch
connection_watch.ConnectionLosses = None
context = zmq.Context()
connection_watch.ConnectionWatch(context).follow(context.socket(zmq.PUSH), "result")
time.sleep(30)
"""


def test_a_watch_that_fails_ends_the_rank() -> None:
    """As when no descriptor is left for a monitor; to go on without it would be to miss the next loss."""
    done = subprocess.run([sys.executable, "-c", BROKEN_WATCH], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "the watch over its connections to the driver failed" in done.stderr) == (CONNECTION_LOST, True)
