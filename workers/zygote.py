"""A process that has imported torch and forks ranks, which then need not import it; ``python -m zspmd.workers.zygote SOCKET_FD AGENT_PID``.

It starts no thread and touches no GPU, since neither survives a fork. The agent sends requests over a socket pair: one datagram
each, with a file in memory (msgpack) and the descriptors of the rank. The first request imports; each later one forks:

    agent ----request----> zygote --fork--> intermediate --fork--> rank
                              <---- pid ------- |                    :  waits for "go"
                           waitpid <--- exits --+                    :
          (the agent, as subreaper, is now the rank's parent)        :
                              ----- go ----------------------------> :  setsid, dies with the agent
                              <---- ready -------------------------- +  entry()
    agent <------ pid ------- |
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import msgpack

from .. import process
from ..descriptors import receive_fds

_PID = struct.Struct("<I")
_MAX_FDS = 5
_MAX_ERROR_CHARACTERS = 32_000


def main() -> None:
    """Serve the agent until it closes the socket."""
    process.die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    agent_pid = int(sys.argv[2])
    with socket.socket(fileno=int(sys.argv[1])) as agent:
        agent.set_inheritable(False)
        while True:
            request, fds = _receive(agent)
            if request is None:
                return
            if "preload" in request:
                reply: dict[str, object] = _preload(request["preload"], request["sys_path"])
            else:
                reply = _fork_rank(agent, agent_pid, request, fds)
            for fd in fds:
                os.close(fd)
            agent.send(msgpack.packb(reply, unicode_errors="surrogateescape"))


def _receive(agent: socket.socket) -> tuple[dict[str, object] | None, list[int]]:
    """Return the request and the rank's descriptors: stdout, stderr, stacks, perhaps the bootstrap; None when the agent has closed."""
    data, fds = receive_fds(agent, 1, _MAX_FDS)
    if not data:
        return None, []
    with open(fds[0], "rb") as file:
        request: dict[str, object] = msgpack.unpackb(file.read(), unicode_errors="surrogateescape")
    return request, fds[1:]


def _preload(modules: object, sys_path: object) -> dict[str, object]:
    assert isinstance(modules, list), "the agent sends a list"
    assert isinstance(sys_path, list), "the agent sends a list"
    if sys_path:
        sys.path[:] = sys_path
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException:  # whatever an import raises, SystemExit included, is the answer to this request
            return {"error": f"importing {module!r} to fork ranks from failed:\n{traceback.format_exc()[-_MAX_ERROR_CHARACTERS:]}"}
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        names = ", ".join(_thread_name(thread) for thread in threads)
        return {
            "error": f"importing {', '.join(modules)} started threads ({names}), and a process with threads cannot be forked safely; "
            'import less, or choose the start method "spawn"'
        }
    # What is alive now lives as long as any rank: keep the collector from touching it, which would unshare its pages.
    gc.collect()
    gc.freeze()
    return {"preloaded": len(modules)}


def _thread_name(thread: str) -> str:
    with open(f"/proc/self/task/{thread}/comm") as name:
        return name.read().strip()


def _fork_rank(agent: socket.socket, agent_pid: int, request: dict[str, object], fds: list[int]) -> dict[str, object]:
    go_read, go_write = os.pipe()
    news_read, news_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        intermediate = os.fork()
        if intermediate == 0:
            _run_intermediate(lambda: _run_rank(agent, agent_pid, request, fds, go_read, go_write, news_write), news_read, news_write)
        os.close(news_write)
        news_write = -1
        pid_bytes = os.read(news_read, _PID.size)
        os.waitpid(intermediate, 0)
        if len(pid_bytes) < _PID.size:
            return {"error": "a rank could not be forked: no process left, see ulimit -u and dmesg"}
        os.write(go_write, b"g")
        os.read(news_read, 1)  # "ready", or the end of a rank that did not get that far: its exit code tells the agent
        return {"pid": _PID.unpack(pid_bytes)[0]}
    except OSError as error:
        return {"error": f"a rank could not be forked: {error}"}
    finally:
        for fd in (go_read, go_write, news_read, news_write):
            if fd >= 0:
                os.close(fd)


def _run_intermediate(run_rank: Callable[[], NoReturn], news_read: int, news_write: int) -> NoReturn:
    """Fork the rank and end, which makes the agent its parent."""
    try:
        os.close(news_read)
        pid = os.fork()
        if pid == 0:
            run_rank()
        os.write(news_write, _PID.pack(pid))
    finally:
        os._exit(0)  # never back into the zygote's loop


def _run_rank(
    agent: socket.socket, agent_pid: int, request: dict[str, object], fds: list[int], go_read: int, go_write: int, news_write: int
) -> NoReturn:
    exit_code = 1
    try:
        os.close(go_write)
        os.read(go_read, 1)
        os.setsid()
        process.die_with_parent(agent_pid)
        os.write(news_write, b"r")
        for fd in (go_read, news_write):
            os.close(fd)
        agent.close()
        _take_place(request, fds)
        exit_code = _call_entry(str(request["entry"]))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the last frame of this process: print what it was, and never unwind into the zygote's loop
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)


def _take_place(request: dict[str, object], fds: list[int]) -> None:
    """Put on the rank's descriptors, environment, directory and signals."""
    environment = request["environment"]
    assert isinstance(environment, dict), "the agent sends a map"
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    os.close(fds[0])
    os.close(fds[1])
    os.environ.clear()
    os.environ.update(environment)
    os.environ[process.STACKS_FD] = str(fds[2])
    if len(fds) > 3:
        os.environ[process.BOOTSTRAP_FD] = str(fds[3])
    os.chdir(str(request["cwd"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["zspmd-rank"]


def _call_entry(entry: str) -> int:
    """Call "module:function" and return the exit code that it asks for, as the interpreter would."""
    module, _, function = entry.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)()
    except SystemExit as stop:
        result = stop.code
    if result is None or isinstance(result, int):
        return (result or 0) & 0xFF
    print(result, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
