"""Norm, rotation and sliding-window masks against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zspmd.model_config import RopeScaling
from zspmd.models.attention import AttentionInputs, ChunkSpan, SdpaAttention
from zspmd.models.layers import RmsNorm
from zspmd.models.rope import apply_rotation, rotary_frequencies


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6], ids=["tiny", "usual", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norm(dtype: torch.dtype, scale: float) -> None:
    """Both ways of computing it, where eps rules (tiny) and where it does not matter."""
    norm = RmsNorm("norm", 48, 1e-5, dtype=dtype, device=torch.device("cpu"))
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.manual_seed(0)
    x = (torch.randn(5, 3, 48) * scale).to(dtype)
    wanted = F.rms_norm(x.double(), (48,), norm.weight.double(), 1e-5).to(dtype)
    torch.testing.assert_close(norm(x), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_rotation_of_one_pair() -> None:
    angle = torch.tensor(0.3)
    cos, signed_sin = angle.cos().expand(1, 1, 2), torch.stack((-angle.sin(), angle.sin())).view(1, 1, 2)
    out = apply_rotation(torch.tensor([[[1.0, 0.0]]]), (cos, signed_sin))
    torch.testing.assert_close(out, torch.tensor([[[math.cos(0.3), math.sin(0.3)]]]))


def test_llama3_keeps_short_and_divides_long_wavelengths() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = rotary_frequencies(128, 500_000.0, None), rotary_frequencies(128, 500_000.0, scaling)
    wavelengths = 2 * math.pi / plain
    is_short, is_long = wavelengths < 8192 / 4, wavelengths > 8192
    torch.testing.assert_close(scaled[is_short], plain[is_short])
    torch.testing.assert_close(scaled[is_long], plain[is_long] / 8)
    between = scaled[~is_short & ~is_long] / plain[~is_short & ~is_long]
    assert len(between) > 3
    assert ((between > 1 / 8) & (between < 1)).all()


@pytest.mark.parametrize("window", [1, 3, 5], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("kind", ["decode", "chunk", "whole"])
def test_sliding_window_sees_exactly_its_positions(kind: str, window: int) -> None:
    """Equal keys and one-hot values: the output shows which of 6 positions the last token sees."""
    attention = SdpaAttention(1, sliding_window=window, dtype=torch.float32)
    slots = torch.tensor([9, 4, 7, 5, 8, 6])
    cache = torch.zeros(2, 12, 1, 6)
    rows = {"decode": 1, "chunk": 2, "whole": 6}[kind]
    values = torch.eye(6)[:, None]
    cache[1, slots] = values
    inputs = AttentionInputs(
        positions=torch.arange(6)[-rows:],
        write_slots=slots[-rows:],
        chunks=() if kind == "decode" else (ChunkSpan(0, rows, slots),),
        decode_start=0 if kind == "decode" else rows,
        decode_read_slots=slots[None] if kind == "decode" else torch.empty(0, 0, dtype=torch.int64),
        decode_lengths=torch.tensor([6] if kind == "decode" else [], dtype=torch.int64),
    )
    attend = attention.begin_step(inputs)
    out = attend(torch.ones(rows, 1, 6), torch.zeros(rows, 1, 6), values[-rows:], cache)
    wanted = torch.zeros(6)
    wanted[-window:] = 1 / window
    torch.testing.assert_close(out[-1], wanted)
