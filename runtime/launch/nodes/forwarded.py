"""What ranks of another node get of this process's environment; a program that was started by ssh has hardly any of its own."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ....process import BOOTSTRAP_FD, STACKS_FD
from ..plan import is_foreign

# What programs of this field are set up by. Everything else is forwarded by name only.
_PATTERNS = """
    PATH PYTHON* LD_LIBRARY_PATH VIRTUAL_ENV CONDA_* LANG LC_* TZ
    HF_HOME HF_ENDPOINT HF_HUB_* HF_DATASETS_* TRANSFORMERS_* TOKENIZERS_* TORCH_* PYTORCH_* TRITON_*
    CUDA_* CUBLAS_* NVIDIA_* NCCL_* GLOO_* UCX_* TP_* OMP_* MKL_* OPENBLAS_* KMP_* ZSPMD_*
"""
PATTERNS = tuple(_PATTERNS.split())
# Secrets, whatever program they are for, and which GPUs this machine's processes may use: the other nodes have counted their own.
_BY_NAME_ONLY = ("*TOKEN", "*_KEY", "*SECRET*", "*PASSWORD*", "*_VISIBLE_DEVICES", "PYTHONHOME")
_NEVER = frozenset((BOOTSTRAP_FD, STACKS_FD, "ZSPMD_SECRET", "ZSPMD_RUN_DIR"))


def forwarded_environment(patterns: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that fit one of ``PATTERNS`` and may be forwarded unasked, or ``patterns``, and are no other launcher's."""

    def is_wanted(name: str) -> bool:
        return _fits(name, patterns) or (_fits(name, PATTERNS) and not _fits(name, _BY_NAME_ONLY))

    variables = os.environ if environment is None else environment
    return {name: value for name, value in variables.items() if name not in _NEVER and not is_foreign(name) and is_wanted(name)}


def program_paths() -> list[str]:
    """Return those entries of ``sys.path`` that are the program's own, not the interpreter's: its directory, PYTHONPATH."""
    own = dict.fromkeys(map(os.path.abspath, sys.path))
    installed = [*site.getsitepackages(), site.getusersitepackages(), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))]
    return [path for path in own if not _is_below(path, installed)]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_below(path: str, directories: Sequence[str]) -> bool:
    return path.endswith(".zip") or any(path == directory or path.startswith(directory + os.sep) for directory in directories)
