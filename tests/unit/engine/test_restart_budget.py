"""RestartBudget: which faults count, and for how long."""

from __future__ import annotations

from zspmd.config import RestartPolicy
from zspmd.errors import WorkerExitedError, ZspmdError
from zspmd.runtime.engine.restart_budget import RestartBudget


def fault(number: int = 0) -> ZspmdError:
    return WorkerExitedError(exit_code=number, rank=0)


def budget_of(max_restarts: int, window_s: float = 10.0) -> RestartBudget:
    return RestartBudget(RestartPolicy(max_restarts=max_restarts, window_s=window_s))


def test_the_fault_after_the_last_restart_is_one_too_many() -> None:
    budget = budget_of(2)
    assert [budget.charge(fault(), now=float(i)) is None for i in range(3)] == [False, False, True]


def test_no_restart_at_all() -> None:
    assert budget_of(0).charge(fault(), now=0.0) is None


def test_old_faults_are_forgotten_once_new_workers_were_ready() -> None:
    budget = budget_of(1)
    budget.charge(fault(), now=0.0)
    budget.restarted()
    assert budget.charge(fault(), now=10.0) is not None, "the window has passed"
    assert budget.charge(fault(), now=100.0) is None, "that restart failed"


def test_a_fault_within_the_window_counts_whatever_happened_since() -> None:
    budget = budget_of(1)
    budget.charge(fault(), now=0.0)
    budget.restarted()
    budget.progressed()
    assert budget.charge(fault(), now=9.9) is None


def test_an_explained_fault_counts_until_a_step_has_come_back() -> None:
    budget = budget_of(1)
    counted = budget.charge(fault(), now=0.0)
    assert counted is not None
    budget.progressed()
    budget.explain(counted)
    assert budget.num_counted == 1
    budget.progressed()
    assert budget.num_counted == 0


def test_the_last_fault_has_the_earlier_ones_as_its_causes() -> None:
    budget, faults = budget_of(2), [fault(number) for number in range(3)]
    faults[2].__cause__ = reason = ValueError("its own")
    for error in faults:
        budget.charge(error, now=0.0)
    assert faults[2].__cause__ is reason
    assert reason.__cause__ is faults[1]
    assert faults[1].__cause__ is faults[0]


def test_the_same_fault_twice_is_not_its_own_cause() -> None:
    budget, error = budget_of(1), fault()
    budget.charge(error, now=0.0)
    assert budget.charge(error, now=0.0) is None
    assert error.__cause__ is None
