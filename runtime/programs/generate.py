"""Complete prompts with a model and print the text as it comes; without --model, with the small one that ships with zspmd."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import DTYPES, EXPERT_DISPATCHES, Deadlines, EngineConfig, RestartPolicy, SamplingParams
from ...errors import ConfigError, RequestError, ZspmdError
from ...model_config import read_model_config
from ...transformers_config import read_any_config
from ...transport.security import check_bind_address
from ..engine.checkpoint import open_checkpoint
from ..engine.draft_checkpoint import find_draft
from ..engine.engine import Engine
from ..engine.outputs import RequestOutput
from ..engine.rank_shares import choose_dtype_name, share_draft, share_model
from ..engine.start_times import describe_moments
from ..launch.command.console import RankConsole
from ..launch.command.rank_prefixes import rank_hosts
from ..launch.command.speculation_options import add_speculation_arguments, read_speculation

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

USES = ("hosts", "calls", "logs", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete; none reads one a line from standard input")
    parser.add_argument("--model", default="demo", metavar="DIR", help="a Hugging Face directory (default: the demo model)")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template as a user's message")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt instead of text")
    parser.add_argument("--timings", action="store_true", help="say on stderr what the start took, from this process to the first token")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate at most (64)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens (all)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest that sum to P (1)")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest (0)")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (drawn)")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's end-of-sequence token")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights and activations (auto)")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and output (the model's)")
    engine.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="prompts that run at once (64)")
    engine.add_argument("--num-blocks", type=int, metavar="N", help="blocks of the KV pool (from free memory)")
    engine.add_argument("--pp-partition", metavar="N,N", help="layers of each stage of --pp, such as 3,2 (equal)")
    engine.add_argument("--redundant-experts", type=int, default=0, metavar="N", help="further copies of experts in a mixture layer (0)")
    ways = "how tokens reach experts that replicas share (auto)"
    engine.add_argument("--expert-dispatch", default="auto", choices=EXPERT_DISPATCHES, help=ways)
    engine.add_argument("--bind", metavar="ADDR", help="an IP address of this host: ranks connect to it by TCP, with CURVE (no TCP)")
    engine.add_argument("--max-restarts", type=int, default=3, metavar="N", help="replace failed workers N times a minute at most (3)")
    add_speculation_arguments(parser)


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check everything that can be checked before a process starts; returns the model's directory."""
    _sampling_params(arguments)
    _restart_policy(arguments)
    if arguments.bind is not None:
        check_bind_address(arguments.bind)
    checkpoint = open_checkpoint(arguments.model, options.parallel, _engine_config(arguments), needs_weights=not options.is_dry)
    if checkpoint.tokenizer is None and not options.is_dry:
        raise ConfigError(f"{checkpoint.directory} has no tokenizer.json, without which there is no text; add one")
    for prompt in arguments.prompts:
        if not prompt:
            raise RequestError("a prompt is empty; give at least one character")
    return str(checkpoint.directory)


def share_out(directory: str, arguments: argparse.Namespace, options: LaunchOptions) -> list[dict[str, Any]]:
    """Return what each rank will hold of the model in ``directory``, for ``--dry-run``: names and values of one row a rank."""
    model = read_any_config(Path(directory))
    spec = options.device_spec if options.device_spec in ("cpu", "cuda") else None  # "auto" is for other nodes to say
    devices = options.devices or [spec] * options.parallel.world_size
    dtypes = [choose_dtype_name(arguments.dtype, model.dtype, device) for device in devices]
    num_redundant = arguments.redundant_experts
    shares = share_model(model, options.parallel, _pp_partition(arguments), dtypes, num_redundant=num_redundant)
    rows = [share.to_row() for share in shares]
    return _add_drafts(rows, devices, arguments, options)


def _add_drafts(
    rows: list[dict[str, Any]], devices: Sequence[str | None], arguments: argparse.Namespace, options: LaunchOptions
) -> list[dict[str, Any]]:
    """Return the rows with ``draft_bytes``, the weights of all draft models on a rank, where there are any."""
    speculation = read_speculation(arguments)
    for config in () if speculation is None else speculation.drafts:
        draft = read_model_config(find_draft(config.model))
        dtypes = [choose_dtype_name(arguments.dtype, draft.dtype, device) for device in devices]
        for row, size_bytes in zip(rows, share_draft(draft, config.tp, options.parallel, dtypes)):
            row["draft_bytes"] = None if size_bytes is None else row.get("draft_bytes", 0) + size_bytes
    return rows


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Read the prompts, which may wait for standard input and so must not happen on the event loop, and return the rest of the work."""
    prompts = arguments.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("no prompt; give one or more as arguments, or one a line on standard input")
    return _complete(prompts, arguments, options)


async def _complete(prompts: list[str], arguments: argparse.Namespace, options: LaunchOptions) -> int:
    """Complete all prompts at once and print them in order, the first unfinished one as it grows.

    A prompt that ends its workers whenever it runs is named on stderr, and the others are completed; the exit code is then 1.
    """
    params = _sampling_params(arguments)
    started = time.monotonic()
    hosts = rank_hosts(options.hosts or (), options.parallel.world_size)
    with RankConsole(
        options.parallel.world_size,
        is_quiet=options.is_quiet,
        hosts=hosts,
        has_prefix=options.has_prefix,
        shown=options.shown,
        launcher_log=options.launcher_log,
    ) as console:
        places = options.devices if options.hosts is None else [host.target for host in options.hosts]
        if options.dial is not None:
            places = [f"{options.dial.num_nodes} nodes that call in"]
        console.say(f"launch {options.launch_id}: starting {options.parallel.world_size} on {', '.join(places)}")
        engine = Engine(
            arguments.model,
            parallel=options.parallel,
            config=_engine_config(arguments),
            launch_id=options.launch_id,
            devices=options.placement,
            deadlines=Deadlines(lease_s=options.lease_s),
            hosts=options.hosts,
            nodes=options.nodes,
            log_dir=options.log_dir,
            bind=arguments.bind,
            on_log=console.on_log,
            on_progress=console.on_progress,
            launcher=options.dial or "agents",
            trace=options.trace,
            restart=_restart_policy(arguments) if options.dial is None else None,
            on_restart=console.say,
        )
        async with engine:
            console.finish_loading()
            console.say(f"ready after {time.monotonic() - started:.1f} s")
            gc.freeze()  # what is alive now stays to the end: nothing to look through between tokens
            started = time.monotonic()
            completions = [_Completion(engine, prompt, params, is_chat=arguments.chat) for prompt in prompts]
            try:
                num_tokens = num_failed = 0
                for completion in completions:
                    try:
                        num_tokens += await _print(completion, as_json=arguments.json)
                    except RequestError as error:
                        if not isinstance(error.__cause__, ZspmdError):  # the prompt is wrong, which ends its program
                            raise
                        num_failed += 1
                        print(f"zspmd-run: {error}; its prompt was {completion.prompt!r}", file=sys.stderr)
            finally:
                await _cancel([completion.task for completion in completions])
            elapsed_s = time.monotonic() - started
            console.say(f"done: {num_tokens} tokens in {elapsed_s:.2f} s{_describe_speculation(engine)}")
            for line in describe_moments(engine.start_times()) if arguments.timings else ():
                console.say(line)
    return 1 if num_failed else 0


async def _print(completion: _Completion, *, as_json: bool) -> int:
    """Print a completion and return its number of tokens."""
    if not as_json:
        return len((await completion.print_as_it_grows(sys.stdout.write)).token_ids)
    output = await completion.finished()
    print(json.dumps(_as_json(completion.prompt, output), ensure_ascii=False), flush=True)
    return len(output.token_ids)


class _Completion:
    """One prompt on its way: a task keeps the latest output and says when it changes."""

    def __init__(self, engine: Engine, prompt: str, params: SamplingParams, *, is_chat: bool) -> None:
        self.prompt = prompt
        self._latest: RequestOutput | None = None
        self._changed = asyncio.Event()
        message = [{"role": "user", "content": prompt}] if is_chat else prompt
        self.task = asyncio.create_task(self._follow(engine, message, params))
        self.task.add_done_callback(lambda task: self._changed.set())

    async def finished(self) -> RequestOutput:
        """Wait for the whole output."""
        await self.task
        assert self._latest is not None
        return self._latest

    async def print_as_it_grows(self, write: Callable[[str], object]) -> RequestOutput:
        """Write the prompt once it has been accepted, then its text as it comes, then the end of the line."""
        shown = ""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._latest is not None:
                line = self.prompt + self._latest.text
                write(line[len(shown) :])
                sys.stdout.flush()
                shown = line
            if self.task.done():
                if shown:
                    write("\n")
                return await self.finished()

    async def _follow(self, engine: Engine, prompt: Any, params: SamplingParams) -> None:
        async for output in engine.generate(prompt, params):
            self._latest = output
            self._changed.set()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    """End what still runs; a failure has been raised where its prompt was awaited."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
    )


def _restart_policy(arguments: argparse.Namespace) -> RestartPolicy | None:
    policy = RestartPolicy(max_restarts=arguments.max_restarts)
    return policy if policy.max_restarts else None


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        num_blocks=arguments.num_blocks,
        dtype=arguments.dtype,
        pp_partition=_pp_partition(arguments),
        redundant_experts=arguments.redundant_experts,
        expert_dispatch=arguments.expert_dispatch,
        speculation=read_speculation(arguments),
    )


def _pp_partition(arguments: argparse.Namespace) -> tuple[int, ...] | None:
    text = arguments.pp_partition
    if text is None:
        return None
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise ConfigError(f"--pp-partition is {text!r}; give the number of layers of each stage, such as 3,2") from None


def _describe_speculation(engine: Engine) -> str:
    """Return what became of the proposals; nothing where there is no speculation."""
    counted = engine.statistics().speculation
    return "" if counted is None else f", {sum(counted.accepted)} of {sum(counted.drafted)} proposed ones kept"


def _as_json(prompt: str, output: RequestOutput) -> dict[str, Any]:
    answer = {"prompt": prompt, "text": output.text, "token_ids": output.token_ids, "finish_reason": output.finish_reason}
    return answer if output.metrics is None else {**answer, "metrics": asdict(output.metrics)}
