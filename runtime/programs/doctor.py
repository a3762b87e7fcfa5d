"""Check whether this machine can run launches, and say what to mend: one line a check, exit code 1 if any has failed."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, LaunchError
from ..launch.agent_protocol import RankExited, RankLog, RankStart, Start
from ..launch.checks import FAIL, MACHINE_CHECKS, OK, WARN, Check
from ..launch.devices import num_cuda_devices
from ..launch.supervisor import AgentLost, Event, NodeSupervisor

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

_TORCH_S = 120.0
_LAUNCH_S = 30.0
_ASK_TORCH = """
import json, torch, torch.distributed as dist
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available(),
    "devices": torch.cuda.device_count(), "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(),
}))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON list of checks instead of lines")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Return what the program is about."""
    return "checks of this machine"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the checks as a coroutine."""
    return _examine(arguments.json)


async def _examine(is_json: bool) -> int:
    checks = []

    def tell(check: Check) -> None:
        checks.append(check)
        if not is_json:
            print(f"{check.status:<5} {check.name:<14} {check.text}" + (f"\n      -> {check.advice}" if check.advice else ""), flush=True)

    for examine in MACHINE_CHECKS:
        tell(examine())
    tell(await check_torch())
    tell(await check_launch())
    if is_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    return int(any(check.status == FAIL for check in checks))


async def check_torch() -> Check:
    """torch, in a process of its own, since this one is never to import it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _ASK_TORCH, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        told, errors = await asyncio.wait_for(process.communicate(), _TORCH_S)
    except asyncio.TimeoutError:
        return Check("torch", FAIL, f"was not imported within {_TORCH_S:g} s", "see where it hangs: python -X importtime -c 'import torch'")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = (errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Check("torch", FAIL, f"cannot be imported: {last}", "reinstall it: https://pytorch.org/get-started/locally")
    return _judge_torch(json.loads(told))


def _judge_torch(facts: dict[str, Any]) -> Check:
    cuda = f"CUDA {facts['cuda']}, {facts['devices']} devices" if facts["available"] else "no CUDA device"
    text = f"{facts['version']}, {cuda}, gloo {'yes' if facts['gloo'] else 'no'}, nccl {'yes' if facts['nccl'] else 'no'}"
    if num_cuda_devices() and not facts["available"]:
        why = "has no CUDA in it: install a CUDA build" if facts["cuda"] is None else "finds no usable driver: see nvidia-smi"
        return Check("torch", WARN, text, f"this node has GPUs, and torch {why}")
    if not facts["gloo"]:
        return Check("torch", WARN, text, "scripts with the gloo backend and CPU ranks of several nodes need a build with gloo")
    return Check("torch", OK, text)


async def check_launch() -> Check:
    """A launch of two ranks that print a line: the agent, its supervision, and what the kernel does for it."""
    lines: list[str] = []
    exits: list[int] = []
    ended = asyncio.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, RankLog):
            lines.extend(event.lines)
        elif isinstance(event, RankExited):
            exits.append(event.exit_code)
        if isinstance(event, AgentLost) or len(exits) == 2:
            ended.set()

    started = time.monotonic()
    ranks = tuple(RankStart(rank, dict(os.environ)) for rank in range(2))
    order = Start(ranks, "spawn", argv=(sys.executable, "-I", "-S", "-c", "print('here')"))
    supervisor = NodeSupervisor(on_event)
    try:
        supervisor.open()
        await supervisor.start(order, timeout_s=_LAUNCH_S)
        await asyncio.wait_for(ended.wait(), _LAUNCH_S)
    except (ConfigError, LaunchError, asyncio.TimeoutError) as error:
        return Check("launch", FAIL, f"two ranks could not be run: {error or 'no end in sight'}", "the lines above may say why")
    finally:
        await supervisor.stop(0.0, 1.0)
    if exits != [0, 0] or lines != ["here", "here"]:
        return Check("launch", FAIL, f"two ranks ended with {exits} and printed {lines}", "python -I -S -c \"print('here')\" must work")
    return Check("launch", OK, f"two ranks ran and ended in {time.monotonic() - started:.2f} s")
