"""One intra-op thread: ranks are threads here, and idle OpenMP threads of a busy machine slow tiny products a hundredfold."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)
