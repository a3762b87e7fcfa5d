"""A communicator as a vendor would add one: complete, and as simple as can be. Its ranks meet in the store alone."""

from __future__ import annotations

import torch

from zspmd.workers.communicators.communicator import Communicator
from zspmd.workers.communicators.setup import CommunicatorSetup
from zspmd.workers.store import get_blobs, set_blob


class StoreCommunicator(Communicator):
    """Everybody puts its bytes into the store and reads those of the others."""

    def __init__(self, setup: CommunicatorSetup) -> None:
        super().__init__(setup.group, device=setup.device)
        self._store = setup.store
        self._timeout_s = setup.timeout_s
        self._num_rounds = 0
        self._num_messages: dict[tuple[int, int], int] = {}
        self.unique_id = setup.meet(f"made by {setup.group.rank}".encode())

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        tensor.copy_(self._reduced(self._exchange(tensor), op))

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        rows.copy_(self._exchange(own))

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        reduced.copy_(self._reduced(self._exchange(tensor)[:, self.rank], op))

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        data.copy_(self._exchange(data)[src])

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        outgoing, incoming = torch.split(data, send_sizes), torch.split(received, receive_sizes)
        incoming[self.rank].copy_(outgoing[self.rank])
        for peer in range(self.size):
            if peer != self.rank and outgoing[peer].numel():
                self._send(outgoing[peer], peer)
        for peer in range(self.size):
            if peer != self.rank and incoming[peer].numel():
                self._receive(incoming[peer], peer)

    def _send(self, data: torch.Tensor, dst: int) -> None:
        set_blob(self._store, self._next_message(self.rank, dst), data.numpy().tobytes())

    def _receive(self, data: torch.Tensor, src: int) -> None:
        (blob,) = get_blobs(self._store, [self._next_message(src, self.rank)], self._timeout_s)
        data.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8))

    def _barrier(self) -> None:
        self._exchange(torch.zeros(1))

    def _close(self) -> None:
        """Nothing to release."""

    def _exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor, [size, *shape]."""
        keys = [f"round/{self._num_rounds}/{rank}" for rank in range(self.size)]
        self._num_rounds += 1
        set_blob(self._store, keys[self.rank], tensor.view(-1).view(torch.uint8).numpy().tobytes())
        blobs = get_blobs(self._store, keys, self._timeout_s)
        return torch.stack([torch.frombuffer(bytearray(blob), dtype=tensor.dtype).view(tensor.shape) for blob in blobs])

    def _next_message(self, src: int, dst: int) -> str:
        number = self._num_messages.get((src, dst), 0)
        self._num_messages[src, dst] = number + 1
        return f"message/{src}/{dst}/{number}"

    def _reduced(self, rows: torch.Tensor, op: str) -> torch.Tensor:
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if op == "product":
            return wide.prod(0)
        if op in ("min", "max"):
            return wide.amin(0) if op == "min" else wide.amax(0)
        return wide.sum(0) / (self.size if op == "mean" else 1) if wide.is_floating_point() else wide.sum(0)


def create(setup: CommunicatorSetup) -> StoreCommunicator:
    """The factory that the entry point names."""
    return StoreCommunicator(setup)
