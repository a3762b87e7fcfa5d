"""What travels between a driver and real ranks: bulk, tensors, logs, and a worker class of the driver's own script."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.groups import launch

from zspmd.errors import WorkerRaisedError
from zspmd.transport import codec
from zspmd.transport.codec import BFLOAT16, bfloat16_to_float32

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.mark.parametrize("size", [1 << 26, (1 << 26) + 13], ids=["64 MiB", "64 MiB and a bit"])
async def test_a_large_payload_goes_there_and_back(size: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    async with launch("Echo", 1) as group:
        (answer,) = await group.step({"x": array})
        assert np.array_equal(answer["inputs"]["x"], array)


@pytest.mark.parametrize("preload", [(), ("torch",)], ids=["imported in the ranks", "imported before the fork"])
async def test_tensors_go_both_ways(preload: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from zspmd.workers.torch_bridge import register_torch

    monkeypatch.setattr(codec, "_bridges", {})
    register_torch()
    weight = torch.arange(6.0).reshape(2, 3)
    async with launch("Types", 1, preload=preload, worker_args={"weight": weight}) as group:
        for x in (torch.arange(3), torch.linspace(0, 1, 5000).bfloat16()):
            (answer,) = await group.step({"x": x})
            assert (answer["type"], answer["dtype"]) == ("torch.Tensor", str(x.dtype))
            assert torch.equal(answer["twice"], x + x)
            assert torch.equal(answer["weight"], weight)
            assert answer["bfloat16"].dtype == torch.bfloat16
        (answer,) = await group.step({"x": np.arange(3)})
        assert (answer["type"], answer["twice"].tolist()) == ("numpy.ndarray", [0, 2, 4])


async def test_a_driver_without_torch_gets_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_bridges", {})
    async with launch("Types", 1) as group:
        (answer,) = await group.step({"x": np.arange(3)})
        assert answer["type"] == "numpy.ndarray"
        assert answer["bfloat16"].dtype == BFLOAT16
        assert bfloat16_to_float32(answer["bfloat16"]).tolist() == [1.0, 1.0, 1.0]


async def test_what_ranks_print_and_report_arrives(tmp_path: Path) -> None:
    lines: list[tuple[int, str, str]] = []
    progress: list[tuple[int, int, int, str]] = []
    options: dict[str, Any] = {
        "on_log": lambda rank, stream, line: lines.append((rank, stream, line)),
        "on_progress": lambda *report: progress.append(report),
        "log_dir": str(tmp_path),
    }
    async with launch("Chatty", worker_args={"lines": 3}, **options) as group:
        assert sorted(progress) == [(rank, done, 2, "weights") for rank in (0, 1) for done in (1, 2)]
        await group.step("to stderr")
    for rank in (0, 1):
        assert [line for r, stream, line in lines if (r, stream) == (rank, "out")] == ["line 0", "line 1", "line 2", "tears down"]
        assert (rank, "err", "to stderr") in lines
        assert (tmp_path / f"r{rank:05}.out").read_text() == "line 0\nline 1\nline 2\ntears down\n"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_class_in_the_main_script(tmp_path: Path, start_method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import asyncio
            import zspmd

            class Doubler(zspmd.Worker):
                def setup(self, *, by):
                    self.by = by
                def step(self, inputs):
                    return inputs * self.by + self.ctx.rank

            async def main():
                options = {{"output_ranks": "all", "preload": (), "start_method": {start_method!r}}}
                async with zspmd.launch(Doubler, world_size=2, worker_args={{"by": 2}}, **options) as group:
                    print(await group.step(21))

            if __name__ == "__main__":
                asyncio.run(main())
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[42, 43]\n"), done.stderr


async def test_an_answer_is_the_workers_again_once_it_is_given() -> None:
    async with launch("Reuser", 1) as group:
        pending = [await group.submit({"fill": number}) for number in range(4)]
        for number, reply in enumerate(pending):
            (buffer,) = await reply
            assert (buffer.min(), buffer.max()) == (number, number)


async def test_too_many_large_arrays_are_refused_where_they_are_sent() -> None:
    async with launch("Reuser", 1) as group:
        with pytest.raises(ValueError, match="the value holds 1100 arrays of more than 4096 B; the limit is 1024"):
            await group.step({"x": [np.zeros(2000)] * 1100})
        assert len((await group.step({"num_arrays": 1000}))[0]) == 1000
        with pytest.raises(WorkerRaisedError, match="the value holds 1100 arrays"):
            await group.step({"num_arrays": 1100})


async def test_an_input_is_encoded_when_its_turn_has_come() -> None:
    array = np.zeros(12_000)
    async with launch("Echo", 1, window=1) as group:
        first = await group.submit("first")
        second = asyncio.ensure_future(group.step(array))
        await asyncio.sleep(0)  # it waits for room now
        array[:] = 9
        await first
        (answer,) = await second
        assert set(answer["inputs"]) == {9.0}
