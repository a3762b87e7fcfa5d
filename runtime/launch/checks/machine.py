"""What a launch needs of this machine, one function a check; ``zspmd-run doctor`` runs them all, here or through a node's agent."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from ....errors import ConfigError, LaunchError
from ..devices import available_cores, num_cuda_devices
from ..launch_id import generate_launch_id
from ..ports import FIRST_PORT, LAST_PORT, reserve_port
from ..resources import KERNEL_ADVICE, check_resources, missing_facilities
from ..run_directory import RunDirectory, remove_dead_directories
from .cgroup_limits import cgroup_cores, cgroup_limit
from .check_records import FAIL, OK, WARN, Check, MachineChecks
from .leftovers import find_leftovers

MIN_PYTHON = (3, 10)
_MIN_FILES = 4096
_MIN_PROCESSES = 4096
_MIN_SHARED_BYTES = 256 << 20
_MIN_TEMPORARY_BYTES = 64 << 20
_MIN_MEMORY_BYTES = 1 << 30
_GIB = 1 << 30
_SMI_S = 10.0
_SMI = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_gpu_memory", "--format=csv,noheader")
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_MAX_SHOWN = 8


def check_python() -> Check:
    """The interpreter and the operating system."""
    text = f"{platform.python_version()} ({platform.python_implementation()}), {platform.system()} {platform.release()}, {sys.executable}"
    if sys.platform != "linux":
        return Check("python", FAIL, text, "zspmd needs Linux: pidfd, parent-death signals, subreapers")
    if sys.version_info < MIN_PYTHON:
        return Check("python", FAIL, text, f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("python", OK, text)


def check_packages() -> Check:
    """The packages that zspmd requires, and their versions."""
    try:
        required = importlib.metadata.requires("zspmd") or []
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", WARN, "zspmd is not installed, only imported from a directory", "pip install it for its packages")
    found, wrong = [], []
    for requirement in required:
        match = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?", requirement.strip())
        if match is None:  # those of the extras
            continue
        name, wanted = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if wanted and _numbers(version) < _numbers(wanted):
            wrong.append(f"{name} {version} is older than {wanted}")
    if wrong:
        return Check("packages", FAIL, "; ".join(wrong), "pip install --upgrade " + " ".join(entry.split()[0] for entry in wrong))
    return Check("packages", OK, ", ".join(found))


def check_zmq() -> Check:
    """The ZeroMQ library: its version, and what it was built with."""
    text = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.__version__}"
    if zmq.zmq_version_info() < (4, 2) or not zmq.has("ipc"):
        return Check("zmq", FAIL, text, "needs libzmq 4.2 or newer with ipc: pip install --upgrade pyzmq")
    if not zmq.has("curve"):
        return Check("zmq", WARN, f"{text}, without CURVE", "one node needs none; launches over several do: install pyzmq's own wheels")
    return Check("zmq", OK, f"{text}, with CURVE")


def check_kernel() -> Check:
    """The system calls by which ranks are supervised."""
    missing = missing_facilities()
    return Check("kernel", FAIL, "; ".join(missing), KERNEL_ADVICE) if missing else Check("kernel", OK, "pidfd, memfd, children")


def check_devices() -> Check:
    """GPUs, as far as their files tell; torch's view is checked apart."""
    count, visible = num_cuda_devices(), os.environ.get("CUDA_VISIBLE_DEVICES")
    text = f"{count} CUDA devices" + ("" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}")
    if driver := _driver_version():
        text += f", driver {driver}"
    if shutil.which("nvidia-smi") and not count and visible is None:
        return Check(
            "devices",
            WARN,
            f"{text}, and nvidia-smi is there",
            "there are no files /dev/nvidia*: pass the GPUs into the container",
        )
    return Check("devices", OK, text if count else f"{text}: ranks compute on the CPU")


def check_device_use() -> Check:
    """Programs of anybody that compute on the GPUs."""
    if not num_cuda_devices() or not shutil.which(_SMI[0]):
        return Check("device use", OK, "no GPUs, or no nvidia-smi to tell")
    try:
        told = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Check("device use", WARN, f"nvidia-smi fails: {error}", "run it: the driver hangs, or differs from its library")
    users = [" ".join(line.replace(",", "").split()) for line in told.splitlines() if line.strip()]
    if users:
        return Check("device use", WARN, _some(users), "they take memory and time of ranks: end them, or choose other devices")
    return Check("device use", OK, "nobody computes on them")


def check_limits() -> Check:
    """Limits of this user's processes, and what they leave for a launch."""
    files, processes = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_NPROC)[0]
    core, locked = resource.getrlimit(resource.RLIMIT_CORE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = f"files {_limit(files)}, processes {_limit(processes)}, locked memory {_limit(locked)}, core {_limit(core)}"
    pids = cgroup_limit("pids.max")
    text += "" if pids is None else f", this cgroup may have {pids} processes and threads"
    try:
        check_resources(1)
    except (ConfigError, LaunchError) as error:
        return Check("limits", FAIL, text, str(error))
    low = [f"ulimit -n {_MIN_FILES}"] if _is_below(files, _MIN_FILES) else []
    low += [f"ulimit -u {_MIN_PROCESSES}"] if _is_below(processes, _MIN_PROCESSES) else []
    low += ["a higher limit of pids for the container or session"] if pids is not None and pids < _MIN_PROCESSES else []
    return Check("limits", WARN, text, f"many ranks may not fit: {' and '.join(low)}") if low else Check("limits", OK, text)


def check_shared_memory() -> Check:
    """/dev/shm, which torch's data loaders use."""
    path = Path("/dev/shm")
    if not path.is_dir() or not os.access(path, os.W_OK):
        return Check("shm", WARN, "/dev/shm is missing or cannot be written", "data loaders with workers need it: mount a tmpfs there")
    free = shutil.disk_usage(path).free
    text = f"/dev/shm has {free / _GIB:.1f} GiB free"
    if free < _MIN_SHARED_BYTES:
        return Check("shm", WARN, text, "data loaders with workers may run out of it: remount it larger, or docker run --shm-size=1g")
    return Check("shm", OK, text)


def check_run_directory() -> Check:
    """The directory for the sockets of launches: private, short enough, on a disk with room. Removes what dead launches left."""
    try:
        dead = remove_dead_directories()
        directory = RunDirectory.create(generate_launch_id())
    except (ConfigError, LaunchError, OSError) as error:
        return Check("run directory", FAIL, str(error), "set XDG_RUNTIME_DIR to a short path that only you can read")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(directory.endpoint("control").partition("://")[2])
        free = shutil.disk_usage(directory.path).free
    except OSError as error:
        return Check("run directory", FAIL, f"{directory.path}: {error}", "no socket can be made there: set XDG_RUNTIME_DIR elsewhere")
    finally:
        directory.remove()
    text = f"{directory.path.parent}, {free / _GIB:.1f} GiB free"
    if dead:
        text += f"; removed what dead launches had left: {', '.join(dead)}"
    if free < _MIN_TEMPORARY_BYTES:
        return Check("run directory", WARN, text, "the disk is nearly full: free some space")
    return Check("run directory", OK, text)


def check_ports() -> Check:
    """The ports from which launches choose."""
    try:
        reserve_port(generate_launch_id(), "doctor").close()
    except (ConfigError, LaunchError) as error:
        return Check("ports", FAIL, str(error), "end what holds them: ss -ltnp")
    text = f"{FIRST_PORT} to {LAST_PORT} of 127.0.0.1"
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if ephemeral.is_file() and int(ephemeral.read_text().split()[0]) <= LAST_PORT:
        numbers = "-".join(ephemeral.read_text().split())
        return Check(
            "ports",
            WARN,
            f"{text}; outgoing connections use {numbers} too",
            "ports in use are passed over; or raise ip_local_port_range",
        )
    return Check("ports", OK, text)


def check_cores() -> Check:
    """Processor cores and threads."""
    cores, present = available_cores(), os.cpu_count() or 1
    text = f"{cores} usable of {present}"
    if (allowed := cgroup_cores()) is not None:
        text += f", this cgroup may use the time of {allowed:g}"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        text += f", OMP_NUM_THREADS={threads} is set and passed on to every rank"
    return Check("cores", OK, text)


def check_memory() -> Check:
    """Main memory, and the limit of the cgroup."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(match[1]) * 1024 if match else 0
    text = f"{available / _GIB:.1f} GiB available"
    if (allowed := cgroup_limit("memory.max")) is not None:
        available = min(available, allowed)
        text += f", this cgroup may use {allowed / _GIB:.1f} GiB"
    if available < _MIN_MEMORY_BYTES:
        return Check("memory", WARN, text, "ranks that exceed it are killed (SIGKILL): raise the limit, or start fewer")
    return Check("memory", OK, text)


def check_host() -> Check:
    """This machine's name, which gloo looks up unless it is told an interface."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Check("host", WARN, f"{name}: {error}", "scripts with gloo look it up: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo")
    return Check("host", OK, f"{name}, {address}")


def check_leftovers() -> Check:
    """Processes of this user whose launch has ended without them."""
    left = find_leftovers()
    if not left:
        return Check("leftovers", OK, "no process of a launch without its agent")
    text = f"no agent above {_some([f'pid {one.pid} of launch {one.launch_id} ({one.command})' for one in left])}"
    return Check("leftovers", WARN, text, f"if their launch has ended: kill -9 {' '.join(str(one.pid) for one in left)}")


MACHINE_CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_packages,
    check_zmq,
    check_kernel,
    check_devices,
    check_device_use,
    check_cores,
    check_memory,
    check_limits,
    check_shared_memory,
    check_run_directory,
    check_ports,
    check_host,
    check_leftovers,
)


def check_machine() -> MachineChecks:
    """Return what all of them say."""
    return MachineChecks(tuple(check() for check in MACHINE_CHECKS))


def _driver_version() -> str:
    """Return the version of the NVIDIA driver that the kernel has loaded, or nothing."""
    try:
        match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", _DRIVER_VERSION.read_text())
    except OSError:
        return ""
    return match[1] if match else ""


def _some(entries: Sequence[str]) -> str:
    return "; ".join(entries[:_MAX_SHOWN]) + (f" and {len(entries) - _MAX_SHOWN} more" if len(entries) > _MAX_SHOWN else "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _is_below(value: int, wanted: int) -> bool:
    return value != resource.RLIM_INFINITY and value < wanted
