"""Running a program of ``zspmd-run`` in this process, without what ``zspmd-run`` does to its own: signals, orphans, log files."""

from __future__ import annotations

import argparse
import asyncio
import sys
from types import ModuleType

from zspmd.config import ParallelConfig
from zspmd.errors import ZspmdError
from zspmd.runtime.launch.command.exit_codes import exit_code
from zspmd.runtime.launch.command.options import LaunchOptions


def run_program(program: ModuleType, *arguments: str) -> int:
    """Run it to its end and return its exit code; an error is a message on stderr."""
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    options = LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True)
    parsed = parser.parse_args(arguments)
    try:
        program.prepare(parsed, options)
        return int(asyncio.run(program.run(parsed, options)))
    except ZspmdError as error:
        print(f"zspmd-run: {error}", file=sys.stderr)
        return exit_code(error)
