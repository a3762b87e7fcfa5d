"""What a user subclasses: the code that every rank runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .context import WorkerContext

_Method = TypeVar("_Method", bound=Callable[..., Any])
_RPC_MARK = "__zspmd_rpc__"


class Worker:
    """Base of all workers: one instance on each rank, used by one thread.

    Every rank gets the same steps and calls in the same order and must do the same collectives for them. ``self.ctx`` is there
    before ``setup`` runs: rank facts, mesh, communicators.
    """

    ctx: WorkerContext

    # type checkers let a subclass name its own arguments where the base takes any
    def setup(self, *args: Any, **worker_args: Any) -> None:
        """Prepare; gets ``launch``'s ``worker_args`` by name. Collectives are allowed."""
        if worker_args:
            raise TypeError(f"{type(self).__qualname__} has no setup(), but worker_args has {', '.join(sorted(worker_args))}")

    def step(self, inputs: Any) -> Any:
        """Do one step on this rank's shard and return what the driver gets if this is an output rank."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no step()")

    def teardown(self) -> None:
        """Release what ``setup`` took. No collectives: a peer may be dead."""


def rpc(method: _Method) -> _Method:
    """Let the driver call this method of a Worker by its name, with ``group.call``."""
    setattr(getattr(method, "__func__", method), _RPC_MARK, True)  # static and class methods wrap the one that is found later
    return method


def find_rpc(worker: Worker, name: str) -> Callable[..., Any]:
    """Return a worker's method that ``rpc`` marked.

    Raises:
        AttributeError: no such method is marked; names those that are.
    """
    method = getattr(type(worker), name, None)
    if not getattr(method, _RPC_MARK, False):
        known = sorted(n for n in dir(type(worker)) if getattr(getattr(type(worker), n, None), _RPC_MARK, False))
        raise AttributeError(
            f"{type(worker).__qualname__} has no method {name!r} marked @zspmd.rpc; marked are: {', '.join(known) or 'none'}"
        )
    bound: Callable[..., Any] = getattr(worker, name)
    return bound
