from __future__ import annotations

import pytest

from zspmd.runtime.launch.nodes.forwarded import forwarded_environment


@pytest.mark.parametrize(
    ("name", "is_forwarded"),
    [
        ("NCCL_DEBUG", True),
        ("PYTORCH_CUDA_ALLOC_CONF", True),
        ("CUBLAS_WORKSPACE_CONFIG", True),
        ("PYTHONPATH", True),
        ("PYTHONHOME", False),
        ("CUDA_LAUNCH_BLOCKING", True),
        ("CUDA_VISIBLE_DEVICES", False),
        ("HF_HUB_OFFLINE", True),
        ("HF_HUB_TOKEN", False),
        ("HF_TOKEN", False),
        ("AWS_SECRET_ACCESS_KEY", False),
        ("HOME", False),
        ("ZSPMD_BOOTSTRAP_FD", False),
        ("OMPI_COMM_WORLD_RANK", False),
    ],
)
def test_programs_settings_are_forwarded_and_neither_secrets_nor_facts_of_a_machine(name: str, is_forwarded: bool) -> None:
    assert (name in forwarded_environment((), {name: "x"})) is is_forwarded


@pytest.mark.parametrize("pattern", ["HF_TOKEN", "HF_*"])
def test_whoever_names_a_variable_has_it_forwarded(pattern: str) -> None:
    assert forwarded_environment((pattern,), {"HF_TOKEN": "x", "OTHER": "y"}) == {"HF_TOKEN": "x"}


def test_what_belongs_to_one_process_is_never_forwarded() -> None:
    assert forwarded_environment(("*",), {"ZSPMD_SECRET": "x", "ZSPMD_RUN_DIR": "/run/x"}) == {}
