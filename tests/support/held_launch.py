"""Stands in for a live launch: holds a run directory with a record, and ends as it is told to at the first signal.

    python held_launch.py LAUNCH_ID KIND HOW

KIND is that of the record. HOW is what SIGTERM does: "ends" it, "stays" for ever, or "guard": a child is the launch's guard, and this
process ends when that has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

from support.records import SomeProcesses, some_plan

from zspmd.runtime.launch.launch_record import LaunchRecord
from zspmd.runtime.launch.run_directory import RunDirectory


def main(launch_id: str, kind: str, how: str) -> None:
    directory = RunDirectory.create(launch_id)
    guard = subprocess.Popen(["sleep", "600"]) if how == "guard" else None
    processes = SomeProcesses({0: os.getpid()}, guard_pid=0 if guard is None else guard.pid)
    record = replace(LaunchRecord.of_this_process(some_plan(launch_id), [processes]), kind=kind)
    record.write(directory.path)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "stays" else lambda *_: sys.exit(0))
    print("ready", flush=True)
    try:
        if guard is not None:
            print(f"the guard ended with {guard.wait()}", flush=True)
        else:
            while True:
                signal.pause()
    finally:
        directory.remove()


if __name__ == "__main__":
    main(*sys.argv[1:])
