"""A host that ``examination`` looks at: its agent, and the outcome of its checks so far."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from ....config import NodesConfig
from ....errors import LaunchError, NodeProblem
from ..agent_protocol import AgentGone, AgentRecord, RankExited, RankLog, RankStart, Start
from ..hosts.host import Host
from ..launch_supervisor import LaunchSupervisor, NodeEvent
from ..nodes.agent_link import AgentLink
from ..nodes.assembly import agent_advice
from ..nodes.node_facts import NodeFacts
from ..supervisor import AgentLost
from .check_records import FAIL, OK, WARN, Check
from .torch_check import ASK_TORCH, TORCH_S, judge_torch, slow_torch

_ATTACH_S = 40.0
_ASK_S = 60.0
_KILL_S = 2.0
_MAX_CLOCK_ERROR_S = 0.05
AnswerT = TypeVar("AnswerT", bound=AgentRecord)


class ExaminedHost:
    """One host, from the start of its agent to the end; what fails becomes a check that has failed.

    Args:
        link: the way to its agent; None where it is this machine.
        config: how that was made, for advice.
    """

    def __init__(self, host: Host, link: AgentLink | None, config: NodesConfig, lease_s: float) -> None:
        self.name = host.target
        self.host = host
        self.checks: list[Check] = []
        self.facts: NodeFacts | None = None
        self.address = ""
        self._link = link
        self._config = config
        self._supervisor = LaunchSupervisor(self._on_event, [link], lease_s=lease_s)
        self._is_attached = False
        self._printed: list[str] = []
        self._exited: RankExited | None = None
        self._ended = asyncio.Event()

    @property
    def is_local(self) -> bool:
        """Whether it is this machine."""
        return self._link is None

    def add(self, name: str, status: str, text: str, advice: str = "") -> None:
        """Note the outcome of a check."""
        self.checks.append(Check(name, status, text, advice))

    def add_problem(self, problem: NodeProblem) -> None:
        """Note a check that has failed."""
        self.add(problem.check, FAIL, problem.text, problem.advice)

    async def attach(self) -> None:
        """Start its agent, and tell how long that took and what the login printed.

        Raises:
            ConfigError: the command for it is not installed.
        """
        started = time.monotonic()
        self._supervisor.open()
        failure = (await self._supervisor.attach(fanout=1, timeout_s=_ATTACH_S)).get(0)
        noise = self._supervisor.nodes[0].noise
        if failure is not None:
            said = f"; its login printed: {noise[-1]}" if noise else ""
            self.add("agent", FAIL, f"{failure}{said}", agent_advice(str(failure), self.host, self._config))
            return
        self._is_attached = True
        way = "on this machine, without ssh" if self._link is None else f"by {self._link.name}"
        self.add("agent", OK, f"{way}, after {time.monotonic() - started:.2f} s")
        if noise:
            text = f"prints {'a line' if len(noise) == 1 else 'lines'} before its agent speaks, such as {noise[-1]!r:.80}"
            self.add("login", WARN, text, "zspmd passes over it, scp does not: let start files print to terminals alone ([ -t 1 ] && ...)")

    async def ask(self, question: AgentRecord, answer: type[AnswerT]) -> AnswerT | None:
        """Return what its agent answers; None where it does not, or has never been there."""
        if not self._is_attached:
            return None
        try:
            return await self._supervisor.nodes[0].ask(question, answer, _ASK_S)
        except LaunchError as error:
            self._fail(error)
            return None

    async def check_torch(self) -> None:
        """Have a rank there import torch, which shows that ranks can be started, too."""
        if not self._is_attached or self.facts is None:
            return
        order = Start((RankStart(0, {}),), "spawn", argv=(self.facts.executable, "-c", ASK_TORCH), has_own_environment=True, kill_s=_KILL_S)
        try:
            await self._supervisor.start([order], None, _ASK_S)
            await asyncio.wait_for(self._ended.wait(), TORCH_S)
        except LaunchError as error:
            self._fail(error)
        except asyncio.TimeoutError:
            self.checks.append(slow_torch())
        else:
            self._judge_torch(self.facts)

    def check_clock(self) -> None:
        """Tell how well its clock is known."""
        if not self._is_attached:
            return
        error_s = self._supervisor.nodes[0].clock_error_s
        text = f"times of its events are known to ±{error_s * 1e3:.2g} ms"
        is_known = error_s <= _MAX_CLOCK_ERROR_S
        advice = "" if is_known else "which of two nodes failed first may not be told: the way to it is slow, see ping"
        self.add("clock", OK if is_known else WARN, text, advice)

    async def aclose(self) -> None:
        """End its agent, which leaves nothing there."""
        try:
            await self._supervisor.stop(0.0, _KILL_S)
        except LaunchError as error:
            self.add("agent", FAIL, str(error), "see what is left of it there, and of its ssh here")

    def _judge_torch(self, facts: NodeFacts) -> None:
        if self._exited is None:
            self._fail(LaunchError("its agent ended while a rank was running"))
        else:
            errors = "\n".join(self._exited.log_tail)
            self.checks.append(judge_torch(self._exited.exit_code, "\n".join(self._printed), errors, facts.cuda_devices))

    def _fail(self, error: LaunchError) -> None:
        self._is_attached = False
        self.add("agent", FAIL, str(error), "see what the node does, and run this again")

    def _on_event(self, event: NodeEvent, node_rank: int) -> None:
        if isinstance(event, RankLog) and event.stream == "out":
            self._printed.extend(event.lines)
        elif isinstance(event, RankExited):
            self._exited = event
        if isinstance(event, (RankExited, AgentGone, AgentLost)):
            self._ended.set()
