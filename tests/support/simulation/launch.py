"""The simulated launch: puts virtual time, sockets and processes where the package would take the real ones."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq

import zspmd
from zspmd.runtime.driver import launch_site, processes, step_stream
from zspmd.runtime.launch import plan, supervisor
from zspmd.transport import control_sockets
from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.frames import ResultKind
from zspmd.transport.records import Hello, unpack_record
from zspmd.transport.schema import pack_record
from zspmd.workers import loop as serving

from .agent import SimulatedAgent
from .loop import SimulatedLoop
from .network import Link, Network, StepFaults
from .options import DEADLY, PAUSES, STALLING, Fault, Options
from .ranks import SimulatedRank
from .sockets import Message, SimulatedContext, SimulatedSocket
from .work import Collectives
from .world import World

if TYPE_CHECKING:
    from .checks import Checks

EPOCH = 0x53494D55
TOKEN = b"of the simulated launch".ljust(32)
_TAMPERING = {"answer_lost": "lose", "answer_doubled": "double", "answer_garbled": "garble"}
_KIND_BYTE = 3  # of a header
_NOT_COUNTED = (ResultKind.GAP, ResultKind.ERROR)  # answers that the window does not count: asked for again, or told by the exit too


class SimulatedRunDirectory:
    """Names endpoints, and says whether it was removed."""

    path = "/simulated"
    lock_fd = -1

    def __init__(self) -> None:
        self.is_removed = False

    def endpoint(self, name: str) -> str:
        return f"ipc:///simulated/{name}"

    def remove(self) -> None:
        self.is_removed = True


class SimulatedPort:
    port = 1

    def close(self) -> None:
        return


class SimulatedLaunch:
    """All of one run that is not the driver: the network, the agent, the ranks, and the faults that befall them."""

    agent: SimulatedAgent
    checks: Checks

    def __init__(self, world: World, options: Options) -> None:
        self.world = world
        self.options = options
        self.loop = SimulatedLoop(world)
        self.network = Network(
            world,
            high_water_mark=options.high_water_mark,
            longest_delay_s=options.longest_delay_s,
            slow_delay_s=options.slow_delay_s,
        )
        self.run_directory = SimulatedRunDirectory()
        self.ranks: list[SimulatedRank] = []
        self.collectives = Collectives(self)
        self._step_faults = [StepFaults(options.lose, options.double, options.reorder) for _ in range(options.num_ranks)]
        self._is_collective: dict[int, bool] = {}
        self._num_by_frame = {(fault.rank, fault.frame): fault for fault in options.faults}
        for fault in options.faults:
            self._arm(fault)

    def fault_at_frame(self, rank: int, seq: int) -> Fault | None:
        """Return what is to befall a rank at a frame, if it is something that does."""
        fault = self._num_by_frame.get((rank, seq))
        return fault if fault is not None and fault.what in _AT_FRAME else None

    def is_collective(self, seq: int) -> bool:
        """Say whether the ranks meet in a step; the same for each of them."""
        if seq not in self._is_collective:
            self._is_collective[seq] = self.world.happens(self.options.collectives)
        return self._is_collective[seq]

    def rank_has_connected(self, rank: int, subscription: SimulatedSocket, pusher: SimulatedSocket) -> None:
        """Have the options' faults befall what this rank gets and sends."""
        self._degrade(rank, subscription)
        for fault in self.options.faults:
            if fault.rank != rank:
                continue
            if fault.what in _TAMPERING:
                pusher.links[0].tampering[fault.frame] = _TAMPERING[fault.what]
                pusher.links[0].on_tampered = functools.partial(self._tampered, fault)
            elif fault.what in ("frame_garbled", "frame_foreign") and subscription.links:
                _down(subscription).tampering[fault.frame] = fault.what.removeprefix("frame_").removesuffix("d")
                _down(subscription).on_tampered = lambda what, message: self.world.reach(f"frame_{what}")
            elif fault.what == "step_cut":
                self.world.after(fault.at_s, self._cut, rank, subscription)

    def num_lost(self, ranks: Sequence[int], since: float) -> int:
        """Return how many messages one of these ranks has not got, the one with the most."""
        return max(sum(at >= since for at in self._step_faults[rank].lost_at) for rank in ranks)

    def _degrade(self, rank: int, subscription: SimulatedSocket) -> None:
        if subscription.links:
            _down(subscription).faults = self._step_faults[rank]

    def _arm(self, fault: Fault) -> None:
        if fault.what in PAUSES:
            self.world.after(fault.at_s, self._pause, fault)
        elif fault.what == "agent_killed":
            self.world.after(fault.at_s, self._kill_agent)
        elif fault.what == "stranger":
            self.world.after(fault.at_s, self._knock)

    def _pause(self, fault: Fault) -> None:
        if not self.world.reached["event_closed"]:
            (self.world.stop_driver if fault.what == "driver_stopped" else self.world.block_driver)(fault.for_s)

    def _kill_agent(self) -> None:
        if self.ranks and self.checks.fault_at is None and self.checks.closing_at is None:
            self.world.fail_root("agent_killed")
            self.agent.kill_agent()

    def _knock(self) -> None:
        """Have a stranger say hello without the launch's token."""
        context: Any = SimulatedContext(self.network)
        client = ControlClient(context, self.run_directory.endpoint("control"))
        self.world.reach("stranger")
        client.send(Hello(token=b"?" * 32, rank=0, pid=1, host="elsewhere", version=zspmd.__version__, purpose="rank"))
        self.world.after(1.0, context.destroy)

    def _cut(self, rank: int, subscription: SimulatedSocket) -> None:
        if not subscription.closed:
            self.world.reach("step_cut")
            self.network.disconnect(subscription, keeps_sent=False)
            self._step_faults[rank].lost_at += [self.world.now] * 2  # what is on its way, and what is sent meanwhile
            self.world.after(self.world.chance.uniform(1e-3, 50e-3), self._reconnect, rank, subscription)

    def _reconnect(self, rank: int, subscription: SimulatedSocket) -> None:
        if not subscription.closed:
            self.network.connect(self.run_directory.endpoint("step"), subscription)
            self._degrade(rank, subscription)

    def _tampered(self, fault: Fault, what: str, message: Message) -> None:
        if what == "garble" or message[0][_KIND_BYTE] not in _NOT_COUNTED:
            self.world.fail_root(fault.what, fault.rank)
        else:
            self.world.reach(f"{fault.what}_uncounted")


_AT_FRAME = frozenset((*DEADLY, *STALLING))
# What a record becomes, and bytes, depends on nothing else, and runs share most of them: each is checked and packed once.
_pack = functools.lru_cache(maxsize=4096)(pack_record)
_unpack = functools.lru_cache(maxsize=4096)(unpack_record)


def _down(subscription: SimulatedSocket) -> Link:
    twin = subscription.links[0].twin
    assert twin is not None
    return twin


@contextlib.contextmanager
def simulated(launch: SimulatedLaunch) -> Iterator[None]:
    """Have the package take its clock, its sockets and its processes from the simulation."""
    world = launch.world
    replacements: dict[Any, dict[str, Any]] = {
        time: {"monotonic": lambda: world.now, "monotonic_ns": lambda: round(world.now * 1e9)},
        zmq: {"Context": lambda: SimulatedContext(launch.network, launch.loop.readable)},
        supervisor: {"AgentProcess": functools.partial(SimulatedAgent, launch), "pack_record": lambda order: b""},
        processes: {
            "check_resources": lambda world_size: None,
            "secrets": SimpleNamespace(randbits=lambda num_bits: EPOCH),
        },
        launch_site: {
            "RunDirectory": SimpleNamespace(create=lambda launch_id: launch.run_directory),
            "reserve_port": lambda launch_id, purpose, address: SimulatedPort(),
            "secrets": SimpleNamespace(token_bytes=lambda num_bytes: TOKEN),
            "pack_record": _pack,
            "LaunchRecord": SimpleNamespace(of_this_process=lambda *what, **how: SimpleNamespace(write=lambda directory: None)),
        },
        control_sockets: {"pack_record": _pack, "unpack_record": lambda data: _unpack(bytes(data))},
        step_stream: {"unpack_record": lambda data: _unpack(bytes(data))},
        serving: {"pack_record": _pack},
        plan: {
            "os": SimpleNamespace(environ={"PATH": "/simulated"}),
            "available_cores": lambda: 1,
            "detect_devices": lambda devices, world_size: list(devices),
        },
    }
    originals = {module: {name: getattr(module, name) for name in names} for module, names in replacements.items()}
    _replace(replacements)
    try:
        yield
    finally:
        _replace(originals)


def _replace(replacements: dict[Any, dict[str, Any]]) -> None:
    for module, attributes in replacements.items():
        for name, value in attributes.items():
            setattr(module, name, value)
