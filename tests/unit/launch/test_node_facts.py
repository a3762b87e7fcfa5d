"""What an agent finds out about its node, and that it costs no import of what ranks use."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.facts import facts
from support.polling import block_until

import zspmd
from zspmd.errors import BadFrameError
from zspmd.runtime.launch.agent_protocol import AgentRecord, RecordReader, encode_record
from zspmd.runtime.launch.nodes import node_facts
from zspmd.runtime.launch.nodes.node_facts import CODE, UNLIMITED, Examine, NodeFacts, code_digest, gather_facts, own_addresses


def test_the_facts_are_those_of_this_machine(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print()\n")
    told = gather_facts(Examine(str(tmp_path), "train.py"))
    assert told.hostname == socket.gethostname()
    assert told.executable == sys.executable
    assert told.python_version == ".".join(map(str, sys.version_info[:3]))
    assert told.versions["zspmd"] == zspmd.__version__
    assert all(told.versions[name][0].isdigit() for name in ("torch", "pyzmq", "msgpack", "numpy"))
    assert told.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f"net:[{told.network_id}]" == os.readlink("/proc/self/ns/net")
    assert "lo 127.0.0.1" in told.addresses
    assert told.script_sha256 == hashlib.sha256(b"print()\n").hexdigest()
    assert (told.cwd_error, told.script_error) == ("", "")
    assert told.cores >= 1
    assert told.shared_bytes > 0
    assert told.file_limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(
    "record", [Examine("/x", "y"), Examine(), facts(1), facts(2, file_limit=UNLIMITED)], ids=lambda r: type(r).__name__
)
def test_records_come_back_equal(record: AgentRecord) -> None:
    assert list(RecordReader().feed(encode_record(record))) == [record]


def test_what_is_gathered_can_be_sent() -> None:
    told = gather_facts(Examine("/", ""))
    assert list(RecordReader().feed(encode_record(told))) == [told]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hostname": "x" * 257}, "NodeFacts.hostname has length 257; the limit is 256"),
        ({"cores": -1}, "NodeFacts.cores is -1, outside 0 to"),
        ({"addresses": ("lo 127.0.0.1",) * 4097}, "NodeFacts.addresses has length 4097; the limit is 4096"),
        ({"versions": {"torch": 2}}, "NodeFacts.versions is not a map of texts to texts"),
        ({"loopback_name": 1}, "NodeFacts.loopback_name is a int, not a bool"),
    ],
    ids=["name", "cores", "addresses", "versions", "flag"],
)
def test_facts_out_of_bounds_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        encode_record(facts(1, **changes))


@pytest.mark.parametrize(
    ("cwd", "script", "cwd_error", "script_error"),
    [
        ("gone", "", "{tmp}/gone: No such file or directory", ""),
        ("file", "", "{tmp}/file: Not a directory", ""),
        (".", "gone.py", "", "{tmp}/./gone.py: No such file or directory"),
        (".", "folder", "", "{tmp}/./folder: Is a directory"),
        ("gone", "x.py", "{tmp}/gone: No such file or directory", "{tmp}/gone/x.py: No such file or directory"),
        (".", "/dev/null", "", ""),
    ],
    ids=["no directory", "a file for a directory", "no script", "a directory for a script", "neither", "an absolute script"],
)
def test_what_cannot_be_used_is_told_with_its_path(tmp_path: Path, cwd: str, script: str, cwd_error: str, script_error: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    told = gather_facts(Examine(f"{tmp_path}/{cwd}", script))
    assert told.cwd_error == cwd_error.format(tmp=tmp_path)
    assert told.script_error == script_error.format(tmp=tmp_path)


def test_nothing_is_looked_for_where_nothing_is_named() -> None:
    told = gather_facts(Examine())
    assert (told.cwd_error, told.script_error, told.script_sha256) == ("", "", "")


def test_no_package_of_ranks_is_imported() -> None:
    program = (
        "import sys; from zspmd.runtime.launch.nodes.node_facts import Examine, gather_facts; before = 'psutil' in sys.modules; "
        "gather_facts(Examine('/')); print(before, [name for name in ('torch', 'numpy', 'zmq', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False []\n"), done.stderr


def test_an_absent_package_has_an_empty_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_facts, "PACKAGES", ("no-such-package",))
    assert gather_facts(Examine()).versions == {"zspmd": zspmd.__version__, CODE: code_digest(), "no-such-package": ""}


def test_addresses_have_their_interface_and_no_scope() -> None:
    found = [entry.split(" ") for entry in own_addresses()]
    assert all(len(entry) == 2 for entry in found)
    assert not [address for _, address in found if "%" in address]


def test_an_interface_that_is_down_has_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    down = {name: stats._replace(isup=name != "lo") for name, stats in psutil.net_if_stats().items()}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: down)
    assert not [entry for entry in own_addresses() if entry.startswith("lo ")]


def test_the_digest_changes_with_any_file_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "zspmd"
    (package / "runtime" / "launch").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "errors.py").write_text("1")
    (package / "runtime" / "launch" / "agent.py").write_text("2")
    monkeypatch.setattr(node_facts, "_ROOT", package)
    first = code_digest()
    (package / "tests" / "test_it.py").write_text("of the checkout, not of the package")
    assert code_digest() == first
    (package / "runtime" / "launch" / "agent.py").write_text("3")
    assert code_digest() != first


def test_no_limit_of_files_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert gather_facts(Examine()).file_limit == UNLIMITED


@pytest.mark.parametrize(
    ("addresses", "is_loopback"),
    [(["127.0.1.1"], True), (["127.0.1.1", "::1"], True), (["127.0.1.1", "10.0.0.1"], False), (["fe80::1%eth0"], False), (None, False)],
    ids=["as Debian has it", "both kinds", "a real one too", "link-local", "no address"],
)
def test_a_name_that_leads_to_loopback_alone(monkeypatch: pytest.MonkeyPatch, addresses: list[str] | None, is_loopback: bool) -> None:
    def look_up(name: str, port: None) -> list[Any]:
        if addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert gather_facts(Examine()).loopback_name == is_loopback


def test_a_resolver_that_does_not_answer_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def look_up(name: str, port: None) -> list[Any]:
        release.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(node_facts, "_LOOK_UP_S", 0.05)
    assert not gather_facts(Examine()).loopback_name
    release.set()
    block_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "zspmd-look-up"], 5.0)


def test_the_ssh_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 4711 10.0.0.1 22")
    assert gather_facts(Examine()).ssh_connection == "10.0.0.9 4711 10.0.0.1 22"
    monkeypatch.setenv("SSH_CONNECTION", "x" * 1000)
    assert isinstance(next(iter(RecordReader().feed(encode_record(gather_facts(Examine()))))), NodeFacts)
