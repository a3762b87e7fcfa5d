"""The tasks that use the group in a run, and what they expect of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zspmd.errors import BackpressureError, WorkerRaisedError, WorkerStalledError, ZspmdError
from zspmd.runtime.driver.pending import PendingReply

from .options import Caller

if TYPE_CHECKING:
    from zspmd.runtime.driver.group import WorkerGroup

    from .launch import SimulatedLaunch

LARGE = np.zeros(300_000, np.uint8)  # is sent from where it lies, and its answer waits for every rank
STACKS_S = 0.5  # beyond a request's timeout
MAX_TIMEOUTS = 2  # until a caller gives up


@dataclass(frozen=True)
class Asked:
    """A step that was published at ``at`` and is to be awaited."""

    number: int
    reply: PendingReply
    at: float


class Callers:
    """Runs the callers of the options against a group that is ready."""

    def __init__(self, launch: SimulatedLaunch, group: WorkerGroup) -> None:
        self._launch = launch
        self._world = launch.world
        self._checks = launch.checks
        self._group = group
        self._numbers = itertools.count(1)

    async def run(self, caller: Caller) -> None:
        """Make the caller's requests, until the group has failed or too many of them were overdue."""
        num_timeouts = 0
        pending: list[Asked] = []
        for _ in range(caller.num_requests):
            try:
                if caller.kind == "ahead":
                    await self._submit(caller, pending)
                    if len(pending) > self._world.chance.randint(0, self._launch.options.window):
                        await self._take(caller, pending.pop(0))
                else:
                    await (self._step(caller) if caller.kind == "step" else self._call(caller))
            except (BackpressureError, WorkerStalledError):
                num_timeouts += 1
                if num_timeouts == MAX_TIMEOUTS:
                    break
            except ZspmdError:
                break
            if self._world.happens(0.2):
                await asyncio.sleep(self._world.chance.expovariate(50.0))
        for asked in pending:
            with contextlib.suppress(ZspmdError):
                await self._take(caller, asked)

    async def _submit(self, caller: Caller, pending: list[Asked]) -> None:
        number = next(self._numbers)
        submitting = self._group.submit(self._inputs(caller, number), timeout_s=caller.patience_s)
        reply: PendingReply | None = await self._watched(f"submit {number}", caller, submitting, self._room_s)
        if reply is not None:
            asked = Asked(number, reply, self._world.now)
            reply.add_done_callback(lambda: self._ended(caller, asked))
            pending.append(asked)

    def _ended(self, caller: Caller, asked: Asked) -> None:
        self._checks.within(f"answer {asked.number}", asked.at, self._answer_s(caller))

    async def _take(self, caller: Caller, asked: Asked) -> None:
        """Await an answer; again where that was cancelled, since it has taken nothing."""
        outputs = None
        while outputs is None:
            outputs = await self._watched(f"answer {asked.number}", caller, _await(asked.reply), math.inf, since=asked.at)
        assert asked.reply.step_id is not None
        self._check_step(asked.number, outputs, asked.reply.step_id)

    async def _step(self, caller: Caller) -> None:
        number = next(self._numbers)
        stepping = self._group.step(self._inputs(caller, number), timeout_s=caller.patience_s)
        outputs = await self._watched(f"step {number}", caller, stepping, self._room_s + self._answer_s(caller))
        if outputs is not None:
            self._check_step(number, outputs, None)

    async def _call(self, caller: Caller) -> None:
        number = next(self._numbers)
        num_ranks = self._launch.options.num_ranks
        ranks = sorted(self._world.chance.sample(range(num_ranks), self._world.chance.randint(1, num_ranks)))
        method = "refuse" if self._world.happens(0.2) else "twice"
        calling = self._group.call(method, number, ranks=ranks, timeout_s=caller.patience_s)
        limit_s = self._room_s + self._answer_s(caller)
        answers = await self._watched(f"call {number}", caller, calling, limit_s, refused_by=ranks if method == "refuse" else ())
        if answers is not None and [answer[:2] for answer in answers] != [[rank, 2 * number] for rank in ranks]:
            self._world.violate(f"call {number} of ranks {ranks} gave {answers}")

    async def _watched(
        self,
        what: str,
        caller: Caller,
        request: Awaitable[Any],
        limit_s: float,
        *,
        since: float | None = None,
        refused_by: Sequence[int] = (),
    ) -> Any:
        """Await a request, cancelled at random where the caller does so; returns None then, or where it was refused as it should be."""
        started = self._world.now if since is None else since
        task = asyncio.ensure_future(request)
        if self._world.happens(caller.cancel):
            asyncio.get_running_loop().call_later(self._world.chance.expovariate(300.0), task.cancel)
        try:
            result = await task
        except asyncio.CancelledError:
            self._world.reach("request_cancelled", what)
            return None
        except BaseException as error:
            self._checks.within(what, started, limit_s)
            if refused_by and isinstance(error, WorkerRaisedError) and error.rank in refused_by and "refuses" in str(error):
                self._world.reach("call_refused")
                return None
            self._checks.got_error(what, error, self._world.now - started, self._patience_s(caller))
            raise
        self._checks.within(what, started, limit_s)
        self._world.reach("request_done", what)
        return result

    def _check_step(self, number: int, outputs: list[Any], step_id: int | None) -> None:
        """Each output rank has answered this step, and has done as many as were published: none twice, none out of turn."""
        if [(output["rank"], output["number"]) for output in outputs] != [(rank, number) for rank in self._launch.options.output_ranks]:
            self._world.violate(f"step {number} gave {outputs}")
        counts = {output["num_steps"] for output in outputs}
        if len(counts) != 1 or (step_id is not None and counts != {step_id + 1}):
            self._world.violate(f"step {number} with id {step_id} was done as number {sorted(counts)}")

    def _inputs(self, caller: Caller, number: int) -> dict[str, Any]:
        return {"number": number, "large": LARGE} if self._world.happens(caller.large) else {"number": number}

    def _patience_s(self, caller: Caller) -> float:
        return self._launch.options.deadlines.step_s if caller.patience_s is None else caller.patience_s

    def _answer_s(self, caller: Caller) -> float:
        return self._patience_s(caller) + STACKS_S

    @property
    def _room_s(self) -> float:
        return self._launch.options.deadlines.step_s


async def _await(reply: PendingReply) -> list[Any]:
    return await reply
