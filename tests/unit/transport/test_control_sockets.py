"""The ends of the control socket over inproc: records, values behind them, and what is an error."""

from __future__ import annotations

import numpy as np
import pytest
import zmq

from zspmd.errors import BadFrameError, PeerLostError
from zspmd.transport.codec import ValueEncoder, decode_value
from zspmd.transport.control_sockets import ControlClient, ControlServer, Received
from zspmd.transport.records import Accepted, Beat, Reject

WAIT_MS = 5000
BEAT = Beat(phase="idle", seq=0, done_seq=0, step_id=-1, memory_bytes=0)


@pytest.fixture
def control(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[ControlServer, ControlClient]:
    return ControlServer(context, ["inproc://control"]), ControlClient(context, "inproc://control")


def receive_record(server: ControlServer) -> Received:
    assert server.sockets[0].poll(WAIT_MS)
    return server.receive()


def test_control_records_go_both_ways_with_values_behind_them(control: tuple[ControlServer, ControlClient]) -> None:
    server, client = control
    client.send(BEAT)
    connection, record, sender = receive_record(server)
    assert (record, sender) == (BEAT, None)
    server.send(connection, Accepted())
    assert client.receive(WAIT_MS / 1000) == (Accepted(), [])
    array = np.arange(10_000)
    server.send(connection, Accepted(), *ValueEncoder().encode({"x": array}))
    record, frames = client.receive(WAIT_MS / 1000)
    body, *buffers = (frame if isinstance(frame, bytes) else frame.buffer for frame in frames)
    assert record == Accepted()
    np.testing.assert_array_equal(decode_value(body, buffers)["x"], array)


def test_a_bad_record_is_gone_once_it_was_reported(control: tuple[ControlServer, ControlClient]) -> None:
    server, client = control
    client.socket.send(b"rubbish")
    client.send(BEAT)
    assert server.sockets[0].poll(WAIT_MS)
    with pytest.raises(BadFrameError):
        server.receive()
    assert receive_record(server).record == BEAT
    with pytest.raises(zmq.Again):
        server.receive()


def test_a_connection_that_is_gone_is_an_error(control: tuple[ControlServer, ControlClient]) -> None:
    with pytest.raises(PeerLostError, match="control connection 006162"):
        control[0].send(b"\0ab", Accepted())


def test_a_record_beyond_its_bounds_leaves_the_others_theirs(control: tuple[ControlServer, ControlClient]) -> None:
    server, client = control
    client.send(BEAT)
    connection = receive_record(server).connection
    with pytest.raises(BadFrameError):
        server.send(connection, Reject(reason="x" * 5000))
    server.send(connection, Accepted())
    assert client.receive(WAIT_MS / 1000) == (Accepted(), [])


def test_a_driver_that_is_silent_is_an_error(control: tuple[ControlServer, ControlClient]) -> None:
    with pytest.raises(PeerLostError, match=r"no answer of the driver on the control socket within 0\.01 s"):
        control[1].receive(0.01)
