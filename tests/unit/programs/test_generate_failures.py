"""``zspmd-run generate`` where one of its prompts ends the workers, over an engine that only answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import RequestError, WorkerExitedError
from zspmd.runtime.engine.outputs import CompletionOutput, RequestOutput
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.runtime.engine.statistics import SchedulerStatistics
from zspmd.runtime.launch.cli import LaunchOptions
from zspmd.runtime.programs import generate


class AnsweringEngine:
    """Gives each prompt one token of text; "bad" gets that and then fails as ``Engine`` fails poison, "wrong" as it refuses a prompt."""

    def __init__(self, model: str, **options: Any) -> None:
        pass

    async def __aenter__(self) -> AnsweringEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    def statistics(self) -> SchedulerStatistics:
        return Scheduler(EngineConfig(), num_blocks=2, max_model_len=2, eos_token_ids=()).statistics()

    async def generate(self, prompt: str, params: Any) -> AsyncIterator[RequestOutput]:
        if prompt == "wrong":
            raise RequestError("the prompt has 600 tokens", request_id="request-1")
        yield self._output(prompt, None)
        if prompt == "bad":
            raise RequestError("request request-1 ended its workers twice", request_id="request-1") from WorkerExitedError(
                exit_code=7, rank=1
            )
        yield self._output(prompt, "length")

    def _output(self, prompt: str, reason: str | None) -> RequestOutput:
        completion = CompletionOutput(index=0, text="!", token_ids=[5], finish_reason=reason, stop_reason=None, logprobs=None)
        return RequestOutput("request-0", prompt, [1], [completion], reason is not None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(generate, "Engine", AnsweringEngine)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    options = LaunchOptions(launch_id="test", parallel=ParallelConfig(), devices=("cpu",), log_dir=None, is_quiet=True)
    return generate.run(parser.parse_args(arguments), options)


async def test_a_prompt_that_ends_its_workers_takes_no_other_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(monkeypatch, "one", "bad", "two") == 1
    printed = capsys.readouterr()
    assert printed.out == "one!\nbad!\ntwo!\n"
    assert printed.err == "zspmd-run: request request-1 ended its workers twice; its prompt was 'bad'\n"


async def test_as_json_it_has_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(monkeypatch, "--json", "bad", "two") == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in printed.out.splitlines()] == ["two"]
    assert "its prompt was 'bad'" in printed.err


async def test_a_prompt_that_is_wrong_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="600 tokens"):
        await run(monkeypatch, "one", "wrong", "two")
