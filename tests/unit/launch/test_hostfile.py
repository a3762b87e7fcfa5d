"""Hostfiles, good and bad: exactly this reading, or exactly this message. Long, as it is mostly these two tables."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from pathlib import Path

import pytest
from support.host_texts import reading
from support.package import ROOT

from zspmd.errors import ConfigError, HostfileError
from zspmd.runtime.launch.hosts.host import MAX_HOSTS
from zspmd.runtime.launch.hosts.host_collector import MAX_PROBLEMS
from zspmd.runtime.launch.hosts.hostfile import MAX_FILE_BYTES, parse_hostfile, read_hostfile

COUNTED = "hosts: hosts are named repeatedly, so their slots add up, one for each mention without a number: "

# name: (text, reading, notes)
GOOD: dict[str, tuple[str, list[str], list[str]]] = {
    "a name": ("h", ["h"], []),
    "a full name": ("node-1.rack_2.example.org.", ["node-1.rack_2.example.org."], []),
    "upper case is kept": ("Node1", ["Node1"], []),
    "slots=": ("h slots=4", ["h slots=4"], []),
    "blanks round =": ("h slots = 4", ["h slots=4"], []),
    "tabs": ("\th\tslots\t=\t4\t", ["h slots=4"], []),
    "a colon": ("h:4", ["h slots=4"], []),
    "ports begin above": ("h:1023", ["h slots=1023"], []),
    "as many slots as you like": ("h slots=2222", ["h slots=2222"], []),
    "IPv4": ("10.0.0.1", ["10.0.0.1"], []),
    "IPv4 with slots": ("10.0.0.1:4", ["10.0.0.1 slots=4"], []),
    "IPv6": ("2001:db8::2", ["2001:db8::2"], []),
    "IPv6, whose last part is no number of slots": ("2001:db8::2:4", ["2001:db8::2:4"], []),
    "IPv6 in brackets": ("[2001:db8::2]", ["2001:db8::2"], []),
    "IPv6 in brackets with slots": ("[2001:db8::2]:4", ["2001:db8::2 slots=4"], []),
    "IPv6 with slots=": ("2001:db8::2 slots=4", ["2001:db8::2 slots=4"], []),
    "IPv6 with a scope": ("fe80::1%eth0", ["fe80::1%eth0"], []),
    "IPv6 with scope, brackets and user": ("lee@[fe80::1%eth0.100]:2", ["lee@fe80::1%eth0.100 slots=2"], []),
    "user@": ("bob@h", ["bob@h"], []),
    "user=": ("h user=bob", ["bob@h"], []),
    "a user's account may end with $": ("host$@h", ["host$@h"], []),
    "user@ with slots": ("bob@h:2", ["bob@h slots=2"], []),
    "port= is of ssh": ("h port=2222", ["h port=2222"], []),
    "port and slots": ("h:2 port=22", ["h slots=2 port=22"], []),
    "aliases of slots": ("a cpu=2\nb count=2\nc np=2", ["a slots=2", "b slots=2", "c slots=2"], []),
    "max_slots": ("h slots=2 max_slots=4", ["h slots=2 max_slots=4"], []),
    "aliases of max_slots": (
        "a max-slots=4\nb slots_max=4\nc max_cpu=4\nd count-max=4",
        ["a max_slots=4", "b max_slots=4", "c max_slots=4", "d max_slots=4"],
        [],
    ),
    "aliases of user": ("a username=lee\nb user-name=lee\nc user_name=lee", ["lee@a", "lee@b", "lee@c"], []),
    "addr": ("h addr=10.1.0.7", ["h addr=10.1.0.7"], []),
    "addr in brackets": ("h addr=[2001:DB8:0::7]", ["h addr=2001:db8::7"], []),
    "addr with a scope": ("h addr=fe80::1%eth0", ["h addr=fe80::1%eth0"], []),
    "iface by name": ("h iface=ib0.8001", ["h iface=ib0.8001"], []),
    "iface by network": ("h iface=10.1.0.7/16", ["h iface=10.1.0.0/16"], []),
    "iface by network, IPv6": ("h iface=2001:db8::/32", ["h iface=2001:db8::/32"], []),
    "devices are slots": ("h devices=0,2", ["h slots=2 devices=0,2"], []),
    "more devices than slots": ("h:1 devices=4,5", ["h slots=1 devices=4,5"], []),
    "a device for two ranks": ("h devices=0,0", ["h slots=2 devices=0,0"], []),
    "python by path": ("h python=/opt/my-env_3.12/bin/python3", ["h python=/opt/my-env_3.12/bin/python3"], []),
    "python by name": ("h python=python3.12", ["h python=python3.12"], []),
    "all keys": (
        "lee@n1:2 port=2200 addr=10.1.0.7 iface=ib0 devices=1,3 python=/opt/python max_slots=8",
        ["lee@n1 slots=2 port=2200 addr=10.1.0.7 iface=ib0 devices=1,3 python=/opt/python max_slots=8"],
        [],
    ),
    "a range": ("n[1-3]", ["n1", "n2", "n3"], []),
    "a range with zeros and a number": ("n[08-10,20]", ["n08", "n09", "n10", "n20"], []),
    "a range that outgrows its zeros": ("n[099-101]", ["n099", "n100", "n101"], []),
    "two ranges": ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"], []),
    "a range with an end": ("n[1,2]-ib.x", ["n1-ib.x", "n2-ib.x"], []),
    "a range of addresses": ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"], []),
    "a range with user, slots and keys": ("lee@n[1-2]:4 port=22", ["lee@n1 slots=4 port=22", "lee@n2 slots=4 port=22"], []),
    "comments": ("# all\nh # one\n  # two\n\ng\t//three\n// four", ["h", "g"], []),
    "a comment behind slots": ("h slots=2 # x", ["h slots=2"], []),
    "CRLF": ("a\r\nb slots=2\r\n", ["a", "b slots=2"], []),
    "BOM": ("\ufeffa\nb", ["a", "b"], []),
    "BOM and comment": ("\ufeff# c\na", ["a"], []),
    "no last newline, blank lines": ("\n\na\n\n \nb", ["a", "b"], []),
    "repeats": ("h\nh\ng\nh", ["h slots=3", "g slots=1"], [COUNTED + "h 3, g 1"]),
    "repeats beside a number": ("h\nh\ng:4", ["h slots=2", "g slots=4"], [COUNTED + "h 2, g 4"]),
    "repeats keep what the first says": ("lee@h port=22\nh\nlee@h", ["lee@h slots=3 port=22"], [COUNTED + "h 3"]),
    "repeats of other case": ("Node1\nnode1", ["Node1 slots=2"], [COUNTED + "Node1 2"]),
    "repeats of an IPv6 address": ("2001:db8::1\n[2001:DB8:0::1]", ["2001:db8::1 slots=2"], [COUNTED + "2001:db8::1 2"]),
    "many repeats": (
        "".join(f"n{i}\nn{i}\n" for i in range(10)),
        [f"n{i} slots=2" for i in range(10)],
        [COUNTED + ", ".join(f"n{i} 2" for i in range(8)) + " and 2 hosts more"],
    ),
    "names are never cut at a dot": ("a.1.x\na.2.x", ["a.1.x", "a.2.x"], []),
    "no slots": ("h slots=0\ng", ["g"], ["hosts: h is left out, as it has no slots on line 1"]),
    "no slots behind a colon": ("g\nh:0", ["g"], ["hosts: h is left out, as it has no slots on line 2"]),
    "excluded": ("g\n^h\nh slots=4", ["g"], ["hosts: h is left out, as '^' on line 2 says"]),
    "a range excluded": (
        "n[1-4]:2\n^n[2,3]",
        ["n1 slots=2", "n4 slots=2"],
        ["hosts: n2 is left out, as '^' on line 2 says", "hosts: n3 is left out, as '^' on line 2 says"],
    ),
    "an address excluded": ("g\nfe80::1\n^[fe80::1]", ["g"], ["hosts: fe80::1 is left out, as '^' on line 3 says"]),
}

NAME_RULE = "is no host name: it takes at most 253 letters, digits, '.', '-' and '_', and begins with no '.' or '-'"
USER_RULE = "is no user's name: it takes letters, digits, '.', '-' and '_', and begins with no '.' or '-'"
IPV4_RULE = "is no IPv4 address, and a name has letters too; give all four numbers, each up to 255"
IPV6_RULE = "is no IPv6 address; with a number of slots it is [ADDRESS]:N or ADDRESS slots=N"
PYTHON_RULE = "cannot be used: give an absolute path without blanks, quotes, '~' or '$', or the name of a command"
KEYS = "the keys are slots, max_slots, user, port, addr, iface, devices, python"
TWICE = "is given twice; give it once, also where it is written as HOST:N, USER@HOST or under another key"
ONE = "keep one of them, or no number on any of its lines"
NONE_LEFT = "every host is left out, by having no slots or by '^'; name at least one to run on"
ADDR_RULE = "is no IP address; give one of the node's own, or iface=NAME or iface=NETWORK/BITS"

# name: (text, what is said of it, a line for each problem, without "hosts:")
BAD: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["", " it names no host; name at least one to run on"]),
    "comments only": ("# nothing\n\n", ["", " it names no host; name at least one to run on"]),
    "all without slots": ("h:0", ["", f" {NONE_LEFT}"]),
    "all excluded": ("h\n^h", ["", f" {NONE_LEFT}"]),
    "an option": ("-oProxyCommand=x", ["1:1: '-oProxyCommand=x' begins with no host; write the host first, then KEY=VALUE"]),
    "an option without =": ("-v", [f"1:1: '-v' {NAME_RULE}"]),
    "an option as user": ("-v@h", [f"1:1: '-v' {USER_RULE}"]),
    "a dot first": (".h", [f"1:1: '.h' {NAME_RULE}"]),
    "two dots": ("a..b", [f"1:1: 'a..b' {NAME_RULE}"]),
    "a name too long": ("h" * 254, [f"1:1: '{'h' * 59}…' {NAME_RULE}"]),
    "letters beyond ASCII": ("müller", [f"1:1: 'müller' {NAME_RULE}"]),
    "digits beyond ASCII": ("h slots=٤", ["1:3: slots='٤' is no whole number from 0 to 65536"]),
    "a zero byte": ("h\0", [f"1:1: 'h\\x00' {NAME_RULE}"]),
    "a return inside": ("h\rg", [f"1:1: 'h\\rg' {NAME_RULE}"]),
    "a no-break space": ("h\xa0slots", [f"1:1: 'h\\xa0slots' {NAME_RULE}"]),
    "a shell's text": ("h;reboot", [f"1:1: 'h;reboot' {NAME_RULE}"]),
    "a number": ("17", [f"1:1: '17' {IPV4_RULE}"]),
    "IPv4 out of range": ("10.0.0.256", [f"1:1: '10.0.0.256' {IPV4_RULE}"]),
    "IPv4 too short": ("10.0.1", [f"1:1: '10.0.1' {IPV4_RULE}"]),
    "IPv4 with a zero first": ("10.0.0.01", [f"1:1: '10.0.0.01' {IPV4_RULE}"]),
    "the wildcard": ("0.0.0.0", ["1:1: '0.0.0.0' is not the address of one machine; give the node's own"]),
    "the wildcard, IPv6": ("[::]:2", ["1:1: '::' is not the address of one machine; give the node's own"]),
    "a multicast address": ("ff02::1", ["1:1: 'ff02::1' is not the address of one machine; give the node's own"]),
    "two colons": ("h:4:2", [f"1:1: 'h:4:2' {IPV6_RULE}"]),
    "a scope without a name": ("fe80::1%", [f"1:1: 'fe80::1%' {IPV6_RULE}"]),
    "a scope of a name": ("h%eth0", [f"1:1: 'h%eth0' {IPV6_RULE}"]),
    "an open bracket": (
        "[fe80::1",
        ["1:1: '[fe80::1': a bracket has no partner; write a range as n[1-4], an IPv6 address as [2001:db8::1]"],
    ),
    "brackets in brackets": (
        "n[[1-2]]",
        ["1:1: 'n[[1-2]]': a bracket has no partner; write a range as n[1-4], an IPv6 address as [2001:db8::1]"],
    ),
    "no number behind the colon": ("h:", ["1:3: ':' is no number of slots from 0 to 65536; write HOST:N, or port=N for the port of ssh"]),
    "a word behind the colon": ("h:x", ["1:3: ':x' is no number of slots from 0 to 65536; write HOST:N, or port=N for the port of ssh"]),
    "below zero": ("h:-1", ["1:3: ':-1' is no number of slots from 0 to 65536; write HOST:N, or port=N for the port of ssh"]),
    "the port of ssh": ("h:22", ["1:3: ':22' looks like a port: write port=22, or slots=22 where slots are meant"]),
    "a user's port": ("lee@h:1024", ["1:7: ':1024' looks like a port: write port=1024, or slots=1024 where slots are meant"]),
    "no host before @": ("bob@", [f"1:5: '' {NAME_RULE}"]),
    "no user before @": ("@h", [f"1:1: '' {USER_RULE}"]),
    "two @": ("a@b@c", ["1:1: 'a@b@c' has two '@'; write USER@HOST"]),
    "a user and a user": ("bob@h user=lee", [f"1:7: user {TWICE}"]),
    "slots twice": ("h:2 slots=2", [f"1:5: slots {TWICE}"]),
    "slots under two names": ("h slots=2 np=2", [f"1:11: slots {TWICE}"]),
    "slots=two": ("h slots=two", ["1:3: slots='two' is no whole number from 0 to 65536"]),
    "slots with a sign": ("h slots=+2", ["1:3: slots='+2' is no whole number from 0 to 65536"]),
    "slots beyond every machine": ("h slots=65537", ["1:3: slots='65537' is no whole number from 0 to 65536"]),
    "slots of many digits": ("h slots=" + "9" * 5000, [f"1:3: slots='{'9' * 59}…' is no whole number from 0 to 65536"]),
    "a comment without a blank": ("h slots=2#x", ["1:3: slots='2#x' is no whole number from 0 to 65536"]),
    "slots above max_slots": ("h slots=4 max_slots=2", ["1:1: 'h': slots=4 is more than max_slots=2; raise the one or lower the other"]),
    "repeats above max_slots": ("h max_slots=1\nh", ["1:1: 'h': slots=2 is more than max_slots=1; raise the one or lower the other"]),
    "port 0": ("h port=0", ["1:3: port='0' is no whole number from 1 to 65535"]),
    "an unknown key that is known elsewhere": ("h gpus=2", ["1:3: 'gpus=' is no key; did you mean slots=?"]),
    "a misspelt key": ("h slot=2", ["1:3: 'slot=' is no key; did you mean slots=?"]),
    "a key in capitals": ("h PORT=2", ["1:3: 'PORT=' is no key; did you mean port=?"]),
    "a key like no other": ("h xyzzy=2", [f"1:3: 'xyzzy=' is no key; {KEYS}"]),
    "Hydra's binding": ("h binding=user:0", [f"1:3: 'binding=' is no key; {KEYS}"]),
    "a value is missing": ("h slots=", ["1:3: 'slots=' has no value, or one with '=' in it"]),
    "a value is missing before a key": ("h slots= port=22", ["1:3: 'slots=' has no value, or one with '=' in it"]),
    "two =": ("h slots==2", ["1:3: 'slots=' has no value, or one with '=' in it"]),
    "no key": ("h = 2", ["1:1: 'h = 2' begins with no host; write the host first, then KEY=VALUE"]),
    "a key first": ("  slots=4", ["1:3: 'slots=4' begins with no host; write the host first, then KEY=VALUE"]),
    "a number behind a blank": ("h 4", ["1:3: '4' is no KEY=VALUE; write slots=4"]),
    "SGE's line": ("h 4 all.q@h <NULL>", ["1:3: '4' is no KEY=VALUE; write slots=4"]),
    "two hosts on a line": ("h g", ["1:3: 'g' is no KEY=VALUE; after the host comes KEY=VALUE; a comment begins with '#'"]),
    "two hosts with a comma": ("h,g", [f"1:1: 'h,g' {NAME_RULE}"]),
    "a comment of C": ("h /* x */", ["1:3: '/*' is no KEY=VALUE; after the host comes KEY=VALUE; a comment begins with '#'"]),
    "a rankfile": ("rank 0=h slots=1", ["1:6: '0=' is no key; " + KEYS]),
    "Open MPI's relative nodes": ("+n0", [f"1:1: '+n0' {NAME_RULE}"]),
    "addr by name": ("h addr=g", [f"1:3: addr='g' {ADDR_RULE}"]),
    "addr that is every address": ("h addr=::", ["1:3: '::' is not the address of one machine; give the node's own"]),
    "addr with a port": ("h addr=10.0.0.1:80", [f"1:3: addr='10.0.0.1:80' {ADDR_RULE}"]),
    "addr IPv4 in brackets": ("h addr=[10.0.0.1]", [f"1:3: addr='[10.0.0.1]' {ADDR_RULE}"]),
    "an address as iface": (
        "h iface=10.0.0.1",
        ["1:3: iface='10.0.0.1' is an address; write addr=10.0.0.1, or the network as 10.0.0.1/BITS"],
    ),
    "a network that is none": (
        "h iface=10.0.0.0/33",
        ["1:3: iface='10.0.0.0/33' is no network; write it as 10.1.0.0/16, or name an interface"],
    ),
    "two interfaces": (
        "h iface=a,b",
        ["1:3: iface='a,b' is no interface: give one name of at most 15 characters, or a network such as 10.1.0.0/16"],
    ),
    "devices with a gap": ("h devices=0,,1", ["1:3: devices='0,,1' is no list of device numbers from 0 to 9999; write it as 0,2"]),
    "devices by name": ("h devices=cuda:0", ["1:3: devices='cuda:0' is no list of device numbers from 0 to 9999; write it as 0,2"]),
    "too few devices": ("h slots=3 devices=0,1", ["1:1: 'h': slots=3 and devices has 2; list a device for each slot, or fewer slots"]),
    "python relative": ("h python=venv/bin/python", [f"1:3: python='venv/bin/python' {PYTHON_RULE}"]),
    "python at home": ("h python=~/bin/python", [f"1:3: python='~/bin/python' {PYTHON_RULE}"]),
    "python in quotes": ("h python='python3'", [f"1:3: python=\"'python3'\" {PYTHON_RULE}"]),
    "a range that is empty": ("n[]", ["1:1: '[]' is no range: '' is neither a number nor two of them with '-' between"]),
    "a range that runs backwards": ("n[3-1]", ["1:1: '[3-1]' runs backwards: 3 is more than 1"]),
    "a range of letters": ("n[a-c]", ["1:1: '[a-c]' is no range: 'a-c' is neither a number nor two of them with '-' between"]),
    "a range with a step": ("n[1-9:2]", ["1:1: '[1-9:2]' is no range: '1-9:2' is neither a number nor two of them with '-' between"]),
    "ranges that overlap": ("n[1-3,2]", ["1:1: 'n[1-3,2]' stands for a name twice; ranges in one bracket must not overlap"]),
    "a range too large": ("n[1-999999999]", ["1:1: 'n[1-999999999]' stands for 999999999 hosts, and 65536 more are accepted"]),
    "ranges too many": ("n[1][1][1][1][1]", ["1:1: 'n[1][1][1][1][1]' has 5 ranges; 4 are accepted in one name"]),
    "a range beyond addresses": ("10.0.0.[255-256]", [f"1:1: '10.0.0.256' {IPV4_RULE}"]),
    "slots= twice": ("h slots=2\n\nh slots=2", [f"3:1: 'h' is on line 1 and on line 3, with a number of slots; {ONE}"]),
    "slots= and no number": ("h\nh slots=2", [f"2:1: 'h' is on line 1 and on line 2, with a number of slots; {ONE}"]),
    "devices twice": ("h devices=0\nh devices=1", [f"2:1: 'h' is on line 1 and on line 2, with a number of slots; {ONE}"]),
    "another user": (
        "bob@h\nlee@h",
        ["2:1: 'h' is on line 1 and on line 2, with another user; give that once, where the host is named first"],
    ),
    "another port": (
        "h port=1\nh port=2",
        ["2:1: 'h' is on line 1 and on line 2, with another port; give that once, where the host is named first"],
    ),
    "who is excluded is not there": ("h\n^g", ["2:1: '^g' excludes a host that is not named here"]),
    "excluded with a number": ("h\n^h:2", ["2:1: '^h:2' excludes a host; a user, slots and keys mean nothing there"]),
    "every problem at once": (
        "ok slots=2\nh gpus=2 slots=two\n\n  g:22 # ssh\n-x",
        [
            "2:3: 'gpus=' is no key; did you mean slots=?",
            "hosts:2:10: slots='two' is no whole number from 0 to 65536",
            "hosts:4:5: ':22' looks like a port: write port=22, or slots=22 where slots are meant",
            f"hosts:5:1: '-x' {NAME_RULE}",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected", "notes"), GOOD.values(), ids=GOOD)
def test_good(text: str, expected: list[str], notes: list[str]) -> None:
    said: list[str] = []
    assert (reading(parse_hostfile(text, "hosts", said)), said) == (expected, notes)


@pytest.mark.parametrize(("text", "problems"), BAD.values(), ids=BAD)
def test_bad(text: str, problems: list[str]) -> None:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    expected = f"hosts:{problems[1]}" if problems[0] == "" else "hosts:" + "\n".join(problems)
    assert str(caught.value) == expected
    assert (caught.value.path, caught.value.line) == ("hosts", caught.value.problems[0][0])


def documented() -> list[tuple[str, str]]:
    """Return the rows of the table of examples in the documentation: text and reading."""
    page = (ROOT / "docs" / "hostfile.md").read_text()
    table = page.partition("## Examples")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| (.*?) \|$", table, re.MULTILINE)


@pytest.mark.parametrize(("shown", "expected"), documented(), ids=[shown for shown, _ in documented()])
def test_the_documentation_shows_what_happens(shown: str, expected: str) -> None:
    text = shown.replace("⏎", "\n").replace("CR", "\r").replace("BOM", "\ufeff")
    try:
        got = ", ".join(f"`{line}`" for line in reading(parse_hostfile(text, "hosts")))
    except HostfileError as error:
        got = f"error: {error.problems[0][2]}"
    assert got == expected


def test_the_documentation_has_examples() -> None:
    assert len(documented()) >= 25


def test_each_host_knows_where_it_was_named() -> None:
    assert [host.where for host in parse_hostfile("# x\nh\nh\ng", "a/hosts")] == ["a/hosts:2", "a/hosts:4"]


def test_of_very_many_problems_the_first_are_listed() -> None:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile("h gpus=1\n" * 2000, "hosts")
    *listed, last = str(caught.value).split("\n")
    assert listed == [f"hosts:{line}:3: 'gpus=' is no key; did you mean slots=?" for line in range(1, MAX_PROBLEMS + 1)]
    assert last == f"hosts:{MAX_PROBLEMS + 1}:3: more than {MAX_PROBLEMS} problems; from here on none is listed"


def test_hosts_are_bounded_over_all_lines() -> None:
    with pytest.raises(HostfileError, match=r"^hosts:2:1: 'm\[1-2\]' stands for 2 hosts, and 1 more are accepted$"):
        parse_hostfile(f"n[1-{MAX_HOSTS - 1}]\nm[1-2]", "hosts")
    with pytest.raises(HostfileError, match=rf"^hosts:{MAX_HOSTS + 1}:1: more than {MAX_HOSTS} entries; what follows was not read$"):
        parse_hostfile("h\n" * (MAX_HOSTS + 1) + "-x", "hosts")


@pytest.mark.parametrize(
    "text",
    [
        "h " + "x=1 " * 250_000,
        "n" + "[1-9]" * 200_000,
        "[" * MAX_FILE_BYTES,
        "h:" * 500_000,
        "h " + "=" * MAX_FILE_BYTES,
        "n[" + "1," * 500_000,
    ],
    ids=["keys", "ranges", "brackets", "colons", "equals", "numbers"],
)
def test_a_hostile_line_takes_no_time(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(text, "hosts")
    assert time.monotonic() - began < 20  # a tenth of that on an idle machine; what is quadratic here takes minutes
    assert len(str(caught.value)) < 50_000


# --- files


def read(path: Path | str) -> str:
    with pytest.raises(HostfileError) as caught:
        read_hostfile(path)
    assert isinstance(caught.value, ConfigError)
    return str(caught.value).replace(str(path), "FILE")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfh slots=2\r\nlee@g")
    notes: list[str] = []
    hosts = read_hostfile(str(tmp_path / "hosts"), notes)
    assert (reading(hosts), [host.where for host in hosts]) == (["h slots=2", "lee@g"], [f"{tmp_path}/hosts:1", f"{tmp_path}/hosts:2"])
    assert notes == []


def test_a_missing_file(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == "FILE: it cannot be read: No such file or directory; give the path of a hostfile"


def test_a_directory(tmp_path: Path) -> None:
    assert read(tmp_path) == "FILE: it is a directory; name a file"


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").touch()
    assert read(tmp_path / "hosts") == "FILE: it names no host; name at least one to run on"


def test_a_pipe_that_nobody_writes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hosts")
    assert read(tmp_path / "hosts") == "FILE: it names no host; name at least one to run on"


def test_a_pipe_with_a_writer() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"h slots=2\n")
    os.close(writer)
    try:
        assert reading(read_hostfile(f"/dev/fd/{reader}")) == ["h slots=2"]
    finally:
        os.close(reader)


def test_a_file_without_an_end() -> None:
    assert read("/dev/zero") == f"FILE: it is larger than {MAX_FILE_BYTES} bytes, which no hostfile is; name another file"


def test_the_largest_file(tmp_path: Path) -> None:
    largest = b"h\n".ljust(MAX_FILE_BYTES, b"#")
    (tmp_path / "hosts").write_bytes(largest)
    assert reading(read_hostfile(tmp_path / "hosts")) == ["h"]
    (tmp_path / "hosts").write_bytes(largest + b"#")
    assert read(tmp_path / "hosts") == f"FILE: it is larger than {MAX_FILE_BYTES} bytes, which no hostfile is; name another file"


@pytest.mark.parametrize(
    ("data", "place"),
    [(b"\xff\xfeh\x00", "1:1: byte 0xff"), (b"h\n\xc3\xbcx\xe9\n", "2:3: byte 0xe9"), (b"\xef\xbb\xbfh\xc3", "1:2: byte 0xc3")],
    ids=["UTF-16", "Latin-1", "cut short"],
)
def test_a_file_that_is_not_utf8(tmp_path: Path, data: bytes, place: str) -> None:
    (tmp_path / "hosts").write_bytes(data)
    assert read(tmp_path / "hosts") == f"FILE:{place} is not UTF-8; save the file as UTF-8 text"


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_file_without_the_right_to_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").touch(mode=0)
    assert read(tmp_path / "hosts") == "FILE: it cannot be read: Permission denied; give the path of a hostfile"


@pytest.mark.parametrize("path", ["a\0b", "\ud800"], ids=["a zero byte", "half a character"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    assert re.fullmatch("FILE: it cannot be read: .+; give the path of a hostfile", read(path))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h:2\n")))
    hosts = read_hostfile("-")
    assert (reading(hosts), hosts[0].where) == (["h slots=2"], "<stdin>:1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h:22\n")))
    with pytest.raises(HostfileError, match=r"^<stdin>:1:3: ':22' looks like a port"):
        read_hostfile("-")


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(HostfileError, match=r"^<stdin>: it cannot be read: standard input is closed; "):
        read_hostfile("-")
