"""RequestOutput: its shorthands are the first completion's."""

from __future__ import annotations

from zspmd.runtime.engine.outputs import CompletionOutput, RequestOutput


def test_shorthands_are_the_first_completions() -> None:
    outputs = [CompletionOutput(0, "one", [1], "stop", "\n"), CompletionOutput(1, "two", [2])]
    output = RequestOutput("r", "prompt", [9], outputs, finished=False)
    assert (output.text, output.token_ids, output.finish_reason) == ("one", [1], "stop")
