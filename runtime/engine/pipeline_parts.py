"""Which sequences decode in the next step of a pipeline: an equal part for each stage, so that every stage has a step to work on.

    stage 0   A1 B1 A2 B2 A3 B3        A, B: parts of the running sequences; every ``num_stages``th step has the same part
    stage 1      A1 B1 A2 B2 A3

The last stage hands the tokens that it samples to the first one, so that A2 may be published before the answer to A1 is back, like the
next step where there is one stage. It is published behind the steps of all other parts: no sooner, since the first stage would wait for
A1's tokens where it could have computed B1. With speculation the driver tells the ranks which drafts were kept: there a sequence
decodes only once the answer to its last step is back, and is in one step at most.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from .request import Sequence


def most_in_flight(window: int, num_stages: int, *, is_told: bool) -> int:
    """Return how many steps of a pipeline may be published and not answered.

    Args:
        window: for each sequence, ``EngineConfig.window``.
        is_told: whether the driver tells the ranks what was sampled.
    """
    return max(window, num_stages) if is_told else num_stages - 1 + window


class PipelineParts:
    """Shares running sequences out among the steps of a pipeline.

    Args:
        num_stages: of the pipeline.
        window: steps in flight that one sequence may be in.
        is_told: as in ``most_in_flight``.
    """

    def __init__(self, num_stages: int, window: int, *, is_told: bool) -> None:
        self._num_stages = num_stages
        self._window = window
        self._is_told = is_told

    def choose(self, growing: SequenceOf[Sequence], *, num_running: int, num_in_flight: int, step_number: int) -> list[Sequence]:
        """Return those of ``growing`` that the next step takes, in the same order.

        Args:
            growing: running sequences that may decode once more, oldest first.
            num_running: sequences in all, with those that steps in flight bring to their ends and one whose prompt is not done.
            num_in_flight: steps that are published and not answered.
            step_number: of the next step, counted like ``Sequence.last_step``.
        """
        num_parts = self._num_stages if self._is_told else min(self._num_stages, num_running)
        ready = [sequence for sequence in growing if self._is_ready(sequence, step_number - num_parts)]
        num_lacking = max(1, num_parts - num_in_flight)  # steps, this one counted, until each part is in one
        share = min(-(-num_running // self._num_stages), -(-len(ready) // num_lacking))
        if len(ready) <= share:
            return ready
        if self._is_told:
            return ready[:share]
        longest_waiting = set(map(id, sorted(ready, key=lambda sequence: sequence.last_step)[:share]))
        return [sequence for sequence in ready if id(sequence) in longest_waiting]

    def _is_ready(self, sequence: Sequence, round_before: int) -> bool:
        if not sequence.num_in_flight:
            return True
        return not self._is_told and sequence.last_step <= round_before and sequence.num_ahead < self._window
