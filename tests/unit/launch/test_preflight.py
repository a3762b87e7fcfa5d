"""Every rule by which nodes are judged before a launch, and exactly what is said of each."""

from __future__ import annotations

from typing import Any

import pytest
from support.facts import FACTS, facts

from zspmd.errors import LaunchError, PreflightError
from zspmd.runtime.launch.nodes.node_facts import CODE, UNLIMITED
from zspmd.runtime.launch.nodes.preflight import (
    NodeProblem,
    Place,
    check_capacity,
    compare_facts,
    judge_listening,
    judge_reached,
    note_facts,
    reach_targets,
)

SHARED = "start from a directory that all nodes share"
FEWER = "give it fewer slots, name its devices with devices= in the hostfile, or check CUDA_VISIBLE_DEVICES and nvidia-smi there"
PIP = "/opt/py/bin/python -m pip install"


def test_equal_nodes_have_no_problems() -> None:
    assert compare_facts(FACTS, [("a", facts(1)), ("b", facts(2))], local_host="node0") == []


@pytest.mark.parametrize(
    ("changes", "check", "text", "advice"),
    [
        pytest.param(
            {"versions": {"zspmd": "0.2.0"}},
            "zspmd",
            "0.2.0, the driver has 0.1.0",
            f"install the driver's version there: {PIP} zspmd==0.1.0",
            id="zspmd",
        ),
        pytest.param(
            {"versions": {CODE: "bbbbbbbbbbbb"}},
            "zspmd",
            "0.1.0 with other code than the driver's: bbbbbbbbbbbb, not aaaaaaaaaaaa",
            "install both from the same commit, or have the nodes share one directory",
            id="code of one version",
        ),
        pytest.param(
            {"python_version": "3.10.12", "executable": "/usr/bin/python3"},
            "python",
            "3.10.12 at /usr/bin/python3, the driver has 3.11.7",
            "install Python 3.11 there, or name another interpreter with python= in the hostfile",
            id="python minor",
        ),
        pytest.param({"versions": {"torch": "2.12.1"}}, "torch", "2.12.1, node0 has 2.13.0", f"{PIP} torch==2.13.0", id="torch"),
        pytest.param(
            {"versions": {"torch": "2.13.0+cpu"}}, "torch", "2.13.0+cpu, node0 has 2.13.0", f"{PIP} torch==2.13.0", id="torch build"
        ),
        pytest.param({"versions": {"torch": ""}}, "torch", "not installed, node0 has 2.13.0", f"{PIP} torch==2.13.0", id="no torch"),
        pytest.param({"versions": {"numpy": "1.26.4"}}, "numpy", "1.26.4, the driver has 2.4.6", f"{PIP} numpy==2.4.6", id="numpy"),
        pytest.param({"versions": {"pyzmq": "26.1.0"}}, "pyzmq", "26.1.0, the driver has 27.1.0", f"{PIP} pyzmq==27.1.0", id="pyzmq"),
        pytest.param(
            {"versions": {"msgpack": ""}}, "msgpack", "not installed, the driver has 1.2.3", f"{PIP} msgpack==1.2.3", id="no msgpack"
        ),
        pytest.param(
            {"cwd_error": "/home/lee/x: No such file or directory"},
            "cwd",
            "/home/lee/x: No such file or directory",
            "make that directory there, or start from one that all nodes share",
            id="no directory",
        ),
        pytest.param(
            {"script_error": "/x/train.py: No such file or directory", "script_sha256": ""},
            "script",
            "/x/train.py: No such file or directory",
            f"copy it there, or {SHARED}",
            id="no script",
        ),
        pytest.param(
            {"script_sha256": "2" * 64},
            "script",
            "is another file than the driver's: sha256 222222222222, not 111111111111",
            f"copy the driver's there, or {SHARED}",
            id="another script",
        ),
        pytest.param(
            {"boot_id": "boot-0"},
            "same host",
            "is the same machine as node0 (node1)",
            "write one entry with the slots of both, or allow it: --allow-same-host",
            id="the driver's machine again",
        ),
    ],
)
def test_a_node_that_differs_is_named_with_the_fix(changes: dict[str, Any], check: str, text: str, advice: str) -> None:
    assert compare_facts(FACTS, [("a", facts(1, **changes))], local_host="node0") == [NodeProblem("a", check, text, advice)]


@pytest.mark.parametrize(
    "changes",
    [
        {"python_version": "3.11.2"},
        {"versions": {"numpy": "2.4.1"}},
        {"versions": {"pyzmq": "27.1.9"}},
        {"versions": {"msgpack": "1.2.3rc1"}},
        {"hostname": "node0"},
        {"boot_id": "boot-0", "network_id": "2"},
        {"file_limit": 10, "cores": 1, "cuda_devices": 8, "shared_bytes": 0, "loopback_name": True},
    ],
    ids=["python patch", "numpy patch", "pyzmq patch", "msgpack candidate", "equal names", "a container of its own network", "sizes"],
)
def test_some_differences_are_none(changes: dict[str, Any]) -> None:
    assert compare_facts(FACTS, [("a", facts(1, **changes))], local_host="node0") == []


def test_torch_is_not_compared_with_a_driver_that_has_no_ranks() -> None:
    bare = facts(0, versions={"torch": ""})
    nodes = [("a", facts(1)), ("b", facts(2)), ("c", facts(3, versions={"torch": "2.9.0"}))]
    assert compare_facts(bare, nodes) == [NodeProblem("c", "torch", "2.9.0, a has 2.13.0", f"{PIP} torch==2.13.0")]


def test_a_package_that_no_node_has_is_no_difference() -> None:
    absent = {"torch": ""}
    assert compare_facts(facts(0, versions=absent), [("a", facts(1, versions=absent))], local_host="node0") == []


def test_a_driver_that_has_not_read_the_script_compares_none() -> None:
    assert compare_facts(facts(0, script_sha256=""), [("a", facts(1))]) == []


def test_every_problem_of_every_host_is_told_at_once() -> None:
    found = compare_facts(
        FACTS, [("a", facts(1, python_version="3.12.0", cwd_error="/x: gone")), ("b", facts(2, versions={"numpy": "1.0"}))], local_host="l"
    )
    assert [(problem.host, problem.check) for problem in found] == [("a", "python"), ("a", "cwd"), ("b", "numpy")]


@pytest.mark.parametrize(
    ("local_host", "allow", "blamed"),
    [("node0", False, ["b", "c"]), (None, False, ["c"]), ("node0", True, [])],
    ids=["with the driver's", "the driver is no node", "allowed"],
)
def test_two_entries_on_one_machine(local_host: str | None, allow: bool, blamed: list[str]) -> None:
    nodes = [("a", facts(1)), ("b", facts(2, boot_id="boot-0")), ("c", facts(3, boot_id="boot-0"))]
    found = compare_facts(FACTS, nodes, local_host=local_host, allow_same_host=allow)
    assert [problem.host for problem in found if problem.check == "same host"] == blamed


@pytest.mark.parametrize(
    ("changes", "devices", "problems"),
    [
        pytest.param({}, ["cpu"] * 8, [], id="cpu"),
        pytest.param({"cuda_devices": 2}, ["cuda:0", "cuda:1"], [], id="as many"),
        pytest.param(
            {"cuda_devices": 2},
            ["cuda:1", "cuda:2", "cuda:3", "cuda:3"],
            [
                NodeProblem(
                    "a",
                    "devices",
                    "cuda:2, cuda:3 would be used, and it shows 2 CUDA devices",
                    FEWER,
                )
            ],
            id="too few",
        ),
        pytest.param(
            {"file_limit": 71},
            ["cpu"],
            [
                NodeProblem(
                    "a",
                    "limits",
                    "a process may open 71 files, and 1 rank needs 72",
                    "raise nofile in /etc/security/limits.conf there, or LimitNOFILE of its sshd",
                )
            ],
            id="descriptors",
        ),
        pytest.param({"file_limit": 72}, ["cpu"], [], id="just enough descriptors"),
        pytest.param({"file_limit": UNLIMITED}, ["cpu"] * 64, [], id="no limit"),
    ],
)
def test_what_a_node_lacks_for_its_ranks(changes: dict[str, Any], devices: list[str], problems: list[NodeProblem]) -> None:
    assert check_capacity("a", facts(1, **changes), devices) == problems


def test_a_loopback_name_is_noted() -> None:
    assert note_facts([("a", facts(1)), ("b", facts(2, loopback_name=True))]) == [
        NodeProblem(
            "b",
            "name",
            "its name node2 leads to loopback addresses alone",
            "ranks are told their interface (GLOO_SOCKET_IFNAME), others look the name up: give it the node's address in /etc/hosts",
        )
    ]


# --- ways ---


def places(count: int) -> list[Place]:
    return [Place(f"n{number}", f"10.0.0.{number}", 4000 + number) for number in range(count)]


DRIVER = Place("driver", "10.0.1.1", 5000)


def test_up_to_sixteen_nodes_everybody_reaches_everybody() -> None:
    nodes = places(16)
    targets = reach_targets(nodes, DRIVER)
    assert [set(mine) for mine in targets] == [{DRIVER, *nodes} - {node} for node in nodes]
    assert all(len(mine) == 16 for mine in targets)


def test_more_nodes_reach_node_0_and_the_driver() -> None:
    nodes = places(17)
    targets = reach_targets(nodes, DRIVER)
    assert targets[0] == [DRIVER]
    assert targets[1:] == [[DRIVER, nodes[0]]] * 16


def test_a_driver_on_node_0_with_one_listener_is_tried_once() -> None:
    nodes = places(2)
    assert reach_targets(nodes, Place("driver", nodes[0].address, nodes[0].port)) == [[nodes[1]], [nodes[0]]]


OTHER = "or choose another network: --iface, or addr= in the hostfile"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("no answer within 5 s", f"a firewall drops it or the way back is missing: open TCP from a to 10.0.0.0, {OTHER}"),
        ("Connection refused", f"a firewall rejects it, or 10.0.0.0 is another machine there: open TCP from a to it, {OTHER}"),
        ("No route to host", f"a has no way to this network: see 'ip route get 10.0.0.0' there, {OTHER}"),
        ("Network is unreachable", f"a has no way to this network: see 'ip route get 10.0.0.0' there, {OTHER}"),
        ("Connection reset by peer", f"see what is between a and 10.0.0.0 (a proxy, address translation), {OTHER}"),
    ],
    ids=["dropped", "refused", "no route", "no network", "anything else"],
)
def test_a_way_that_is_closed_is_named_with_the_fix(error: str, advice: str) -> None:
    target, *_ = places(1)
    assert judge_reached("a", [DRIVER, target], ["", error]) == [NodeProblem("a", "tcp", f"n0 at 10.0.0.0 port 4000: {error}", advice)]


def test_open_ways_are_no_problem_and_silence_is_one() -> None:
    assert judge_reached("a", [DRIVER], [""]) == []
    (problem,) = judge_reached("a", [DRIVER, places(1)[0]], [""])
    assert problem.text == "n0 at 10.0.0.0 port 4000: its agent does not say"
    assert judge_reached("a", [DRIVER], ["", "more than was asked"]) == []


def test_an_address_that_cannot_be_bound_is_a_problem() -> None:
    assert judge_listening("a", "10.0.0.1", "") == []
    assert judge_listening("a", "10.0.0.1", "Cannot assign requested address") == [
        NodeProblem(
            "a",
            "listen",
            "cannot listen at 10.0.0.1: Cannot assign requested address",
            "choose another of its addresses with addr= or iface= in the hostfile",
        )
    ]


# --- the error ---


def test_the_error_is_a_table() -> None:
    error = PreflightError(
        [NodeProblem("node1", "python", "3.10.12, the driver has 3.11.7", "install it"), NodeProblem("n2", "cwd", "/x:\n gone", "make it")],
        fine=["node0", "node3"],
    )
    assert isinstance(error, LaunchError)
    assert error.problems[1].host == "n2"
    assert str(error) == (
        "no rank was started: 2 of 4 hosts cannot be used as they are\n"
        "  host   check   what                            fix\n"
        "  node1  python  3.10.12, the driver has 3.11.7  install it\n"
        "  n2     cwd     /x: gone                        make it\n"
        "  fine: node0, node3"
    )


def test_a_long_table_is_cut() -> None:
    lines = str(PreflightError([NodeProblem(f"n{number}", "tcp", "x" * 500, "y") for number in range(100)], fine=["f"] * 20)).splitlines()
    assert len(lines) == 1 + 1 + 64 + 1 + 1
    assert lines[1].index("fix") == lines[2].index("x" * 500) + 80 + 2
    assert lines[-2:] == ["  and 36 more", f"  fine: {', '.join('f' * 16)} and 4 more"]
