"""Norm, rotation and sliding-window masks against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zspmd.config_fields import Fields
from zspmd.models.attention import AttentionInputs, ChunkSpan, KvLayer, PagedAttention
from zspmd.models.layers import RmsNorm
from zspmd.models.rope import rotary_frequencies, rotate_
from zspmd.rope_config import RopeScaling, read_rope


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
    head = torch.tensor([[[1.0, 0.0]]])
    rotate_(head, (cos, signed_sin))
    torch.testing.assert_close(head, torch.tensor([[[math.cos(0.3), math.sin(0.3)]]]))


@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}, id="deepseek-v3"),
        pytest.param({"factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4, "mscale": 0.7}, id="mscale-alone"),
        pytest.param({"factor": 8.0, "original_max_position_embeddings": 512, "mscale": 0.5, "mscale_all_dim": 1.0}, id="mscales-differ"),
        pytest.param({"factor": 2.0, "original_max_position_embeddings": 4096, "truncate": False, "attention_factor": 1.3}, id="truncate"),
        pytest.param({"factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1000}, id="equal-bounds"),
    ],
)
def test_yarn_equals_transformers(rope: dict[str, Any]) -> None:
    values = {"rope_type": "yarn", "rope_theta": 10_000.0, **rope}
    config = transformers.AutoConfig.for_model(
        "qwen2", hidden_size=256, num_attention_heads=4, max_position_embeddings=65536, rope_parameters=dict(values)
    )
    wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    read = read_rope(Fields({"rope_parameters": values, "max_position_embeddings": 65536}, "config.json"), 64, theta=1e4, part=None)
    rotary_dim, theta, scaling = read
    assert scaling is not None
    assert scaling.table_factor == pytest.approx(factor, rel=1e-9)
    torch.testing.assert_close(rotary_frequencies(rotary_dim, theta, scaling), wanted)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [1, 3, 5], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("kind", ["decode", "repeat", "chunk", "whole"])
def test_sliding_window_sees_exactly_its_positions(kind: str, window: int, dtype: torch.dtype) -> None:
    """Equal keys and one-hot values: the output shows which of 6 positions the last token sees."""
    cpu = torch.device("cpu")
    attention = PagedAttention(1, 1, 6, 1, sliding_window=window, dtype=dtype, device=cpu)
    layer = KvLayer(5, 1, 2, 6, dtype=dtype, device=cpu)
    blocks = torch.tensor([3, 1, 4])
    values = torch.eye(6, dtype=dtype)
    layer.cache[blocks, 1] = values.view(3, 2, 6)

    def attend(first: int, stop: int, *, repeats: bool = False) -> torch.Tensor:
        is_chunk = kind in ("chunk", "whole")
        positions = torch.arange(first, stop)
        inputs = AttentionInputs(
            block_size=2,
            positions=positions,
            max_length=stop,
            write_blocks=blocks[positions // 2],
            write_places=positions % 2,
            chunks=(ChunkSpan(0, stop - first, stop, blocks),) if is_chunk else (),
            decode_start=stop - first if is_chunk else 0,
            decode_blocks=torch.empty(0, 0, dtype=torch.int64) if is_chunk else blocks[None, : -(-stop // 2)],
            decode_lengths=torch.tensor([] if is_chunk else [stop], dtype=torch.int64),
            repeats_decodes=repeats,
        )
        query = torch.ones(stop - first, 1, 6, dtype=dtype)
        keys_values = torch.stack((torch.zeros(stop - first, 6, dtype=dtype), values[first:stop]), 1)
        return attention.begin_step(inputs)(query, keys_values, layer)

    if kind == "repeat":
        for length in range(2, 6):
            attend(length - 1, length, repeats=length > 2)
        if attention.has_plain_decode:
            layer.cache.fill_(100.0)  # what was gathered is not read again
        out = attend(5, 6, repeats=True)
    else:
        out = attend({"decode": 5, "chunk": 4, "whole": 0}[kind], 6)
    wanted = torch.zeros(6, dtype=dtype)
    wanted[-window:] = 1 / window
    torch.testing.assert_close(out[-1], wanted)
