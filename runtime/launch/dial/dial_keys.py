"""The secret by which nodes that call in and their driver know each other, and the keys that follow from it.

Both sides derive the same two CURVE key pairs from the secret and the launch id, so that nothing needs to be exchanged: the driver
proves to have the secret by the one pair, and a node by the other. Launches with other ids have other keys.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import MutableMapping

import zmq
from zmq.utils import z85

from ....errors import ConfigError
from ....transport.security import RankKeys

SECRET_VARIABLE = "ZSPMD_SECRET"
MIN_SECRET_CHARACTERS = 16
_MAX_SECRET_BYTES = 4096
_ADVICE = "make one with: openssl rand -hex 32"


class DialKeys:
    """What both sides need: the driver's pair, and the one of all nodes. ``node`` is what a node's socket connects by."""

    def __init__(self, secret: bytes, launch_id: str) -> None:
        self.server_secret = _derive(secret, launch_id, "driver")
        self._server_public: bytes = zmq.curve_public(self.server_secret)
        node_secret = _derive(secret, launch_id, "node")
        self.node_public: bytes = zmq.curve_public(node_secret)
        self.node = RankKeys(self.node_public, node_secret, self._server_public)


def _derive(secret: bytes, launch_id: str, role: str) -> bytes:
    """Return a CURVE secret key in Z85: any 32 bytes are one."""
    key = hashlib.blake2b(secret, digest_size=64, person=b"zspmd secret").digest()
    return bytes(z85.encode(hashlib.blake2b(f"{role}\0{launch_id}".encode(), key=key, digest_size=32, person=b"zspmd dial").digest()))


def take_secret(environment: MutableMapping[str, str], path: str | None) -> bytes | None:
    """Return the secret that the user has given, or None; it is taken out of ``environment``, so that no child process finds it there.

    Args:
        path: a file that holds it, which wins over ZSPMD_SECRET.

    Raises:
        ConfigError: it is too short, or the file is missing or can be read by others.
    """
    given = environment.pop(SECRET_VARIABLE, None)
    if path is not None:
        return _checked(_read_private(path), f"the secret in {path}")
    return None if given is None else _checked(given, SECRET_VARIABLE)


def _checked(secret: str, name: str) -> bytes:
    secret = secret.strip()
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise ConfigError(f"{name} has {len(secret)} characters; it needs at least {MIN_SECRET_CHARACTERS}: {_ADVICE}")
    return secret.encode(errors="surrogateescape")


def _read_private(path: str) -> str:
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(_MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the secret cannot be read from {path!r}: {error.strerror}; {_ADVICE}") from error
    if not stat.S_ISREG(facts.st_mode) or len(content) > _MAX_SECRET_BYTES:
        raise ConfigError(f"{path!r} is no file of at most {_MAX_SECRET_BYTES} bytes, as one with a secret is; {_ADVICE}")
    if facts.st_mode & 0o077:
        raise ConfigError(f"others can read {path!r}, which has mode {stat.S_IMODE(facts.st_mode):04o}; run: chmod 600 {path}")
    return content.decode(errors="surrogateescape")
