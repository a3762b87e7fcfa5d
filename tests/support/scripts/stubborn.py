"""Says which signals it gets and goes on; ends by itself at the first one that its arguments name."""

import os
import signal
import subprocess
import sys


def say(number: int, frame: object) -> None:
    name = signal.Signals(number).name
    os.write(1, f"got {name}\n".encode())
    if name in sys.argv:
        sys.exit(0)


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, say)
if "child" in sys.argv:
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
got, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)  # unlike ``signal.pause``, a read does not miss the signal that comes just before it
os.write(1, b"ready\n")
while True:
    os.read(got, 64)
