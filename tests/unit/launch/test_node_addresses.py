"""Which address of a machine the other nodes are told, by every rule and in their order."""

from __future__ import annotations

from typing import Any

import pytest
from support.facts import facts

from zspmd.errors import ConfigError
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.nodes.preflight import choose_address, driver_address

NICS = ("lo 127.0.0.1", "lo ::1", "eth0 10.0.0.1", "eth0 fe80::1", "ib0 192.168.7.1", "docker0 172.17.0.1", "eth0 fd00::1")
ALL = "eth0 10.0.0.1, ib0 192.168.7.1, docker0 172.17.0.1, eth0 fd00::1"
SSH = "10.0.0.9 4711 10.0.0.1 22"
CHOOSE = "say which with addr= or iface= in the hostfile, or --iface NAME or NETWORK"


@pytest.mark.parametrize(
    ("entry", "iface", "ssh", "resolved", "chosen"),
    [
        pytest.param({"addr": "192.168.7.1", "iface": "eth0"}, "eth0", SSH, ["10.0.0.1"], ("192.168.7.1", "ib0"), id="addr before all"),
        pytest.param({"addr": "fd00:0::1"}, None, SSH, [], ("fd00::1", "eth0"), id="addr of IPv6, as Python writes it"),
        pytest.param({"iface": "ib0"}, "eth0", SSH, ["10.0.0.1"], ("192.168.7.1", "ib0"), id="the entry's iface before --iface"),
        pytest.param({}, "ib0", SSH, ["10.0.0.1"], ("192.168.7.1", "ib0"), id="--iface before ssh"),
        pytest.param({}, "192.168.0.0/16", SSH, [], ("192.168.7.1", "ib0"), id="a network"),
        pytest.param({}, "10.0.0.7/8", None, [], ("10.0.0.1", "eth0"), id="a network with host bits"),
        pytest.param({}, "fd00::/8", SSH, [], ("fd00::1", "eth0"), id="a network of IPv6"),
        pytest.param({}, "eth0", None, [], ("10.0.0.1", "eth0"), id="IPv4 of an iface that has both"),
        pytest.param({}, "eth0", None, ["fd00::1"], ("fd00::1", "eth0"), id="the name's of an iface that has several"),
        pytest.param({}, None, SSH, ["192.168.7.1"], ("10.0.0.1", "eth0"), id="ssh before the name"),
        pytest.param({}, None, "::ffff:1.2.3.4 1 ::ffff:10.0.0.1 22", [], ("10.0.0.1", "eth0"), id="ssh over a socket for both"),
        pytest.param({}, None, "127.0.0.1 1 127.0.0.1 22", ["192.168.7.1"], ("192.168.7.1", "ib0"), id="ssh through a tunnel says nothing"),
        pytest.param({}, None, "10.0.0.9 1 10.9.9.9 22", ["192.168.7.1"], ("192.168.7.1", "ib0"), id="ssh behind translation says nothing"),
        pytest.param({}, None, "nonsense", ["8.8.8.8", "127.0.1.1", "192.168.7.1"], ("192.168.7.1", "ib0"), id="an own one of the name"),
    ],
)
def test_the_order_of_choice(
    entry: dict[str, Any], iface: str | None, ssh: str | None, resolved: list[str], chosen: tuple[str, str]
) -> None:
    node = facts(1, addresses=NICS, ssh_connection=ssh or "")
    assert choose_address(Host("a", **entry), node, iface, resolved=resolved) == chosen


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        pytest.param(("lo 127.0.0.1", "eth0 10.0.0.1"), ("10.0.0.1", "eth0"), id="one"),
        pytest.param(("eth0 fd00::2", "eth0 10.0.0.1", "eth0 fe80::2"), ("10.0.0.1", "eth0"), id="one of IPv4, and of IPv6"),
        pytest.param(("lo ::1", "eth0 fe80::2", "eth0 fd00::2"), ("fd00::2", "eth0"), id="one of IPv6"),
    ],
)
def test_the_only_address_needs_no_word(addresses: tuple[str, ...], chosen: tuple[str, str]) -> None:
    assert choose_address(Host("a"), facts(1, addresses=addresses), None) == chosen


@pytest.mark.parametrize(
    ("entry", "iface", "addresses", "text"),
    [
        pytest.param(
            {"addr": "10.9.9.9"},
            None,
            NICS,
            f"a: addr=10.9.9.9 is none of its addresses, which are {ALL}; write one of them, or leave addr= out",
            id="a foreign addr",
        ),
        pytest.param(
            {"addr": "127.0.0.1"},
            None,
            NICS,
            f"a: addr=127.0.0.1 is a loopback address, which no other node reaches; write one of {ALL}",
            id="a loopback addr",
        ),
        pytest.param(
            {"addr": "fe80::1"},
            None,
            NICS,
            f"a: addr=fe80::1 is a link-local address, which no other node reaches; write one of {ALL}",
            id="a link-local addr",
        ),
        pytest.param(
            {"iface": "eth9"},
            None,
            NICS,
            f"a: iface=eth9 fits none of its addresses, which are {ALL}; give iface= for this host in the hostfile, "
            "or --iface NETWORK that holds one address of each node",
            id="a foreign iface",
        ),
        pytest.param(
            {},
            "lo",
            NICS,
            f"a: --iface lo fits none of its addresses, which are {ALL}; give iface= for this host in the hostfile, "
            "or --iface NETWORK that holds one address of each node",
            id="the loopback iface",
        ),
        pytest.param(
            {},
            "10.0.0.0/99",
            NICS,
            "a: --iface 10.0.0.0/99 is no network: '10.0.0.0/99' does not appear to be an IPv4 or IPv6 network; "
            "write an interface's name, or a network: 10.0.0.0/8",
            id="no network",
        ),
        pytest.param(
            {}, None, NICS, f"a: it has several addresses, and nothing says which the other nodes reach: {ALL}; {CHOOSE}", id="several"
        ),
        pytest.param(
            {},
            None,
            ("lo 127.0.0.1", "eth0 fe80::1"),
            "a: it has no address that other nodes could reach, only lo 127.0.0.1, eth0 fe80::1; "
            "bring its network up ('ip addr' there), or leave this host out",
            id="none",
        ),
        pytest.param(
            {},
            None,
            (),
            "a: it has no address that other nodes could reach, only none at all; "
            "bring its network up ('ip addr' there), or leave this host out",
            id="none whatever",
        ),
    ],
)
def test_what_cannot_be_decided_is_said_with_what_there_is(
    entry: dict[str, Any], iface: str | None, addresses: tuple[str, ...], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_address(Host("a", **entry), facts(1, addresses=addresses), iface)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("host", "iface", "clients", "routed", "chosen"),
    [
        pytest.param(Host("h", addr="192.168.7.1"), "eth0", ["10.0.0.1"], [], ("192.168.7.1", "ib0"), id="addr of its entry"),
        pytest.param(None, "ib0", ["10.0.0.1"], [], ("192.168.7.1", "ib0"), id="--iface"),
        pytest.param(None, None, ["172.17.0.1"], ["10.0.0.1"], ("172.17.0.1", "docker0"), id="as a node's sshd saw it"),
        pytest.param(None, None, ["", "10.9.9.9", "10.0.0.1"], [], ("10.0.0.1", "eth0"), id="not as translation shows it"),
        pytest.param(None, None, [""], ["192.168.7.1"], ("192.168.7.1", "ib0"), id="from where its packets go"),
    ],
)
def test_the_driver_s_own(host: Host | None, iface: str | None, clients: list[str], routed: list[str], chosen: tuple[str, str]) -> None:
    others = [facts(number, ssh_connection=f"{client} 1 10.0.0.3 22" if client else "") for number, client in enumerate(clients)]
    mine = facts(0, addresses=NICS, ssh_connection="10.0.0.77 1 172.17.0.1 22")
    assert driver_address(mine, others, iface, host=host, routed=routed) == chosen


def test_by_which_address_the_user_came_to_the_driver_says_nothing() -> None:
    with pytest.raises(ConfigError, match="node0: it has several addresses"):
        driver_address(facts(0, addresses=NICS, ssh_connection="10.0.0.77 1 172.17.0.1 22"), [facts(1)], None)
