"""Makes ``tests/support`` importable as ``support``; tests themselves are no package (import mode importlib)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of ranks, which tests start side by side: tiny models gain nothing from threads
sys.path.insert(0, str(Path(__file__).parent))

from support.leaks import leak_check as leak_check  # after the path that it is found by

# What nohup, or a shell's background, ignores, the programs under test would ignore too.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
