"""The other end of ``rsh_client.py``: ``python -I -S rsh_server.py SOCKET``, until the end of its standard input.

It stands for the machines themselves, as sshd does: what a client has started on a host is no descendant of that client, so that nobody
who ends all that comes below him ends it too.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

CHANNELS = ("in", "out", "err", "status")
CANNOT = 255
CONNECT_S = 5.0
SYSTEM_PORTS = range(514, 1024)  # as ssh's, these pass the firewalls of Cluster.block
NEW_MOUNTS, NEW_NAMES, NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000


def enter(pid: int) -> None:
    """Move this process into the namespaces of another."""
    libc = ctypes.CDLL(None, use_errno=True)
    fds = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "mnt")]
    for fd, kind in zip(fds, (NEW_NETWORK, NEW_NAMES, NEW_MOUNTS)):
        if libc.setns(fd, kind):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(fd)


def listen(address: str) -> socket.socket:
    """Return a socket that listens on the first free system port; the caller reads the port from it."""
    for port in SYSTEM_PORTS:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, port))
            server.listen(len(CHANNELS))
            return server
        except OSError:  # another server is about to be connected to
            server.close()
    raise OSError(f"no free port at {address}")


def serve(asker: socket.socket) -> None:
    """Be the server for one command: run it with the connections as its standard streams, and tell how it ended."""
    with asker:
        request = json.loads(b"".join(iter(lambda: asker.recv(65536), b"")))
        host = request["host"]
        os.setsid()
        enter(host["pid"])
        server = listen(host["address"])
        asker.sendall(str(server.getsockname()[1]).encode())
    with server:
        server.settimeout(CONNECT_S)
        accepted = [server.accept() for _ in CHANNELS]
    channels = [connection for connection, _ in accepted]
    session = os.fork()
    if not session:
        run(channels, accepted[0][1], request)
    for channel in channels[:3]:
        channel.close()
    status = os.waitstatus_to_exitcode(os.waitpid(session, 0)[1])
    channels[3].sendall(bytes([status if status >= 0 else CANNOT]))


def run(channels: list[socket.socket], peer: tuple[str, int], request: dict[str, Any]) -> NoReturn:
    """Become the command."""
    os.setsid()
    for fd, channel in enumerate(channels[:3]):
        channel.setblocking(True)
        os.dup2(channel.fileno(), fd)
    os.closerange(3, 1024)
    os.write(1, request["banner"].encode())
    host = request["host"]
    os.chdir(host["home"])
    environment = {
        "HOME": host["home"],
        "LANG": "C.UTF-8",
        "LOGNAME": "root",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "SHELL": "/bin/sh",
        "SSH_CONNECTION": f"{peer[0]} {peer[1]} {host['address']} 22",
        "USER": "root",
        "XDG_RUNTIME_DIR": request["runtime_dir"],
    }
    if request["pythonpath"]:
        environment["PYTHONPATH"] = request["pythonpath"]
    os.execve("/bin/sh", ["sh", "-c", request["command"]], environment)


def reap(*_: object) -> None:
    """Wait for servers that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def fork_server(asker: socket.socket) -> None:
    """Have a process of its own serve."""
    if os.fork():
        asker.close()
        return
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)  # those of the test process are not the server's to hold
    try:
        serve(asker)
    except OSError:  # the link is cut, or the client was killed
        os._exit(CANNOT)
    os._exit(0)


def main(path: str) -> None:
    """Listen, say so, and fork a server for each who asks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of the terminal: the test process decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, reap)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([0, listener.fileno()], [], [])
            if 0 in readable:
                return
            fork_server(listener.accept()[0])


if __name__ == "__main__":
    main(sys.argv[1])
