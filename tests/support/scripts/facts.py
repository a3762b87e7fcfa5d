"""Prints what a rank's process has been given, as one JSON object a rank."""

import json
import os
import sys

NAMES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TORCHELASTIC_RUN_ID CUDA_VISIBLE_DEVICES"
facts = {
    "argv": sys.argv,
    "path0": sys.path[0],
    "name": __name__,
    "cwd": os.getcwd(),
    "stdin": sys.stdin.read(),
    "environment": {name: os.environ.get(name) for name in [*NAMES.split(), *sys.argv[1:]]},
}
print(json.dumps(facts))
