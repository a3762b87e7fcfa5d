"""How many tokens of a draft are accepted, from counts that every rank has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64Array = npt.NDArray[np.int64]

_MEMORY = 64  # sequences: an older one counts for less and less


class Acceptance:
    """Estimates E(K), the tokens that a sequence gains in a step of depth K.

        E(K) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_K        a_i: the share that has place i accepted, of those with place i-1 accepted

    A sequence for which nothing was proposed counts as one whose first place was not accepted, so that E is what a step of such sequences
    yields, whatever the proposer. Before anything is known each a_i is 1/2 (Laplace's rule of succession). Plain float64 additions,
    products and quotients of whole numbers: equal on every rank.

    Args:
        k: the largest depth.
    """

    def __init__(self, k: int) -> None:
        self._places = np.arange(1, k + 1)[:, None]
        self._tries = [2.0] * k
        self._hits = [1.0] * k
        self.expected = self._sum_up()  # E(0) to E(k)

    def observe(self, num_accepted: I64Array, depths: int | I64Array) -> None:
        """Count the sequences of a step.

        Args:
            num_accepted: int64 [D], of each the drafts that were accepted, 0 to its depth.
            depths: the K of the step, or int64 [D] where the sequences come from different steps.
        """
        tried = (self._places <= depths) & (self._places <= num_accepted + 1)  # bool [k, D]
        tries = tried.sum(axis=1).tolist()
        hits = (tried & (self._places <= num_accepted)).sum(axis=1).tolist()
        for place, (tried_here, accepted_here) in enumerate(zip(tries, hits)):
            keep = _MEMORY / (_MEMORY + tried_here)
            self._tries[place] = self._tries[place] * keep + tried_here
            self._hits[place] = self._hits[place] * keep + accepted_here
        self.expected = self._sum_up()

    def fade(self, num_sequences: float) -> None:
        """Let all that was seen so far count for no more than so many sequences, since it is old."""
        for place, tries in enumerate(self._tries):
            keep = min(1.0, num_sequences / tries)
            self._tries[place], self._hits[place] = tries * keep, self._hits[place] * keep

    def _sum_up(self) -> list[float]:
        expected, reached = [1.0], 1.0
        for tries, hits in zip(self._tries, self._hits):
            reached *= hits / tries
            expected.append(expected[-1] + reached)
        return expected
