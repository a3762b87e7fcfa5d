"""Communicators whose results are written to a file, and such that return what is in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ...topology import AxisGroup
from ..recording import PeerLog, RecordedPeers
from .communicator import Communicator


class _OneHookCommunicator(Communicator):
    """Leads every hook of a backend to one, ``_do``.

    Results are taken where backends deliver them: reductions with dtype and shape, all else as bytes, so that this is also how far a
    replay can tell one collective from another.
    """

    @abstractmethod
    def _do(self, operation: str, arguments: Sequence[Any], details: list[Any], result: torch.Tensor | None) -> None:
        """Do the hook ``operation`` with its ``arguments``, which fills ``result``."""

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        self._do("all_reduce", (tensor, op), [op], tensor)

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        self._do("all_gather", (rows, own), [], rows)

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        self._do("reduce_scatter", (reduced, tensor, op), [op], reduced)

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        self._do("broadcast", (data, src), [src], data)

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        self._do("all_to_all", (received, data, receive_sizes, send_sizes), [receive_sizes, send_sizes], received)

    def _send(self, data: torch.Tensor, dst: int) -> None:
        self._do("send", (data, dst), [dst, data.numel()], None)

    def _send_nowait(self, data: torch.Tensor, dst: int) -> None:
        self._do("send_nowait", (data, dst), [dst, data.numel()], None)

    def _receive(self, data: torch.Tensor, src: int) -> None:
        self._do("receive", (data, src), [src], data)

    def _barrier(self) -> None:
        self._do("barrier", (), [], None)


class RecordingCommunicator(_OneHookCommunicator):
    """Does what another communicator does, and writes down what it returned.

    On a GPU that is a copy to the host, which waits for the collective and cannot be captured in a CUDA graph.
    """

    def __init__(self, inner: Communicator, name: str, log: PeerLog) -> None:
        super().__init__(inner.group, device=str(inner.device))
        self._inner = inner
        self._name = name
        self._log = log
        if inner.device.type != "cpu":
            self._create_cpu = lambda: RecordingCommunicator(inner.cpu, f"{name}.cpu", log)

    def _do(self, operation: str, arguments: Sequence[Any], details: list[Any], result: torch.Tensor | None) -> None:
        getattr(self._inner, f"_{operation}")(*arguments)
        self._log.write(self._name, operation, details, result)

    def _close(self) -> None:
        self._inner.close()

    def _abort(self) -> None:
        self._inner._release(self._inner._abort)


class ReplayedCommunicator(_OneHookCommunicator):
    """Returns what was recorded; there are no peers.

    Collectives raise ReplayDivergedError where the worker makes another one than was recorded.
    """

    def __init__(self, group: AxisGroup, device: str, name: str, peers: RecordedPeers) -> None:
        super().__init__(group, device=device)
        self._name = name
        self._peers = peers
        if self.device.type != "cpu":
            self._create_cpu = lambda: ReplayedCommunicator(group, "cpu", f"{name}.cpu", peers)

    def _do(self, operation: str, arguments: Sequence[Any], details: list[Any], result: torch.Tensor | None) -> None:
        recorded = self._peers.take(self._name, operation, details, result)
        if result is not None:
            result.copy_(recorded)

    def _close(self) -> None:
        """Nothing to release."""
