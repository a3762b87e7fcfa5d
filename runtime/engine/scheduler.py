"""Picks sequences and tokens for the next step: plain Python, no I/O; events in, decisions out.

    add ---> waiting --admit--> running --finish--> gone        oldest first everywhere: the running sequences are always the
                ^___preempt_______|                             oldest ones, and the newest of them gives way

The driver runs ahead: ``schedule`` may be called for step k+1 before ``apply`` has seen the tokens of step k, since each rank
appends the tokens that it samples. The counters of a sequence run ahead with it. What is found out late costs one discarded row:
a sequence that ``apply`` finishes may have rows in steps already published. Their tokens are dropped (the ``Sequence`` object is
finished and never returns, whatever happens to its slot), and its slot and blocks can be given to the very next step, which every
rank runs after those.

The file passes 350 lines because all of it is one state machine, whose rules are easier to see in one place.

With several pipeline stages each step takes its share of the sequences: ``PipelineParts``.

With speculation a decode holds drafts, as many as the step allows and each rank chooses, and gains one to that many tokens more. Blocks are
there for the most, so that the ranks never wait for them; where they would have to be taken from others, the step allows no drafts.

At most one running sequence has prompt left to compute, the newest: nobody is admitted behind an unfinished prompt, since that
has taken the rest of the step's budget.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from ...config import EngineConfig
from ...errors import InternalError, RequestError
from ...speculation_config import SpeculationConfig
from .blocks import BlockPool
from .pipeline_parts import PipelineParts
from .plan import ScheduledStep, StepPlan, Update, build_slot_add
from .queue import WaitingQueue
from .request import NO_SLOT, Sequence, SequenceState
from .statistics import SchedulerStatistics

_RUNNING, _FINISHED = SequenceState.RUNNING, SequenceState.FINISHED


class Scheduler:
    """Continuous batching over the slots and KV blocks of the ranks.

    Args:
        config: sizes; its ``max_model_len`` and ``num_blocks`` are superseded by the next two.
        num_blocks: blocks on each rank, block 0 (padding) included.
        max_model_len: prompt and output tokens of a sequence.
        eos_token_ids: the model's end-of-sequence tokens.
        num_stages: stages of the pipeline.
        replica: which of the data-parallel replicas this schedules for.
        ages: numbers the sequences of all replicas in the order of their arrival; None where there is one replica.

    Raises:
        ConfigError: fewer than 2 blocks.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        num_stages: int = 1,
        replica: int = 0,
        ages: Iterator[int] | None = None,
    ) -> None:
        self._config = config
        self._replica = replica
        self._max_drafts = config.speculation.k if isinstance(config.speculation, SpeculationConfig) else 0
        self._is_told = is_told = num_stages > 1 and self._max_drafts > 0  # by the driver, which drafts the last stage kept
        self._parts = None if num_stages == 1 else PipelineParts(num_stages, config.window, is_told=is_told)
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}
        self._begin()
        self._ages = itertools.count() if ages is None else ages
        self._totals: Counter[str] = Counter()

    def _begin(self) -> None:
        """Take up the state of ranks that have run no step."""
        config = self._config
        self._pool = BlockPool(self._num_blocks, config.block_size, config.enable_prefix_cache)
        self._prefilling: Sequence | None = None
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._deletes: list[int] = []
        self._last_decodes: list[Sequence] = []
        self._in_flight: deque[ScheduledStep] = deque()
        self._step_number = 0  # of the next step

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps that have not been applied."""
        return len(self._in_flight)

    def load(self) -> int:
        """Return the tokens of all sequences that are unfinished here: what a newcomer has to share the ranks with."""
        return sum(sequence.num_tokens for sequence in (*self._running.values(), *self._waiting))

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Return how much of a sequence's beginning need not be computed here, as things are; takes no block."""
        config = self._config
        if not config.enable_prefix_cache:
            return 0
        reusable = sequence.block_digests(config.block_size)[: (sequence.num_tokens - 1) // config.block_size]
        return self._pool.count_prefix(reusable) * config.block_size

    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a step has not been applied."""
        return bool(self._running or self._waiting or self._in_flight)

    def add(self, *sequences: Sequence) -> None:
        """Queue the sequences of one request; all of them or, with an error, none.

        Raises:
            RequestError: a sequence that can never run, or a full queue.
        """
        if len(self._waiting) >= self._config.max_waiting:
            limit = f"{len(self._waiting)} sequences are waiting, the limit max_waiting is {self._config.max_waiting}"
            raise RequestError(f"{limit}: send the request again later", request_id=sequences[0].request_id)
        limits = [self._check_fits(sequence) for sequence in sequences]
        for sequence, limit_tokens in zip(sequences, limits):
            if sequence.sequence_id in self._running or self._waiting.get(sequence.sequence_id) is not None:
                raise InternalError(f"sequence {sequence.sequence_id} was added twice")
            sequence.max_num_tokens = limit_tokens
            eos_token_ids = frozenset() if sequence.params.ignore_eos else self._eos_token_ids
            sequence.end_token_ids = eos_token_ids.union(sequence.params.stop_token_ids)
            sequence.age = next(self._ages)
            self._waiting.append(sequence)

    def abort(self, sequence_id: str) -> bool:
        """End a sequence with the reason "abort"; False if it has finished already."""
        return self.finish(sequence_id, "abort")

    def finish(self, sequence_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """End a sequence from outside, as for a stop text; False if it has finished already. Its later tokens are dropped."""
        sequence = self._running.get(sequence_id) or self._waiting.get(sequence_id)
        if sequence is None:
            return False
        self._finish(sequence, reason, stop_reason)
        return True

    def run_only(self, request_ids: Collection[str] | None) -> None:
        """Let the sequences of these requests run and no other, those to come included; None lets all run.

        Whoever runs gives everything back and starts again in its turn, so that the running ones stay the oldest of those that may.
        """
        self._preempt_all()
        self._waiting.admit_only(request_ids)

    def reset(self) -> None:
        """Begin again with ranks that know nothing: steps in flight are forgotten, and what is unfinished waits to be computed again.

        A sequence keeps the tokens that ``apply`` has given it, and goes on behind them.
        """
        self._preempt_all()
        for sequence in self._waiting:
            sequence.count_ahead(-sequence.num_ahead)
        self._begin()
        self._totals["restarts"] += 1

    def schedule(self) -> ScheduledStep | None:
        """Decide the next step, which must be published; None if nothing can run until a step in flight has been applied."""
        plan = StepPlan(self._config.max_num_batched_tokens, self._replica)
        plan.max_drafts = self._choose_max_drafts(plan)
        self._plan_decodes(plan)
        if self._prefilling is not None:
            self._plan_chunk(plan, self._prefilling)
        self._admit_waiting(plan)
        if not plan.chunks and not plan.decodes:
            return None
        if self._config.enable_prefix_cache:
            for sequence, _ in plan.chunks:
                self._register_full_blocks(sequence)
        # the same sequences have the same slots: one that gave its slot back was in no decode until it had been a chunk again
        is_same = plan.decodes == self._last_decodes and not self._is_told
        decode_slots = None if is_same else [sequence.slot for sequence in plan.decodes]
        step = plan.build(self._deletes, decode_slots, has_tokens=self._is_told)
        self._deletes.clear()
        self._last_decodes = plan.decodes
        if self._parts is not None:
            for sequence in step.sampled:
                sequence.last_step = self._step_number
            self._step_number += 1
        self._in_flight.append(step)
        self._totals["computed"] += step.num_tokens
        return step

    def apply(
        self,
        step: ScheduledStep,
        token_ids: SequenceOf[int] | npt.NDArray[np.integer],
        counts: SequenceOf[int] | None = None,
        num_drafts: SequenceOf[int] | None = None,
    ) -> list[Update]:
        """Take in the tokens of the oldest step in flight.

        Args:
            step: as ``schedule`` returned it.
            token_ids: those of each of ``step.sampled``, one after another.
            counts: how many each has; None stands for one each. 0 is for a sequence that had all its tokens already.
            num_drafts: drafts that each had; None where counts is.

        Returns:
            The sequences that gained tokens, in row order; those that had finished meanwhile are left out. Tokens behind the one that
            ends a sequence are dropped.

        Raises:
            InternalError: a step out of turn, or a wrong number of tokens.
        """
        if not self._in_flight or self._in_flight[0] is not step:
            raise InternalError("a step was applied out of turn; steps are applied once, in the order in which they were scheduled")
        tokens = token_ids.tolist() if isinstance(token_ids, np.ndarray) else token_ids
        if counts is not None:
            return self._apply_several(step, tokens, counts, num_drafts or [0] * len(counts))
        if len(tokens) != len(step.sampled):
            raise InternalError(f"a step that samples {len(step.sampled)} rows came back with {len(tokens)} tokens")
        self._in_flight.popleft()
        updates, take_token = [], self._take_token
        for place, (sequence, token) in enumerate(zip(step.sampled, tokens)):
            if sequence.state is _FINISHED:
                continue
            if self._max_drafts:
                sequence.count_verified(step.most_tokens(place), 1, 0)
            else:
                sequence.num_ahead -= 1
            updates.append(Update(sequence, [token], take_token(sequence, token)))
        self._totals["generated"] += len(updates)
        self._totals["discarded"] += len(tokens) - len(updates)
        return updates

    def _apply_several(
        self, step: ScheduledStep, tokens: SequenceOf[int], counts: SequenceOf[int], num_drafts: SequenceOf[int]
    ) -> list[Update]:
        """``apply`` where a row may hold drafts."""
        mosts = [1] * (len(step.sampled) - step.num_decodes) + [1 + step.batch.max_drafts] * step.num_decodes
        is_whole = len(counts) == len(num_drafts) == len(mosts) and sum(counts) == len(tokens)
        if not is_whole or any(count > most or count > drafts + 1 for most, count, drafts in zip(mosts, counts, num_drafts)):
            raise InternalError(
                f"rows that can gain {mosts} tokens came back with {counts}, of {num_drafts} drafts, and {len(tokens)} tokens"
            )
        self._in_flight.popleft()
        updates, end = [], 0
        for sequence, most, count, drafts in zip(step.sampled, mosts, counts, num_drafts):
            start, end = end, end + count
            if sequence.state is _FINISHED:
                continue
            sequence.count_verified(most, count, drafts)
            if count == 1:
                updates.append(Update(sequence, [tokens[start]], self._take_token(sequence, tokens[start])))
            elif count:
                updates.append(Update(sequence, *self._take_tokens(sequence, tokens[start:end])))
        num_taken = sum(len(update.token_ids) for update in updates)
        self._totals["generated"] += num_taken
        self._totals["discarded"] += len(tokens) - num_taken
        return updates

    def _take_tokens(self, sequence: Sequence, tokens: SequenceOf[int]) -> tuple[list[int], str | None]:
        """Append tokens that came back, up to the one that ends the sequence; returns those and the reason."""
        taken = []
        for token in tokens:
            taken.append(token)
            reason = self._take_token(sequence, token)
            if reason is not None:
                return taken, reason
        return taken, None

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_steps_in_flight=len(self._in_flight),
            num_blocks=self._pool.num_usable,
            num_free_blocks=self._pool.num_free,
            num_cached_blocks=self._pool.num_cached,
            num_prefix_queries=self._totals["prefix_queries"],
            num_prefix_hits=self._totals["prefix_hits"],
            num_preemptions=self._totals["preemptions"],
            num_computed_tokens=self._totals["computed"],
            num_generated_tokens=self._totals["generated"],
            num_discarded=self._totals["discarded"],
            num_restarts=self._totals["restarts"],
        )

    def validate(self) -> None:
        """Check that slots, blocks, queues and counters agree.

        Raises:
            InternalError: what does not.
        """
        running, waiting = list(self._running.values()), list(self._waiting)
        self._waiting.validate()
        self._pool.validate(sequence.blocks for sequence in running)
        slots = [sequence.slot for sequence in running] + self._free_slots
        _require(sorted(slots) == list(range(self._config.max_num_seqs)), f"slots {slots} are not each held or free once")
        _require(self._prefilling is None or self._prefilling is running[-1], "a prompt is unfinished, and not the newest one's")
        ages = [sequence.age for sequence in running] + [first.age for first in [self._waiting.first()] if first is not None]
        _require(ages == sorted(ages), f"running and waiting sequences are out of order: {ages}")
        in_flight: Counter[int] = Counter()
        for step in self._in_flight:
            for place, sequence in enumerate(step.sampled):
                in_flight[id(sequence)] += step.most_tokens(place)
        for sequence in (*running, *waiting):
            name, counted = sequence.sequence_id, in_flight[id(sequence)]
            _require(sequence.num_ahead == counted, f"{name} counts {sequence.num_ahead} tokens in flight, not {counted}")
            ahead = min(counted, sequence.max_num_tokens - sequence.num_known)
            _require(sequence.num_in_flight == ahead, f"{name} counts {sequence.num_in_flight} tokens in flight, not {ahead}")
            _require(sequence.num_tokens <= sequence.max_num_tokens, f"{name} grew beyond {sequence.max_num_tokens} tokens")
            _require(sequence.num_computed < sequence.num_tokens, f"{name} computed a token that nobody has sampled")
            _require(self._blocks_for(sequence.num_computed) <= len(sequence.blocks), f"{name} computed tokens beyond its blocks")
        for sequence in waiting:
            idle = sequence.slot == NO_SLOT and not sequence.blocks and not sequence.num_computed
            _require(idle, f"{sequence.sequence_id} waits with slot {sequence.slot} and {len(sequence.blocks)} blocks")

    def _check_fits(self, sequence: Sequence) -> int:
        """Return the tokens that the sequence may grow to, or say why it can never run."""
        config, num_prompt = self._config, sequence.num_prompt
        limit = min(num_prompt + sequence.params.max_tokens, self._max_model_len)
        if num_prompt >= self._max_model_len:
            problem = f"the prompt has {num_prompt} tokens, and max_model_len {self._max_model_len} must hold one more: shorten it"
        elif not config.enable_chunked_prefill and num_prompt > config.max_num_batched_tokens:
            problem = (
                f"the prompt has {num_prompt} tokens, and without chunked prefill a step takes {config.max_num_batched_tokens}: "
                "shorten it, raise max_num_batched_tokens or set enable_chunked_prefill"
            )
        elif self._blocks_for(limit - 1) > self._pool.num_usable:  # the last token is never computed
            room = self._pool.num_usable * config.block_size
            problem = f"{limit - 1} tokens need KV where all blocks hold {room}: lower max_tokens, shorten the prompt or raise num_blocks"
        else:
            return limit
        raise RequestError(problem, request_id=sequence.request_id)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)

    def _choose_max_drafts(self, plan: StepPlan) -> int:
        """Return how many drafts each decode may hold: no more than the step has room for, and none that cost others their blocks."""
        if not self._max_drafts:
            return 0
        num_decodes = len(self._running) or 1
        most = min(self._max_drafts, plan.budget // num_decodes - 1)
        if most <= 0:
            return 0
        blocks_each = self._blocks_for(1 + most) + 1
        return most if self._pool.num_free >= blocks_each * num_decodes else 0

    def _plan_decodes(self, plan: StepPlan) -> None:
        """One token for each running sequence past its prompt, and drafts, while the tokens in flight leave it room to grow."""
        block_size, decodes, most = self._config.block_size, plan.decodes, 1 + plan.max_drafts
        for sequence in self._choose_decodes():
            if sequence.state is not _RUNNING:
                break  # preempted by an older one just now, as are all that follow
            num_tokens = min(sequence.num_tokens + most, sequence.max_num_tokens)
            if num_tokens - 1 > len(sequence.blocks) * block_size and not self._grow(plan, sequence, num_tokens - 1):
                if not decodes:  # in a pipeline older ones may not have been chosen, and have room now
                    return self._plan_decodes(plan)
                break
            sequence.num_ahead += most
            sequence.num_tokens = num_tokens
            sequence.num_computed = num_tokens - 1
            decodes.append(sequence)
        plan.budget -= most * len(plan.decodes)

    def _choose_decodes(self) -> list[Sequence]:
        """Return running sequences past their prompts, oldest first, but for those that steps in flight fill even if they keep no draft."""
        prefilling, longest = self._prefilling, 1 + self._max_drafts
        growing = [
            sequence
            for sequence in self._running.values()
            if sequence is not prefilling and sequence.num_known + -(-sequence.num_ahead // longest) < sequence.max_num_tokens
        ]
        if self._parts is None:
            return growing
        num_running, num_in_flight = len(self._running), len(self._in_flight)
        return self._parts.choose(growing, num_running=num_running, num_in_flight=num_in_flight, step_number=self._step_number)

    def _grow(self, plan: StepPlan, sequence: Sequence, num_positions: int) -> bool:
        """Give a sequence blocks for so many positions, at the cost of newer ones where none is free; False if it gave way itself."""
        while len(sequence.blocks) * self._config.block_size < num_positions:
            while not self._pool.num_free:
                assert len(self._running) > 1, "one sequence alone does not fit, although add() checked it"
                victim = self._newest()
                self._preempt(victim)
                self._totals["preemptions"] += 1
                if victim is sequence:
                    return False
            block = self._pool.allocate(1)[0]
            sequence.blocks.append(block)
            plan.append_block(sequence.slot, block)
        return True

    def _newest(self) -> Sequence:
        return next(reversed(self._running.values()))

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence) -> None:
        """As much of a prompt as the budget allows; its blocks were allocated at admission."""
        count = min(sequence.num_tokens - sequence.num_computed, plan.budget)
        plan.chunks.append((sequence, count))
        plan.budget -= count
        sequence.num_computed += count
        self._prefilling = sequence
        if sequence.num_computed == sequence.num_tokens:
            sequence.count_ahead(1)
            plan.chunk_samples.append(sequence)
            self._prefilling = None

    def _admit_waiting(self, plan: StepPlan) -> None:
        while self._free_slots and plan.budget and self._prefilling is None:
            sequence = self._waiting.first()
            # after a preemption its tokens are sent again, so that all of them must be known here
            if sequence is None or sequence.num_in_flight or not self._admit(plan, sequence):
                return

    def _admit(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Start a waiting sequence if its known tokens fit, with a block left for each running one to grow.

        Without that reserve a newcomer takes the last blocks and is preempted a few steps later: of 300 requests over 400 blocks,
        232 were, where 49 are with it, and 30 % more tokens were computed.
        """
        config, num_tokens = self._config, sequence.num_tokens
        cached = []
        if config.enable_prefix_cache:
            digests = sequence.block_digests(config.block_size)
            cached = self._pool.match_prefix(digests[: (num_tokens - 1) // config.block_size])
        num_cached = len(cached) * config.block_size
        num_new_blocks = self._blocks_for(num_tokens) - len(cached)
        if num_new_blocks + len(self._running) > self._pool.num_free or not self._may_start(plan, num_tokens - num_cached):
            self._pool.free(cached)
            return False
        self._waiting.remove(sequence)
        self._running[sequence.sequence_id] = sequence
        sequence.state = SequenceState.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.blocks = cached + self._pool.allocate(num_new_blocks)
        sequence.num_computed = num_cached
        sequence.num_told = num_tokens
        sequence.register_at = num_cached + config.block_size
        self._totals["prefix_queries"] += num_tokens
        self._totals["prefix_hits"] += num_cached
        plan.adds.append(build_slot_add(sequence, tells_ends=self._max_drafts > 0))
        self._plan_chunk(plan, sequence)
        return True

    def _may_start(self, plan: StepPlan, num_new: int) -> bool:
        """Without chunked prefill a prompt waits for a step that takes it whole; one that outgrew every step is chunked all the same."""
        return self._config.enable_chunked_prefill or num_new <= plan.budget or num_new > self._config.max_num_batched_tokens

    def _register_full_blocks(self, sequence: Sequence) -> None:
        """Let later steps share the blocks whose tokens are all known, and computed by steps up to the last one published."""
        block_size = self._config.block_size
        digests = sequence.block_digests(block_size)
        complete = min(sequence.num_computed, sequence.num_known)
        while sequence.register_at <= complete:
            place = sequence.register_at // block_size - 1
            self._pool.register(sequence.blocks[place], digests[place])
            sequence.register_at += block_size

    def _take_token(self, sequence: Sequence, token: int) -> str | None:
        """Append a token that came back, and finish the sequence if it is the last; returns the reason."""
        outputs = sequence.output_token_ids
        outputs.append(token)
        known = len(sequence.prompt_token_ids) + len(outputs)
        is_end = token in sequence.end_token_ids and len(outputs) > sequence.params.min_tokens
        if is_end and self._max_drafts:  # ranks that speculate leave it out of the steps behind, so that this token has no KV
            sequence.num_computed = min(sequence.num_computed, known - 1)
        if sequence.register_at <= known and self._config.enable_prefix_cache and sequence.state is _RUNNING:
            self._register_full_blocks(sequence)
        if is_end:
            is_eos = token in self._eos_token_ids and not sequence.params.ignore_eos
            return self._finish(sequence, "stop", None if is_eos else token)
        if known >= sequence.max_num_tokens:
            return self._finish(sequence, "length")
        return None

    def _finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> str:
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        return reason

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it will be computed again, first of those that wait."""
        self._leave(sequence)
        sequence.state = SequenceState.PREEMPTED
        sequence.num_computed = 0
        self._waiting.prepend(sequence)

    def _preempt_all(self) -> None:
        for sequence in reversed(list(self._running.values())):
            self._preempt(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give slot and blocks back at once: ranks run steps in order, so that later steps may use them before earlier ones are applied."""
        del self._running[sequence.sequence_id]
        if sequence is self._prefilling:
            self._prefilling = None
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        self._deletes.append(sequence.slot)
        sequence.slot = NO_SLOT


def _require(claim: bool, message: str) -> None:
    if not claim:
        raise InternalError(message)
