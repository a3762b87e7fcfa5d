"""Tokens through the engine: their rate, the first and those that follow, beside a bare loop and Transformers.

Each case is a tensor-parallel size and a batch. In a turn of it every side gets the same prompts at once and generates as many greedy
tokens for each; consumers of the engine take every output. The bare loop has the same model, sampler and cache in one process, without an
engine; it and Transformers run in processes of their own. With ``--rate`` prompts come to the engine one by one instead, at random times.
With ``--speculate`` the same engine without speculation takes turns with it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ....config import DTYPES, EngineConfig
from ....errors import ConfigError
from ....model_config import read_model_config
from ...engine.checkpoint import DEMO_MODEL
from ...launch.command.speculation_options import add_speculation_arguments, read_speculation
from .engine_cases import OURS, Settings, measure_rates, measure_turns
from .engine_speculation import add_prompt_arguments, choose_prompts, measure_speculation
from .random_checkpoint import SIZES, write_random_checkpoint
from .report import Report

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 8
TAKES_AXES = ("tp",)
_MAX_COUNT = 1 << 16
_LEAST = {"tp": 1, "batch": 1, "requests": 1, "rounds": 1, "prompt_tokens": 1, "output_tokens": 2, "threads": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    add_model_arguments(parser)
    parser.add_argument("--tp", type=int, nargs="+", metavar="N", help="ranks of the engine (1, or --tp before the word bench)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="prompts of a turn (1 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of each prompt (32)")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="for each prompt (128)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights and activations (auto)")
    parser.add_argument("--window", type=int, default=EngineConfig().window, metavar="N", help="steps in flight (%(default)s)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="OMP_NUM_THREADS of a rank, as a launch chooses; rivals get the ranks' sum"
    )
    rivals = ("bare", "transformers", "none")
    parser.add_argument("--baseline", nargs="+", default=["bare"], choices=rivals, help="who takes turns with the engine (bare)")
    parser.add_argument("--rate", type=float, nargs="+", metavar="R", help="prompts come one by one, R a second on average; no baseline")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="prompts of a turn with --rate (64)")
    add_speculation_arguments(parser)
    add_prompt_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is measured."""
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("--preset", choices=(*SIZES, "demo"), help="a Llama of random weights, or the model that ships with zspmd (5m)")


def check_model(arguments: argparse.Namespace) -> str:
    """Check what ``add_model_arguments`` has declared, and return what to call the model."""
    if arguments.model is not None and arguments.preset is not None:
        raise ConfigError(f"--model {arguments.model} and --preset {arguments.preset} are both given; leave one of them out")
    if arguments.model is not None:
        read_model_config(_directory(arguments.model))
    return str(arguments.model or arguments.preset or "5m")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    name = check_model(arguments)
    if arguments.tp is not None and "tp" in options.given:
        raise ConfigError("--tp is given before bench and behind it; leave one of them out")
    arguments.tp = arguments.tp or [options.parallel.tp]
    for option, low in _LEAST.items():
        given = getattr(arguments, option)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value <= _MAX_COUNT:
                raise ConfigError(f"--{option.replace('_', '-')} is {value}; it must be from {low} to {_MAX_COUNT}")
    for rate in arguments.rate or ():
        if not 0 < rate < 1e6:
            raise ConfigError(f"--rate is {rate}; it must be above 0 and below 1,000,000 a second")
    _check_speculation(arguments)
    sizes = f"tp {', '.join(map(str, arguments.tp))}, batch {', '.join(map(str, arguments.batch))}"
    return f"{name}, {sizes}, {arguments.prompt_tokens} and {arguments.output_tokens} tokens, {arguments.turns} turns"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure each case in turns."""
    report.title, report.x_axis, report.others = "Tokens through the engine", "batch", ("torch", "transformers")
    report.baseline = None if arguments.rate else OURS
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # which launches pass on
    speculation = read_speculation(arguments)
    with tempfile.TemporaryDirectory(prefix="zspmd-bench-") as directory:
        if speculation is not None:
            model = open_model(arguments.model, arguments.preset, Path(directory))
            await measure_speculation(arguments, options, report, model, speculation)
            return
        settings = _settings(arguments, options, Path(directory))
        for tp in arguments.tp:
            if arguments.rate:
                await measure_rates(settings, report, tp, arguments.rate, arguments.requests)
            else:
                for batch in arguments.batch:
                    await measure_turns(settings, report, tp, batch)


def _check_speculation(arguments: argparse.Namespace) -> None:
    """Refuse options that do not belong together."""
    if read_speculation(arguments) is None:
        if arguments.prompts is not None:
            raise ConfigError(f"--prompts {' '.join(arguments.prompts)} is for --speculate alone; leave it out, or say who proposes")
    elif arguments.rate:
        raise ConfigError("--rate and --speculate are both given, and prompts that come one by one have no side to compare; leave one out")
    else:
        choose_prompts(arguments)


def open_model(model: str | None, preset: str | None, scratch: Path) -> Path:
    """Return the directory of the model that is asked for; one of random weights is written below ``scratch``."""
    if model is not None:
        return _directory(model)
    return DEMO_MODEL if preset == "demo" else write_random_checkpoint(scratch / "model", preset or "5m")


def _settings(arguments: argparse.Namespace, options: LaunchOptions, scratch: Path) -> Settings:
    model = open_model(arguments.model, arguments.preset, scratch)
    return Settings(
        model=model,
        vocab_size=read_model_config(model).vocab_size,
        num_prompt=arguments.prompt_tokens,
        num_output=arguments.output_tokens,
        num_turns=arguments.turns,
        dtype=arguments.dtype,
        window=arguments.window,
        rivals=[name for name in arguments.baseline if name != "none"],
        placement=options.device_spec,
        log_dir=options.log_dir,
    )


def _directory(model: str) -> Path:
    return Path(model).expanduser().resolve()
