"""Where the ssh server of the tests comes from: installed, or Debian's package unpacked below ``build/`` once, without installing it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "openssh-server"
PACKAGES = ("openssh-server", "libwrap0")
TIMEOUT_S = 60.0


class NoSshdError(Exception):
    """There is no ssh server here and none can be had; tests skip with the text."""


@dataclass(frozen=True)
class SshdFiles:
    """The program, and where its libraries lie; empty where the system knows."""

    program: Path
    library_path: str = ""


def find_sshd() -> SshdFiles:
    """Return the ssh server; raises NoSshdError."""
    files, problem = _find()
    if files is None:
        raise NoSshdError(problem)
    return files


@functools.cache
def _find() -> tuple[SshdFiles | None, str]:
    """Look once: a machine without network would take its time for each test."""
    missing = [tool for tool in ("ssh", "ssh-keygen") if shutil.which(tool) is None]
    if missing:
        return None, f"tests of ssh need {', '.join(missing)} (Debian: openssh-client)"
    installed = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if installed:
        return SshdFiles(Path(installed)), ""
    if not CACHE.is_dir():
        problem = _unpack()
        if problem:
            return None, f"no sshd, and it cannot be unpacked from Debian's packages: {problem}"
    libraries = {str(path.parent) for path in CACHE.rglob("*.so.*")}
    return SshdFiles(CACHE / "usr/sbin/sshd", ":".join(sorted(libraries))), ""


def _unpack() -> str:
    """Fill the cache, whoever else does so at the same time; return what is in the way, empty for nothing."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "apt-get and dpkg-deb are not there"
    CACHE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="openssh-", dir=CACHE.parent) as name:
        directory = Path(name)
        problem = _download(directory)
        if problem:
            return problem
        for package in directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, directory / "root"], check=True, timeout=TIMEOUT_S)
        try:
            os.rename(directory / "root", CACHE)
        except OSError:
            if not CACHE.is_dir():  # another process was not faster
                raise
    return ""


def _download(directory: Path) -> str:
    """Fetch the packages, with fresh lists where those that are there do not know them; return what is in the way."""
    apt = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root"]
    problem = ""
    for argv in ([*apt, "download", *PACKAGES], [*apt, "update"], [*apt, "download", *PACKAGES]):
        try:
            done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{' '.join(argv)} took more than {TIMEOUT_S:g} s"
        if "download" in argv and done.returncode == 0:
            return ""
        problem = done.stderr.strip().replace("\n", "; ") or f"{' '.join(argv)} ended with {done.returncode}"
    return problem
