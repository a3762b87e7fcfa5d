"""A side of ``zspmd-run bench engine``: Transformers on CPUs in one process, ``generate`` or its continuous batching.

    transformers_generation.py WAY MODEL BATCH POSITIONS DTYPE        WAY is generate or continuous

It has as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from zspmd.runtime.programs.bench.generation import Turn, turn_from_times, turn_in_step
from zspmd.runtime.programs.bench.side_server import answers, serve

PAGE_SIZE = 16
_RESULT_S = 60.0


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Notes when ``generate`` has each token; its first call shows the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generation_config(num_output: int) -> Any:
    return transformers.GenerationConfig(
        max_new_tokens=num_output, min_new_tokens=num_output, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def generate(model: Any, prompts: list[list[int]], num_output: int) -> Turn:
    clock, inputs = Clock(), torch.tensor(prompts)
    config = generation_config(num_output)
    started = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=clock)
    return turn_in_step([at - started for at in clock.times[1:]], tokens[:, len(prompts[0]) :].tolist())


def continuous(model: Any, settings: Any, prompts: list[list[int]], num_output: int) -> Turn:
    """Run a turn on the manager that the model keeps between turns; its start is not in the times."""
    with model.continuous_batching_context_manager(
        generation_config=generation_config(num_output), continuous_batching_config=settings, persistent_manager=True
    ) as manager:
        started = time.perf_counter()
        names = manager.add_requests(prompts, max_new_tokens=num_output, record_timestamps=True)
        results: dict[str, Any] = {}
        while len(results) < len(prompts):
            result = manager.get_result(timeout=_RESULT_S)
            if result is None or result.error:
                raise RuntimeError(f"continuous batching gave {result and result.error} after {len(results)} of {len(prompts)} prompts")
            results[result.request_id] = result
    ordered = [results[name] for name in names]
    return turn_from_times([[at - started for at in one.timestamps] for one in ordered], [one.generated_tokens for one in ordered])


def main() -> None:
    way, path, batch, num_positions, dtype = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with answers() as stream:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32" if dtype == "auto" else dtype).eval()
        settings = transformers.ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=int(batch) * (int(num_positions) // PAGE_SIZE + 2),
            max_batch_tokens=max(256, int(batch)),
            allow_block_sharing=False,
        )
        gc.collect()
        gc.freeze()

        def take_turn(request: dict[str, Any]) -> dict[str, Any]:
            prompts, num_output = request["prompts"], request["num_output"]
            if way == "generate":
                return generate(model, prompts, num_output).to_json()
            return continuous(model, settings, prompts, num_output).to_json()

        serve(stream, take_turn, {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
