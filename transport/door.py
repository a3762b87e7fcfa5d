"""The driver's door on TCP: the keys of a launch, whose connection is let in, and who spoke in the name of another rank.

A new key pair for the driver and for each rank is made at each launch, and a rank gets its own alone. libzmq asks, by its ZAP
protocol, for every connection that has proved to hold its key; the answer is the rank of that key, or no. With ``ZAP_ENFORCE_DOMAIN``
nobody gets in while nobody answers. The rank then stands at every message, whatever the message says of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from ..errors import InsecureEndpointError
from .security import BACKLOG, SERVER_HANDSHAKE_MS, RankKeys, check_key, limit_socket

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_MAX_TOLD = 64  # of each kind: whoever lies in a loop must not push all else out of the group's events
_ONCE = ("step", "result")  # the sockets on which a lost connection means lost messages
USER_ID = "User-Id"


class Door:
    """Keys and identities of one launch; one for each ZeroMQ context, made before the first bind.

    Args:
        on_event: called with ("refused", None, why) for a connection that is not let in, and ("impostor", rank, what) for a message
            that a rank sends in the name of another.

    Attributes:
        refused: connections that held the driver's public key and were not let in; the first 64 are told, as of impostors.
        impostor_frames: messages in the name of another rank; they were dropped.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], world_size: int, on_event: Callable[[str, int | None, str], None]) -> None:
        self._public, self._secret = zmq.curve_keypair()
        self._pairs = [zmq.curve_keypair() for _ in range(world_size)]
        self._ranks = {z85.decode(public): rank for rank, (public, _) in enumerate(self._pairs)}
        self._on_event = on_event
        self._heard: set[tuple[str, int]] = set()
        self.refused = 0
        self.impostor_frames = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    def rank_keys(self, rank: int) -> RankKeys:
        """Return what ``rank`` needs to connect."""
        public, secret = self._pairs[rank]
        return RankKeys(public, secret, self._public)

    def secure(self, socket: zmq.Socket[bytes], endpoint: str, name: str) -> None:
        """Set up the driver's socket ``name``, before it binds ``endpoint``."""
        check_key("driver's", self._secret)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, name.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, SERVER_HANDSHAKE_MS)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        limit_socket(socket, endpoint)

    def answer_one(self) -> None:
        """Answer one question of libzmq; raises ``zmq.Again`` where there is none."""
        _, request_id, domain, address, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
        rank = self._ranks.get(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else None
        reason = self._refusal(domain.decode(), rank)
        if reason:
            self.refused += 1
            if self.refused <= _MAX_TOLD:
                where = f"a connection from {address.decode(errors='replace')} to the {domain.decode()} socket"
                self._on_event("refused", rank, f"{where}: {reason}")
            self.socket.send_multipart([_ZAP_VERSION, request_id, b"400", reason.encode(), b"", b""])
        else:
            self.socket.send_multipart([_ZAP_VERSION, request_id, b"200", b"OK", str(rank).encode(), b""])

    def _refusal(self, name: str, rank: int | None) -> str:
        if rank is None:
            return "its key is none of this launch"
        if name in _ONCE and (name, rank) in self._heard:  # what was on its way is lost, and going on would hide that
            return f"rank {rank} has had its connection; one that was lost is not taken up again"
        return ""

    def sender(self, frame: zmq.Frame, name: str) -> int:
        """Return the rank whose connection to socket ``name`` this part came from."""
        rank = int(frame.get(USER_ID))
        self._heard.add((name, rank))
        return rank

    def is_own(self, sender: int, claimed: int, what: str) -> bool:
        """Say whether a message says of itself what its connection proves; if not, it is counted and told, and is to be dropped."""
        if sender == claimed:
            return True
        self.impostor_frames += 1
        if self.impostor_frames <= _MAX_TOLD:
            self._on_event("impostor", sender, f"{what} in the name of rank {claimed}; it was dropped")
        return False

    def close(self) -> None:
        """Let nobody in any more; idempotent."""
        self.socket.close(0)


def secure_server(socket: zmq.Socket[Any], endpoint: str, door: Door | None, name: str) -> None:
    """Set up a socket of the driver that is to bind TCP; raises InsecureEndpointError where there is no door for it."""
    if door is None:
        raise InsecureEndpointError(f"{endpoint} is TCP and this side has no keys; nothing was bound")
    door.secure(socket, endpoint, name)
