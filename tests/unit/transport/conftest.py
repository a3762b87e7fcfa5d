"""Sockets of one process over inproc, and a codec that knows no tensor library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
from support.contexts import KeepingContext

from zspmd.transport import codec


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = KeepingContext()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def no_bridges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the bridges that another test has registered, and afterwards those that this one has."""
    monkeypatch.setattr(codec, "_bridges", {})
