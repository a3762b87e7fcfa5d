"""The interpreter of a host whose monotonic clock shows something else: ``python -I -S shifted_python.py SECONDS ARGUMENTS...``."""

import ctypes
import os
import sys

NEW_TIME = 0x00000080
UNSUPPORTED = 125  # as the exit code where the kernel has no such clocks


def shift(seconds: int) -> None:
    """Move this process to clocks of its own; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_TIME):
        raise OSError(ctypes.get_errno(), "unshare")
    with open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {seconds} 0\n")
    fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY)
    if libc.setns(fd, NEW_TIME):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(fd)


if __name__ == "__main__":
    try:
        shift(int(sys.argv[1]))
    except OSError as error:
        print(f"no clocks of one's own: {error}", file=sys.stderr)
        sys.exit(UNSUPPORTED)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
