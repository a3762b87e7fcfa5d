"""What /proc says of this process's children, while threads come and go."""

from __future__ import annotations

import os
import subprocess
import threading

from support.polling import block_until

from zspmd.process import child_pids


def test_threads_that_end_meanwhile_hide_no_child() -> None:
    """Looked at often enough for a thread to end between the listing and the reading: it did so within a tenth of these rounds."""
    child = subprocess.Popen(["sleep", "60"])
    is_over = False

    def come_and_go() -> None:
        while not is_over:
            for thread in (threads := [threading.Thread(target=lambda: None) for _ in range(8)]):
                thread.start()
            for thread in threads:
                thread.join()

    churn = threading.Thread(target=come_and_go)
    churn.start()
    try:
        block_until(lambda: child.pid in child_pids())
        assert all(child.pid in child_pids() for _ in range(1000))
    finally:
        is_over = True
        churn.join()
        child.kill()
        child.wait()
    assert child.pid not in child_pids()
    assert os.getpid() not in child_pids()
