"""One host of a ``Cluster``: its files, its keeper, and what runs there."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.host_proc import comm_of, command_of, pids_in

KEEPER = Path(__file__).with_name("cluster_keeper.py")
RUNTIME_DIR = f"/run/user/{os.getuid()}"
OWN_FILES = ("hosts", "passwd", "shadow")  # in /etc
TOOLS = ("ip", "nsenter", "sh")
DEADLINE_S = 10.0


class NoClusterError(Exception):
    """This system does not let us have hosts; tests skip with the text."""


@dataclass
class ClusterHost:
    """One host, whose files in ``directory`` may be changed at any time.

    ``pid`` is the process that keeps its namespaces; ``server_pids`` are its ssh servers. Neither counts when it is asked what runs there.
    """

    name: str
    address: str
    directory: Path
    pid: int = 0
    server_pids: set[int] = field(default_factory=set)

    @property
    def home(self) -> Path:
        """Where ``~`` leads whoever logs in."""
        return self.directory / "home"

    @property
    def hosts_file(self) -> Path:
        """What is ``/etc/hosts`` there; write it in place."""
        return self.directory / "hosts"

    @property
    def namespace(self) -> str:
        """The path of its network namespace."""
        return f"/proc/{self.pid}/ns/net"

    @property
    def entering(self) -> list[str]:
        """The words before a command that have it run in this host, at ``/``; its pid stays the same."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--net", "--uts", "--"]

    def path(self, path: str) -> Path:
        """Return what is at ``path`` of that host, as seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    def processes(self) -> list[int]:
        """Return the pids that run in this host but those of ssh servers: after a cut link these wait for long, as on any machine."""
        return [pid for pid in self.killable() if not comm_of(pid).startswith("sshd")]

    def killable(self) -> list[int]:
        """Return the pids that run in this host, sessions of an ssh server too."""
        return [pid for pid in pids_in(self.namespace) if pid != self.pid and pid not in self.server_pids]

    def left_behind(self) -> list[str]:
        """Return in words what a launch may have left here: processes, run directories, shared memory."""
        return [
            *(f"{self.name}: process {pid} {command_of(pid)}" for pid in self.processes()),
            *(f"{self.name}: {entry}" for directory in self._launch_directories() for entry in directory.iterdir()),
        ]

    def remove_left_behind(self) -> None:
        """Remove the directories and shared memory among it; the processes must have ended."""
        for directory in self._launch_directories():
            for entry in directory.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _launch_directories(self) -> list[Path]:
        return [path for path in (self.path(f"{RUNTIME_DIR}/zspmd"), self.path("/dev/shm")) if path.is_dir()]

    def write_files(self, names: str) -> None:
        """Write what differs from the machine's files; ``names`` is for /etc/hosts."""
        self.home.mkdir(parents=True)
        self.hosts_file.write_text(names)
        (self.directory / "passwd").write_text(_passwd(self.home))
        user = pwd.getpwuid(os.getuid()).pw_name
        (self.directory / "shadow").write_text(f"{user}:*:19000:0:99999:7:::\n")  # an ssh server takes an account with a "!" for locked

    @contextlib.contextmanager
    def keeping(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start what keeps this host there, and end it with all that runs there; a switch, which has no address, has no files either."""
        files = [f"{self.directory / name}=/etc/{name}" for name in OWN_FILES] if self.address else []
        argv = [sys.executable, "-I", "-S", str(KEEPER), self.name, *files]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                _, errors = process.communicate(timeout=2 * DEADLINE_S)
                if self.pid and process.returncode:
                    raise RuntimeError(f"the keeper of {self.name} ended with {process.returncode}: {errors.decode()}")

    def wait_made(self, keeper: subprocess.Popen[bytes]) -> None:
        """Wait until this host is there; raises NoClusterError if the system does not let us."""
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        if keeper.stdout.readline() == b"ready\n":
            self.pid = keeper.pid
            return
        said = keeper.stderr.read().decode().strip()
        refused = "PermissionError" in said or f"Errno {errno.ENOSYS}" in said or f"Errno {errno.EINVAL}" in said
        raise (NoClusterError if refused else RuntimeError)(f"cannot make a host of namespaces: {said.splitlines()[-1]}")


def check_possible() -> None:
    """Raise NoClusterError, with the reason, where there can be no hosts."""
    if os.geteuid() != 0:
        raise NoClusterError("hosts of network namespaces need root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoClusterError(f"hosts of network namespaces need {', '.join(missing)} (Debian: iproute2, util-linux)")


def _passwd(home: Path) -> str:
    """Return the machine's users with this one's home at ``home``, and with the user that an ssh server needs."""
    own = pwd.getpwuid(os.getuid())
    users = [user for user in pwd.getpwall() if user.pw_name not in (own.pw_name, "sshd")]
    lines = [":".join(map(str, (*user[:5], user.pw_dir, user.pw_shell))) for user in users]
    shell = shutil.which("bash") or "/bin/sh"
    mine = f"{own.pw_name}:x:{own.pw_uid}:{own.pw_gid}::{home}:{shell}"
    return "\n".join([mine, *lines, "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin", ""])
