"""Which failure came first: a death before what it caused, whatever was heard first."""

from __future__ import annotations

import signal

import pytest

from zspmd.errors import WorkerExitedError, WorkerRaisedError, WorkerStalledError
from zspmd.runtime.driver.faults import FaultLog, RankIdentity
from zspmd.transport.records import Failure


def failure(message: str = "boom", *, step_id: int = 4, exception_type: str = "builtins.ValueError") -> Failure:
    return Failure(exception_type=exception_type, message=message, traceback="Traceback ...", phase="step", step_id=step_id)


@pytest.fixture
def log() -> FaultLog:
    return FaultLog(lambda rank: RankIdentity("node7", 1000 + rank, 3), lambda rank: [f"line of {rank}"])


def test_an_empty_log_is_false(log: FaultLog) -> None:
    assert not log
    log.exited(0, 0)
    assert log


def test_an_exception_of_a_rank(log: FaultLog) -> None:
    log.raised(2, failure())
    error = log.first_cause()
    assert isinstance(error, WorkerRaisedError)
    assert (error.rank, error.host, error.pid, error.step_id, error.consequences) == (2, "node7", 1002, 4, ())
    assert (error.exception_type, error.remote_traceback) == ("builtins.ValueError", "Traceback ...")
    assert "raised builtins.ValueError in its step: boom" in str(error)
    assert "Traceback ..." in str(error)


def test_a_failure_before_the_first_step_has_no_step(log: FaultLog) -> None:
    log.raised(0, failure(step_id=-1))
    assert log.first_cause().step_id is None


@pytest.mark.parametrize(
    ("exit_code", "words"), [(7, "exited with code 7"), (-signal.SIGSEGV, "was ended by SIGSEGV"), (0, "exited with code 0")]
)
def test_an_exit_of_a_rank(log: FaultLog, exit_code: int, words: str) -> None:
    log.exited(1, exit_code)
    error = log.first_cause()
    assert isinstance(error, WorkerExitedError)
    assert (error.rank, error.exit_code, error.step_id, error.log_tail) == (1, exit_code, 3, ("line of 1",))
    assert words in str(error)


def test_the_earlier_of_two_exceptions_is_the_cause(log: FaultLog) -> None:
    log.raised(3, failure("first"))
    log.raised(0, failure("second\nand more"))
    error = log.first_cause()
    assert (error.rank, error.consequences) == (3, ("rank 0: raised builtins.ValueError: second",))
    assert "then:\n    rank 0: raised builtins.ValueError: second" in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:41001",
        "read: Connection reset by peer",
        "writev [127.0.0.1]: Broken pipe",
        "NCCL error: remote error, remote process exited",
        "gloo: wait\ntimed out after 600 s",
    ],
    ids=["closed", "reset", "broken pipe", "nccl", "timed out"],
)
def test_an_exception_of_its_own_outranks_one_of_a_lost_peer(log: FaultLog, message: str) -> None:
    log.raised(0, failure(message, exception_type="builtins.RuntimeError"))
    log.raised(1, failure("the cause"))
    error = log.first_cause()
    assert error.rank == 1
    assert [consequence[:6] for consequence in error.consequences] == ["rank 0"]


def test_what_a_lost_peer_explains_is_no_cause_by_itself(log: FaultLog) -> None:
    log.raised(0, failure("Connection closed by peer"))
    assert not log.has_cause
    log.exited(1, -signal.SIGKILL)
    assert log.has_cause


def test_a_death_outranks_exceptions_that_were_heard_of_before_it(log: FaultLog) -> None:
    log.raised(0, failure("Connection closed by peer"))
    log.raised(1, failure("its own"))
    log.exited(2, -signal.SIGKILL)
    error = log.first_cause()
    assert isinstance(error, WorkerExitedError)
    assert error.rank == 2
    assert [consequence[:6] for consequence in error.consequences] == ["rank 1", "rank 0"]


def test_an_exit_whose_reason_has_yet_to_be_heard_of_is_no_death(log: FaultLog) -> None:
    log.exited(2, 1)
    log.raised(0, failure("its own"))
    assert log.first_cause().rank == 0


def test_an_exit_whose_reason_was_lost_outranks_a_peer_that_noticed_it(log: FaultLog) -> None:
    log.raised(0, failure("Connection closed by peer"))
    log.exited(2, 1)
    assert log.first_cause().rank == 2


def test_a_rank_that_raised_and_then_exited_has_raised(log: FaultLog) -> None:
    log.raised(0, failure())
    log.exited(0, 1)
    assert isinstance(log.first_cause(), WorkerRaisedError)


def test_an_exit_before_its_exception_was_read_is_no_death(log: FaultLog) -> None:
    log.exited(0, 1)
    log.raised(0, failure())
    log.raised(0, failure("another"))
    error = log.first_cause()
    assert isinstance(error, WorkerRaisedError)
    assert "boom" in str(error)


def test_what_the_driver_found_is_raised_itself(log: FaultLog) -> None:
    found = WorkerStalledError("does not answer", rank=1)
    log.failed(found)
    log.failed(WorkerStalledError("again", rank=1))
    log.failed(WorkerStalledError("does not answer either", rank=0))
    assert log.first_cause() is found
    assert found.consequences == ("rank 0: does not answer either",)


@pytest.mark.parametrize("is_heard_of", [True, False], ids=["says why", "has yet to say why"])
def test_a_rank_that_the_driver_had_to_end_is_blamed_before_a_peer_that_noticed_its_end(log: FaultLog, is_heard_of: bool) -> None:
    log.exited(0, 1)
    if is_heard_of:
        log.raised(0, failure("Connection closed by peer"))
    found = WorkerStalledError("did not end", rank=1)
    log.failed(found)
    assert log.first_cause() is found
    assert [consequence[:6] for consequence in found.consequences] == ["rank 0"]


def test_an_exception_is_blamed_before_a_rank_that_the_driver_had_to_end(log: FaultLog) -> None:
    log.failed(WorkerStalledError("did not end", rank=1))
    log.raised(0, failure())
    assert log.first_cause().rank == 0


def test_what_the_driver_found_can_be_a_consequence(log: FaultLog) -> None:
    log.exited(0, 9)
    log.failed(WorkerStalledError("does not answer", rank=1))
    assert log.first_cause().consequences == ("rank 1: does not answer",)
