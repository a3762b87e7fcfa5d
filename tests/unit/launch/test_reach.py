"""The proof that one machine reaches another: what answers, what does not, and what is said of it."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from support.polling import wait_until

from zspmd.runtime.launch.nodes import reach as reach_module
from zspmd.runtime.launch.nodes.reach import NONCE_BYTES, Listener, reach

NONCE = bytes(range(NONCE_BYTES))
DEADLINE_S = 5.0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


ADDRESSES = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.mark.parametrize("address", ADDRESSES, ids=["IPv4", "IPv6"])
async def test_a_listener_is_reached(address: str) -> None:
    listener = Listener(address)
    port = await listener.open()
    try:
        assert await reach(address, port, NONCE, DEADLINE_S) == ""
    finally:
        listener.close()
    assert await reach(address, port, NONCE, DEADLINE_S) == "Connection refused"


async def test_many_reach_it_at_once_and_nothing_stays_open() -> None:
    listener = Listener("127.0.0.1")
    port = await listener.open()
    try:
        assert set(await asyncio.gather(*(reach("127.0.0.1", port, NONCE, DEADLINE_S) for _ in range(100)))) == {""}
        await wait_until(lambda: not listener._connections, DEADLINE_S)
    finally:
        listener.close()


async def test_it_listens_at_its_one_address() -> None:
    listener = Listener("127.0.0.1")
    port = await listener.open()
    try:
        assert await reach("127.0.0.2", port, NONCE, DEADLINE_S) == "Connection refused"
    finally:
        listener.close()


async def test_a_foreign_address_cannot_be_listened_at() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address"):
        await Listener("198.51.100.1").open()


async def test_closing_twice_or_unopened_is_nothing() -> None:
    listener = Listener("127.0.0.1")
    listener.close()
    port = await listener.open()
    listener.close()
    listener.close()
    assert await reach("127.0.0.1", port, NONCE, DEADLINE_S) == "Connection refused"


async def test_a_silent_host_is_given_up_in_time() -> None:
    """Its kernel takes the connection, and nobody reads it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert await reach("127.0.0.1", silent.getsockname()[1], NONCE, 0.2) == "no answer within 0.2 s"
        assert 0.2 <= time.monotonic() - started < 2.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "another program answers there, or the answer was changed (0 B came)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "another program answers there, or the answer was changed (21 B came)"),
        (NONCE[::-1], "another program answers there, or the answer was changed (32 B came)"),
    ],
    ids=["hangs up", "sshd", "other bytes"],
)
async def test_another_program_is_not_taken_for_the_listener(answer: bytes, said: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(NONCE_BYTES)
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        assert await reach("127.0.0.1", server.sockets[0].getsockname()[1], NONCE, DEADLINE_S) == said
    finally:
        server.close()
        await server.wait_closed()


async def test_no_more_connections_than_allowed_are_held() -> None:
    listener = Listener("127.0.0.1", max_connections=2)
    port = await listener.open()
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    try:
        await wait_until(lambda: len(listener._connections) == 2, DEADLINE_S)
        assert (await reach("127.0.0.1", port, NONCE, DEADLINE_S)) in (
            "Connection reset by peer",
            "another program answers there, or the answer was changed (0 B came)",
        )
        held.pop()[1].close()
        await wait_until(lambda: len(listener._connections) == 1, DEADLINE_S)
        assert await reach("127.0.0.1", port, NONCE, DEADLINE_S) == ""
    finally:
        listener.close()
        for _, writer in held:
            writer.close()


async def test_whoever_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_module, "_SAY_S", 0.1)
    listener = Listener("127.0.0.1")
    port = await listener.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(NONCE[:-1])
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        assert not listener._connections
    finally:
        writer.close()
        listener.close()


async def test_no_more_than_a_nonce_comes_back() -> None:
    listener = Listener("127.0.0.1")
    port = await listener.open()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(NONCE[:5])
        await asyncio.wait_for(writer.drain(), DEADLINE_S)
        writer.write(NONCE[5:])
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == NONCE
        writer.close()
        assert await reach("127.0.0.1", port, NONCE + b"more", 0.5) != ""
    finally:
        listener.close()


async def test_closing_hangs_up_on_everybody() -> None:
    listener = Listener("127.0.0.1")
    port = await listener.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await wait_until(lambda: len(listener._connections) == 1, DEADLINE_S)
    listener.close()
    try:
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    finally:
        writer.close()


async def test_an_attempt_that_is_cancelled_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        task = asyncio.ensure_future(reach("127.0.0.1", silent.getsockname()[1], NONCE, DEADLINE_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
