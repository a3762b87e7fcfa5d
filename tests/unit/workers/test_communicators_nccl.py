"""The bindings of NCCL's C library: what can be seen of them without a GPU."""

from __future__ import annotations

import ctypes

import pytest

from zspmd.errors import ConfigError, TransportError
from zspmd.workers.communicators.nccl_library import LIBRARY_NAME, MIN_VERSION, UNIQUE_ID_BYTES, NcclLibrary

# a call with no communicator: every function checks that before anything else
NO_COMM = {
    "ncclAllReduce": (0, 0, 1, 7, 0, None, None),
    "ncclAllGather": (0, 0, 1, 7, None, None),
    "ncclReduceScatter": (0, 0, 1, 7, 0, None, None),
    "ncclBroadcast": (0, 0, 1, 7, 0, None, None),
    "ncclSend": (0, 1, 7, 0, None, None),
    "ncclRecv": (0, 1, 7, 0, None, None),
}


@pytest.fixture(scope="module")
def library() -> NcclLibrary:
    try:
        ctypes.CDLL(LIBRARY_NAME)
    except OSError:
        pytest.skip(f"needs {LIBRARY_NAME}, which comes with torch's CUDA builds")
    return NcclLibrary()


def test_no_library_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"cannot load NCCL \(libabsent.*; install a torch build with CUDA, or use gloo or shm"):
        NcclLibrary("libabsent.so.2")


def test_version_and_unique_id(library: NcclLibrary) -> None:
    assert library.version() >= MIN_VERSION
    ids = {library.create_unique_id() for _ in range(3)}
    assert len(ids) == 3
    assert {len(unique_id) for unique_id in ids} == {UNIQUE_ID_BYTES}


@pytest.mark.parametrize("function", NO_COMM)
def test_a_failure_is_an_error_with_nccls_words(library: NcclLibrary, function: str) -> None:
    with pytest.raises(TransportError, match=f"{function} failed: invalid argument"):
        library.call(function, *NO_COMM[function])
