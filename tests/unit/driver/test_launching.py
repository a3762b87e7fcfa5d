"""What ``launch`` takes and refuses, before anything is started."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from support.workers import Echo

import zspmd
from zspmd.backends import choose_communicator
from zspmd.errors import ConfigError, TopologyError
from zspmd.runtime.driver.launching import check_ranks, launch, worker_reference


class Outer:
    class Inner(zspmd.Worker):
        pass


def test_a_class_is_referred_to_by_module_and_qualname() -> None:
    assert worker_reference(Echo) == ("support.workers:Echo", "")
    assert worker_reference(Outer.Inner) == (f"{__name__}:Outer.Inner", "")
    assert worker_reference("package.module:Outer.Inner") == ("package.module:Outer.Inner", "")


def test_a_class_of_the_main_script_carries_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")
    script.__file__ = "/some/script.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    main_class = type("Mine", (zspmd.Worker,), {"__module__": "__main__"})
    assert worker_reference(main_class) == ("__main__:Mine", "/some/script.py")
    assert worker_reference("__main__:Mine") == ("__main__:Mine", "/some/script.py")
    del script.__file__
    with pytest.raises(ConfigError, match=r"worker Mine is defined at a prompt, .* put it into a file"):
        worker_reference(main_class)


@pytest.mark.parametrize(
    "worker",
    ["Echo", "module:", ":Echo", "", None, Echo(), 7],
    ids=["no module", "no class", "only a class", "empty", "None", "an instance", "a number"],
)
def test_what_is_no_worker_reference_is_refused(worker: Any) -> None:
    with pytest.raises(ConfigError, match="worker is "):
        worker_reference(worker)


def test_a_class_inside_a_function_is_refused() -> None:
    class Local(zspmd.Worker):
        pass

    with pytest.raises(ConfigError, match="defined inside a function; move it to the top level"):
        worker_reference(Local)


@pytest.mark.parametrize(
    ("ranks", "chosen"), [("all", (0, 1, 2)), ([2, 0], (2, 0)), ((1,), (1,)), (range(3), (0, 1, 2))], ids=["all", "list", "tuple", "range"]
)
def test_ranks_keep_their_order(ranks: Any, chosen: tuple[int, ...]) -> None:
    assert check_ranks("ranks", ranks, 3) == chosen


@pytest.mark.parametrize(
    "ranks",
    [[], [0, 0], [3], [-1], [True], [1.0], ["0"], "0", "ALL"],
    ids=["none", "repeat", "outside", "negative", "bool", "float", "text item", "text", "ALL"],
)
def test_bad_ranks_are_refused(ranks: Any) -> None:
    with pytest.raises(TopologyError, match="ranks is "):
        check_ranks("ranks", ranks, 3)


def test_what_is_left_out_has_its_documented_value() -> None:
    config = launch(Echo).config
    assert (config.parallel, config.output_ranks, config.window) == (zspmd.ParallelConfig(), (0,), 4)
    assert (config.preload, config.start_method, config.communicator) == (("torch",), "fork", choose_communicator("auto", ["cpu"]))
    assert config.deadlines == zspmd.Deadlines()
    assert launch(Echo).config.launch_id != config.launch_id


def test_the_world_size_is_on_the_tp_axis_unless_said_otherwise() -> None:
    assert launch(Echo, world_size=3).config.parallel == zspmd.ParallelConfig(tp=3)
    sizes = zspmd.ParallelConfig(tp=2, pp=2)
    assert launch(Echo, parallel=sizes).world_size == 4
    assert launch(Echo, parallel=sizes, world_size=4, output_ranks="all").config.output_ranks == (0, 1, 2, 3)


def test_the_arguments_are_copied() -> None:
    arguments = {"scale": 1.0}
    group = launch(Echo, worker_args=arguments)
    arguments["scale"] = 2.0
    assert group.config.worker_args == {"scale": 1.0}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"world_size": 0}, TopologyError, "world_size is 0; it must be a whole number of at least 1"),
        ({"world_size": "2"}, TopologyError, "world_size is '2'; it must be"),
        ({"world_size": 3, "parallel": zspmd.ParallelConfig(tp=2)}, TopologyError, "world_size is 3, but dp 1 x pp 1 x tp 2 makes 2"),
        ({"output_ranks": [1]}, TopologyError, r"output_ranks is \[1\]; it must name"),
        ({"output_ranks": []}, TopologyError, "output_ranks"),
        ({"window": 0}, ConfigError, "window is 0; it must be a whole number from 1 to 256"),
        ({"window": 257}, ConfigError, "window is 257"),
        ({"window": True}, ConfigError, "window is True"),
        ({"start_method": "forkserver"}, ConfigError, "start_method is 'forkserver'"),
        ({"communicator": "mpi"}, ConfigError, "communicator is 'mpi'"),
        ({"launch_id": "a/b"}, ConfigError, "launch id 'a/b' cannot be used"),
        ({"launch_id": ""}, ConfigError, "launch id ''"),
        ({"devices": "tpu"}, ConfigError, "tpu"),
    ],
    ids=[
        "no ranks",
        "text as world size",
        "sizes that disagree",
        "output rank outside",
        "no output rank",
        "window 0",
        "window too large",
        "window True",
        "start method",
        "communicator",
        "launch id with a slash",
        "empty launch id",
        "unknown device",
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        launch(Echo, **arguments)
