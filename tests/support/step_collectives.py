"""The collectives that a step asks of a rank, worked out from the step alone: arithmetic that knows nothing of the model's code.

    first stage    embedding    tp all-reduce        T * D
    each layer     attention    tp all-reduce        T * D
                   MLP          tp all-reduce        T * D
                   experts of   dp all-gather        longest * D            before it, where replicas share them; also where this
                   replicas     dp reduce-scatter    dp * longest * D       replica has no token, if another of these has some
                   or else      ep all-to-all        ep                     counts of rows
                                ep all-to-all, twice what the router says   rows, and parts back
    between stages              pp send, receive     T * D
    last stage     sampling     tp all-gather        2 a row                of rows that are sampled by shard
                                tp all-gather        V / tp a row           of rows that need the whole vocabulary
                                pp send_nowait       1 a row                to the first stage, without speculation
    first stage    tokens       pp receive           1 a row                of each earlier step up to the last that sampled for a row of
                                                                            this one, and of those beyond the 2 pp youngest

T tokens of this replica in the step, longest the most of the replicas that share experts (the ep axis, and their number for dp, where
these are not all), D model, V vocabulary.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import zspmd
from zspmd.runtime.engine.plan import ScheduledStep

Collective = list[Any]  # [axis, kind, elements]
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class ModelSizes:
    """What of a checkpoint decides which collectives there are."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    mixture_layers: frozenset[int]

    @classmethod
    def read(cls, directory: Path) -> ModelSizes:
        """Read config.json; raises KeyError where it has none of the fields."""
        fields = json.loads((directory / "config.json").read_text())
        layers = range(fields["num_hidden_layers"])
        if fields["model_type"] in ("llama", "qwen3"):
            layers = range(0)
        elif fields["model_type"] != "mixtral":
            layers = layers[fields["first_k_dense_replace"] :]
        return cls(fields["hidden_size"], fields["num_hidden_layers"], fields["vocab_size"], frozenset(layers))


@dataclass(frozen=True)
class ReplicaPart:
    """What a step computes on one replica: its tokens, of the sampled rows how many are by shard and how many whole, and how many tokens
    the others take it to have, None for as many; with stages, how many tokens of each earlier step the first one takes up, and whether
    the last one hands its own on."""

    num_tokens: int = 0
    num_by_shard: int = 0
    num_whole: int = 0
    num_expected: int | None = None
    taken: tuple[int, ...] = ()
    is_handed_on: bool = False

    @property
    def most_tokens(self) -> int:
        return self.num_tokens if self.num_expected is None else self.num_expected


class TokensOnTheWay:
    """Says which sampled tokens the first of several stages takes up in a step of one replica."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._messages: deque[list[Any]] = deque()  # the sequences that each step has sampled for

    def take(self, step: ScheduledStep) -> tuple[int, ...]:
        """Return how many tokens of each earlier step it takes up in this one, which is the next."""
        taken, decodes = [], step.sampled[len(step.sampled) - step.num_decodes :]
        wanted = {id(sequence) for sequence in decodes}
        while len(self._messages) > 2 * self._num_stages or any(id(one) in wanted for message in self._messages for one in message):
            message = self._messages.popleft()
            taken.append(len(message))
        if step.sampled:
            self._messages.append(list(step.sampled))
        return tuple(taken)


def needs_whole(params: zspmd.SamplingParams) -> bool:
    """Whether a row with these parameters is sampled from the logits of the whole vocabulary."""
    is_filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return params.logprobs is not None or (is_filtered and params.temperature >= GREEDY_BELOW)


def predict_collectives(
    sizes: ModelSizes, parallel: zspmd.ParallelConfig, parts: Sequence[ReplicaPart], rank: int, dispatch: str
) -> list[Collective]:
    """Return what ``rank`` enters in a step, in order; ``ANY`` equals any number of elements.

    Args:
        parts: of each replica.
        dispatch: of the engine; "auto" gathers, since models and steps are small here.
    """
    tp, pp, dp = parallel.tp, parallel.pp, parallel.dp
    replica, stage = rank // (pp * tp), rank // tp % pp
    count = max(1, parallel.ep // tp)  # of replicas that share experts; neighbours
    first = replica // count * count
    part, longest = parts[replica], max(part.most_tokens for part in parts[first : first + count])
    is_shared = bool(sizes.mixture_layers) and count > 1 and longest > 0
    axis = "dp" if count == dp else "ep"
    states, collectives = part.num_tokens * sizes.hidden_size, list[Collective]()
    reduce: list[Collective] = [["tp", "all_reduce", states]] if states and tp > 1 else []
    if stage == 0:
        collectives += [["pp", "receive", count] for count in part.taken]
    if states:
        collectives += reduce if stage == 0 else [["pp", "receive", states]]
    for layer in stage_of_layers(sizes.num_layers, pp, stage):
        collectives += reduce
        if is_shared and layer in sizes.mixture_layers:
            if dispatch == "all_to_all":
                collectives += [["ep", "all_to_all", elements] for elements in (parallel.ep, ANY, ANY)]
            else:
                padded = longest * sizes.hidden_size
                collectives += [[axis, "all_gather", padded], [axis, "reduce_scatter", count * padded]]
        collectives += reduce
    if states and stage < pp - 1:
        collectives.append(["pp", "send", states])
    elif stage == pp - 1:
        collectives += sample(sizes, tp, part.num_by_shard, part.num_whole)
        if part.is_handed_on:
            collectives.append(["pp", "send_nowait", part.num_by_shard + part.num_whole])
    return collectives


def sample(sizes: ModelSizes, tp: int, num_by_shard: int, num_whole: int) -> list[Collective]:
    """Return what rows that are sampled ask for."""
    rows = ((num_by_shard, 2), (num_whole, -(-sizes.vocab_size // tp)))
    return [["tp", "all_gather", count * width] for count, width in rows if count and tp > 1]


def stage_of_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Return the layers of a stage: equal numbers, the first stages one more each where that does not come out even."""
    counts = [(num_layers + num_stages - 1 - place) // num_stages for place in range(num_stages)]
    start = sum(counts[:stage])
    return range(start, start + counts[stage])
