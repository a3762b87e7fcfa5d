"""The watch over a rank's connections ends with its context, and the rank with it where it fails."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import zmq
from support.polling import block_until

from zspmd.process import CONNECTION_LOST
from zspmd.workers.connection_watch import ConnectionWatch


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
    assert context.closed


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
