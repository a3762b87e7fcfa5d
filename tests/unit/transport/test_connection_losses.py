"""Which events of a monitor are the loss of a connection."""

from __future__ import annotations

import pytest
import zmq

from zspmd.transport.connection_losses import ConnectionLosses

FAILED, PROTOCOL = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
MADE, REFUSED = zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH
GONE, STOPPED = zmq.EVENT_DISCONNECTED, zmq.EVENT_MONITOR_STOPPED


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([MADE, GONE], "the step connection to the driver broke"),
        ([FAILED, GONE], ""),
        ([PROTOCOL, GONE, FAILED, GONE], ""),
        ([FAILED, GONE, MADE, GONE], "the step connection to the driver broke"),
        ([MADE, PROTOCOL], "the step connection to the driver broke"),
        ([REFUSED], "the driver refused the step connection"),
        ([STOPPED], ""),
    ],
    ids=[
        "lost",
        "an attempt failed",
        "two attempts failed",
        "lost after a failed attempt",
        "broken bytes",
        "refused",
        "closed by its owner",
    ],
)
def test_what_is_a_loss(events: list[int], reason: str) -> None:
    losses = ConnectionLosses("step")
    found = [losses.reason(event) for event in events]
    assert found[-1].startswith(reason)
    assert bool(found[-1]) == bool(reason)
    assert not any(found[:-1])
