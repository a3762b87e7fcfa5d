"""Each rank ends as its own argument says.

A number is an exit code, a name a signal, "wait" waits for ever, "raise" and "lost" raise; "after:R:HOW" first waits for rank R's end.
"""

import os
import signal
import sys
import time
from pathlib import Path

rank = int(os.environ["RANK"])
how = sys.argv[1:][rank]
pids = Path(os.environ["PIDS"])
(pids / f"{rank}.new").write_text(str(os.getpid()))
(pids / f"{rank}.new").rename(pids / f"{rank}")


def wait_for_end_of(other: str) -> None:
    while not (pids / other).exists():
        time.sleep(0.001)
    process = Path("/proc") / (pids / other).read_text()
    while process.exists():
        time.sleep(0.0005)


if how.startswith("after:"):
    _, other, how = how.split(":")
    wait_for_end_of(other)
print(f"rank {rank} does {how}", flush=True)
if how == "wait":
    signal.pause()
elif how == "raise":
    raise ValueError("the reason of them all")
elif how == "lost":
    raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
elif how.isdigit():
    sys.exit(int(how))
else:
    os.kill(os.getpid(), getattr(signal, how))
