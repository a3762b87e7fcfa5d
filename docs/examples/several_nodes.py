"""A worker group over several machines: its ranks say where they are, sum over all of them, and a node that is lost is named.

This file has to be at the same path on each of them, and ssh to get there without a question.

Run it: python docs/examples/several_nodes.py 4 node1:2 node2 node3
"""

import argparse
import asyncio

import numpy as np

import zspmd


class Where(zspmd.Worker):
    def step(self, inputs: dict) -> dict:
        total = self.ctx.mesh["tp"].all_reduce(inputs["x"] * (self.ctx.rank + 1))  # between nodes by gloo or NCCL
        return {"host": self.ctx.facts.host, "local_rank": self.ctx.local_rank, "total": total}


async def main(num_ranks: int, hosts: list[str], nodes: zspmd.NodesConfig) -> None:
    try:
        async with zspmd.launch(Where, world_size=num_ranks, output_ranks="all", hosts=hosts, nodes=nodes) as group:
            for rank, answer in enumerate(await group.step({"x": np.arange(3.0)}, timeout_s=60)):
                print(f"rank {rank} on {answer['host']}, local rank {answer['local_rank']}: {answer['total'].tolist()}")
    except zspmd.PreflightError as error:  # before any rank was started: what is wrong, by host, and what to do
        for problem in error.problems:
            print(f"{problem.host}: {problem.check}: {problem.text}; {problem.advice}")
        raise SystemExit(120) from None
    except zspmd.NodeLostError as error:  # while they ran; those on the other nodes have been ended
        raise SystemExit(f"{error.host} is lost, with ranks {list(error.ranks)}: {error}") from None


if __name__ == "__main__":  # ranks import this script to find Where; they must not launch
    parser = argparse.ArgumentParser(description="Run a worker group over several machines.")
    parser.add_argument("ranks", type=int, help="in all")
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="an entry as in a hostfile: node1, lee@node2:4, 'node3 port=2222'")
    parser.add_argument("--rsh", default="ssh", help="what starts a program on a host")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.ranks, arguments.hosts, zspmd.NodesConfig(rsh=arguments.rsh)))
