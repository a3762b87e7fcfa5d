"""What a user says about speculative decoding: who proposes tokens, how many, and how they are verified. Standard library only.

ngram:k=4,min=2,max=4            the tokens that followed an earlier occurrence of a sequence's last 2 to 4 tokens
draft:PATH,k=4,tp=1              a smaller model; "draft:demo" is the one that ships with zspmd
draft:PATH,k=4+ngram:k=2         the same, itself sped up by what follows the "+"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .errors import ConfigError

MAX_DEPTH = 16  # tokens that are proposed for a sequence in a step
MAX_NGRAM = 16
MAX_PROPOSERS = 4  # within each other
MAX_SEQUENCES = 65_535  # as many as EngineConfig.max_num_seqs may be
POLICIES = ("goodput", "fixed", "batch")
VERIFICATIONS = ("match", "rejection")


@dataclass(frozen=True)
class NgramConfig:
    """Propose what followed the latest earlier occurrence of a sequence's last tokens; costs no model.

    Args:
        k: tokens proposed for a sequence in a step at most; 1 to 16.
        min_n, max_n: how many last tokens are looked for, the longest first; 1 <= min_n <= max_n <= 16.

    Raises:
        ConfigError: a value outside its range.
    """

    k: int = 4
    min_n: int = 2
    max_n: int = 4

    def __post_init__(self) -> None:
        _check_whole("k", self.k, 1, MAX_DEPTH)
        _check_whole("max_n", self.max_n, 1, MAX_NGRAM)
        _check_whole("min_n", self.min_n, 1, self.max_n, "max_n is the limit, lower the one or raise the other")


@dataclass(frozen=True)
class DraftConfig:
    """Propose what a smaller model of the same vocabulary would say.

    Args:
        model: its directory, or "demo" for the draft of the demo model.
        k: tokens proposed for a sequence in a step at most; 1 to 16.
        tp: 1, where each rank runs all of it, or the target's tp, where the same ranks share it.
        inner: who proposes to the draft in turn; None leaves it alone.

    Raises:
        ConfigError: a value outside its range, or more than four proposers within each other.
    """

    model: str
    k: int = 4
    tp: int = 1
    inner: NgramConfig | DraftConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"the draft's model is {self.model!r}; give the path of its directory as text, or 'demo'")
        _check_whole("k", self.k, 1, MAX_DEPTH)
        _check_whole("tp", self.tp, 1, MAX_SEQUENCES)
        if self.inner is not None and not isinstance(self.inner, (NgramConfig, DraftConfig)):
            raise ConfigError(f"inner is {self.inner!r}; give an NgramConfig, a DraftConfig or None")
        if len(_nested(self)) > MAX_PROPOSERS:
            raise ConfigError(f"{len(_nested(self))} proposers are within each other; {MAX_PROPOSERS} is the limit, leave some out")


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are proposed and verified.

    Args:
        proposer: who proposes.
        policy: how many tokens are proposed in a step: "fixed" takes always ``k``, "batch" what ``depths`` says, "goodput" what gives
            most tokens a second by what has been measured, 0 included.
        depths: of the policy "batch": pairs of a largest number of decoding sequences and the tokens proposed for each, in rising
            order. More sequences than the last pair has get none.
        verify: "match" keeps the proposals that equal what would have been sampled without them, so that no token changes;
            "rejection" keeps the distribution of the tokens, and more of the proposals.

    Raises:
        ConfigError: a value outside its range, or ``depths`` and ``policy`` that do not belong together.
    """

    proposer: NgramConfig | DraftConfig
    policy: str = "goodput"
    depths: tuple[tuple[int, int], ...] = ()
    verify: str = "match"

    def __post_init__(self) -> None:
        if not isinstance(self.proposer, (NgramConfig, DraftConfig)):
            raise ConfigError(f"proposer is {self.proposer!r}; give an NgramConfig or a DraftConfig")
        for name, choices in (("policy", POLICIES), ("verify", VERIFICATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        object.__setattr__(self, "depths", _check_depths(self.depths, self.k))
        if (self.policy == "batch") != bool(self.depths):
            raise ConfigError(
                f"policy is {self.policy!r} and depths are {self.depths!r}; depths belong to the policy 'batch', which needs them"
            )

    @property
    def k(self) -> int:
        """Tokens proposed for a sequence in a step at most."""
        return self.proposer.k

    @property
    def drafts(self) -> tuple[DraftConfig, ...]:
        """The draft models, the outermost first."""
        return tuple(proposer for proposer in _nested(self.proposer) if isinstance(proposer, DraftConfig))

    def with_models(self, resolve: Callable[[str], str]) -> SpeculationConfig:
        """Return the same with every draft's ``model`` put through ``resolve``."""
        return replace(self, proposer=_with_models(self.proposer, resolve))

    def to_plain(self) -> dict[str, Any]:
        """Return plain values that may travel to ranks."""
        depths = [list(pair) for pair in self.depths]
        return {"proposer": _to_plain(self.proposer), "policy": self.policy, "depths": depths, "verify": self.verify}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SpeculationConfig:
        """Return what ``to_plain`` was called on; raises ConfigError where a value is out of range."""
        return cls(**{**plain, "proposer": _from_plain(plain["proposer"])})


def parse_speculation(text: str, policy_text: str = "goodput", verify: str = "match") -> SpeculationConfig:
    """Read a proposer, such as "draft:PATH,k=4+ngram:k=2", and a policy: "goodput", "fixed" or "batch:1-4=6,5-16=3".

    A path may hold "=" and ":", and neither "," nor "+". Ranges of "batch" begin with 1 and leave no gap.

    Raises:
        ConfigError: names the text, the piece of it that is wrong, and what is allowed.
    """
    *outer, innermost = text.split("+")
    proposer = _parse_piece(text, innermost, None)
    for piece in reversed(outer):
        proposer = _parse_piece(text, piece, proposer)
    try:
        policy, depths = _parse_policy(policy_text)
        return SpeculationConfig(proposer, policy, depths, verify)
    except ConfigError as error:
        raise ConfigError(f"speculation {text!r} with the policy {policy_text!r}: {error}") from None


_FORMS = "ngram:k=4,min=2,max=4 or draft:PATH,k=4,tp=1, joined by '+', where all but PATH may be left out and PATH holds no ',' and no '+'"
_NGRAM_FIELDS = {"k": "k", "min": "min_n", "max": "max_n"}
_DRAFT_FIELDS = {"k": "k", "tp": "tp"}
_NUMBER = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?=([0-9]{1,9})")


def _parse_piece(text: str, piece: str, inner: NgramConfig | DraftConfig | None) -> NgramConfig | DraftConfig:
    try:
        return _parse_proposer(piece, inner)
    except ConfigError as error:
        raise ConfigError(f"speculation {text!r}, in {piece!r}: {error}") from None


def _parse_proposer(piece: str, inner: NgramConfig | DraftConfig | None) -> NgramConfig | DraftConfig:
    kind, colon, rest = piece.partition(":")
    words = rest.split(",") if colon else []
    if kind == "ngram":
        if inner is not None:
            raise ConfigError("it has no model that another could propose to; put it last")
        return NgramConfig(**_parse_fields(words, _NGRAM_FIELDS))
    if kind != "draft" or not words or not words[0]:
        raise ConfigError(f"that is no proposer; give {_FORMS}")
    return DraftConfig(words[0], inner=inner, **_parse_fields(words[1:], _DRAFT_FIELDS))


def _parse_fields(words: list[str], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of ``name=number`` words, under the names of a config's fields."""
    values: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in fields or not _NUMBER.fullmatch(number):
            raise ConfigError(f"{word!r} is no setting with a whole number; settings are {', '.join(fields)}: give {_FORMS}")
        if fields[name] in values:
            raise ConfigError(f"{name} is there twice; leave one out")
        values[fields[name]] = int(number)
    return values


def _parse_policy(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    policy, colon, rest = text.partition(":")
    if policy != "batch":
        if colon or policy not in POLICIES:
            raise ConfigError("policies are goodput, fixed and batch:RANGES, such as batch:1-4=6,5-16=3")
        return policy, ()
    depths: list[tuple[int, int]] = []
    for word in rest.split(","):
        found = _RANGE.fullmatch(word)
        if found is None:
            raise ConfigError(f"{word!r} is no range of sequences with a depth; give such as batch:1-4=6,5-16=3")
        first, last = int(found[1]), int(found[2] or found[1])
        wanted = depths[-1][0] + 1 if depths else 1
        if first != wanted or last < first:
            raise ConfigError(f"{word!r} should begin with {wanted} and not end before: ranges begin with 1 and leave no gap")
        depths.append((last, int(found[3])))
    return policy, tuple(depths)


def _check_depths(depths: object, k: int) -> tuple[tuple[int, int], ...]:
    if not isinstance(depths, (tuple, list)) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in depths):
        raise ConfigError(f"depths are {depths!r}; give pairs of a number of sequences and a depth, such as ((4, 6), (16, 3))")
    for num_sequences, depth in depths:
        _check_whole("a number of sequences in depths", num_sequences, 1, MAX_SEQUENCES)
        _check_whole("a depth in depths", depth, 0, k, "the proposer's k is the limit, lower the one or raise the other")
    if any(lower >= higher for (lower, _), (higher, _) in pairwise(depths)):
        raise ConfigError(f"depths are {depths!r}; their numbers of sequences must rise")
    return tuple((num_sequences, depth) for num_sequences, depth in depths)


def _nested(proposer: NgramConfig | DraftConfig | None) -> list[NgramConfig | DraftConfig]:
    """Return a proposer and those within it, the outermost first."""
    if proposer is None:
        return []
    return [proposer, *(_nested(proposer.inner) if isinstance(proposer, DraftConfig) else ())]


def _with_models(proposer: Any, resolve: Callable[[str], str]) -> Any:
    if not isinstance(proposer, DraftConfig):
        return proposer
    return replace(proposer, model=resolve(proposer.model), inner=_with_models(proposer.inner, resolve))


def _to_plain(proposer: NgramConfig | DraftConfig | None) -> dict[str, Any] | None:
    if proposer is None:
        return None
    if isinstance(proposer, NgramConfig):
        return {"kind": "ngram", **vars(proposer)}
    return {"kind": "draft", **vars(proposer), "inner": _to_plain(proposer.inner)}


def _from_plain(plain: Mapping[str, Any] | None) -> Any:
    if plain is None:
        return None
    fields = {name: value for name, value in plain.items() if name != "kind"}
    if plain["kind"] == "ngram":
        return NgramConfig(**fields)
    return DraftConfig(**{**fields, "inner": _from_plain(fields["inner"])})


def _check_whole(name: str, value: object, low: int, high: int, advice: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}{advice and ': ' + advice}")
