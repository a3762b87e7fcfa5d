from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest
from support.polling import block_until

from zspmd.errors import ConfigError, EndpointInUseError
from zspmd.runtime.launch import ports
from zspmd.runtime.launch.port_holders import describe_holder
from zspmd.runtime.launch.ports import FIRST_PORT, LAST_PORT, first_candidate, hold_port, reserve_port


def test_the_candidate_follows_from_id_and_purpose() -> None:
    assert first_candidate("a", "master") == first_candidate("a", "master")
    candidates = {first_candidate(f"launch-{i}", "master") for i in range(200)} | {first_candidate("a", "other")}
    assert len(candidates) > 150
    assert all(FIRST_PORT <= port <= LAST_PORT for port in candidates)


def test_reservations_of_one_id_never_share_a_port() -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(reserve_port("same", "master")).port for _ in range(20)]
    assert len(set(held)) == 20


def test_a_port_that_is_asked_for_is_held_or_refused() -> None:
    with reserve_port("asked", "for") as held, pytest.raises(EndpointInUseError, match=f"port {held.port} of 127.0.0.1 is taken"):
        hold_port("127.0.0.1", held.port)
    with hold_port("127.0.0.1", held.port) as again:
        assert (again.host, again.port) == ("127.0.0.1", held.port)
        with reserve_port("asked", "for") as other:
            assert other.port != held.port


def test_probing_passes_the_end_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "first_candidate", lambda launch_id, purpose: LAST_PORT)
    with reserve_port("a", "b") as first, reserve_port("a", "b") as second:
        assert first.port != second.port
        assert second.port < LAST_PORT


@pytest.mark.parametrize("address", ["127.0.0.1", ""], ids=["same address", "every address"])
def test_a_server_with_reuseaddr_can_bind_again_and_again(address: str) -> None:
    with reserve_port("server", "master") as held:
        for _ in range(2):
            with socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((address, held.port))
                server.listen()
                with socket.create_connection(("127.0.0.1", held.port), timeout=5) as client:
                    connection, peer = server.accept()
                    connection.close()
                    assert peer == client.getsockname()


def test_a_launch_at_one_address_excludes_another_at_the_next() -> None:
    """Servers of both would listen on all addresses."""
    with reserve_port("same", "master", "127.0.0.1") as first, reserve_port("same", "master", "127.0.0.2") as second:
        assert second.port != first.port
        for held in (first, second):
            with socket.create_server(("", held.port)):  # sets SO_REUSEADDR
                pass


def test_who_has_a_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EndpointInUseError, match=rf"port {port} of 127.0.0.1 is taken by pid {os.getpid()} \("):
            hold_port("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the side that closes first keeps the port
    block_until(lambda: describe_holder(port).startswith("a connection that has just ended (TIME_WAIT)"))
    with reserve_port("silent", "holder") as held:
        assert "does not listen yet, such as another launch" in describe_holder(held.port)


def test_a_plain_bind_is_excluded_until_the_port_is_given_back() -> None:
    held = reserve_port("plain", "master")
    with socket.socket() as other:
        with pytest.raises(OSError) as refused:  # noqa: PT011  # checked by its number below
            other.bind(("127.0.0.1", held.port))
        assert refused.value.errno == errno.EADDRINUSE
        held.close()
        other.bind(("127.0.0.1", held.port))


def test_nobody_can_connect_to_a_reserved_port() -> None:
    with reserve_port("silent", "master") as held, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", held.port), timeout=5)


def test_a_full_range_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_NUM_PORTS", 3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(reserve_port("full", "master"))
        with pytest.raises(EndpointInUseError, match="are taken"):
            reserve_port("full", "master")


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"], ids=["not of this machine", "not an address"])
def test_a_foreign_address_is_an_error(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot bind"):
        reserve_port("foreign", "master", host)
