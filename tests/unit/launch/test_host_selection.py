"""Which hosts and slots stay, and what is said of a selection that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from support.host_texts import reading

from zspmd.errors import ConfigError, TopologyError
from zspmd.runtime.launch.hosts.host_selection import select_hosts
from zspmd.runtime.launch.hosts.hostfile import parse_hostfile

HOSTS = parse_hostfile("a slots=4\nlee@b devices=4,5,6,7 port=2200\n2001:db8::1\nn[1-3]:2", "hosts")
A, B, V6, N1, N2, N3 = reading(HOSTS)
B_WITH = "lee@b slots={} port=2200 devices={}"

SELECTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, [A, B, V6, N1, N2, N3]),
    "one": ({"include": "b"}, [B]),
    "the order of the file": ({"include": "n2@a"}, [A, N2]),
    "slots become devices": ({"include": "a:0,2"}, ["a slots=2 devices=0,2"]),
    "slots of devices": ({"include": "b:3,0"}, [B_WITH.format(2, "7,4")]),
    "an IPv6 address": ({"include": "2001:DB8:0::1"}, [V6]),
    "an IPv6 address in brackets": ({"include": "[2001:db8::1]@a"}, [A, V6]),
    "slots where nobody said how many": ({"include": "[2001:db8::1]:1,3"}, ["2001:db8::1 slots=2 devices=1,3"]),
    "a range": ({"include": "n[1-2]"}, [N1, N2]),
    "a range with slots": ({"include": "n[1-2]:1"}, ["n1 slots=1 devices=1", "n2 slots=1 devices=1"]),
    "case does not count": ({"include": "A"}, [A]),
    "all but one": ({"include": "^b"}, [A, V6, N1, N2, N3]),
    "all but one and another": ({"include": "^b@^n[1-2]@^a"}, [V6, N3]),
    "some but one": ({"include": "n[1-3]@^n2"}, [N1, N3]),
    "all but a slot": ({"include": "^a:1"}, ["a slots=3 devices=0,2,3", B, V6, N1, N2, N3]),
    "exclude": ({"exclude": "a@n[1-3]"}, [B, V6]),
    "exclude slots": ({"exclude": "a:0@b:1,2"}, ["a slots=3 devices=1,2,3", B_WITH.format(2, "4,7"), V6, N1, N2, N3]),
    "exclude all slots": ({"exclude": "n1:0,1@a:0,1,2,3"}, [B, V6, N2, N3]),
    "exclude from what is included": (
        {"include": "a:1,2,3@b", "exclude": "a:2@b:0@n1"},
        ["a slots=2 devices=1,3", B_WITH.format(3, "5,6,7")],
    ),
    "the first": ({"num_nodes": 2}, [A, B]),
    "the first that are left": ({"exclude": "a", "num_nodes": 2}, [B, V6]),
    "as many as there are": ({"num_nodes": 6}, [A, B, V6, N1, N2, N3]),
}
THERE = "there are a, b, 2001:db8::1, n1, n2, n3"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not there": ({"include": "c"}, f"include is 'c': there is no host 'c'; {THERE}"),
    "not there to exclude": ({"exclude": "n[3-4]"}, f"exclude is 'n[3-4]': there is no host 'n4'; {THERE}"),
    "empty": ({"include": ""}, "include is '': an entry is empty; write hosts with one '@' between two"),
    "an @ too many": ({"include": "a@@b"}, "include is 'a@@b': an entry is empty; write hosts with one '@' between two"),
    "commas": ({"include": "a,b"}, "include is 'a,b': 'a,b' has a comma between hosts; here that is '@', as in h1@h2:0,2"),
    "commas behind slots": (
        {"include": "a:0,b"},
        "include is 'a:0,b': 'a:0,b' has no list of slots behind its colon; write it as HOST:0,2, and '@' between hosts",
    ),
    "no slots": (
        {"include": "a:"},
        "include is 'a:': 'a:' has no list of slots behind its colon; write it as HOST:0,2, and '@' between hosts",
    ),
    "a slot twice": ({"include": "a:0,0"}, "include is 'a:0,0': 'a:0,0' names a slot twice; name it once"),
    "a slot that is not there": ({"include": "a:4"}, "include is 'a:4': there is no slot 4 on 'a', which has 4, counted from 0"),
    "a host twice": ({"include": "a:0@a:1"}, "include is 'a:0@a:1': 'a' is named twice; put its slots into one entry, as HOST:0,2"),
    "no address": (
        {"include": "a:0:1"},
        "include is 'a:0:1': 'a:0:1' is no IPv6 address; with a number of slots it is [ADDRESS]:N or ADDRESS slots=N",
    ),
    "a bad range": ({"include": "n[2-1]"}, "include is 'n[2-1]': '[2-1]' runs backwards: 2 is more than 1"),
    "a user": ({"include": "lee@b"}, f"include is 'lee@b': there is no host 'lee'; {THERE}"),
    "^ in exclude": ({"exclude": "^a"}, "exclude is '^a'; an entry with '^' is for include, leave the '^' out here"),
    "slots that nobody counted": (
        {"exclude": "[2001:db8::1]:0"},
        "slots of '2001:db8::1' are excluded, and nobody says how many it has; write slots=N for it",
    ),
    "nothing left": (
        {"include": "a", "exclude": "a"},
        "the selection leaves no host of a, b, 2001:db8::1, n1, n2, n3; exclude fewer",
    ),
    "no node": ({"num_nodes": 0}, "num_nodes='0' is outside 1 to 65536"),
}


@pytest.mark.parametrize(("selection", "expected"), SELECTED.values(), ids=SELECTED)
def test_selected(selection: dict[str, Any], expected: list[str]) -> None:
    assert reading(select_hosts(HOSTS, **selection)) == expected


@pytest.mark.parametrize(("selection", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_hosts(HOSTS, **selection)
    assert str(caught.value) == message


def test_too_few_nodes() -> None:
    with pytest.raises(TopologyError) as caught:
        select_hosts(HOSTS, include="a@b", num_nodes=3)
    assert str(caught.value) == "3 nodes are asked for, and the hosts are 2: a, b; name more or ask for fewer"
