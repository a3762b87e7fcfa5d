"""The 671 B parameters of DeepSeek-V3 over 8 nodes of 8 GPUs: what ``--dry-run`` says, from config.json alone, checked by hand.

docs/parallelism.md shows the same layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.deepseek_configs import DEEPSEEK_V3
from support.package import ROOT

from zspmd.config import ParallelConfig
from zspmd.model_config import ModelConfig, read_model_config
from zspmd.models.llama import LlamaModel
from zspmd.runtime.engine.rank_shares import RankShare, share_model
from zspmd.runtime.launch.cli import main

DOCS = ROOT / "docs" / "parallelism.md"
NUM_PARAMETERS = 671_026_419_200
NUM_LAYERS, NUM_DENSE, NUM_MIXTURES, NUM_EXPERTS = 61, 3, 58, 256
# of one layer, by who has it; D is 7168, a head has 128 + 64 dims of queries and 128 of values, a latent 512 numbers
ON_EVERY_RANK = 7168 * (1536 + 512 + 64) + 1536 + 512 + 2 * 7168  # q_a and kv_a, their norms, the layer's two
OF_HEADS = 128 * ((128 + 64) * 1536 + (128 + 128) * 512 + 128 * 7168)  # q_b, kv_b, o
DENSE_MLP, EXPERT = 3 * 7168 * 18432, 3 * 7168 * 2048  # the shared expert is as large as any other
ROUTER = 256 * 7168 + 256  # and its correction bias
TABLES, LAST_NORM = 2 * 129280 * 7168, 7168
BF16, F32 = 2, 4


def shares_of(config: ModelConfig, parallel: ParallelConfig) -> list[RankShare]:
    return share_model(config, parallel, None, ["bfloat16"] * parallel.world_size)


def total_bytes(shares: list[RankShare]) -> int:
    return sum(share.weights_bytes or 0 for share in shares)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return tmp_path


@pytest.fixture
def config(directory: Path) -> ModelConfig:
    return read_model_config(directory)


def test_the_parts_are_the_whole() -> None:
    in_layers = NUM_LAYERS * (ON_EVERY_RANK + OF_HEADS) + NUM_DENSE * DENSE_MLP + NUM_MIXTURES * (257 * EXPERT + ROUTER)
    assert in_layers + TABLES + LAST_NORM == NUM_PARAMETERS


@pytest.mark.parametrize("num_stages", [1, 8, 61])
def test_stages_without_copies_hold_each_parameter_once(config: ModelConfig, num_stages: int) -> None:
    """In bfloat16, but for the routers."""
    shares = shares_of(config, ParallelConfig(pp=num_stages))
    assert total_bytes(shares) == NUM_PARAMETERS * BF16 + NUM_MIXTURES * ROUTER * (F32 - BF16)


def test_stages_of_eight_ranks_hold_copies_of_what_is_no_heads(config: ModelConfig) -> None:
    shares = shares_of(config, ParallelConfig(tp=8, pp=8))
    copies = (NUM_LAYERS * ON_EVERY_RANK + LAST_NORM) * BF16 + NUM_MIXTURES * ROUTER * F32
    assert total_bytes(shares) - 7 * copies == NUM_PARAMETERS * BF16 + NUM_MIXTURES * ROUTER * (F32 - BF16)


def test_a_rank_of_eight_replicas_that_share_experts(config: ModelConfig) -> None:
    """A node is a replica of eight tp ranks; the 64 ranks together have each expert once, 4 of each layer on every one."""
    shares = shares_of(config, ParallelConfig(tp=8, dp=8, ep=64))
    of_tp = NUM_LAYERS * OF_HEADS + NUM_DENSE * DENSE_MLP + NUM_MIXTURES * EXPERT + TABLES
    elements = of_tp // 8 + NUM_LAYERS * ON_EVERY_RANK + LAST_NORM + NUM_MIXTURES * 4 * EXPERT
    assert of_tp % 8 == 0
    assert {share.weights_bytes for share in shares} == {elements * BF16 + NUM_MIXTURES * ROUTER * F32} == {26_731_061_248}
    assert [expert for share in shares for expert in share.experts or ()] == list(range(NUM_EXPERTS))
    for replica in (shares[first : first + 8] for first in range(0, 64, 8)):
        assert [head for share in replica for head in share.heads] == list(range(128))
        assert [row for share in replica for row in share.vocabulary_rows or ()] == list(range(129280))
        assert {(share.layers, share.kv_heads) for share in replica} == {(range(61), range(1))}


def test_attention_on_every_rank_alone(config: ModelConfig) -> None:
    """64 replicas: what is no expert is there 64 times."""
    shares = shares_of(config, ParallelConfig(dp=64, ep=64))
    elements = NUM_PARAMETERS - NUM_MIXTURES * (252 * EXPERT + ROUTER)
    assert {share.weights_bytes for share in shares} == {elements * BF16 + NUM_MIXTURES * ROUTER * F32}


def test_a_rank_builds_what_its_share_says(config: ModelConfig) -> None:
    share = shares_of(config, ParallelConfig(tp=8, pp=8))[-1]
    place: Any = SimpleNamespace(rank=7, size=8)
    model = LlamaModel(config, place, dtype=torch.bfloat16, device=torch.device("meta"), layers=share.layers)
    assert share.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert model.kv_bytes_per_block(16) == len(share.layers) * 16 * 576 * BF16


def test_a_dry_run_needs_config_json_alone(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "hosts").write_text("".join(f"node{i}.invalid slots=8\n" for i in range(8)))
    layout = ["--hostfile", str(directory / "hosts"), "--tp", "8", "--dp", "8", "--ep", "64"]
    model = ["generate", "--model", str(directory), "--dtype", "bfloat16"]
    assert main([*layout, "--dry-run", "--json", *model]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [node["host"] for node in told["nodes"]] == [f"node{i}.invalid" for i in range(8)]
    assert [(share["heads"], share["experts"], share["weights_bytes"]) for share in told["shares"][7:9]] == [
        ("112-127", "28-31", 26_731_061_248),
        ("0-15", "32-35", 26_731_061_248),
    ]
    assert main([*layout, "--dry-run", *model]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in DOCS.read_text().splitlines() if line.endswith("26,731,061,248")]
    assert len(rows) > 4
    assert set(rows) <= set(shown)  # what the page shows is what is printed
    assert main([*layout, *model, "a prompt"]) == 2
    assert f"{directory} has neither model.safetensors nor" in capsys.readouterr().err
