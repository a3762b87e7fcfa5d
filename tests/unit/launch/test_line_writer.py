from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.polling import block_until

from zspmd.runtime.launch.command import line_writer
from zspmd.runtime.launch.command.line_writer import LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose ends may be closed by the test."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", closefd=False), open(write_fd, "wb", closefd=False):
        yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        try:
            os.close(fd)
        except OSError:
            continue


def fail(fd: int, error: OSError) -> None:
    pytest.fail(f"descriptor {fd} was closed: {error}")


def read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


def test_lines_come_out_in_order(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    writer = LineWriter(fail)
    lines = [b"%d\n" % number for number in range(100)]
    for line in lines:
        writer.write(write_fd, line)
    assert writer.flush(10)
    assert read(read_fd, len(b"".join(lines))) == b"".join(lines)


def test_a_reader_that_pauses_delays_nobody_and_what_is_too_much_is_counted(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "MAX_PENDING_BYTES", 1 << 20)
    read_fd, write_fd = pipe
    writer = LineWriter(fail)
    line = b"x" * 131_071 + b"\n"  # more than a pipe takes, so that not one is done
    for _ in range(32):
        writer.write(write_fd, line)
    assert not writer.flush(0.01)
    told = b"[zspmd] 23 lines are not shown, since they were read too slowly\n"
    data = read(read_fd, 9 * len(line) + len(told))
    assert data.count(line) == 9
    assert data.endswith(told)
    assert writer.flush(10)


def test_a_reader_that_is_gone_is_told_once_and_later_lines_go_nowhere(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    closed: list[tuple[int, OSError]] = []
    writer = LineWriter(lambda fd, error: closed.append((fd, error)))
    os.close(read_fd)
    for _ in range(3):
        writer.write(write_fd, b"line\n")
    assert writer.flush(10)
    block_until(lambda: closed)
    writer.write(write_fd, b"line\n")
    assert writer.flush(10)
    ((fd, error),) = closed
    assert fd == write_fd
    assert isinstance(error, BrokenPipeError)


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing(pipe: tuple[int, int]) -> None:
    read_fd, write_fd = pipe
    os.set_blocking(write_fd, False)
    writer = LineWriter(fail)
    data = b"".join(b"%07d\n" % number for number in range(40_000))
    writer.write(write_fd, data)
    assert read(read_fd, len(data)) == data
