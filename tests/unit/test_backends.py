"""Which backend is chosen, which are refused, and what vendors may add."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.distributions import install_distribution

from zspmd.backends import choose_communicator, vendor_entry_points
from zspmd.errors import ConfigError, TopologyError


@pytest.mark.parametrize(
    ("name", "devices", "is_one_node", "machine", "chosen"),
    [
        ("auto", ["cpu", "cpu"], True, "x86_64", "shm"),
        ("auto", ["cpu", "cpu"], False, "x86_64", "gloo"),
        ("auto", ["cpu"], True, "aarch64", "gloo"),
        ("auto", ["cuda:0", "cuda:1"], True, "aarch64", "nccl"),
        ("auto", ["cuda:0", "cuda:0"], False, "x86_64", "nccl"),
        ("shm", ["cpu"], True, "AMD64", "shm"),
        ("gloo", ["cpu"], False, "x86_64", "gloo"),
        ("nccl", ["cuda:0"], True, "x86_64", "nccl"),
        ("nccl-raw", ["cuda:0"], False, "x86_64", "nccl-raw"),
    ],
    ids=["cpus", "two nodes", "weak ordering", "gpus", "gpus of two nodes", "shm", "gloo", "nccl", "nccl-raw"],
)
def test_what_fits_is_chosen(
    name: str, devices: list[str], is_one_node: bool, machine: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert choose_communicator(name, devices, is_one_node=is_one_node) == chosen


@pytest.mark.parametrize(
    ("name", "devices", "is_one_node", "machine", "error", "words"),
    [
        ("mpi", ["cpu"], True, "x86_64", ConfigError, "communicator is 'mpi'; choose one of auto, shm, gloo, nccl, nccl-raw$"),
        ("glooo", ["cpu"], True, "x86_64", ConfigError, r"communicator is 'glooo' \(did you mean 'gloo'\?\); choose one of"),
        ("auto", ["cpu", "cuda:0"], True, "x86_64", TopologyError, "no collective spans CPUs and GPUs"),
        ("auto", ["xpu:0"], True, "x86_64", TopologyError, "no built-in communicator serves 'xpu:0'; name a vendor's: none is installed"),
        ("nccl", ["cpu"], True, "x86_64", TopologyError, "'nccl' does not serve 'cpu'; on GPUs use nccl or nccl-raw, on CPUs shm or gloo"),
        ("shm", ["cuda:0"], True, "x86_64", TopologyError, "'shm' does not serve 'cuda:0'"),
        ("shm", ["cpu"], True, "aarch64", ConfigError, "needs an x86-64 processor, this is aarch64; use gloo"),
        ("shm", ["cpu"], False, "x86_64", TopologyError, "'shm' serves the ranks of one node only; use gloo"),
    ],
    ids=["unknown", "misspelt", "mixed", "another device", "nccl on a cpu", "shm on a gpu", "weak ordering", "shm on two nodes"],
)
def test_what_does_not_fit_is_refused(
    name: str, devices: list[str], is_one_node: bool, machine: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(error, match=words):
        choose_communicator(name, devices, is_one_node=is_one_node)


def test_a_vendor_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_distribution(tmp_path, "acme", {"acme": "module_that_is_not_there:create"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_communicator("acme", ["xpu:0", "xpu:1"]) == "acme"
    assert choose_communicator("auto", ["cuda:0"]) == "nccl"
    with pytest.raises(ConfigError, match=r"'acm' \(did you mean 'acme'\?\); choose one of auto, shm, gloo, nccl, nccl-raw, acme"):
        choose_communicator("acm", ["cpu"])


@pytest.mark.parametrize(
    ("distributions", "words"),
    [
        ({"acme": {"gloo": "acme:gloo"}}, "the communicator 'gloo' of acme: acme:gloo has the name of a built-in one; uninstall it"),
        ({"acme": {"auto": "acme:auto"}}, "the communicator 'auto' of acme: acme:auto has the name of a built-in one"),
        ({"acme": {"fast": "acme:fast"}, "bolt": {"fast": "bolt:fast"}}, "(acme|bolt): .* both add a communicator 'fast'; uninstall one"),
        ({"acme": {"f" * 65: "acme:fast"}}, "has a name of more than 64 characters"),
    ],
    ids=["built-in", "auto", "two vendors", "too long"],
)
def test_names_that_clash_are_refused(
    distributions: dict[str, dict[str, str]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, communicators in distributions.items():
        install_distribution(tmp_path, name, communicators)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        vendor_entry_points()
    with pytest.raises(ConfigError, match=words):
        choose_communicator("gloo", ["cpu"])
