"""What may be bound, and that nothing binds or connects TCP without its keys."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from zspmd.errors import ConfigError, InsecureEndpointError
from zspmd.transport.control_sockets import ControlClient, ControlServer
from zspmd.transport.records import Bootstrap, Hello
from zspmd.transport.security import RankKeys, check_bind_address, needs_keys, tcp_endpoint
from zspmd.transport.sockets import ResultCollector, ResultPusher, StepPublisher, StepSubscriber

Context = zmq.Context[zmq.Socket[bytes]]
PUBLIC, SECRET = zmq.curve_keypair()


@pytest.mark.parametrize(("bind", "address"), [("127.0.0.1", "127.0.0.1"), ("127.1", "127.0.0.1"), ("127.0.0.9", "127.0.0.9")])
def test_an_address_of_this_host(bind: str, address: str) -> None:
    assert check_bind_address(bind) == address


def test_a_name_of_this_host() -> None:
    assert check_bind_address("localhost") in ("127.0.0.1", "::1")


@pytest.mark.parametrize("bind", ["", "*", "0.0.0.0", "0", "::", "::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"])
def test_every_interface_is_refused(bind: str) -> None:
    with pytest.raises(InsecureEndpointError, match=re.escape(f"bind is {bind!r}, which means every interface")):
        check_bind_address(bind)


@pytest.mark.parametrize("bind", ["224.0.0.1", "ff02::1"])
def test_a_group_of_hosts_is_refused(bind: str) -> None:
    with pytest.raises(InsecureEndpointError, match="a group of hosts"):
        check_bind_address(bind)


@pytest.mark.parametrize(
    "bind", ["192.0.2.1", "255.255.255.255", "127.0.0.1:80", "tcp://127.0.0.1", "no such name", "x" * 70, 5, b"127.0.0.1"]
)
def test_what_is_no_address_of_this_host(bind: Any) -> None:
    with pytest.raises(ConfigError, match=r"bind is .*(give an IP|is no) address of this host"):
        check_bind_address(bind)


def test_endpoints() -> None:
    assert [tcp_endpoint("10.0.0.1"), tcp_endpoint("fe80::1")] == ["tcp://10.0.0.1:*", "tcp://[fe80::1]:*"]
    assert [needs_keys("ipc:///x"), needs_keys("inproc://x"), needs_keys("tcp://h:1")] == [False, False, True]


@pytest.mark.parametrize("endpoint", ["udp://h:1", "ws://h:1", "vmci://h:1", "pgm://h:1", "TCP://h:1", ""])
def test_other_transports_are_refused(endpoint: str) -> None:
    with pytest.raises(InsecureEndpointError, match="is none of tcp://, ipc://, inproc://"):
        needs_keys(endpoint)


@pytest.mark.parametrize(
    "bad", [b"", SECRET[:-1], z85.encode(bytes(32)), b"\xff" * 40, b"\0" * 40], ids=["absent", "short", "zero", "no Z85", "nul"]
)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["public", "secret", "driver's"])
def test_a_key_that_is_none(bad: bytes, place: int) -> None:
    public, secret, server = (bad if place == number else key for number, key in enumerate((PUBLIC, SECRET, PUBLIC)))
    with pytest.raises(InsecureEndpointError, match="nothing uses TCP without its keys") as caught:
        RankKeys(public, secret, server)
    assert not bad or bad.decode("latin1") not in str(caught.value)


@pytest.mark.parametrize("end", [StepPublisher, ResultCollector, ControlServer], ids=lambda end: end.__name__)
@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://*:*", "ws://127.0.0.1:*"])
@pytest.mark.parametrize("others", [[], ["inproc://bound"]], ids=["alone", "beside another"])
def test_the_driver_binds_no_tcp_without_a_door(context: Context, end: Any, endpoint: str, others: list[str]) -> None:
    options = {} if end is ControlServer else {"epoch": 1}
    with pytest.raises(InsecureEndpointError):
        end(context, [*others, endpoint], **options)
    assert all(socket.closed for socket in vars(context)["kept"])


RANK_ENDS = {
    "StepSubscriber": partial(StepSubscriber, epoch=1, rank=0, on_gap=lambda seq: None),
    "ResultPusher": partial(ResultPusher, epoch=1, rank=0),
    "ControlClient": ControlClient,
}


@pytest.mark.parametrize("end", RANK_ENDS.values(), ids=RANK_ENDS)
def test_a_rank_connects_to_no_tcp_without_keys(context: Context, end: Any) -> None:
    with pytest.raises(InsecureEndpointError, match="this side has no keys"):
        end(context, "tcp://127.0.0.1:9")
    assert all(socket.closed for socket in vars(context)["kept"])


def test_a_bootstrap_for_tcp_must_have_keys() -> None:
    bootstrap = Bootstrap(launch_id="l", control_endpoint="tcp://127.0.0.1:9", token=b"t")
    with pytest.raises(InsecureEndpointError, match="public key has 0 characters"):
        _ = bootstrap.keys
    assert Bootstrap(launch_id="l", control_endpoint="ipc://x", token=b"t").keys is None


def test_no_secret_is_shown() -> None:
    token = b"never-to-be-seen"
    bootstrap = Bootstrap("l", "tcp://h:1", token, PUBLIC, SECRET, PUBLIC)
    hello = Hello(token=token, rank=0, pid=1, host="h", version="1", purpose="rank")
    shown = f"{bootstrap!r} {bootstrap} {bootstrap.keys!r} {hello!r}"
    assert not any(secret.decode() in shown for secret in (token, SECRET, PUBLIC))
