from __future__ import annotations

import pytest

import zspmd
from zspmd.errors import BadFrameError
from zspmd.runtime.launch.agent_protocol import AgentStarted, encode_record
from zspmd.runtime.launch.guard import GREETING
from zspmd.runtime.launch.nodes.remote_agent import GreetedReader

HELLO = GREETING + f"{zspmd.__version__} 4711\n".encode()
STARTED = encode_record(AgentStarted(4712))


def read(*parts: bytes) -> tuple[list[object], list[int], list[str]]:
    """Return the records, the pids of the guards that greeted, and the noise."""
    greeted: list[int] = []
    reader = GreetedReader(greeted.append)
    return [record for part in parts for record in reader.feed(part)], greeted, reader.noise


@pytest.mark.parametrize(
    ("noise", "lines"),
    [
        (b"", []),
        (b"Welcome!\nLast login: today\n", ["Welcome!", "Last login: today"]),
        (b"\r\n\x1b[1mbold\x1b[0m\r\n", ["bold"]),
        (b"\x1b]0;a title\x07\n\x1b]0;another\x1b\\x\n", ["x"]),
        (b"\xff\xfe\n", ["��"]),
        (b"a line with ZSPMD/1 in it\n", ["a line with ZSPMD/1 in it"]),
    ],
    ids=["none", "banner", "colours", "titles", "no text", "greeting quoted"],
)
def test_what_a_login_prints_is_passed_over(noise: bytes, lines: list[str]) -> None:
    assert read(noise + HELLO + STARTED) == ([AgentStarted(4712)], [4711], lines)


def test_bytes_may_come_one_by_one() -> None:
    data = b"hello\n" + HELLO + STARTED
    assert read(*(data[i : i + 1] for i in range(len(data)))) == ([AgentStarted(4712)], [4711], ["hello"])


def test_only_the_last_lines_of_noise_are_kept() -> None:
    assert read(b"".join(b"%d\n" % i for i in range(50)) + HELLO)[2] == [str(i) for i in range(40, 50)]


def test_records_before_the_greeting_are_noise() -> None:
    assert read(STARTED + b"\n" + HELLO)[0] == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GREETING + b"9.9.9 1\n", "it runs zspmd 9.9.9, the driver"),
        (GREETING + zspmd.__version__.encode() + b"\n", "without a pid"),
        (GREETING + zspmd.__version__.encode() + b" -5\n", "without a pid"),
        (b"x" * (1 << 20) + b"y", "no agent among the first 1048576 B"),
        (b"line\n" * (1 << 18) + b"y", "no agent among the first 1048576 B"),
    ],
    ids=["another version", "no pid", "negative pid", "an endless line", "endless lines"],
)
def test_no_greeting_that_fits_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(BadFrameError, match=message):
        read(data)
