"""What the driver reads of a checkpoint, and how large a KV pool follows from the ranks' memory; no torch here."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from support.zero_checkpoints import save_zeros

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import CheckpointError, ConfigError, TopologyError
from zspmd.runtime.engine.checkpoint import DEMO_MODEL, choose_num_blocks, open_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole checkpoint of zeros, without a tokenizer."""
    return save_zeros(tmp_path)


@pytest.mark.parametrize(("asked", "limit"), [(None, 64), (64, 64), (7, 7)])
def test_the_model_length_is_the_checkpoints_unless_a_shorter_one_is_asked_for(directory: Path, asked: int | None, limit: int) -> None:
    checkpoint = open_checkpoint(str(directory), ParallelConfig(tp=2), EngineConfig(max_model_len=asked))
    assert (checkpoint.directory, checkpoint.max_model_len, checkpoint.tokenizer) == (directory, limit, None)
    assert checkpoint.model.vocab_size == 11


def test_a_tokenizer_is_read_where_there_is_one(directory: Path, byte_level_backend: tokenizers.Tokenizer) -> None:
    byte_level_backend.save(str(directory / "tokenizer.json"))
    tokenizer = open_checkpoint(directory, ParallelConfig(), EngineConfig()).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("quick")) == "quick"


def test_paths_are_resolved(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("HOME", str(directory.parent))
    for path in (directory.name, f"~/{directory.name}", directory / ".." / directory.name):
        assert open_checkpoint(path, ParallelConfig(), EngineConfig()).directory == directory


def test_demo_is_the_name_of_the_model_that_ships_with_the_package() -> None:
    assert DEMO_MODEL.parts[-2:] == ("models", "demo")
    assert DEMO_MODEL.parents[1].joinpath("errors.py").is_file()


@pytest.mark.parametrize(
    ("parallel", "config", "kind", "message"),
    [
        pytest.param(ParallelConfig(pp=2), EngineConfig(), TopologyError, "pp 2 is more than the 1 layers .* at most 1", id="pp"),
        pytest.param(
            ParallelConfig(pp=2),
            EngineConfig(pp_partition=(1, 2)),
            TopologyError,
            "partition 1, 2 has 2 stages and 3 layers",
            id="partition",
        ),
        pytest.param(
            ParallelConfig(tp=2, ep=2),
            EngineConfig(),
            TopologyError,
            "ep is 2, and the model has no experts: with tp 2 and dp 1 choose 1",
            id="ep",
        ),
        pytest.param(ParallelConfig(tp=3), EngineConfig(), TopologyError, "tp 3 .* choose one of 1, 2, 4", id="tp"),
        pytest.param(
            ParallelConfig(), EngineConfig(max_model_len=65), ConfigError, "max_model_len is 65; .* has 64 positions: lower it", id="length"
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    directory: Path, parallel: ParallelConfig, config: EngineConfig, kind: type[ConfigError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_checkpoint(directory, parallel, config)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory .*/nowhere; give a local directory"):
        open_checkpoint(tmp_path / "nowhere", ParallelConfig(), EngineConfig())


def capacity(free_blocks: float, bytes_per_block: int = 100) -> dict[str, int]:
    return {"free_bytes": int(free_blocks * bytes_per_block), "bytes_per_block": bytes_per_block}


@pytest.mark.parametrize(
    ("capacities", "devices", "expected"),
    [
        pytest.param([capacity(40)], ["cpu"], 20, id="half of a CPU's memory"),
        pytest.param([capacity(40)] * 2, ["cpu"] * 2, 10, id="ranks on CPUs share it"),
        pytest.param([capacity(20)], ["cuda:0"], 18, id="nine tenths of a GPU's"),
        pytest.param([capacity(20)] * 2, ["cuda:0", "cuda:1"], 18, id="each GPU has its own"),
        pytest.param([capacity(20)] * 2, ["cuda:0", "cuda:0"], 9, id="ranks on one GPU share it"),
        pytest.param([capacity(20), capacity(15), capacity(30)], ["cuda:0", "cuda:1", "cuda:2"], 13, id="the poorest rank counts"),
        pytest.param([capacity(1e9)], ["cpu"], 4 * 5 + 1, id="no more than all slots can use, and the padding block"),
    ],
)
def test_the_pool_is_sized_from_free_memory(capacities: list[dict[str, int]], devices: list[str], expected: int) -> None:
    config = EngineConfig(max_num_seqs=4, block_size=8)
    assert choose_num_blocks(capacities, [(0, device) for device in devices], 40, config) == expected


def test_a_pool_that_holds_no_sequence_is_refused() -> None:
    config = EngineConfig(block_size=8)
    assert choose_num_blocks([capacity(12)], [(0, "cpu")], 40, config) == 6
    with pytest.raises(ConfigError, match=r"memory for 5 KV blocks of 8 positions, .* max_model_len 40 needs 6; lower max_model_len"):
        choose_num_blocks([capacity(11)], [(0, "cpu")], 40, config)


def test_the_users_number_of_blocks_is_taken_if_it_fits() -> None:
    capacities, devices = [capacity(1000), capacity(60)], ["cuda:0", "cuda:1"]
    assert choose_num_blocks(capacities, [(0, device) for device in devices], 40, EngineConfig(num_blocks=60)) == 60
    with pytest.raises(ConfigError, match=r"num_blocks is 61, which takes 6,100 B on rank 1, where 6,000 B are free; lower it to 60"):
        choose_num_blocks(capacities, [(0, device) for device in devices], 40, EngineConfig(num_blocks=61))
