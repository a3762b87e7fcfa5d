"""By which of its addresses the other nodes of a launch reach a machine, judged from its facts; no I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ....errors import ConfigError, NodeProblem
from ..hosts.host import Host
from .node_facts import NodeFacts

_CHOOSE = "say which with addr= or iface= in the hostfile, or --iface NAME or NETWORK"

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Found = tuple[str, IpAddress]  # interface, address


def choose_address(host: Host, facts: NodeFacts, iface: str | None, *, resolved: Sequence[str] = ()) -> tuple[str, str]:
    """Return the address at which other nodes are to reach a node, and its interface; never a loopback or link-local one.

    It is the first of: the entry's ``addr``; an address of the entry's ``iface``, or of ``iface``; where sshd took the driver's
    connection; one that the host's name leads to; the only one that there is, IPv4 before IPv6.

    Args:
        iface: an interface's name, or a network as in 10.0.0.0/8.
        resolved: the addresses that the driver finds for the host's name.

    Raises:
        ConfigError: none of these, or more than one; says what there is.
    """
    return _found_or_raised(find_address(host, facts, iface, resolved=resolved))


def driver_address(
    facts: NodeFacts, others: Sequence[NodeFacts], iface: str | None, *, host: Host | None = None, routed: Sequence[str] = ()
) -> tuple[str, str]:
    """Return the address at which other nodes are to reach the driver, and its interface, likewise.

    What counts is the first of: ``addr`` and ``iface`` as for nodes; the address that a node's sshd saw the driver at; the one from
    which the driver's packets to a node go; the only one.

    Args:
        host: the entry of this machine, where it is a node too.
        routed: by which of its addresses the driver would speak to the nodes.

    Raises:
        ConfigError: as ``choose_address``.
    """
    return _found_or_raised(find_driver_address(facts, others, iface, host=host, routed=routed))


def find_address(host: Host, facts: NodeFacts, iface: str | None, *, resolved: Sequence[str] = ()) -> tuple[str, str] | NodeProblem:
    """Return what ``choose_address`` does, or the problem."""
    return _Search(host.target, facts, host, iface, [*facts.ssh_connection.split()[2:3], *resolved]).find()


def find_driver_address(
    facts: NodeFacts, others: Sequence[NodeFacts], iface: str | None, *, host: Host | None = None, routed: Sequence[str] = ()
) -> tuple[str, str] | NodeProblem:
    """Return what ``driver_address`` does, or the problem."""
    seen = [client for other in others for client in other.ssh_connection.split()[:1]]
    return _Search(facts.hostname if host is None else host.target, facts, host, iface, [*seen, *routed]).find()


class _Search:
    """The choice between the addresses of one machine; of ``hints`` those count that it has."""

    def __init__(self, name: str, facts: NodeFacts, host: Host | None, iface: str | None, hints: Sequence[str]) -> None:
        own = _usable_addresses(facts)
        self.name = name
        self.facts = facts
        self.own = sorted(own, key=lambda found: found[1].version)  # IPv4 first, else as they were
        self.hinted = [found for hint in map(_parsed, hints) for found in own if found[1] == hint]
        self.addr = None if host is None else host.addr
        self.own_iface = None if host is None else host.iface
        self.iface = self.own_iface or iface

    def find(self) -> tuple[str, str] | NodeProblem:
        """Return address and interface by the rules of ``choose_address``, or the problem."""
        if self.addr is not None:
            return self._find_given(self.addr)
        if self.iface is not None:
            return self._find_on_iface(self.iface)
        if self.hinted:
            return _shown(self.hinted[0])
        if not self.own:
            text = f"it has no address that other nodes could reach, only {', '.join(self.facts.addresses) or 'none at all'}"
            return self._problem(text, "bring its network up ('ip addr' there), or leave this host out")
        if len([found for found in self.own if found[1].version == self.own[0][1].version]) > 1:
            return self._problem(f"it has several addresses, and nothing says which the other nodes reach: {self._listed()}", _CHOOSE)
        return _shown(self.own[0])

    def _find_given(self, addr: str) -> tuple[str, str] | NodeProblem:
        address = _parsed(addr)
        for found in self.own:
            if found[1] == address:
                return _shown(found)
        if address is not None and (address.is_loopback or address.is_link_local):
            kind = "loopback" if address.is_loopback else "link-local"
            return self._problem(f"addr={addr} is a {kind} address, which no other node reaches", f"write one of {self._listed()}")
        text = f"addr={addr} is none of its addresses, which are {self._listed()}"
        return self._problem(text, "write one of them, or leave addr= out")

    def _find_on_iface(self, iface: str) -> tuple[str, str] | NodeProblem:
        given = f"iface={iface}" if self.own_iface else f"--iface {iface}"
        try:
            network = ipaddress.ip_network(iface, strict=False) if "/" in iface else None
        except ValueError as error:
            return self._problem(f"{given} is no network: {error}", "write an interface's name, or a network: 10.0.0.0/8")
        for name, address in (*self.hinted, *self.own):
            if name == iface if network is None else address in network:
                return str(address), name
        text = f"{given} fits none of its addresses, which are {self._listed()}"
        return self._problem(text, "give iface= for this host in the hostfile, or --iface NETWORK that holds one address of each node")

    def _listed(self) -> str:
        return ", ".join(f"{iface} {address}" for iface, address in self.own) or "none"

    def _problem(self, text: str, advice: str) -> NodeProblem:
        return NodeProblem(self.name, "address", text, advice)


def _usable_addresses(facts: NodeFacts) -> list[Found]:
    """Return those by which other machines can reach a node."""
    found = []
    for entry in facts.addresses:
        iface, _, address = entry.rpartition(" ")
        parsed = _parsed(address)
        if parsed is not None and not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast):
            found.append((iface, parsed))
    return found


def _parsed(address: str) -> IpAddress | None:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0].strip("[]"))
    except ValueError:
        return None
    return parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed


def _found_or_raised(found: tuple[str, str] | NodeProblem) -> tuple[str, str]:
    if isinstance(found, NodeProblem):
        raise ConfigError(f"{found.host}: {found.text}; {found.advice}")
    return found


def _shown(found: Found) -> tuple[str, str]:
    return str(found[1]), found[0]
