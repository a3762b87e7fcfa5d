"""The base class that users build on, and the import of their classes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import zspmd
from zspmd.errors import ConfigError
from zspmd.workers import main
from zspmd.workers.context import RankFacts, WorkerContext
from zspmd.workers.worker import find_rpc


class Base(zspmd.Worker):
    @zspmd.rpc
    def shared(self) -> str:
        return "base"

    @zspmd.rpc
    def replaced(self) -> str:
        return "base"

    def hidden(self) -> str:
        return "hidden"


class Derived(Base):
    @zspmd.rpc
    def replaced(self) -> str:
        return "derived"

    @zspmd.rpc
    @staticmethod
    def without_self() -> str:
        return "static"


def test_setup_without_arguments_does_nothing() -> None:
    worker = zspmd.Worker()
    worker.setup()
    assert vars(worker) == {}


def test_arguments_without_a_setup_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"Base has no setup\(\), but worker_args has a, b"):
        Base().setup(b=1, a=2)


def test_a_step_has_to_be_defined() -> None:
    with pytest.raises(NotImplementedError, match=r"Base defines no step\(\)"):
        Base().step(None)


@pytest.mark.parametrize(("name", "answer"), [("shared", "base"), ("replaced", "derived"), ("without_self", "static")])
def test_marked_methods_are_found(name: str, answer: str) -> None:
    assert find_rpc(Derived(), name)() == answer


@pytest.mark.parametrize("name", ["hidden", "absent", "step", "setup", "__init__", "ctx", ""])
def test_unmarked_names_are_not(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no method '{name}' marked @zspmd.rpc; marked are: replaced, shared, without_self"):
        find_rpc(Derived(), name)


def test_an_attribute_of_the_instance_is_not_callable_from_afar() -> None:
    worker = Base()
    worker.stored = zspmd.rpc(lambda: "leak")  # type: ignore[attr-defined]  # that is the question
    with pytest.raises(AttributeError):
        find_rpc(worker, "stored")


def test_a_class_is_imported_by_its_reference() -> None:
    assert main.import_worker("support.workers:Echo", "").__name__ == "Echo"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("no_such_module:Echo", "cannot import the worker 'no_such_module:Echo': No module named 'no_such_module'"),
        ("support.workers:Nope", "has no attribute 'Nope'; it must be importable on every rank"),
        ("support.workers:Echo.Inner", "has no attribute 'Inner'"),
        ("support.workers:os", "not a subclass of zspmd.Worker"),
        ("pathlib:Path", "not a subclass of zspmd.Worker"),
    ],
    ids=["no module", "no class", "no inner class", "a module", "another class"],
)
def test_a_bad_reference_is_refused(reference: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main.import_worker(reference, "")


def test_a_class_of_the_main_script_is_imported_once_and_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, main.MAIN_MODULE, raising=False)
    script = tmp_path / "script.py"
    script.write_text(
        "import zspmd\n"
        "class Outer:\n    class Mine(zspmd.Worker):\n        pass\n"
        "class Other(zspmd.Worker):\n    pass\n"
        "if __name__ == '__main__':\n    raise SystemExit('ran as a script')\n"
    )
    mine = main.import_worker("__main__:Outer.Mine", str(script))
    assert (mine.__qualname__, mine.__module__) == ("Outer.Mine", main.MAIN_MODULE)
    script.write_text("raise SystemExit('imported twice')")
    assert main.import_worker("__main__:Other", str(script)).__module__ == main.MAIN_MODULE
    del sys.modules[main.MAIN_MODULE]


@pytest.mark.parametrize("path", ["notes.txt", "absent.py", ""], ids=["no Python file", "missing", "none"])
def test_a_main_script_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delitem(sys.modules, main.MAIN_MODULE, raising=False)
    (tmp_path / "notes.txt").write_text("no Python")
    with pytest.raises(ConfigError, match="cannot import the worker '__main__:Mine'"):
        main.import_worker("__main__:Mine", str(tmp_path / path) if path else "")
    assert main.MAIN_MODULE not in sys.modules


def make_context(sent: list[tuple[int, int]]) -> WorkerContext:
    facts = RankFacts("id", rank=1, world_size=4, local_rank=1, local_world_size=2, host="h", device="cpu")
    nothing: Any = None
    return WorkerContext(facts, nothing, nothing, lambda progress: sent.append((progress.done, progress.total)))


def test_the_context_tells_the_rank_facts() -> None:
    context = make_context([])
    assert (context.launch_id, context.rank, context.world_size) == ("id", 1, 4)
    assert (context.local_rank, context.local_world_size, context.device) == (1, 2, "cpu")


def test_progress_is_sent_at_most_ten_times_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("zspmd.workers.context.time.monotonic", lambda: now)
    sent: list[tuple[int, int]] = []
    context = make_context(sent)
    for done in range(1, 101):
        now += 0.025
        context.report_progress(done, 100, "weights")
    assert sent[-1] == (100, 100)
    assert 25 <= len(sent) <= 26
