"""Rejection sampling on one GPU: the decisions and tokens of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zspmd.workers.speculation.rejection import probabilities, verify_by_rejection

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_SEQUENCES = 2000
VOCAB = 50


@pytest.mark.parametrize("is_certain", [False, True])
def test_a_gpu_decides_as_the_cpu_does(is_certain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    num_drafts = np.arange(NUM_SEQUENCES) % 5
    target = probabilities(torch.randn(NUM_SEQUENCES + num_drafts.sum(), VOCAB, generator=generator))
    draft = probabilities(torch.randn(int(num_drafts.sum()), VOCAB, generator=generator))
    drafts = draft.multinomial(1, generator=generator)[:, 0].int().numpy()
    places = np.arange(NUM_SEQUENCES)
    on_cpu, on_gpu = (
        verify_by_rejection(
            target.to(device), None if is_certain else draft.to(device), drafts, num_drafts, places.astype(np.uint64), places
        )
        for device in ("cpu", "cuda:0")
    )
    assert 0 < on_cpu[0].sum() < num_drafts.sum()
    assert on_gpu[0].tolist() == on_cpu[0].tolist()
    assert on_gpu[1].tolist() == on_cpu[1].tolist()
