"""The options of programs that speculate: who proposes, how many tokens, and how they are verified."""

from __future__ import annotations

import argparse

from ....errors import ConfigError
from ....speculation_config import VERIFICATIONS, SpeculationConfig, parse_speculation


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--speculate", metavar="PROPOSER", help="ngram:k=4,min=2,max=4 or draft:PATH,k=4,tp=1, or draft:...+ngram:... (none)"
    )
    group.add_argument("--speculate-policy", metavar="POLICY", help="goodput, fixed, or by running prompts as batch:1-4=6,5-16=3 (goodput)")
    group.add_argument("--speculate-verify", choices=VERIFICATIONS, help="keep each token, or the distribution of tokens (match)")


def read_speculation(arguments: argparse.Namespace) -> SpeculationConfig | None:
    """Return what the options ask for; None without ``--speculate``.

    Raises:
        ConfigError: as ``parse_speculation``; or one of the other options without ``--speculate``.
    """
    policy, verify = arguments.speculate_policy, arguments.speculate_verify
    if arguments.speculate is not None:
        return parse_speculation(arguments.speculate, policy or "goodput", verify or "match")
    for option, value in (("--speculate-policy", policy), ("--speculate-verify", verify)):
        if value is not None:
            raise ConfigError(f"{option} is {value!r}, and nothing proposes tokens; give --speculate too, such as --speculate ngram:k=4")
    return None
