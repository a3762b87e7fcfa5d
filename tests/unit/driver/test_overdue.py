"""A reply whose deadline has passed: the stacks of all ranks, who is blamed, and an answer that comes after all."""

from __future__ import annotations

import asyncio

import pytest

from zspmd.errors import WorkerStalledError
from zspmd.runtime.driver.control import RankRecord
from zspmd.runtime.driver.overdue import OverdueReplies
from zspmd.runtime.driver.pending import PendingReply
from zspmd.runtime.driver.reports import RankReports
from zspmd.transport.records import Beat

IN_STEP = 'state: running\n  File "job.py", line 3 in step\n'
IN_COLLECTIVE = 'state: sleeping\n  File "zspmd/workers/communicators/shared_region.py", line 90 in wait\n  File "job.py", line 3 in step\n'
STOPPED = "state: stopped by a signal\n"


class Case:
    """Three ranks that have begun the frames of ``seqs``, and stacks that are handed out when the test says so."""

    def __init__(self, *seqs: int, stacks: dict[int, str] | None = None) -> None:
        records = [RankRecord(rank, pid=100 + rank) for rank in range(len(seqs))]
        for record, seq in zip(records, seqs):
            record.beat, record.beat_at = Beat(phase="step", seq=seq, done_seq=seq - 1, step_id=seq, memory_bytes=0), 0.0
        self.stacks = stacks or {}
        self.num_dumps = 0
        self.go = asyncio.Event()
        self.given_up: list[WorkerStalledError] = []
        self.overdue = OverdueReplies(self._dump, RankReports(lambda: records, lambda rank: []), self._give_up)

    async def _dump(self, timeout_s: float) -> dict[int, str]:
        self.num_dumps += 1
        await self.go.wait()
        return self.stacks

    def _give_up(self, pending: PendingReply, error: WorkerStalledError) -> None:
        self.given_up.append(error)
        pending.fail(error)

    def pending(self, seq: int = 5) -> PendingReply:
        return PendingReply(asyncio.get_running_loop(), seq, seq, (0,), awaited=(0,), asked_ns=0, published_ns=0, limit_s=10.0)


async def blamed(*seqs: int, missing: list[int], stacks: dict[int, str]) -> WorkerStalledError:
    case = Case(*seqs, stacks=stacks)
    case.overdue.add(case.pending(), missing)
    case.go.set()
    await case.overdue.aclose()
    return case.given_up[0]


@pytest.mark.parametrize(
    ("seqs", "missing", "stacks", "rank"),
    [
        ((5, 5, 5), [0, 1, 2], {0: IN_COLLECTIVE, 1: STOPPED, 2: IN_COLLECTIVE}, 1),
        ((5, 5, 5), [0, 1, 2], {0: IN_COLLECTIVE, 1: IN_COLLECTIVE, 2: IN_STEP}, 2),
        ((5, 4, 5), [0, 1, 2], {0: IN_STEP, 1: IN_STEP, 2: IN_STEP}, 1),
        ((5, 5, 5), [1, 2], {}, 1),
        ((5, 5, 5), [1, 2], {0: STOPPED, 1: IN_COLLECTIVE, 2: IN_STEP}, 2),
    ],
    ids=["stopped", "not in a collective", "furthest behind", "no stacks", "only of those that are missing"],
)
async def test_who_is_blamed(seqs: tuple[int, ...], missing: list[int], stacks: dict[int, str], rank: int) -> None:
    error = await blamed(*seqs, missing=missing, stacks=stacks)
    assert (error.rank, error.missing, error.stacks) == (rank, tuple(missing), stacks)


async def test_the_error_shows_every_stack() -> None:
    error = await blamed(5, 5, missing=[1], stacks={0: IN_COLLECTIVE, 1: IN_STEP})
    text = str(error)
    assert text.index("rank 0 was at:") < text.index("shared_region.py") < text.index("rank 1 was at:")


async def test_several_that_are_overdue_at_once_ask_once() -> None:
    case = Case(5, 5)
    replies = [case.pending(seq) for seq in (5, 6, 7)]
    for pending in replies:
        case.overdue.add(pending, [1])
    asked = asyncio.ensure_future(case.overdue.dump_stacks(1.0))
    await asyncio.sleep(0)
    case.go.set()
    await case.overdue.aclose()
    assert (case.num_dumps, len(case.given_up), await asked) == (1, 3, {})
    await case.overdue.dump_stacks(1.0)
    assert case.num_dumps == 2


async def test_an_answer_that_comes_meanwhile_is_taken() -> None:
    case = Case(5, 5)
    pending = case.pending()
    case.overdue.add(pending, [0])
    await asyncio.sleep(0)
    pending.answer(0, "late")
    case.go.set()
    await case.overdue.aclose()
    assert (await pending, case.given_up) == (["late"], [])


async def test_an_asker_that_gives_up_stops_nobody_else() -> None:
    case = Case(5, 5)
    asked = asyncio.ensure_future(case.overdue.dump_stacks(1.0))
    case.overdue.add(case.pending(), [1])
    await asyncio.sleep(0)
    asked.cancel()
    case.go.set()
    await case.overdue.aclose()
    assert (asked.cancelled(), len(case.given_up)) == (True, 1)


async def test_an_asker_with_more_patience_makes_no_error_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zspmd.runtime.driver.overdue.OVERDUE_STACKS_S", 0.02)
    case = Case(5, 5)
    asked = asyncio.ensure_future(case.overdue.dump_stacks(60.0))
    await asyncio.sleep(0)
    pending = case.pending()
    case.overdue.add(pending, [1])
    with pytest.raises(WorkerStalledError) as caught:
        await asyncio.wait_for(asyncio.ensure_future(_answer(pending)), 5.0)
    assert caught.value.stacks == {1: "nothing was heard within 0.02 s"}
    case.go.set()
    assert await asked == {}


async def _answer(pending: PendingReply) -> object:
    return await pending
