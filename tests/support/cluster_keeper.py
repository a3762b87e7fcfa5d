"""Keeps one host of a ``Cluster`` there: ``python -I -S cluster_keeper.py NAME [FILE=PLACE ...]``; for the switch, the same without files.

This process is what the host's namespaces live by: network, mounts and host name. In a host ``/run`` and ``/dev/shm`` are its own, ``/sys``
shows its own interfaces, and each FILE stands at PLACE. It says "ready", waits for the end of its standard input, which is the end of
the test process in whatever way, and kills what is left in its network. So nothing has a name, and there is nothing to clean up later.
"""

import ctypes
import os
import signal
import sys
import time

NEW_MOUNTS, NEW_NAMES, NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000
BIND, MOVE, RECURSIVE, PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
DEADLINE_S = 10.0
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise the error of the C library's call that has just returned."""
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def mount(source: str, place: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount as mount(2) does; raises OSError."""
    check(libc.mount(source.encode(), place.encode(), kind.encode() or None, flags, options.encode() or None), f"mount at {place}")


def make_host(files: list[str]) -> None:
    """Give this process mounts of its own: what two machines do not share, these hosts do not share either."""
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", "/dev/shm", "tmpfs")
    for option in files:
        source, _, place = option.partition("=")
        mount(source, place, flags=BIND)
    mount("tmpfs", "/run", "tmpfs", options="mode=755")
    os.makedirs(f"/run/user/{os.getuid()}", 0o700)
    os.mkdir("/run/sshd", 0o755)
    mount_sys("/run/sys")


def mount_sys(place: str) -> None:
    """Have ``/sys/class/net`` show the interfaces of this network; cgroups stay where they are."""
    os.mkdir(place)
    mount("sysfs", place, "sysfs")
    if os.path.isdir("/sys/fs/cgroup"):
        mount("/sys/fs/cgroup", f"{place}/fs/cgroup", flags=BIND | RECURSIVE)
    mount(place, "/sys", flags=MOVE)


def others() -> list[int]:
    """Return the pids of this network but this one."""
    own = os.stat("/proc/self/ns/net").st_ino
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if os.stat(f"/proc/{name}/ns/net").st_ino == own:
                    found.append(int(name))
            except OSError:  # it has ended
                continue
    return found


def kill_others() -> None:
    """Kill what is in this network, until there is nothing."""
    deadline = time.monotonic() + DEADLINE_S
    while pids := others():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            sys.exit(f"cluster_keeper: still there {DEADLINE_S:g} s after SIGKILL: {pids}")
        time.sleep(0.002)


def main(name: str, files: list[str]) -> None:
    """Make the namespaces, say so, and keep them to the end of the standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of the terminal: the test process decides
        signal.signal(number, signal.SIG_IGN)
    check(libc.unshare(NEW_NETWORK | NEW_NAMES | NEW_MOUNTS), "unshare")
    check(libc.sethostname(name.encode(), len(name)), "sethostname")
    if files:
        make_host(files)
    print("ready", flush=True)
    sys.stdin.buffer.read()
    kill_others()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
