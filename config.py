"""What a user may set, as frozen dataclasses that check themselves. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from .errors import ConfigError, TopologyError
from .speculation_config import SpeculationConfig, parse_speculation


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; ``world_size`` is ``dp * pp * tp``.

    Args:
        tp: ranks that share each layer (tensor parallel).
        pp: contiguous stages of layers (pipeline parallel).
        dp: replicas (data parallel).
        ep: ranks that share the experts of a mixture layer; must divide ``dp * tp``.

    Raises:
        TopologyError: a size below 1, or an ``ep`` that does not divide ``dp * tp``.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp", "ep"):
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise TopologyError(f"{axis} is {size!r}; it must be a whole number of at least 1")
        if (self.dp * self.tp) % self.ep:
            raise TopologyError(f"ep {self.ep} does not divide dp * tp = {self.dp * self.tp}; choose a divisor of it")

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp


MAX_DEADLINE_S = 1e6


@dataclass(frozen=True)
class Deadlines:
    """How long each wait may last, in seconds. They nest: beat < step < collective, and each phase has its own.

    Args:
        beat_s: period of a rank's heartbeat.
        ready_s: from the start of the processes until every rank has set up and answered SYNC (loading included).
        step_s: from publishing a step or call until every rank that answers has answered, unless the caller gives its own.
        collective_s: for a rank inside a collective or store operation; longer than a step, since the driver is to speak first.
        drain_s: at shutdown, spent first on steps in flight; then again from STOP, for the ranks' own teardown, to SIGTERM.
        kill_s: from SIGTERM to SIGKILL, and again from SIGKILL until a process must be gone.
        lease_s: for which the driver and the agent of another node may hear nothing of each other, until each takes the other for lost.
    """

    beat_s: float = 1.0
    ready_s: float = 600.0
    step_s: float = 300.0
    collective_s: float = 600.0
    drain_s: float = 5.0
    kill_s: float = 2.0
    lease_s: float = 15.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not 0 < value <= MAX_DEADLINE_S:
                raise ConfigError(f"deadline {name} is {value!r} s; it must be above 0 and at most {MAX_DEADLINE_S:g}")
        if not self.beat_s < self.step_s <= self.collective_s:
            raise ConfigError(
                f"deadlines must nest as beat_s < step_s <= collective_s; got {self.beat_s}, {self.step_s}, {self.collective_s} s"
            )


RELAY_MODES = ("auto", "on", "off")
MAX_FANOUT = 1024


@dataclass(frozen=True)
class NodesConfig:
    """How other nodes are reached and what travels between them.

    Args:
        rsh: the command that starts an agent on a node, split as a shell does; it is called with the host and one command line. Where
            the program's name is ssh it gets options: no terminal, no questions, no forwarding.
        ssh_port: of sshd, where a host entry has none.
        ssh_options: further arguments of ``rsh``, before the host.
        python: the interpreter on the other nodes, where a host entry has none; None takes the driver's path.
        iface: the interface for data, by name or as a network (10.0.0.0/8), where a host entry has none.
        relay: whether an agent takes each step once for all ranks of its node: "auto", "on" or "off".
        include, exclude, num_nodes: which of the hosts take part, as in ``docs/hostfile.md``.
        environment: variables of this process that the ranks of other nodes get, by name or pattern (``WANDB_*``), beside the usual ones.
        fanout: how many agents are started at the same time.
        is_preflight: whether everything is compared and every connection tried before a rank starts.
        allow_same_host: whether two entries may be the same machine.

    Raises:
        ConfigError: a value outside its range.
    """

    rsh: str = "ssh"
    ssh_port: int | None = None
    ssh_options: tuple[str, ...] = ()
    python: str | None = None
    iface: str | None = None
    relay: str = "auto"
    include: str | None = None
    exclude: str | None = None
    num_nodes: int | None = None
    environment: tuple[str, ...] = ()
    fanout: int = 32
    is_preflight: bool = True
    allow_same_host: bool = False

    def __post_init__(self) -> None:
        if not self.rsh.strip():
            raise ConfigError("rsh is empty; give the command that starts a program on a node, such as ssh")
        if self.relay not in RELAY_MODES:
            raise ConfigError(f"relay is {self.relay!r}; choose one of {', '.join(RELAY_MODES)}")
        if self.ssh_port is not None:
            _check_whole("ssh_port", self.ssh_port, 1, 65_535, "or leave it out")
        if self.num_nodes is not None:
            _check_whole("num_nodes", self.num_nodes, 1, 1 << 16, "or leave it out for all")
        _check_whole("fanout", self.fanout, 1, MAX_FANOUT, "sshd itself takes ten new connections at a time")


DTYPES = ("auto", "float32", "bfloat16", "float16")
EXPERT_DISPATCHES = ("auto", "gather", "all_to_all")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may hold and schedule.

    Args:
        max_num_seqs: sequences that run at once, each in a slot; 1 to 65,535.
        max_num_batched_tokens: tokens of all sequences in one step.
        max_model_len: prompt and output tokens of a request; None takes the checkpoint's limit.
        block_size: KV positions in a block.
        num_blocks: blocks of the KV pool on each rank, block 0 (padding) included; None sizes the pool from free memory.
        enable_prefix_cache: let requests share blocks of equal prompt beginnings.
        enable_chunked_prefill: let a prompt be computed over several steps beside decodes; without it a prompt
            must fit ``max_num_batched_tokens``.
        dtype: dtype of weights and activations; "auto" is float32 on a CPU and the checkpoint's on a GPU.
        pack_weights: put the weights into the form that a CPU multiplies fastest with, once they are loaded. Costs a copy of the
            vocabulary where embedding and head share theirs; does nothing on a GPU.
        window: steps in flight that a sequence may be in; 2 lets the next one be published before the last one is back. A pipeline of
            pp stages has pp - 1 more in flight, for other sequences; with speculation there a sequence is in one, and pp or more are.
        max_waiting: requests that may wait for a slot before ``generate`` refuses more.
        pp_partition: layers of each pipeline stage, such as (3, 2); None balances them.
        redundant_experts: copies of experts that each mixture layer has beyond one of each, shared out among the ranks like the experts;
            ``Engine.rebalance_experts`` gives them to those that have the most to do.
        expert_dispatch: how tokens meet experts that several replicas share: "gather" brings all tokens to every rank, "all_to_all" each
            to the ranks that have its experts; "auto" takes whichever is better for the step.
        speculation: who proposes tokens ahead of the model, and how they are verified; a text such as "ngram:k=4" is read as
            ``--speculate`` is, under the policy "goodput". None proposes nothing.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_cache: bool = True
    enable_chunked_prefill: bool = True
    dtype: str = "auto"
    pack_weights: bool = True
    window: int = 2
    max_waiting: int = 10_000
    pp_partition: tuple[int, ...] | None = None
    redundant_experts: int = 0
    expert_dispatch: str = "auto"
    speculation: SpeculationConfig | str | None = None

    def __post_init__(self) -> None:
        bounds = {
            "max_num_seqs": (1, 65_535),
            "max_num_batched_tokens": (1, 1 << 24),
            "max_model_len": (1, 1 << 24),
            "block_size": (1, 1024),
            "num_blocks": (2, 1 << 31),
            "window": (1, 64),
            "max_waiting": (1, 1 << 31),
            "redundant_experts": (0, 1 << 14),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_blocks"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
        partition = self.pp_partition
        if partition is not None and not (isinstance(partition, (tuple, list)) and all(type(count) is int for count in partition)):
            raise ConfigError(f"pp_partition is {partition!r}; give the layers of each stage, such as (3, 2)")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.expert_dispatch not in EXPERT_DISPATCHES:
            raise ConfigError(f"expert_dispatch is {self.expert_dispatch!r}; choose one of {', '.join(EXPERT_DISPATCHES)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "a step could not hold one token of each sequence; raise the first or lower the second"
            )
        if isinstance(self.speculation, str):
            object.__setattr__(self, "speculation", parse_speculation(self.speculation))
        if self.speculation is not None and not isinstance(self.speculation, SpeculationConfig):
            raise ConfigError(f"speculation is {self.speculation!r}; give a SpeculationConfig, or a text such as 'ngram:k=4'")


@dataclass(frozen=True)
class RestartPolicy:
    """How many faults of its workers an engine outlives; see ``Engine``.

    Args:
        max_restarts: restarts within ``window_s``; the fault after them ends the engine. 0 ends it at the first.
        window_s: seconds after which a restart counts no longer, given that it came to an end.
    """

    max_restarts: int = 3
    window_s: float = 60.0

    def __post_init__(self) -> None:
        _check_whole("max_restarts", self.max_restarts, 0, 1000, "use 0 for none")
        _check_number("window_s", self.window_s, 0.0, MAX_DEADLINE_S, "in seconds", above=True)


@dataclass(frozen=True)
class TraceConfig:
    """A trace of a launch: where it goes, and how much of it is kept.

    Args:
        path: of the file to make; an earlier trace there is replaced.
        max_events: that the driver and each rank keep, the last ones; the file says how many there were before. One takes 48 B of
            memory, which a rank has from its start, and about 200 B in the file. Rounded up to a power of two.

    Raises:
        ConfigError: ``max_events`` out of its range.
    """

    path: str | PathLike[str]
    max_events: int = 1 << 16

    def __post_init__(self) -> None:
        _check_whole("max_events", self.max_events, 64, 1 << 24, "a step of a rank takes one, and one for each of its spans")

    @property
    def capacity(self) -> int:
        """``max_events``, rounded up."""
        return 1 << (self.max_events - 1).bit_length()


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    Args:
        max_tokens: tokens to generate at most; at least 1.
        min_tokens: tokens before any stop condition may end the request; tokens that would end it are not sampled before.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities sum to at least this; 1 keeps all.
        min_p: drop tokens below this share of the likeliest token's probability; 0 keeps all.
        seed: 0 to 2**63 - 1; the same seed gives the same tokens whatever else runs. None lets the driver draw one.
        stop: text that ends the request; it is cut from the output.
        stop_token_ids: tokens that end the request, beside the model's own end-of-sequence ones; they stay in ``token_ids``.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: report the log-probability of each sampled token and of this many likeliest ones (0 to 20); None reports none.
        repetition_penalty: divide positive (multiply negative) logits of tokens in prompt or output; 1 does nothing.
        presence_penalty: subtract from logits of tokens in the output; -2 to 2.
        frequency_penalty: subtract per occurrence in the output; -2 to 2.
        n: independent completions of one prompt.

    Raises:
        ConfigError: a value outside its range; the message names value, limit and what to do.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_whole("max_tokens", self.max_tokens, 1, 1 << 24, "ask for at least one token")
        _check_whole("min_tokens", self.min_tokens, 0, self.max_tokens, "keep it at or below max_tokens")
        _check_number("temperature", self.temperature, 0.0, 100.0, "use 0 for greedy decoding")
        _check_whole("top_k", self.top_k, 0, 1 << 24, "use 0 to keep every token")
        _check_number("top_p", self.top_p, 0.0, 1.0, "use 1 to keep every token", above=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, "use 0 to keep every token")
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, (1 << 63) - 1, "or leave it out")
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, 20, "or leave it out")
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, "use 1 for none", above=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0, "use 0 for none")
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "use 0 for none")
        _check_whole("n", self.n, 1, 128, "send several requests for more")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ConfigError(f"stop holds {text!r}; each stop must be a text of at least one character")
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0, (1 << 31) - 1, "each is a token id")


def _check_whole(name: str, value: object, low: int, high: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}: {advice}")


def _check_number(name: str, value: object, low: float, high: float, advice: str, *, above: bool = False) -> None:
    """``above`` excludes ``low`` itself. Comparisons are written so that NaN fails them."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (low < value <= high if above else low <= value <= high):
        bound = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number {bound}: {advice}")
