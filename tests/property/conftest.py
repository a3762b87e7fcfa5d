"""A codec that knows no tensor library, for the tests of a whole module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zspmd.transport import codec


@pytest.fixture(scope="module")
def no_bridges() -> Iterator[None]:
    """Forget the bridges that another test has registered, and afterwards those of this module."""
    before = dict(codec._bridges)
    codec._bridges.clear()
    yield
    codec._bridges.clear()
    codec._bridges.update(before)
