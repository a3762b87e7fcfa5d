"""What a group fails with: the first cause after a moment, once; and what is kept for the end while ranks are being ended."""

from __future__ import annotations

import asyncio
import signal

import pytest

from zspmd.errors import (
    AnswerLostError,
    PeerLostError,
    ProtocolError,
    WorkerError,
    WorkerExitedError,
    WorkerRaisedError,
    WorkerStalledError,
    ZspmdError,
)
from zspmd.runtime.driver.faults import FaultLog, RankIdentity
from zspmd.runtime.driver.verdict import Verdict
from zspmd.transport.records import Failure

BOOM = Failure(exception_type="builtins.RuntimeError", message="boom", traceback="", phase="step", step_id=3)


class Case:
    """A verdict on the running loop, and what it has named."""

    def __init__(self) -> None:
        self.named: list[ZspmdError] = []
        faults = FaultLog(lambda rank: RankIdentity(), lambda rank: [])
        self.verdict = Verdict("job", faults, self._not_ended, self.named.append)
        self.verdict.open(asyncio.get_running_loop())

    def _not_ended(self, rank: int) -> WorkerError:
        return WorkerStalledError("did not end", rank=rank)


async def test_the_first_cause_is_named_once() -> None:
    case = Case()
    case.verdict.exited(1, 1)
    case.verdict.raised(0, BOOM)
    assert case.named == []
    await asyncio.sleep(0.2)
    case.verdict.fail(PeerLostError("later"))
    (error,) = case.named
    assert error is case.verdict.fault
    assert isinstance(error, WorkerRaisedError)
    assert (error.rank, len(error.consequences)) == (0, 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(AnswerLostError("lost", rank=1, seq=2), AnswerLostError), (ProtocolError("odd"), ProtocolError)],
    ids=["lost", "odd"],
)
async def test_an_answer_that_cannot_be_taken_is_named_at_once(error: ZspmdError, kind: type[ZspmdError]) -> None:
    case = Case()
    case.verdict.misanswered(1, 2, error)
    assert [type(named) for named in case.named] == [kind]
    assert "rank 1" in str(case.named[0])


@pytest.mark.parametrize(
    ("signals_after_s", "exit_code", "kind"),
    [
        (0.0, -signal.SIGTERM, WorkerStalledError),
        (60.0, -signal.SIGTERM, WorkerExitedError),
        (0.0, 3, WorkerExitedError),
        (0.0, 0, None),
    ],
    ids=["ended by us", "ended by others", "failed", "orderly"],
)
async def test_the_end_of_a_rank_that_is_to_end(signals_after_s: float, exit_code: int, kind: type[WorkerError] | None) -> None:
    case = Case()
    case.verdict.stopping(signals_after_s=signals_after_s)
    case.verdict.exited(0, exit_code)
    error = await case.verdict.last_words()
    assert (None if error is None else type(error)) is kind
    assert (case.named, case.verdict.fault) == ([], None)


async def test_an_agent_that_is_lost_while_ranks_end_is_told_unless_a_rank_failed() -> None:
    case = Case()
    case.verdict.stopping()
    lost = PeerLostError("the agent is gone")
    case.verdict.troubled(lost)
    assert await case.verdict.last_words() is lost
    case.verdict.exited(1, 3)
    assert isinstance(await case.verdict.last_words(), WorkerExitedError)


async def test_other_trouble_is_printed_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case()
    case.verdict.troubled(ProtocolError("a stranger knocks"))
    assert "zspmd: job: ProtocolError: a stranger knocks" in capsys.readouterr().err
    assert case.named == []


async def test_a_ranks_own_word_may_come_after_its_end() -> None:
    """It travels on the result socket, its end by the agent."""
    case = Case()
    case.verdict.stopping()
    case.verdict.exited(1, 1)
    asyncio.get_running_loop().call_later(0.02, case.verdict.raised, 1, BOOM)
    error = await case.verdict.last_words()
    assert isinstance(error, WorkerRaisedError)
    assert error.exception_type == BOOM.exception_type


async def test_a_rank_that_ends_with_code_1_without_a_word_is_told_all_the_same() -> None:
    case = Case()
    case.verdict.stopping()
    case.verdict.exited(1, 1)
    assert isinstance(await case.verdict.last_words(), WorkerExitedError)
