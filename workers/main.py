"""The entry of a rank's process: ``python -m zspmd.workers.main``, or called in a process that the zygote forked.

Facts come in the environment; the driver's endpoint and the launch's secret come through an inherited fd.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import zmq

from ..config import ParallelConfig
from ..errors import ConfigError, LaunchError, ProtocolError
from ..process import name_process, offer_stacks
from ..transport.codec import decode_value
from ..transport.control_sockets import ControlClient
from ..transport.frames import ResultKind
from ..transport.records import Bootstrap, Reject, Welcome
from ..transport.schema import pack_record
from ..transport.sockets import ResultPusher, StepSubscriber
from ..transport.trace_spans import NO_TRACE, SpanTrace
from .bootstrap import hello, rank_facts, read_bootstrap
from .connection_watch import ConnectionWatch
from .context import RankStatus, WorkerContext
from .heartbeat import Heartbeat
from .loop import AnswerSink, FrameSource, StepLoop, describe_failure
from .mesh import Mesh
from .recording import PeerLog, RecordingMesh, RecordingStore
from .store_client import StoreClient
from .torch_bridge import register_torch
from .tracing import FrameTrace, open_trace, trace_collectives
from .worker import Worker

WELCOME_TIMEOUT_S = 60.0
MAIN_MODULE = "__zspmd_main__"  # the driver's script, imported here so that its ``if __name__ == "__main__"`` stays quiet


def main() -> int:
    """Run this rank to its end and return the exit code: 0 after a STOP, 1 after an error that the driver has been told."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)  # for people: to the rank's log
    offer_stacks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    register_torch()
    bootstrap = read_bootstrap()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        return _serve(context, bootstrap)
    finally:
        context.destroy(linger=1000)


def _serve(context: zmq.Context[zmq.Socket[bytes]], bootstrap: Bootstrap) -> int:
    rank = int(os.environ["RANK"])
    name_process(f"zspmd-rank{rank}")
    with contextlib.ExitStack() as stack:
        keys = bootstrap.keys
        if keys is not None:
            watch = ConnectionWatch(context)
            stack.callback(watch.stop)
            keys = replace(keys, follow=watch.follow)
        connect = functools.partial(ControlClient, context, bootstrap.control_endpoint, keys)
        control = connect()
        control.send(hello(bootstrap, rank, "rank"))
        welcome, worker_args = _receive_welcome(control)
        status = RankStatus()
        pusher = ResultPusher(context, welcome.result_endpoint, epoch=welcome.epoch, rank=rank, keys=keys)
        subscriber = StepSubscriber(
            context,
            welcome.step_endpoint,
            epoch=welcome.epoch,
            rank=rank,
            on_gap=lambda seq: pusher.push(ResultKind.GAP, seq),
            keys=keys,
            is_relayed=welcome.is_relayed,
        )
        trace = None
        if welcome.trace_events:
            trace = stack.enter_context(open_trace(welcome, connect, hello(bootstrap, rank, "trace")))
        spans = trace or NO_TRACE
        beat = Heartbeat(connect, hello(bootstrap, rank, "beat"), status, subscriber, period_s=welcome.beat_s)
        beat.start()
        stack.callback(beat.stop)
        try:
            store = StoreClient(connect, hello(bootstrap, rank, "store"), timeout_s=welcome.collective_s)
            log = PeerLog.create(welcome.recording, rank, epoch=welcome.epoch) if welcome.recording else None
            with spans.span("create worker"):
                worker = _create_worker(welcome, store, control, log, trace)
            with spans.span("setup"):
                worker.setup(**worker_args)
            frames: FrameSource = subscriber
            answers: AnswerSink = pusher
            if trace is not None:
                frames = answers = FrameTrace(trace, subscriber, pusher)
            loop = StepLoop(worker, frames, answers, status, output_ranks=welcome.output_ranks, check_parent=_parent_check())
            loop.run()
            status.phase = "teardown"
            with spans.span("teardown"):
                worker.teardown()
        except Exception as error:  # the driver is told first, whatever it was; then this rank ends
            spans.mark(f"raised {type(error).__name__}")
            pusher.push(ResultKind.ERROR, max(status.seq, 0), pack_record(describe_failure(error, status)))
            pusher.close()
            return 1
        worker.ctx.mesh.close()
        if log is not None:
            log.close()
    return 0


def _create_worker(welcome: Welcome, store: StoreClient, control: ControlClient, log: PeerLog | None, trace: SpanTrace | None) -> Worker:
    parallel = ParallelConfig(tp=welcome.tp, pp=welcome.pp, dp=welcome.dp, ep=welcome.ep)
    facts = rank_facts(welcome.device)
    build_mesh = Mesh if log is None else functools.partial(RecordingMesh, log)
    mesh = build_mesh(
        parallel,
        facts.rank,
        device=facts.device,
        backend=welcome.communicator,
        local_backend=welcome.local_communicator,
        nodes=welcome.nodes,
        address=os.environ["ZSPMD_NODE_ADDR"],
        store=store,
        timeout_s=welcome.collective_s,
    )
    if trace is not None:
        trace_collectives(mesh, trace)
    worker = import_worker(welcome.worker, welcome.main_path)()
    recorded = store if log is None else RecordingStore(log, store)
    store.connect()
    recorded.connect()
    worker.ctx = WorkerContext(facts, mesh, recorded, control.send, trace or NO_TRACE)
    return worker


def import_worker(reference: str, main_path: str) -> type[Worker]:
    """Return the class that ``module:qualname`` names; the module ``__main__`` is loaded from ``main_path`` under another name.

    Raises:
        ConfigError: no such module or name, or no subclass of Worker.
    """
    module_name, _, qualname = reference.partition(":")
    try:
        module = _import_main(main_path) if module_name == "__main__" else importlib.import_module(module_name)
        target: object = module
        for part in qualname.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(f"cannot import the worker {reference!r}: {error}; it must be importable on every rank") from error
    if not (isinstance(target, type) and issubclass(target, Worker)):
        raise ConfigError(f"{reference!r} is {target!r}, not a subclass of zspmd.Worker")
    return target


def _import_main(path: str) -> object:
    if MAIN_MODULE in sys.modules:
        return sys.modules[MAIN_MODULE]
    spec = importlib.util.spec_from_file_location(MAIN_MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"the driver's script {path!r} is no Python file; put the worker class into a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MAIN_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[MAIN_MODULE]
        raise
    return module


def _receive_welcome(control: ControlClient) -> tuple[Welcome, dict[str, object]]:
    record, frames = control.receive(WELCOME_TIMEOUT_S)
    if isinstance(record, Reject):
        raise LaunchError(f"the driver refused this rank: {record.reason}")
    if not isinstance(record, Welcome) or not frames:
        raise ProtocolError(f"the driver answered the hello with a {type(record).__name__}")
    body, *buffers = (frame if isinstance(frame, bytes) else frame.buffer for frame in frames)
    worker_args = decode_value(body, buffers)
    if not isinstance(worker_args, dict):
        raise ProtocolError(f"worker_args arrived as a {type(worker_args).__name__}, not a dict")
    return record, worker_args


def _parent_check() -> Callable[[], None]:
    """Return what ends this process once its supervisor is gone; the parent-death signal does it sooner, this is the second line."""
    parent = os.getppid()

    def check() -> None:
        if os.getppid() != parent:
            os._exit(1)

    return check


if __name__ == "__main__":
    sys.exit(main())
