"""The error tree: as documented, with facts in fields and in the text."""

from __future__ import annotations

import inspect
import re
import signal

import pytest

from zspmd import errors
from zspmd.errors import (
    CheckpointError,
    ConfigError,
    HostfileError,
    ReadyTimeoutError,
    RequestError,
    StepGapError,
    WorkerError,
    WorkerExitedError,
    WorkerRaisedError,
    WorkerStalledError,
    ZspmdError,
    describe_exit,
)


def tree_of(kind: type[BaseException], depth: int = 1) -> list[str]:
    lines = [f"{'  ' * depth}  {kind.__name__}"]
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            lines += tree_of(child, depth + 1)
    return lines


def test_the_module_opens_with_its_tree() -> None:
    documented = re.findall(r"^( +)([A-Z]\w+Error)(?:\(ValueError\))?(?: |$)", errors.__doc__ or "", re.MULTILINE)
    assert [f"{indent}{name}" for indent, name in documented] == tree_of(ZspmdError)


def test_every_error_says_who_caused_it() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert all(issubclass(kind, ZspmdError) and kind.__doc__ for kind in kinds)
    assert issubclass(ConfigError, ValueError)


def test_places_are_in_the_text_and_in_fields() -> None:
    error = HostfileError([(3, 5, "no host"), (4, 1, "no slots"), (0, 0, "no end")], path="hosts")
    assert str(error) == "hosts:3:5: no host\nhosts:4:1: no slots\nhosts: no end"
    assert (error.path, error.line, error.problems[1]) == ("hosts", 3, (4, 1, "no slots"))
    checkpoint = CheckpointError("does not fit", tensor="lm_head", wanted=(2, 3), found=(3, 2))
    assert (checkpoint.tensor, checkpoint.wanted, checkpoint.found) == ("lm_head", (2, 3), (3, 2))
    assert ReadyTimeoutError("late", missing=[1, 2]).missing == (1, 2)
    assert RequestError("no room", request_id="r1").request_id == "r1"
    gap = StepGapError(expected=3, got=5)
    assert (str(gap)[:27], gap.expected, gap.got, gap.rank) == ("expected frame 3, got 5; th", 3, 5, None)


def test_a_worker_error_lists_its_facts_in_order() -> None:
    error = WorkerError("broke", rank=2, host="n1", pid=77, step_id=5, log_tail=["last"], consequences=["rank 0: too"])
    assert str(error) == "rank 2 on n1 (pid 77) in step 5: broke\n  last lines of its log:\n    last\n  then:\n    rank 0: too"
    assert str(WorkerError("broke", rank=0)) == "rank 0 on localhost: broke"


def test_a_raised_error_ends_with_the_remote_traceback() -> None:
    error = WorkerRaisedError("raised", rank=1, remote_traceback="one\n  two\n", exception_type="E", consequences=["c"])
    assert str(error) == "rank 1 on localhost: raised\n  then:\n    c\n  remote traceback:\n    one\n      two"
    assert error.exception_type == "E"


def test_an_exit_is_described_unless_it_has_a_message() -> None:
    assert str(WorkerExitedError(rank=0, exit_code=3)) == "rank 0 on localhost: exited with code 3"
    assert str(WorkerExitedError("left", rank=0, exit_code=3)) == "rank 0 on localhost: left"


def test_a_stall_lists_all_ranks_that_are_late() -> None:
    assert WorkerStalledError("late", rank=1, missing=[1, 3]).missing == (1, 3)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "exited with code 0"),
        (7, "exited with code 7"),
        (-signal.SIGTERM, "was ended by SIGTERM"),
        (-signal.SIGKILL, "was ended by SIGKILL (if nobody sent it, the kernel's out-of-memory killer may have: see dmesg)"),
        (-999, "was ended by signal 999"),
    ],
)
def test_exit_codes_in_words(exit_code: int, words: str) -> None:
    assert describe_exit(exit_code) == words
