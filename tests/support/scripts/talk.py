"""Prints on both streams: a line, bytes that are no text, a progress bar, and a last line without an end."""

import os

rank = os.environ["RANK"]
os.write(1, f"out {rank}\n".encode() + b"\xff\n 10%\r 90%\rdone\nlast")
os.write(2, f"err {rank}\n".encode())
