"""What is said of a system that has too little of something."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
import zmq

from zspmd.errors import ConfigError, LaunchError, ResourceError
from zspmd.runtime.launch import resources
from zspmd.runtime.launch.resources import check_resources, launch_error, num_files_needed, shortages_named


@pytest.mark.parametrize("world_size", [1, 8])
def test_enough_is_enough_and_nothing_of_the_probe_stays(world_size: int) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    check_resources(world_size)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


@pytest.mark.parametrize(
    ("highest", "advice"),
    [(1 << 20, "ulimit -n"), (resource.RLIM_INFINITY, "ulimit -n"), (100, "have the hard limit, 100, raised, then ulimit -n")],
    ids=["within the hard limit", "no hard limit", "beyond the hard limit"],
)
def test_too_few_descriptors_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, highest: int, advice: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (100, highest))
    monkeypatch.setattr(resources, "_num_open_below", lambda limit: 30)
    wanted = 30 + num_files_needed(1)
    words = f"may open 100 files and has 30 open; a launch of 1 rank needs {num_files_needed(1)} more: {advice} {wanted}, or start fewer"
    with pytest.raises(ResourceError, match=words):
        check_resources(1)


def test_no_limit_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_resources(10_000)


def test_a_descriptor_above_the_limit_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["0", "1", "2", "251", "3"])
    assert resources._num_open_below(100) == 3, "the listing's own is closed again"


def test_with_no_descriptor_to_count_them_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", refuse)
    assert resources._num_open_below(100) == 100


def test_threads_that_cannot_be_started_are_named_and_those_that_were_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse_the_third(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(ResourceError, match=r"of 6 threads that a launch needs, this process may start 2 \(can't start new thread\)"):
        check_resources(1)
    assert not [thread for thread in started if thread.is_alive()]


def test_a_current_directory_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the current directory was removed; change to one that is there"):
        check_resources(1)


@pytest.mark.parametrize(
    ("kind", "number"),
    [(kind, number) for kind in (OSError, zmq.ZMQError) for number in resources._ADVICE if (kind, number) != (zmq.ZMQError, errno.EAGAIN)],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value.__name__,
)
def test_a_shortage_is_a_resource_error_with_advice(kind: type[Exception], number: int) -> None:
    error = kind(number, os.strerror(number))
    told = launch_error("the agent cannot be started", error)
    assert type(told) is ResourceError
    assert str(told) == f"the agent cannot be started: {error}; {resources._ADVICE[number]}"
    with pytest.raises(ResourceError) as caught, shortages_named():
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no such file"), zmq.Again(), zmq.ZMQError(errno.EADDRINUSE), TimeoutError()], ids=repr
)
def test_what_is_no_shortage_passes(error: OSError | zmq.ZMQError) -> None:
    assert type(launch_error("it", error)) is LaunchError
    with pytest.raises(type(error)) as caught, shortages_named():
        raise error
    assert caught.value is error


def test_a_kernel_or_container_that_refuses_what_supervision_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.pidfd_open", refuse)
    with pytest.raises(LaunchError, match=r"pidfd_open: \[Errno 1\] .* container whose seccomp"):
        check_resources(1)
    monkeypatch.delattr("os.pidfd_open")  # as in a Python that was built on an older system
    with pytest.raises(LaunchError, match=r"pidfd_open: .* has no attribute"):
        check_resources(1)


def test_a_proc_of_another_pid_namespace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers in it are those of strangers, and would be killed."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr(resources, "_send_nothing", lambda: None)
    with pytest.raises(LaunchError, match="calls itself 1; mount it anew"):
        check_resources(1)
