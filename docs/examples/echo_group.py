"""An echo group: one driver, four ranks, and the four things to do with them: step, submit, call, health.

Run it: python docs/examples/echo_group.py
"""

import asyncio

import numpy as np

import zspmd


class Echo(zspmd.Worker):
    """What every rank runs. ``self.ctx`` knows the rank, the world, the device and the mesh."""

    def setup(self, *, scale: float) -> None:
        self.scale = scale
        self.num_steps = 0

    def step(self, inputs: dict) -> dict:  # once for each published step, on every rank, in order
        self.num_steps += 1
        total = self.ctx.mesh["tp"].all_reduce(inputs["x"] * self.scale)  # the ranks talk to each other only here
        return {"rank": self.ctx.rank, "total": total}

    @zspmd.rpc
    def count_steps(self) -> int:  # callable by its name, in order with the steps
        return self.num_steps


async def main() -> None:
    # Leaving the block ends the ranks, whatever happens in it; "all" asks every rank for its answer, the default only rank 0.
    async with zspmd.launch(Echo, world_size=4, worker_args={"scale": 2.0}, output_ranks="all") as group:
        for answer in await group.step({"x": np.arange(3.0)}, timeout_s=10):
            print(f"rank {answer['rank']}: {answer['total'].tolist()}")

        # submit returns as soon as the step is published: several are in flight, and their answers come in order.
        pending = [await group.submit({"x": np.full(1, float(number))}) for number in range(3)]
        print("submitted:", [float((await reply)[0]["total"][0]) for reply in pending])

        print("steps seen by ranks 0 and 3:", await group.call("count_steps", ranks=[0, 3]))
        # health asks nobody: it is what each rank's last beat said.
        print("processes:", len({health.pid for health in group.health()}))


if __name__ == "__main__":  # ranks import this script to find Echo; they must not launch
    asyncio.run(main())
