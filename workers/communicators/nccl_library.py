"""NCCL's C functions through ctypes: the few that a communicator needs, with their types, and errors as exceptions.

The library is the one that torch has brought and loaded. Names and numbers are those of ``nccl.h``, 2.10 and later.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_int, c_size_t, c_void_p
from typing import Any

import torch

from ...errors import ConfigError, PeerLostError, TransportError

LIBRARY_NAME = "libnccl.so.2"
MIN_VERSION = 21000  # ncclAvg
UNIQUE_ID_BYTES = 128
DATA_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
REDUCTIONS = {"sum": 0, "product": 1, "max": 2, "min": 3, "mean": 4}
_PEER_RESULTS = (2, 6, 8)  # system error, remote error, timeout: what is seen of a peer that has gone


class UniqueId(ctypes.Structure):
    """``ncclUniqueId``: what the ranks of a communicator share to find each other."""

    _fields_ = [("internal", c_char * UNIQUE_ID_BYTES)]


_COMM, _STREAM, _BUFFER, _TYPE, _OP = c_void_p, c_void_p, c_void_p, c_int, c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(_COMM), c_int, UniqueId, c_int),
    "ncclCommDestroy": (_COMM,),
    "ncclCommAbort": (_COMM,),
    "ncclAllReduce": (_BUFFER, _BUFFER, c_size_t, _TYPE, _OP, _COMM, _STREAM),
    "ncclAllGather": (_BUFFER, _BUFFER, c_size_t, _TYPE, _COMM, _STREAM),
    "ncclReduceScatter": (_BUFFER, _BUFFER, c_size_t, _TYPE, _OP, _COMM, _STREAM),
    "ncclBroadcast": (_BUFFER, _BUFFER, c_size_t, _TYPE, c_int, _COMM, _STREAM),
    "ncclSend": (_BUFFER, c_size_t, _TYPE, c_int, _COMM, _STREAM),
    "ncclRecv": (_BUFFER, c_size_t, _TYPE, c_int, _COMM, _STREAM),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
}


class NcclLibrary:
    """The loaded library. ``call`` is the way to all functions."""

    def __init__(self, name: str = LIBRARY_NAME) -> None:
        """Load it.

        Raises:
            ConfigError: it is not there, or too old.
        """
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise ConfigError(f"cannot load NCCL ({error}); install a torch build with CUDA, or use gloo or shm on CPUs") from error
        self._library.ncclGetErrorString.argtypes = (c_int,)
        self._library.ncclGetErrorString.restype = c_char_p
        for function, types in _SIGNATURES.items():
            getattr(self._library, function).argtypes = types
            getattr(self._library, function).restype = c_int
        if self.version() < MIN_VERSION:
            raise ConfigError(f"NCCL has version {self.version()}; communicator 'nccl-raw' needs {MIN_VERSION} or later, or use nccl")

    def call(self, function: str, *arguments: Any) -> None:
        """Call one of NCCL's functions.

        Raises:
            PeerLostError: it failed as it does when a peer has gone.
            TransportError: it failed otherwise.
        """
        result = getattr(self._library, function)(*arguments)
        if result != 0:
            text = self._library.ncclGetErrorString(result).decode(errors="replace")
            kind = PeerLostError if result in _PEER_RESULTS else TransportError
            raise kind(f"{function} failed: {text} (result {result})")

    def version(self) -> int:
        """Return NCCL's version as one number: 22703 is 2.27.3."""
        version = c_int()
        self.call("ncclGetVersion", ctypes.byref(version))
        return version.value

    def create_unique_id(self) -> bytes:
        """Return the bytes of a new ``ncclUniqueId``."""
        unique_id = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id)

    def create_comm(self, unique_id: bytes, rank: int, size: int) -> c_void_p:
        """Return this rank's ``ncclComm_t`` on the current device; blocks until every rank of the id has called this."""
        comm = c_void_p()
        self.call("ncclCommInitRank", ctypes.byref(comm), size, UniqueId.from_buffer_copy(unique_id), rank)
        return comm
