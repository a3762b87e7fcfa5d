"""Real ssh servers on the hosts of a ``Cluster``, with keys made for them.

The user's own keys and settings are neither used nor changed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from support.cluster import Cluster
from support.cluster_host import ClusterHost
from support.polling import block_until
from support.sshd_files import find_sshd

PORT = 22
DEADLINE_S = 10.0


class SshServers:
    """A context manager: one server on each host of a cluster.

    What a login shell would say is a host's ``home / ".bashrc"``; ssh's servers have bash read it, for commands too.

    Attributes:
        command: for ``--rsh`` and for people; used in a host.
        options: for ``--ssh-options`` and the like, where "ssh" is said elsewhere.
    """

    def __init__(
        self, cluster: Cluster, *, port: int = PORT, accepts_keys: bool = True, is_known: bool = True, max_startups: int = 100
    ) -> None:
        """Describe them; entering starts them, or raises NoSshdError.

        Args:
            port: where they listen; the client's settings name it.
            accepts_keys: let the user's key in; otherwise they ask for a password.
            is_known: the client knows the servers' key.
            max_startups: how many may be logging in at a time; the server drops others.
        """
        self._cluster = cluster
        self._port = port
        self._accepts_keys = accepts_keys
        self._is_known = is_known
        self._max_startups = max_startups
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SshServers:
        self._files = find_sshd()
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssh", dir=self._cluster.directory)))
            self._write_client_files()
            stack.callback(self._stop_all)
            for index in range(self._cluster.num_hosts):
                self._start(index)
            self.wait_listening()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def options(self) -> tuple[str, ...]:
        return ("-F", str(self.directory / "config"))

    @property
    def command(self) -> str:
        return " ".join(("ssh", *self.options))

    def start(self, index: int) -> None:
        """Start the server of a host again, after ``stop`` or the host's loss of power."""
        self.stop(index)
        self._start(index)
        self.wait_listening()

    def stop(self, index: int) -> None:
        """End the server of a host; those who are connected stay so, others are refused."""
        process = self._processes.pop(index, None)
        if process is not None:
            process.terminate()
            process.wait(DEADLINE_S)
            self._cluster.hosts[index].server_pids.discard(process.pid)

    def log(self, index: int) -> str:
        """Return what a host's server said."""
        return (self.directory / f"log{index}").read_text()

    def wait_listening(self) -> None:
        """Wait until every server listens; raises AssertionError with what it said if it ended."""
        for index, process in self._processes.items():
            address = (self._cluster.hosts[index].address, self._port)

            def is_up(index: int = index, process: subprocess.Popen[bytes] = process, address: tuple[str, int] = address) -> bool:
                assert process.poll() is None, f"sshd ended with {process.returncode}: {self.log(index)}"
                return address in self._cluster.listeners(index)

            block_until(is_up, DEADLINE_S)

    def _start(self, index: int) -> None:
        host = self._cluster.hosts[index]
        settings = self.directory / f"sshd{index}"
        settings.write_text(self._server_settings(host))
        argv = [*host.entering, str(self._files.program), "-D", "-f", str(settings), "-E", str(self.directory / f"log{index}")]
        environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": self._files.library_path}
        process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL)
        self._processes[index] = process
        host.server_pids.add(process.pid)

    def _stop_all(self) -> None:
        for index in list(self._processes):
            self.stop(index)

    def _server_settings(self, host: ClusterHost) -> str:
        path = os.environ.get("PYTHONPATH", "")  # what is installed here is installed there
        return f"""
            ListenAddress {host.address}
            Port {self._port}
            HostKey {self.directory}/server
            AuthorizedKeysFile {self.directory}/user.pub
            PubkeyAuthentication {_yes(self._accepts_keys)}
            PasswordAuthentication {_yes(not self._accepts_keys)}
            KbdInteractiveAuthentication no
            PermitRootLogin yes
            StrictModes no
            UsePAM no
            UseDNS no
            PidFile none
            MaxStartups {self._max_startups}
            SetEnv XDG_RUNTIME_DIR=/run/user/{os.getuid()} {f"PYTHONPATH={path}" if path else ""}
        """

    def _write_client_files(self) -> None:
        for name in ("server", "user"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", self.directory / name]
            subprocess.run(argv, check=True, timeout=DEADLINE_S)
        key = (self.directory / "server.pub").read_text()
        hosts = [name for host in self._cluster.hosts for name in (host.name, host.address)]
        patterns = [name if self._port == PORT else f"[{name}]:{self._port}" for name in hosts]
        (self.directory / "known_hosts").write_text("".join(f"{pattern} {key}" for pattern in patterns) if self._is_known else "")
        (self.directory / "config").write_text(f"""
            Host *
            Port {self._port}
            IdentityFile {self.directory}/user
            IdentitiesOnly yes
            UserKnownHostsFile {self.directory}/known_hosts
            GlobalKnownHostsFile /dev/null
            UpdateHostKeys no
            KexAlgorithms curve25519-sha256  # a third of the default's time
        """)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
