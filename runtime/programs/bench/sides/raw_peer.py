"""Answers every message of ``raw_side`` up to an empty one, or until it is left alone. A file that is run as it is, also on another host.

Arguments: step endpoint, result endpoint, the server's public key or nothing, 1 for one that reads and does not answer, the parent's pid
or 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

import zmq

ANSWER_BYTES = 33  # as many as a rank's: a header of 32 B and a body of one
_PEER_TIMEOUT_MS = 60_000
_PR_SET_PDEATHSIG = 1


def serve(step_endpoint: str, result_endpoint: str, server_key: str, *, is_silent: bool) -> None:
    """Subscribe, say so, and answer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber, pusher = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    for socket in (subscriber, pusher):
        if server_key:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = server_key.encode()
    subscriber.subscribe(b"")
    subscriber.connect(step_endpoint)
    pusher.connect(result_endpoint)
    subscriber.setsockopt(zmq.RCVTIMEO, _PEER_TIMEOUT_MS)
    answer = bytes(ANSWER_BYTES)
    pusher.send(answer)
    with contextlib.suppress(zmq.Again):
        while subscriber.recv():
            if not is_silent:
                pusher.send(answer)
    context.destroy(linger=0)


def main(step: str, result: str, key: str, is_silent: str, parent: str) -> None:
    """Run as a program; ends with its parent."""
    if int(parent):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            return
    serve(step, result, key, is_silent=bool(int(is_silent)))


if __name__ == "__main__":
    main(*sys.argv[1:])
