"""Serves on the launch's port as torch's store does, until as many launches do so at once as the arguments say."""

import os
import socket
import sys
import time
from pathlib import Path

directory, count = Path(sys.argv[1]), int(sys.argv[2])
with socket.create_server(("", int(os.environ["MASTER_PORT"]))) as server:
    (directory / os.environ["ZSPMD_LAUNCH_ID"]).write_text(str(server.getsockname()[1]))
    while len(list(directory.iterdir())) < count:
        time.sleep(0.01)
