"""Every error that zspmd raises on purpose, sorted by who caused it.

    ZspmdError
      ConfigError(ValueError)       the user's input; raised before any process starts wherever it can be known then
        TopologyError               sizes that do not fit each other
        HostfileError               a hostfile or list of hosts: all its bad lines
        CheckpointError             a model directory: a file, a tensor, a field of config.json
        InsecureEndpointError       an address or key that would let others in
        RecordingError              a recording that cannot be read, or is not one
      LaunchError                   the group never became ready
        PreflightError              what nodes lack or differ in, found before any rank is started
        EndpointInUseError          the launch id or a port is held by somebody else
        ReadyTimeoutError           some ranks did not answer in time
        ResourceError               the system has too little of something: file descriptors, memory, disk
      TransportError
        ClosedError                 this side has closed
        PeerLostError               the other side is gone
          NodeLostError             a node of the launch: names it and its ranks
        BackpressureError           no room in the window within the deadline; nothing was sent
        StoreTimeoutError           keys of the coordinator's store did not appear in time; also a TimeoutError
        CoordinatorTimeoutError     ranks did not come to an operation of the coordinator in time; also a TimeoutError
        AnswerLostError             a rank has answered, and the answer never came
        ProtocolError               bytes that break the protocol
          WireVersionError          another version of zspmd is at the other end
          BadFrameError             a malformed frame: says which field
          StepGapError              a rank missed a frame, and it is not kept any more
      WorkerError                   one rank failed: rank, host, pid, step, log tail
        WorkerRaisedError           its code raised; carries the remote traceback
        WorkerExitedError           its process ended; carries the exit code or signal
        WorkerStalledError          it did not do what was asked within the deadline
      ResultTakenError              the caller awaited a result twice; also a RuntimeError
      ReplayDivergedError           a replayed rank does another thing than was recorded
      RequestError                  one request fails, the engine lives
      InternalError                 a broken invariant: a bug of zspmd

Messages carry the value, the limit and the next action. The first fault is raised; what followed from it is listed below it.
"""

from __future__ import annotations

import signal
from collections import namedtuple
from collections.abc import Mapping, Sequence

# Of the table of a PreflightError: what is longer than a column shifts the rest of its line.
_MAX_ROWS = 64
_MAX_COLUMN = 80


class ZspmdError(Exception):
    """Base of every error that zspmd raises on purpose."""


class ConfigError(ZspmdError, ValueError):
    """The caller's input is wrong; nothing was started, or it has been ended again."""


class TopologyError(ConfigError):
    """World size, axes, heads or devices do not fit each other."""


class HostfileError(ConfigError):
    """A hostfile or list of hosts cannot be used: every bad place at once, one line of text each.

    Attributes:
        problems: (line, column, rule broken), both from 1, in the order of the text; line 0 means the whole of it.
        path: the file, or what the hosts came from, such as "--host".
        line: of the first problem.
    """

    def __init__(self, problems: Sequence[tuple[int, int, str]], *, path: str) -> None:
        super().__init__("\n".join(f"{path}:{line}:{column}: {rule}" if line else f"{path}: {rule}" for line, column, rule in problems))
        self.problems = tuple(problems)
        self.path = path
        self.line = self.problems[0][0]


class CheckpointError(ConfigError):
    """A model directory cannot be loaded.

    ``tensor`` names the tensor at fault, ``wanted`` and ``found`` its shapes or dtypes, where they apply.
    """

    def __init__(self, message: str, *, tensor: str | None = None, wanted: object = None, found: object = None) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.wanted = wanted
        self.found = found


class InsecureEndpointError(ConfigError):
    """An address that more than the launch's own ranks could reach unasked, or a TCP endpoint without a key; nothing was bound."""


class RecordingError(ConfigError):
    """A recording cannot be read: no such file, another kind or version, or damaged; the message has the path and the offset."""


class LaunchError(ZspmdError):
    """The worker group never became ready."""


class NodeProblem(namedtuple("NodeProblem", ("host", "check", "text", "advice"))):
    """Why a launch cannot use a node: the check that it failed, what was found there, and what to do about it.

    It is no dataclass, which would cost the guard of each node 5 ms of imports.
    """

    __slots__ = ()
    host: str
    check: str
    text: str
    advice: str


class PreflightError(LaunchError):
    """Nodes cannot be used as they are, and no rank was started; ``problems`` has each, ``fine`` the hosts that have none."""

    def __init__(self, problems: Sequence[NodeProblem], *, fine: Sequence[str] = ()) -> None:
        super().__init__(f"{len(problems)} problems of nodes")
        self.problems = tuple(problems)
        self.fine = tuple(fine)

    def __str__(self) -> str:
        num_hosts = len({problem.host for problem in self.problems})
        lines = [f"no rank was started: {num_hosts} of {num_hosts + len(self.fine)} hosts cannot be used as they are"]
        rows = [("host", "check", "what", "fix")]
        rows += [(_one_line(p.host), _one_line(p.check), _one_line(p.text), _one_line(p.advice)) for p in self.problems[:_MAX_ROWS]]
        widths = [min(_MAX_COLUMN, max(len(row[column]) for row in rows)) for column in range(3)]
        lines += ["  " + "  ".join((*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[3])).rstrip() for row in rows]
        if len(self.problems) > _MAX_ROWS:
            lines.append(f"  and {len(self.problems) - _MAX_ROWS} more")
        return "\n".join([*lines, f"  fine: {_some(self.fine)}"] if self.fine else lines)


class EndpointInUseError(LaunchError):
    """A launch id, socket path or port is held by another launch."""


class ReadyTimeoutError(LaunchError):
    """Ranks in ``missing`` did not become ready within the deadline."""

    def __init__(self, message: str, *, missing: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ResourceError(LaunchError):
    """The system has too little of something that a launch needs; the message names what, how much there is and how much is needed."""


class TransportError(ZspmdError):
    """Moving bytes failed."""


class ClosedError(TransportError):
    """This side has closed; start a new launch."""


class PeerLostError(TransportError):
    """The other side is gone."""


class NodeLostError(PeerLostError):
    """A node of the launch is gone, or its agent: ``host`` and ``ranks`` say which; "" for the driver's own.

    What ran there ends by itself, whether or not anybody can see it.
    """

    def __init__(self, message: str, *, host: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.host = host
        self.ranks = tuple(ranks)


class BackpressureError(TransportError):
    """No room in the in-flight window within the deadline; nothing was sent."""


class StoreTimeoutError(TransportError, TimeoutError):
    """Keys of the coordinator's store that did not appear in time; ``absent`` names them."""

    def __init__(self, absent: Sequence[str], timeout_s: float) -> None:
        shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
        super().__init__(f"no value for {shown} within {timeout_s:g} s; another rank has not set it")
        self.absent = tuple(absent)


class CoordinatorTimeoutError(TransportError, TimeoutError):
    """Ranks that did not come to an operation of the coordinator in time; ``absent`` names them, ``operation`` says which it was."""

    def __init__(self, operation: str, absent: Sequence[int], timeout_s: float) -> None:
        shown = ", ".join(map(str, absent[:16])) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
        who = f"rank {shown} has" if len(absent) == 1 else f"ranks {shown} have"
        super().__init__(f"{operation}: {who} not come within {timeout_s:g} s; see what they do, or allow more time")
        self.operation = operation
        self.absent = tuple(absent)


class AnswerLostError(TransportError):
    """Rank ``rank`` has answered frame ``seq``, and the answer never came."""

    def __init__(self, message: str, *, rank: int, seq: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.seq = seq


class ProtocolError(TransportError):
    """Bytes that break the protocol."""


class WireVersionError(ProtocolError):
    """The peer speaks another version of the wire."""


class BadFrameError(ProtocolError):
    """A malformed frame; the message names the field, its value and its limit."""


class StepGapError(ProtocolError):
    """A rank received frame ``got`` where ``expected`` was due."""

    def __init__(self, *, expected: int, got: int, rank: int | None = None) -> None:
        who = "" if rank is None else f"rank {rank}: "
        super().__init__(f"{who}expected frame {expected}, got {got}; the missing frames cannot be made up for, relaunch the group")
        self.expected = expected
        self.got = got
        self.rank = rank


class WorkerError(ZspmdError):
    """One rank failed.

    Attributes:
        rank, host, pid: which process.
        step_id: the step that the rank was at: the first that it had not done, or the last if it had done all; None before the first.
        log_tail: the last lines that it printed.
        consequences: what followed on other ranks, one line each.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        host: str = "localhost",
        pid: int | None = None,
        step_id: int | None = None,
        log_tail: Sequence[str] = (),
        consequences: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.pid = pid
        self.step_id = step_id
        self.log_tail = tuple(log_tail)
        self.consequences = tuple(consequences)

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}" + (f" (pid {self.pid})" if self.pid else "")
        when = "" if self.step_id is None else f" in step {self.step_id}"
        text = f"{where}{when}: {self.args[0]}"
        if self.log_tail:
            text += "\n  last lines of its log:\n" + "\n".join(f"    {line}" for line in self.log_tail)
        if self.consequences:
            text += "\n  then:\n" + "\n".join(f"    {line}" for line in self.consequences)
        return text


class WorkerRaisedError(WorkerError):
    """The rank's own code raised; ``exception_type`` names the class, ``remote_traceback`` has the text."""

    def __init__(self, message: str, *, remote_traceback: str = "", exception_type: str = "", **facts: object) -> None:
        super().__init__(message, **facts)  # type: ignore[arg-type]  # the facts of WorkerError, passed through
        self.remote_traceback = remote_traceback
        self.exception_type = exception_type

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  remote traceback:\n{_indent(self.remote_traceback)}" if self.remote_traceback else text


class WorkerExitedError(WorkerError):
    """The rank's process ended: ``exit_code`` is as in subprocess, negative for a signal."""

    def __init__(self, message: str | None = None, *, exit_code: int, **facts: object) -> None:
        super().__init__(message or describe_exit(exit_code), **facts)  # type: ignore[arg-type]  # as above
        self.exit_code = exit_code


class WorkerStalledError(WorkerError):
    """The rank had not done a step, call or STOP within the deadline; ``missing`` lists every rank that had not.

    ``stacks`` has, by rank, what each process was doing then: the kernel's word and the Python stacks of its threads.
    """

    def __init__(self, message: str, *, missing: Sequence[int] = (), stacks: Mapping[int, str] | None = None, **facts: object) -> None:
        super().__init__(message, **facts)  # type: ignore[arg-type]  # as above
        self.missing = tuple(missing)
        self.stacks = dict(stacks or {})

    def __str__(self) -> str:
        stacks = (f"\n  rank {rank} was at:\n{_indent(text)}" for rank, text in sorted(self.stacks.items()))
        return super().__str__() + "".join(stacks)


class ResultTakenError(ZspmdError, RuntimeError):
    """The answers to a step were awaited before: they belong to whoever did."""


class ReplayDivergedError(ZspmdError):
    """A rank that is replayed alone asks for another collective than was recorded, or for one more."""


class RequestError(ZspmdError):
    """One request cannot be served; the engine lives on."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class InternalError(ZspmdError):
    """A broken invariant: a bug of zspmd. Please report it with the message."""


def describe_exit(exit_code: int) -> str:
    """Say in words how a process ended; ``exit_code`` as in subprocess, negative for a signal."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (if nobody sent it, the kernel's out-of-memory killer may have: see dmesg)" if exit_code == -signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def _one_line(text: str) -> str:
    """Return a text of another node as one line that does nothing to a terminal."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())


def _some(names: Sequence[str], limit: int = 16) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
