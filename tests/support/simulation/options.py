"""What a seed stands for: the group, its callers, the network, and what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass

from zspmd.config import Deadlines

# what happens to a rank at frame ``frame`` (0 is SYNC), and when it is to start or to stop
DEADLY = ("killed_before", "killed_within", "killed_after", "exited_within", "raised")
STALLING = ("hung", "hung_with_lock", "stopped", "stopped_for", "slowed")
AT_START = ("killed_at_start", "killed_in_setup", "raised_in_setup", "hung_in_setup")
AT_STOP = ("killed_at_stop", "exited_at_stop", "raised_in_teardown", "ignored_stop", "ignored_signals")
# what happens on the way; the answer, or frame, with number ``frame``
ON_THE_WAY = ("answer_lost", "answer_doubled", "answer_garbled", "frame_garbled", "frame_foreign", "step_cut", "stranger")
PAUSES = ("driver_stopped", "driver_blocked")
OTHERS = ("agent_killed",)


@dataclass(frozen=True)
class Fault:
    """``at_s`` counts from the start of the ranks, ``for_s`` is how long it lasts; each kind uses some of the fields."""

    what: str
    rank: int = 0
    frame: int = 0
    at_s: float = 0.0
    for_s: float = 0.0


@dataclass(frozen=True)
class Caller:
    """A task that uses the group: ``kind`` is step, ahead (submits several and awaits them then) or call.

    ``patience_s`` is the timeout of its requests, None for the group's; ``cancel`` how likely each await of it is cancelled.
    """

    kind: str
    num_requests: int
    patience_s: float | None
    cancel: float
    large: float


@dataclass(frozen=True)
class Options:
    seed: int
    num_ranks: int
    window: int
    output_ranks: tuple[int, ...]
    deadlines: Deadlines
    callers: tuple[Caller, ...]
    faults: tuple[Fault, ...]
    longest_delay_s: float
    slow_delay_s: float
    longest_step_s: float
    collectives: float  # the part of steps in which ranks wait for each other
    lose: float
    double: float
    reorder: float
    lose_beats: float
    agent_delay_s: float
    high_water_mark: int
    cancel_start_s: float | None
    close_s: float | None  # while callers are at it
    num_closers: int
    abort: bool


def draw_options(seed: int) -> Options:
    """Return what this seed stands for."""
    chance = random.Random(f"options {seed}")
    num_ranks = chance.choice((1, 2, 2, 2, 3, 3, 4))
    is_lossy = chance.random() < 0.35
    faults = _draw_faults(chance, num_ranks)
    return Options(
        seed=seed,
        num_ranks=num_ranks,
        window=chance.choice((1, 2, 2, 3, 4, 6)),
        output_ranks=tuple(sorted(chance.sample(range(num_ranks), chance.randint(1, num_ranks)))),
        deadlines=Deadlines(beat_s=1.0, ready_s=12.0, step_s=chance.uniform(2.0, 5.0), collective_s=60.0, drain_s=0.8, kill_s=0.4),
        callers=tuple(_draw_caller(chance) for _ in range(chance.choice((1, 1, 2, 2, 3)))),
        faults=faults,
        longest_delay_s=chance.choice((300e-6, 1e-3, 5e-3)),
        slow_delay_s=chance.choice((2e-3, 20e-3, 0.3)),
        longest_step_s=chance.choice((200e-6, 2e-3, 20e-3)),
        collectives=chance.choice((0.0, 0.5, 1.0)),
        lose=chance.choice((0.02, 0.1, 0.3)) if is_lossy else 0.0,
        double=chance.choice((0.0, 0.1)) if is_lossy else 0.0,
        reorder=chance.choice((0.0, 0.2)) if is_lossy else 0.0,
        lose_beats=chance.choice((0.0, 0.0, 0.5)),
        agent_delay_s=chance.choice((1e-3, 5e-3, 20e-3, 0.15)),
        high_water_mark=chance.choice((1024, 1024, 1024, 10)),
        cancel_start_s=chance.uniform(0.0, 0.1) if chance.random() < 0.04 else None,
        close_s=chance.expovariate(20.0) if chance.random() < 0.15 else None,
        num_closers=chance.choice((1, 1, 1, 3)),
        abort=chance.random() < 0.1,
    )


def _draw_caller(chance: random.Random) -> Caller:
    kind = chance.choice(("step", "step", "ahead", "ahead", "call"))
    patience_s = chance.uniform(1e-3, 50e-3) if chance.random() < 0.1 else None
    cancel = 0.15 if chance.random() < 0.2 else 0.0
    return Caller(kind, chance.randint(1, 6), patience_s, cancel, large=0.3 if chance.random() < 0.05 else 0.0)


def _draw_faults(chance: random.Random, num_ranks: int) -> tuple[Fault, ...]:
    """Half of the runs have none but what the network does; of the others some have two, which may come together."""
    if chance.random() < 0.35:
        return ()
    kinds = chance.choices(
        (DEADLY, STALLING, AT_START, AT_STOP, ON_THE_WAY, PAUSES, OTHERS), (30, 12, 8, 8, 14, 20, 3), k=chance.choice((1, 1, 2))
    )
    frame = chance.randint(0, 5)
    return tuple(_draw_fault(chance, chance.choice(group), num_ranks, chance.choice((frame, chance.randint(0, 5)))) for group in kinds)


def _draw_fault(chance: random.Random, what: str, num_ranks: int, frame: int) -> Fault:
    for_s = chance.choice((chance.uniform(0.01, 0.6), chance.uniform(0.5, 3.0), chance.uniform(3.0, 20.0)))
    return Fault(what, chance.randrange(num_ranks), frame, chance.expovariate(12.0), for_s)
