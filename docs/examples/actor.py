"""The actor example of vLLM's PR 3466, written there for torch RPC: an object on each rank, whose method is called from one place.

Run it: python docs/examples/actor.py
"""

import asyncio

import zspmd


class Actor(zspmd.Worker):
    def setup(self):
        self.value = self.ctx.rank

    @zspmd.rpc
    def compute(self, x):
        return x + self.value


async def main():
    async with zspmd.launch(Actor, world_size=4) as group:
        rets = [group.call("compute", i, ranks=[i]) for i in range(4)]
        for i, ret in enumerate(await asyncio.gather(*rets)):
            print(f"Rank {i}: {ret[0]}")


if __name__ == "__main__":
    asyncio.run(main())
