"""The exit codes of ``zspmd-run`` that are its own, and which of them stands for an error."""

from __future__ import annotations

from ....errors import ConfigError, LaunchError, PeerLostError, ReadyTimeoutError, RequestError, WorkerExitedError, ZspmdError

USAGE_ERROR, START_FAILED, NODE_LOST, NOT_READY, TIMED_OUT = 2, 120, 121, 122, 124


def exit_code(error: ZspmdError) -> int:
    """Return the exit code that stands for an error; a rank's own code where it is the first cause."""
    if isinstance(error, WorkerExitedError):
        return 128 - error.exit_code if error.exit_code < 0 else max(1, error.exit_code)
    if isinstance(error, ReadyTimeoutError):
        return NOT_READY
    if isinstance(error, LaunchError):
        return START_FAILED
    if isinstance(error, PeerLostError):
        return NODE_LOST
    return USAGE_ERROR if isinstance(error, (ConfigError, RequestError)) else 1


def cause_kind(error: ZspmdError) -> str:
    """Return the ``cause.kind`` of a report that stands for an error."""
    if isinstance(error, WorkerExitedError):
        return "rank_signal" if error.exit_code < 0 else "rank_exit"
    code = exit_code(error)
    return {START_FAILED: "start_failed", NODE_LOST: "node_lost", NOT_READY: "not_ready"}.get(code, "error")
