"""A data-parallel batch scorer: every rank sees the whole batch, scores its share of the rows, and answers with it.

Which rows are whose follows from the step and the rank alone, so nobody asks anybody: there is no collective here.

Run it: python docs/examples/batch_scorer.py
"""

import asyncio

import numpy as np

import zspmd

NUM_RANKS = 3


class Scorer(zspmd.Worker):
    """A logistic model; a real one would load its weights here."""

    def setup(self, *, weights: np.ndarray) -> None:
        self.weights = weights

    def step(self, inputs: dict) -> np.ndarray:
        group = self.ctx.mesh.group("dp")  # this rank's place on the axis; starts no communicator
        rows = np.array_split(inputs["rows"], group.size)[group.index]  # shares may differ by one row
        return 1 / (1 + np.exp(-rows @ self.weights))


async def main() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=8)
    batches = [random.normal(size=(size, 8)) for size in (7, 100, 1)]

    parallel = zspmd.ParallelConfig(dp=NUM_RANKS)
    options = {"worker_args": {"weights": weights}, "output_ranks": "all"}
    async with zspmd.launch(Scorer, parallel=parallel, preload=(), **options) as group:  # no torch here, so none is imported
        # The next batch is published while this one is being scored: at most `window` (4) are in flight.
        pending = [await group.submit({"rows": batch}) for batch in batches]
        for batch, reply in zip(batches, pending):
            scores = np.concatenate(await reply)  # answers come in rank order, so the shares do too
            expected = 1 / (1 + np.exp(-batch @ weights))
            print(f"{len(batch)} rows, best score {scores.max():.3f}, as in one process: {np.allclose(scores, expected)}")


if __name__ == "__main__":
    asyncio.run(main())
