"""What ``Cluster.rsh`` names: ``python -I -S rsh_client.py CONFIG [ssh's options] TARGET COMMAND...``, as ssh towards both its ends.

::

    caller ── stdin, stdout, stderr ── this process ══ 4 TCP connections on the links ══ server, in the target's namespaces
                                          │             in, out, err, status              └ session: sh -c COMMAND
                                          └── asks for it ── rsh_server.py ── starts it, so that the caller is no ancestor ──┘

A cut link holds the bytes back, and they arrive when it heals; the death of either process closes the connections, and nothing else is
known of it on the other side. The command gets the few variables that an ssh server gives, and a session of its own. No encryption.
"""

import getopt
import json
import os
import select
import socket
import sys
import time
from typing import Any, NoReturn

SSH_OPTIONS = "1246ab:c:e:fgi:kl:m:no:p:qstvxAB:CD:E:F:GI:J:KL:MNO:PQ:R:S:TVw:W:XYy"
CHANNELS = ("in", "out", "err", "status")
CANNOT = 255
CONNECT_S = 5.0


def fail(message: str) -> NoReturn:
    """Say on stderr why there is no connection, and exit as ssh does."""
    print(f"rsh: {message}", file=sys.stderr)
    sys.exit(CANNOT)


def relay(channels: list[socket.socket]) -> int:
    """Pass bytes on until the command has ended and both its outputs are at their end; return its exit code.

    What goes to the command is never waited for: it may itself wait until its output is taken.
    """
    to_remote, out, err, status = channels
    to_remote.setblocking(False)
    sources: list[Any] = [0, out, err, status]
    unsent, code = b"", CANNOT
    while len(sources) > (0 in sources):
        readable, writable, _ = select.select(sources[bool(unsent) :] if 0 in sources else sources, [to_remote] if unsent else [], [])
        if writable:
            unsent = send_some(to_remote, unsent)
        for source in readable:
            data = os.read(0, 65536) if source == 0 else receive(source)
            if not data:
                sources.remove(source)
                if source == 0:
                    end(to_remote)
            elif source == 0:
                unsent = send_some(to_remote, data)
            elif source is status:
                code = data[0]
            else:
                write_all(1 if source is out else 2, data)
    return code


def receive(channel: socket.socket) -> bytes:
    """Return what came, nothing at the end of a connection, however it ended."""
    try:
        return channel.recv(65536)
    except OSError:
        return b""


def send_some(channel: socket.socket, data: bytes) -> bytes:
    """Send what fits and return the rest; a command that reads no more gets none."""
    try:
        return data[channel.send(data) :]
    except BlockingIOError:
        return data
    except OSError:
        return b""


def end(channel: socket.socket) -> None:
    """Let the command find the end of its input, if it still has one."""
    try:
        channel.shutdown(socket.SHUT_WR)
    except OSError:
        return


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(fd, data) :]


def ask_for_server(config: dict[str, Any], host: str, command: str) -> int:
    """Have a server started for one command, and return its port; 0 where there can be none."""
    request = {
        "host": config["hosts"][host],
        "command": command,
        **{name: config[name] for name in ("banner", "runtime_dir", "pythonpath")},
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(config["server"])
        server.sendall(json.dumps(request).encode())
        server.shutdown(socket.SHUT_WR)
        return int(server.recv(16) or 0)


def main() -> None:
    """Connect, run the command, and exit with its code."""
    with open(sys.argv[1]) as file:
        config = json.load(file)
    _, (target, *command) = getopt.getopt(sys.argv[2:], SSH_OPTIONS)
    name = target.rpartition("@")[2]
    if name not in config["hosts"]:
        fail(f"Could not resolve hostname {name}: Name or service not known")
    time.sleep(config["delay_s"])
    address, port = config["hosts"][name]["address"], ask_for_server(config, name, " ".join(command))
    try:
        channels = [socket.create_connection((address, port), CONNECT_S) for _ in CHANNELS]
    except OSError as error:
        fail(f"connect to host {name} port {port}: {error.strerror or 'Connection timed out'}")
    for channel in channels:
        channel.settimeout(None)
    sys.exit(relay(channels))


if __name__ == "__main__":
    main()
