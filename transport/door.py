"""The driver's door on TCP: the keys of a launch, whose connection is let in, and who spoke in the name of another rank.

A new key pair for the driver, for each rank and for each node with a relay is made at each launch, and whoever has one gets its own
alone. libzmq asks, by its ZAP protocol, for every connection that has proved to hold its key; the answer is the rank of that key, or no.
With ``ZAP_ENFORCE_DOMAIN`` nobody gets in while nobody answers. The rank then stands at every message, whatever the message says of
itself. A relay takes steps, and so may say for the ranks of its node that they listen, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85

from ..errors import InsecureEndpointError
from .security import BACKLOG, SERVER_HANDSHAKE_MS, RankKeys, check_key, limit_socket

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_VERSION = b"1.0"
_MAX_TOLD = 64  # of each kind: whoever lies in a loop must not push all else out of the group's events
_ONCE = ("step", "result")  # the sockets on which a lost connection means lost messages
USER_ID = "User-Id"
_RELAY_LETTER = "n"  # before the node's number, in what a relay's messages carry
NO_RELAYS: Mapping[int, Sequence[int]] = {}


class _Peer(NamedTuple):
    """Whose key it is: that of a rank, or of the relay of a node."""

    user_id: str
    rank: int | None
    name: str


class Door:
    """Keys and identities of one launch; one for each ZeroMQ context, made before the first bind.

    Args:
        nodes: the ranks of each node that has a relay.
        on_event: called with ("refused", None, why) for a connection that is not let in, and ("impostor", rank, what) for a message
            that a rank sends in the name of another. The rank is None where it is a relay's.

    Attributes:
        refused: connections that held the driver's public key and were not let in; the first 64 are told, as of impostors.
        impostor_frames: messages in the name of another rank; they were dropped.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        world_size: int,
        on_event: Callable[[str, int | None, str], None],
        nodes: Mapping[int, Sequence[int]] = NO_RELAYS,
    ) -> None:
        self._public, self._secret = zmq.curve_keypair()
        self._pairs = [zmq.curve_keypair() for _ in range(world_size)]
        self._node_pairs = {node: zmq.curve_keypair() for node in nodes}
        self._peers = {z85.decode(public): _Peer(str(rank), rank, f"rank {rank}") for rank, (public, _) in enumerate(self._pairs)}
        for node, (public, _) in self._node_pairs.items():
            self._peers[z85.decode(public)] = _Peer(f"{_RELAY_LETTER}{node}", None, f"the relay of node {node}")
        self._relayed = {f"{_RELAY_LETTER}{node}": frozenset(ranks) for node, ranks in nodes.items()}
        self._on_event = on_event
        self._heard: set[tuple[str, str]] = set()  # (socket, user id)
        self.refused = 0
        self.impostor_frames = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)

    def rank_keys(self, rank: int) -> RankKeys:
        """Return what ``rank`` needs to connect."""
        return RankKeys(*self._pairs[rank], self._public)

    def node_keys(self, node_rank: int) -> RankKeys:
        """Return what the relay of a node needs to connect."""
        return RankKeys(*self._node_pairs[node_rank], self._public)

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
        peer = self._peers.get(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else None
        reason = self._refusal(domain.decode(), peer)
        if peer is not None and not reason:
            self.socket.send_multipart([_ZAP_VERSION, request_id, b"200", b"OK", peer.user_id.encode(), b""])
            return
        self.refused += 1
        if self.refused <= _MAX_TOLD:
            where = f"a connection from {address.decode(errors='replace')} to the {domain.decode()} socket"
            self._on_event("refused", None if peer is None else peer.rank, f"{where}: {reason}")
        self.socket.send_multipart([_ZAP_VERSION, request_id, b"400", reason.encode(), b"", b""])

    def _refusal(self, name: str, peer: _Peer | None) -> str:
        if peer is None:
            return "its key is none of this launch"
        if peer.rank is None and name != "step":
            return f"{peer.name} takes steps and has no other connection"
        if name in _ONCE and (name, peer.user_id) in self._heard:  # what was on its way is lost, and going on would hide that
            return f"{peer.name} has had its connection; one that was lost is not taken up again"
        return ""

    def sender(self, frame: zmq.Frame, name: str) -> int:
        """Return the rank whose connection to socket ``name``, result or control, this part came from."""
        return int(self._hear(frame, name))

    def may_subscribe(self, frame: zmq.Frame, rank: int) -> bool:
        """Say whether the connection of a subscription is this rank's, or its node's relay; if not, it is to be dropped."""
        user_id = self._hear(frame, "step")
        ranks = self._relayed.get(user_id)
        if ranks is None:
            return self.is_own(int(user_id), rank, "a subscription")
        if rank not in ranks:
            self._tell_impostor(None, rank, f"a subscription by the relay of node {user_id[len(_RELAY_LETTER) :]}")
        return rank in ranks

    def is_own(self, sender: int, claimed: int, what: str) -> bool:
        """Say whether a message says of itself what its connection proves; if not, it is counted and told, and is to be dropped."""
        if sender == claimed:
            return True
        self._tell_impostor(sender, claimed, what)
        return False

    def _hear(self, frame: zmq.Frame, name: str) -> str:
        user_id = str(frame.get(USER_ID))
        self._heard.add((name, user_id))
        return user_id

    def _tell_impostor(self, sender: int | None, claimed: int, what: str) -> None:
        self.impostor_frames += 1
        if self.impostor_frames <= _MAX_TOLD:
            self._on_event("impostor", sender, f"{what} in the name of rank {claimed}; it was dropped")

    def close(self) -> None:
        """Let nobody in any more; idempotent."""
        self.socket.close(0)


def secure_server(socket: zmq.Socket[Any], endpoint: str, door: Door | None, name: str) -> None:
    """Set up a socket of the driver that is to bind TCP; raises InsecureEndpointError where there is no door for it."""
    if door is None:
        raise InsecureEndpointError(f"{endpoint} is TCP and this side has no keys; nothing was bound")
    door.secure(socket, endpoint, name)
