"""Makes ``tests/support`` importable as ``support``, and looks after every test that it gives back what it took.

Tests themselves are no package (import mode importlib).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of ranks, which tests start side by side: tiny models gain nothing from threads
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("support")  # python -O drops the asserts of a module that pytest does not rewrite

from support.cluster_fixtures import cluster as cluster  # noqa: E402  # found by the path above
from support.cluster_fixtures import needs_sshd as needs_sshd  # noqa: E402
from support.cluster_fixtures import rsh as rsh  # noqa: E402
from support.cluster_fixtures import shared_cluster as shared_cluster  # noqa: E402
from support.cluster_fixtures import ssh_servers as ssh_servers  # noqa: E402
from support.holdings import Holdings, check_tasks, start_zero_copy_thread  # noqa: E402
from support.leaks import leak_check as leak_check  # noqa: E402

# What nohup, or a shell's background, ignores, the programs under test would ignore too.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

LONG_TIMEOUT_S = 3600.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests the time that they need, unless they say how much that is, and put the files of those marked first in front."""
    first = {item.path for item in items if item.get_closest_marker("first")}
    items.sort(key=lambda item: item.path not in first)
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S))


@pytest.fixture(scope="session", autouse=True)
def own_run_directories() -> Iterator[None]:
    """Keep run directories and log files of these tests apart from those of every other program of this user."""
    with tempfile.TemporaryDirectory(prefix="z") as directory, pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_RUNTIME_DIR", directory)
        environment.setenv("XDG_STATE_HOME", f"{directory}/state")
        start_zero_copy_thread()
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test that it has given back descriptors, threads, processes, shared memory and run directories.

    What fixtures of a module or session hold is there before and after.
    """
    for name in request.fixturenames:
        if name in ("_module_scoped_runner", "_session_scoped_runner"):  # pytest-asyncio makes a shared loop only after this fixture
            request.getfixturevalue(name)
    before = Holdings.now()
    yield
    request.node.funcargs.clear()  # the last references to the values of this test's fixtures, all of which have ended
    before.check(but_descriptors=request.node.get_closest_marker("keeps_descriptors") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Check after each async test that its tasks have ended, before its loop is closed and cancels them."""
    runners: list[Any] = [value for name, value in pyfuncitem.funcargs.items() if name.endswith("_scoped_runner")]
    before = [asyncio.all_tasks(runner.get_loop()) for runner in runners]
    result = yield
    for runner, tasks in zip(runners, before, strict=True):
        runner.run(check_tasks(tasks))
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have measured, as ``support.latencies`` publishes it."""
    ends = [report for reports in terminalreporter.stats.values() for report in reports if getattr(report, "when", "") == "teardown"]
    figures = [value for report in ends for name, value in report.user_properties if name == "figures"]
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.line(str(line))
