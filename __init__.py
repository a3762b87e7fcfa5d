"""zspmd: an asyncio driver that publishes each step once, and SPMD workers that derive the rest from it.

The public names are resolved on first use, so that ``import zspmd`` costs little and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module that defines it, relative to this package
_HOMES = {
    "AnswerLostError": ".errors",
    "BackpressureError": ".errors",
    "BadFrameError": ".errors",
    "CheckpointError": ".errors",
    "ClosedError": ".errors",
    "Communicator": ".workers.communicators.communicator",
    "ConfigError": ".errors",
    "Coordinator": ".workers.coordinator",
    "CoordinatorTimeoutError": ".errors",
    "Deadlines": ".config",
    "DraftConfig": ".speculation_config",
    "EndpointInUseError": ".errors",
    "Engine": ".runtime.engine.engine",
    "EngineConfig": ".config",
    "GroupEvent": ".runtime.driver.events",
    "HostfileError": ".errors",
    "InsecureEndpointError": ".errors",
    "InternalError": ".errors",
    "LaunchError": ".errors",
    "ParallelConfig": ".config",
    "PeerLostError": ".errors",
    "NgramConfig": ".speculation_config",
    "NodeLostError": ".errors",
    "NodesConfig": ".config",
    "PreflightError": ".errors",
    "ProtocolError": ".errors",
    "ReadyTimeoutError": ".errors",
    "Rebalance": ".runtime.engine.expert_balance",
    "RecordingError": ".errors",
    "ReplayDivergedError": ".errors",
    "RequestError": ".errors",
    "RequestOutput": ".runtime.engine.outputs",
    "SamplingParams": ".config",
    "RestartPolicy": ".config",
    "ResourceError": ".errors",
    "ResultTakenError": ".errors",
    "SpeculationConfig": ".speculation_config",
    "StepGapError": ".errors",
    "StoreTimeoutError": ".errors",
    "TopologyError": ".errors",
    "TraceConfig": ".config",
    "TransportError": ".errors",
    "WireVersionError": ".errors",
    "Worker": ".workers.worker",
    "WorkerContext": ".workers.context",
    "WorkerError": ".errors",
    "WorkerExitedError": ".errors",
    "WorkerGroup": ".runtime.driver.group",
    "WorkerRaisedError": ".errors",
    "WorkerStalledError": ".errors",
    "ZspmdError": ".errors",
    "launch": ".runtime.driver.launching",
    "rpc": ".workers.worker",
}

if TYPE_CHECKING:
    from .config import Deadlines as Deadlines
    from .config import EngineConfig as EngineConfig
    from .config import NodesConfig as NodesConfig
    from .config import ParallelConfig as ParallelConfig
    from .config import RestartPolicy as RestartPolicy
    from .config import SamplingParams as SamplingParams
    from .config import TraceConfig as TraceConfig
    from .errors import AnswerLostError as AnswerLostError
    from .errors import BackpressureError as BackpressureError
    from .errors import BadFrameError as BadFrameError
    from .errors import CheckpointError as CheckpointError
    from .errors import ClosedError as ClosedError
    from .errors import ConfigError as ConfigError
    from .errors import CoordinatorTimeoutError as CoordinatorTimeoutError
    from .errors import EndpointInUseError as EndpointInUseError
    from .errors import HostfileError as HostfileError
    from .errors import InsecureEndpointError as InsecureEndpointError
    from .errors import InternalError as InternalError
    from .errors import LaunchError as LaunchError
    from .errors import NodeLostError as NodeLostError
    from .errors import PeerLostError as PeerLostError
    from .errors import PreflightError as PreflightError
    from .errors import ProtocolError as ProtocolError
    from .errors import ReadyTimeoutError as ReadyTimeoutError
    from .errors import RecordingError as RecordingError
    from .errors import ReplayDivergedError as ReplayDivergedError
    from .errors import RequestError as RequestError
    from .errors import ResourceError as ResourceError
    from .errors import ResultTakenError as ResultTakenError
    from .errors import StepGapError as StepGapError
    from .errors import StoreTimeoutError as StoreTimeoutError
    from .errors import TopologyError as TopologyError
    from .errors import TransportError as TransportError
    from .errors import WireVersionError as WireVersionError
    from .errors import WorkerError as WorkerError
    from .errors import WorkerExitedError as WorkerExitedError
    from .errors import WorkerRaisedError as WorkerRaisedError
    from .errors import WorkerStalledError as WorkerStalledError
    from .errors import ZspmdError as ZspmdError
    from .runtime.driver.events import GroupEvent as GroupEvent
    from .runtime.driver.group import WorkerGroup as WorkerGroup
    from .runtime.driver.launching import launch as launch
    from .runtime.engine.engine import Engine as Engine
    from .runtime.engine.expert_balance import Rebalance as Rebalance
    from .runtime.engine.outputs import RequestOutput as RequestOutput
    from .speculation_config import DraftConfig as DraftConfig
    from .speculation_config import NgramConfig as NgramConfig
    from .speculation_config import SpeculationConfig as SpeculationConfig
    from .workers.communicators.communicator import Communicator as Communicator
    from .workers.context import WorkerContext as WorkerContext
    from .workers.coordinator import Coordinator as Coordinator
    from .workers.worker import Worker as Worker
    from .workers.worker import rpc as rpc

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"zspmd has no public name {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
