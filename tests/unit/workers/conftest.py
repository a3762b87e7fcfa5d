"""What the tests of the rank side share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's stubs do not export it


@pytest.fixture(scope="session", autouse=True)
def libuv_pipe() -> None:
    """Have libuv open the pipe that the first of torch's stores opens and the process keeps."""
    TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Use one thread in an operation: ranks are threads here, and the cores are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
