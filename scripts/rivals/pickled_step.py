"""A side of ``zspmd-run bench wire``: the decode step pickled, as an object or with each request by its name."""

from __future__ import annotations

import pickle
from typing import Any

from zspmd.runtime.programs.bench.side_server import answers, serve, timed_us
from zspmd.runtime.programs.bench.wire import decode_step


def named_step(batch: int, num_blocks: int) -> dict[str, Any]:
    """Return the step as engines pickle it: each request by its name, with its token, position and new blocks."""
    return {
        "request_ids": [f"cmpl-{number:032x}" for number in range(batch)],
        "new_token_ids": [[number] for number in range(batch)],
        "num_computed_tokens": [500 + number for number in range(batch)],
        "new_block_ids": [[1000 + number] if number < num_blocks else [] for number in range(batch)],
        "num_scheduled_tokens": {f"cmpl-{number:032x}": 1 for number in range(batch)},
    }


def take_turn(request: dict[str, Any]) -> dict[str, Any]:
    """Pickle and unpickle."""
    batch, num_blocks = request["batch"], request["num_blocks"]
    step = named_step(batch, num_blocks) if request["is_named"] else decode_step(num_blocks)

    def there_and_back() -> None:
        pickle.loads(pickle.dumps(step, 5))

    return {"bytes": len(pickle.dumps(step, 5)), "times_us": timed_us(there_and_back, request["calls"], request["limit_s"])}


if __name__ == "__main__":
    with answers() as stream:
        serve(stream, take_turn)
