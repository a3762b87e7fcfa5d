"""The name of a launch: public, seeds ports and paths, never a secret."""

from __future__ import annotations

import getpass
import os
import re
import secrets

from ...errors import ConfigError

MAX_CHARACTERS = 64
# A leading dot would make "." and ".." and hidden directories of it, a leading dash an option.
_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_MAX_USER_CHARACTERS = 32


def generate_launch_id() -> str:
    """Return ``<user>-<8 hex digits>``, new on each call."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid without an entry in the password file
        user = f"uid{os.getuid()}"
    cleaned = re.sub(r"[^A-Za-z0-9_]", "_", user)[:_MAX_USER_CHARACTERS] or "user"
    return f"{cleaned}-{secrets.token_hex(4)}"


def check_launch_id(text: str) -> str:
    """Return ``text`` when it may name a launch.

    Raises:
        ConfigError: it is not 1 to 64 characters of ``A-Z a-z 0-9 _ . -``, or begins with a dot or a dash.
    """
    if not isinstance(text, str) or _PATTERN.fullmatch(text) is None:
        raise ConfigError(
            f"launch id {text!r} cannot be used: choose 1 to {MAX_CHARACTERS} of the characters A-Z a-z 0-9 _ . - "
            "that do not begin with a dot or a dash"
        )
    return text
