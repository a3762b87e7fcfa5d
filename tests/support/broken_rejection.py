"""Model workers whose rejection sampling breaks one rule; of a launch of them, no rank does better."""

from __future__ import annotations

from typing import Any

from zspmd.workers.model_worker import ModelWorker
from zspmd.workers.speculation import rejection


class _Broken(ModelWorker):
    """Replaces a rule in its process, which is a rank's own."""

    rule: tuple[str, Any]

    def setup(self, **worker_args: Any) -> None:
        setattr(rejection, *self.rule)
        super().setup(**worker_args)


class AcceptsWithP(_Broken):
    """Accepts a draft with the target's probability, whatever the draft's own."""

    rule = ("_accepts", lambda p, q, u: u < p)


class AcceptsAll(_Broken):
    """Accepts every draft that the target can sample."""

    rule = ("_accepts", lambda p, q, u: p > 0)


class ResamplesFromTarget(_Broken):
    """Takes what follows a rejection from the target's distribution, and not from what the draft has left of it."""

    rule = ("_residual", lambda p, q: p)
