"""An engine over several hosts: takes orders from its standard input, and tells what happens on its standard output, as ``node_driver``.

    python -m support.node_engine OPTIONS

The orders: "generate" NAME PROMPT PARAMS, "secrets", "close".
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from support.node_driver import describe, orders, settings, tell

import zspmd
from zspmd.errors import ZspmdError


async def generate(engine: zspmd.Engine, name: str, prompt: Any, params: dict[str, Any]) -> None:
    """Run one request, and tell of each output and of its end."""
    output = None
    try:
        async for output in engine.generate(prompt, zspmd.SamplingParams(**params), request_id=name):
            tell("token", request=name, number=len(output.outputs[0].token_ids))
    except ZspmdError as error:
        tell("raised", request=name, **describe(error))
        return
    assert output is not None
    tell("finished", request=name, token_ids=list(output.outputs[0].token_ids), text=output.outputs[0].text)


def secrets_of(engine: zspmd.Engine) -> list[str]:
    """Return in hex what only two ends may know: the secret keys of the driver, of each rank and each relay, and the token."""
    site = engine.group._processes._site
    door = site.door
    assert door is not None
    keys = [door._secret, *(secret for _, secret in (*door._pairs, *door._node_pairs.values()))]
    return [secret.hex() for secret in (*keys, site.token)]


def endpoints_of(engine: zspmd.Engine) -> list[str]:
    """Return where the driver listens on TCP."""
    processes = engine.group._processes
    bound = [*processes.publisher.endpoints, *processes.collector.endpoints, *processes._control_endpoints]
    return [endpoint.removeprefix("tcp://") for endpoint in bound if endpoint.startswith("tcp://")]


async def live(options: dict[str, Any]) -> None:
    restart = options.get("max_restarts")
    engine = zspmd.Engine(
        "demo",
        parallel=zspmd.ParallelConfig(**options.get("parallel", {"tp": options["world_size"]})),
        config=zspmd.EngineConfig(max_num_seqs=12, num_blocks=400),
        devices="cpu",
        log_dir=options["log_dir"],
        restart=None if restart is None else zspmd.RestartPolicy(max_restarts=restart, window_s=600.0),
        on_restart=lambda line: tell("restart", line=line),
        **settings(options),
    )
    tasks = []
    try:
        async with engine:
            plan = engine.group.plan
            tell("ready", hosts=plan.hosts, master=[plan.master_addr, plan.master_port], pids=[rank.pid for rank in engine.group.health()])
            async for name, *arguments in orders():
                if name == "close":
                    break
                if name == "secrets":
                    tell("secrets", secrets=secrets_of(engine), endpoints=endpoints_of(engine))
                else:
                    tasks.append(asyncio.create_task(generate(engine, *arguments)))
            await asyncio.gather(*tasks)
    except ZspmdError as error:
        tell("failed", **describe(error))
    tell("closed")


if __name__ == "__main__":
    asyncio.run(live(json.loads(sys.argv[1])))
