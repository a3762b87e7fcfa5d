"""Hosts for tests of several nodes: namespaces of this machine, joined by links of their own.

::

    switch (a network of its own)      host k: network, mounts, host name of its own
      bridge ── port0 ═════ veth ═════ eth0 10.x.y.1/24   node0, where tests run the driver
             ── port1 ═════ veth ═════ eth0 10.x.y.2/24   node1
             ── ...

A host has its own ``lo``, host name, ``/etc/hosts`` (all nodes by name), ``/dev/shm``, ``/run`` with ``XDG_RUNTIME_DIR`` in it, and home
directory as far as ``/etc/passwd`` says. It shares the other files, such as checkout and ``/tmp``, and the numbers of processes. The
network of the machine itself is neither used nor changed. Root only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.cluster_host import RUNTIME_DIR, ClusterHost, NoClusterError, check_possible
from support.host_proc import listeners_of
from support.polling import block_until

RSH_CLIENT, RSH_SERVER = (Path(__file__).with_name(f"rsh_{end}.py") for end in ("client", "server"))
DEADLINE_S = 10.0
_PREFIX = "zc"  # short: a socket's path has 107 bytes at most
_DROPPING_TABLE = 66  # of routes; what looks there is lost
_DEAD_NEIGHBOUR = "02:00:00:00:00:fe"
_ALLOW, _DROP = 10, 20  # of routing rules; the lower comes first


class Cluster:
    """A context manager: hosts ``node0``, ``node1``, ..., and what can happen to them.

    Everything in them is killed at the end, also at that of the test process by SIGKILL.
    """

    def __init__(self, num_hosts: int = 3) -> None:
        """Describe ``num_hosts`` hosts; entering makes them, or raises NoClusterError."""
        self.num_hosts = num_hosts
        self.hosts: list[ClusterHost] = []
        self._switch = ClusterHost("switch", "", Path())
        self._added: list[str] = []
        self._started: list[subprocess.Popen[Any]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        check_possible()
        _remove_directories_of_the_dead()
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-")))
            self.hosts = [self._describe(index) for index in range(self.num_hosts)]
            for host in self.hosts:
                host.write_files(self._names())
            everything = [*self.hosts, self._switch]
            keepers = [stack.enter_context(host.keeping()) for host in everything]
            for host, keeper in zip(everything, keepers):
                host.wait_made(keeper)
            self._connect()
            stack.enter_context(self._serving_rsh())
            stack.callback(self._end_processes)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, index: int, argv: Sequence[str], *, env: Mapping[str, str | None] | None = None, **popen: Any) -> subprocess.Popen[Any]:
        """Start a program in a host; the pid of the result is the program's own.

        Args:
            env: variables on top of this process's, None for one that shall not be set; ``XDG_RUNTIME_DIR`` is the host's.
            popen: as of ``subprocess.Popen``; ``cwd`` is this process's unless it is said.
        """
        variables = {**os.environ, "XDG_RUNTIME_DIR": RUNTIME_DIR, **(env or {})}
        directory = str(popen.pop("cwd", None) or os.getcwd())
        command = [*self.hosts[index].entering, "sh", "-c", 'cd "$0" && exec "$@"', directory, *argv]
        process = subprocess.Popen(command, env={name: value for name, value in variables.items() if value is not None}, **popen)
        self._started.append(process)
        return process

    def read(self, index: int, argv: Sequence[str], **options: Any) -> str:
        """Run a program in a host to its end and return what it printed; raises AssertionError with all that it said if it failed."""
        process = self.run(index, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, f"exit {process.returncode} of {argv} in {self.hosts[index].name}: {output}{errors}"
        return str(output)

    def hostfile(self, slots: Sequence[int]) -> str:
        """Return a hostfile with the first hosts and these slots."""
        return "".join(f"{host.name} slots={count}\n" for host, count in zip(self.hosts, slots))

    def rsh(self, *, banner: str = "", delay_s: float = 0.0) -> str:
        """Return a command for ``--rsh``, used in a host; it is as ssh towards both its ends, and its connection is on the links.

        Args:
            banner: what the other side prints on its standard output before the command runs.
            delay_s: how long the connection takes to be made.
        """
        hosts = {host.name: {"pid": host.pid, "address": host.address, "home": str(host.home)} for host in self.hosts}
        by_address = {host.address: hosts[host.name] for host in self.hosts}
        fd, path = tempfile.mkstemp(".json", "rsh", self.directory)
        with open(fd, "w") as file:
            settings = {"server": str(self._rsh_socket), "banner": banner, "delay_s": delay_s, "runtime_dir": RUNTIME_DIR}
            settings["pythonpath"] = os.environ.get("PYTHONPATH", "")  # what is installed here is installed there
            json.dump({"hosts": {**hosts, **by_address}, **settings}, file)
        return shlex.join([sys.executable, "-I", "-S", str(RSH_CLIENT), path])

    def processes(self, index: int) -> list[int]:
        """Return the pids that run in a host, but those of ssh servers."""
        return self.hosts[index].processes()

    def listeners(self, index: int) -> set[tuple[str, int]]:
        """Return (address, port) of every TCP socket that listens in a host, an ssh server's too."""
        return listeners_of(self.hosts[index].pid)

    def cut(self, index: int, *, at: str = "switch") -> None:
        """Pull a host's cable: what is sent is lost and nobody is told. At "host" its own interface goes down, and it knows at once."""
        if at == "host":
            self._ip(self.hosts[index], ["link set eth0 down"])
        else:
            self._ip(self._switch, [f"link set port{index} down"])

    def heal(self, index: int) -> None:
        """Undo ``cut``."""
        self._ip(self.hosts[index], ["link set eth0 up"])
        self._ip(self._switch, [f"link set port{index} up"])

    def block(self, index: int, other: int, *, but_system_ports: bool = False) -> None:
        """Lose what goes from one host to another, in silence as a firewall does; a blackhole route would tell the sender at once.

        Args:
            but_system_ports: let through TCP from and to ports below 1024, such as that of ssh.
        """
        nowhere = self.hosts[0].address.rpartition(".")[0] + ".254"
        to = f"to {self.hosts[other].address}"
        allowed = [f"rule add pref {_ALLOW} {to} ipproto tcp {end} 1-1023 lookup main" for end in ("sport", "dport")]
        self._ip(
            self.hosts[index],
            [
                f"neighbour replace {nowhere} lladdr {_DEAD_NEIGHBOUR} nud permanent dev eth0",
                f"route replace default via {nowhere} dev eth0 table {_DROPPING_TABLE}",
                f"rule add pref {_DROP} {to} lookup {_DROPPING_TABLE}",
                *(allowed if but_system_ports else ()),
            ],
        )

    def unblock(self, index: int) -> None:
        """Undo every ``block`` of a host."""
        preferences = [line.partition(":")[0] for line in self.read(index, ["ip", "rule"]).splitlines()]
        self._ip(self.hosts[index], [f"rule del pref {each}" for each in preferences if each in (str(_ALLOW), str(_DROP))])

    def add_interface(self, index: int, name: str, address: str) -> None:
        """Give a host another interface, with an address such as "192.168.7.1/24"; nobody is reached through it."""
        host, end = self.hosts[index], f"end{index}.{len(self._added)}"
        self._ip(self._switch, [f"link add {end} type veth peer name {name} netns {host.pid}", f"link set {end} up"])
        self._added.append(end)
        self._ip(host, [f"address add {address} dev {name}", f"link set {name} up"])

    def kill(self, index: int) -> None:
        """Kill all that runs in a host but its ssh server, and wait until it is gone."""

        def is_empty() -> bool:
            pids = self.hosts[index].killable()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        block_until(is_empty, DEADLINE_S)

    def power_off(self, index: int) -> None:
        """End a host, its ssh server too: its link goes first, so that nobody is told. After ``heal`` it is there with nothing running.

        What it had in memory is lost too, run directories among it.
        """
        self.cut(index)
        self.hosts[index].server_pids.clear()
        self.kill(index)
        self.hosts[index].remove_left_behind()

    def check_nothing_left(self, timeout_s: float = DEADLINE_S) -> None:
        """Assert that within ``timeout_s`` nothing of a launch is left in any host."""

        def left() -> list[str]:
            return [what for host in self.hosts for what in host.left_behind()]

        try:
            block_until(lambda: not left(), timeout_s)
        except TimeoutError:
            raise AssertionError(f"left behind after {timeout_s:g} s: " + "; ".join(left())) from None

    def reset(self) -> None:
        """Make all as it was at first, for the next test: links, rules, /etc/hosts, processes; servers stay."""
        for index, host in enumerate(self.hosts):
            self.heal(index)
            self.unblock(index)
            self._ip(host, ["neighbour flush dev eth0"])  # who was not reached is asked for again a second later only
        self._ip(self._switch, [f"link del {end}" for end in self._added])
        self._added.clear()
        self._end_processes()
        for host in self.hosts:
            host.remove_left_behind()
            host.hosts_file.write_text(self._names())

    def _describe(self, index: int) -> ClusterHost:
        network = f"10.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # for people; no two clusters share a link
        return ClusterHost(f"node{index}", f"{network}.{index + 1}", self.directory / f"node{index}")

    @property
    def _rsh_socket(self) -> Path:
        return self.directory / "rsh"

    @contextlib.contextmanager
    def _serving_rsh(self) -> Iterator[None]:
        """Run what stands for the hosts' rsh servers."""
        argv = [sys.executable, "-I", "-S", str(RSH_SERVER), str(self._rsh_socket)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
            server.communicate(timeout=DEADLINE_S)

    def _names(self) -> str:
        """Return /etc/hosts."""
        return "127.0.0.1 localhost\n::1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts)

    def _connect(self) -> None:
        """Lay the cables."""
        lines = ["link add bridge type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set bridge up"]
        for index, host in enumerate(self.hosts):
            lines.append(f"link add port{index} type veth peer name eth0 netns {host.pid}")
            lines.append(f"link set port{index} master bridge up")
        try:
            self._ip(self._switch, lines)
        except RuntimeError as error:
            if "not supported" not in str(error):
                raise
            raise NoClusterError(f"this kernel lacks bridges or veth links: {error}") from error
        for host in self.hosts:
            self._ip(host, ["link set lo up", f"address add {host.address}/24 dev eth0", "link set eth0 up"])

    def _ip(self, host: ClusterHost, lines: Sequence[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run([*host.entering, "ip", "-batch", "-"], input=text, capture_output=True, text=True, timeout=DEADLINE_S)
        if done.returncode:
            raise RuntimeError(f"ip in {host.name}: {done.stderr.strip()}; it was told:\n{text}")

    def _end_processes(self) -> None:
        """Kill what runs in the hosts, wait for what this process has started, and close what leads to it."""
        for index in range(self.num_hosts):
            self.kill(index)
        for process in self._started:
            process.wait(DEADLINE_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # of what was written and never read
                        stream.close()
        self._started.clear()


def _remove_directories_of_the_dead() -> None:
    """Remove what test processes have left that were killed; of their hosts nothing else is left."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)  # another test process does so too
