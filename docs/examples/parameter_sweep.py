"""A parameter sweep: independent trials, each on one rank, all ranks kept busy.

A rank passes by the calls that name another, so each works through its own. One asyncio task feeds each rank: it takes the next
trial as soon as its rank is done. Quick ranks run ahead of the slowest by as many calls as the window holds.

Run it: python docs/examples/parameter_sweep.py
"""

import asyncio

import zspmd

NUM_RANKS = 4
RATES = [0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.8, 0.95, 1.01]


class Trial(zspmd.Worker):
    """Minimises (x - 3)^2 by gradient descent."""

    @zspmd.rpc
    def run(self, rate: float, num_steps: int) -> dict:
        x = 0.0
        for _ in range(num_steps):
            x -= rate * 2 * (x - 3)
        return {"rate": rate, "loss": (x - 3) ** 2, "rank": self.ctx.rank}


async def main() -> None:
    async with zspmd.launch(Trial, world_size=NUM_RANKS, window=64, preload=()) as group:  # no torch here
        rates = iter(RATES)  # shared: each task takes the next one
        results = []

        async def feed(rank: int) -> None:
            for rate in rates:
                results.extend(await group.call("run", rate, num_steps=20, ranks=[rank]))

        await asyncio.gather(*(feed(rank) for rank in range(NUM_RANKS)))

    for result in sorted(results, key=lambda result: result["rate"]):
        print(f"rate {result['rate']:.2f}: loss {result['loss']:.2e}")
    best = min(results, key=lambda result: result["loss"])
    print(f"best rate {best['rate']:.2f}, from {len(results)} trials on {len({result['rank'] for result in results})} ranks")


if __name__ == "__main__":
    asyncio.run(main())
