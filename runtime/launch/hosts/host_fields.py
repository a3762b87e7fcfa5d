"""What may stand in each field of a host: checks of values, and from the text of a hostfile to a value.

What passes is safe as an argument of ssh and in a line for a shell: no field begins with a dash, none holds a blank, a quote or anything
that a shell expands.
"""

from __future__ import annotations

import ipaddress
import re

from ....errors import ConfigError

MAX_SLOTS = 1 << 16
MAX_PORT = 65_535
MAX_DEVICE = 9_999
_MAX_SHOWN = 60

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\$?")
_IFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}")
_PYTHON = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+,:@%-]{0,1023}")
_WHOLE = re.compile(r"[0-9]{1,9}")  # more digits are outside every bound, and cost time to read


def shown(text: object) -> str:
    """Return a value as a message shows it: quoted, on one line and not long."""
    full = str(text)
    return repr(full if len(full) <= _MAX_SHOWN else full[: _MAX_SHOWN - 1] + "…")


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` is a host's name, an IPv4 address or an IPv6 address without brackets."""
    if ":" in name or "%" in name:
        address, _, scope = name.partition("%")
        if not _is_ipv6(address) or ("%" in name and _SCOPE.fullmatch(scope) is None):
            raise ConfigError(f"{shown(name)} is no IPv6 address; with a number of slots it is [ADDRESS]:N or ADDRESS slots=N")
        _check_one_machine(address)
    elif _DIGITS_AND_DOTS.fullmatch(name):
        if not _is_ipv4(name):
            raise ConfigError(f"{shown(name)} is no IPv4 address, and a name has letters too; give all four numbers, each up to 255")
        _check_one_machine(name)
    elif _NAME.fullmatch(name) is None or ".." in name:
        raise ConfigError(
            f"{shown(name)} is no host name: it takes at most 253 letters, digits, '.', '-' and '_', and begins with no '.' or '-'"
        )


def check_user(user: str) -> None:
    """Raise ConfigError unless ``user`` can be an account's name."""
    if _USER.fullmatch(user) is None:
        raise ConfigError(f"{shown(user)} is no user's name: it takes letters, digits, '.', '-' and '_', and begins with no '.' or '-'")


def check_python(path: str) -> None:
    """Raise ConfigError unless ``path`` is absolute or the name of a command; nothing in it is expanded."""
    if _PYTHON.fullmatch(path) is None or ("/" in path and not path.startswith("/")):
        raise ConfigError(
            f"python={shown(path)} cannot be used: give an absolute path without blanks, quotes, '~' or '$', or the name of a command"
        )


def check_whole(key: str, number: object, low: int, high: int) -> None:
    """Raise ConfigError unless ``number`` is an integer from ``low`` to ``high``."""
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise ConfigError(f"{key}={shown(number)} is outside {low} to {high}")


def read_whole(key: str, text: str, low: int, high: int) -> int:
    """Return the number that ``text`` is in decimal digits."""
    if _WHOLE.fullmatch(text) is None or not low <= int(text) <= high:
        raise ConfigError(f"{key}={shown(text)} is no whole number from {low} to {high}")
    return int(text)


def read_address(text: str) -> str:
    """Return the IP address that ``text`` is, as Python writes it; IPv6 with or without brackets."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    address, _, scope = bare.partition("%")
    is_ipv6 = _is_ipv6(address) and ("%" not in bare or _SCOPE.fullmatch(scope) is not None)
    if not is_ipv6 and (bare != text or not _is_ipv4(bare)):
        raise ConfigError(f"addr={shown(text)} is no IP address; give one of the node's own, or iface=NAME or iface=NETWORK/BITS")
    _check_one_machine(address)
    return str(ipaddress.ip_address(bare))


def read_iface(text: str) -> str:
    """Return the interface that ``text`` is: its name, or a network in canonical form."""
    if "/" in text:
        try:
            return str(ipaddress.ip_network(text, strict=False))
        except ValueError:
            raise ConfigError(f"iface={shown(text)} is no network; write it as 10.1.0.0/16, or name an interface") from None
    if _is_ipv4(text) or _is_ipv6(text):
        raise ConfigError(f"iface={shown(text)} is an address; write addr={text}, or the network as {text}/BITS")
    if _IFACE.fullmatch(text) is None:
        raise ConfigError(f"iface={shown(text)} is no interface: give one name of at most 15 characters, or a network such as 10.1.0.0/16")
    return text


def read_devices(text: str) -> tuple[int, ...]:
    """Return the device numbers that ``text`` lists."""
    entries = text.split(",")
    if not all(_WHOLE.fullmatch(entry) and int(entry) <= MAX_DEVICE for entry in entries):
        raise ConfigError(f"devices={shown(text)} is no list of device numbers from 0 to {MAX_DEVICE}; write it as 0,2")
    return tuple(map(int, entries))


def canonical_name(name: str) -> str:
    """Return what two spellings of the same host have in common: case does not count, nor how an IPv6 address is cut short."""
    return str(ipaddress.ip_address(name)) if ":" in name else name.lower()


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text


def _check_one_machine(text: str) -> None:
    address = ipaddress.ip_address(text)
    if address.is_unspecified or address.is_multicast or text == "255.255.255.255":
        raise ConfigError(f"{shown(text)} is not the address of one machine; give the node's own")
