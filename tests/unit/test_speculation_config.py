"""What may be said of speculation, as text, as dataclasses and as plain values that travel."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from zspmd.config import EngineConfig
from zspmd.errors import ConfigError
from zspmd.speculation_config import DraftConfig, NgramConfig, SpeculationConfig, parse_speculation
from zspmd.transport.codec import ValueEncoder, decode_value

TABLE = ((4, 3), (16, 0))
STAGED = DraftConfig("a", k=4, tp=2, inner=DraftConfig("b", k=3, inner=NgramConfig(k=2)))


@pytest.mark.parametrize(
    ("text", "proposer"),
    [
        ("ngram", NgramConfig(k=4, min_n=2, max_n=4)),
        ("ngram:k=16", NgramConfig(k=16)),
        ("ngram:max=1,min=1,k=2", NgramConfig(k=2, min_n=1, max_n=1)),
        ("draft:demo", DraftConfig("demo", k=4, tp=1, inner=None)),
        ("draft:/models/a=b:c d,tp=4,k=6", DraftConfig("/models/a=b:c d", k=6, tp=4)),
        ("draft:a,k=4+ngram:k=2", DraftConfig("a", inner=NgramConfig(k=2))),
        ("draft:a,tp=2+draft:b,k=3+ngram:k=2", STAGED),
    ],
)
def test_a_proposer_is_read_from_text(text: str, proposer: NgramConfig | DraftConfig) -> None:
    assert parse_speculation(text) == SpeculationConfig(proposer, "goodput", (), "match")
    assert EngineConfig(speculation=text).speculation == SpeculationConfig(proposer)


@pytest.mark.parametrize(
    ("text", "policy", "depths"),
    [
        ("goodput", "goodput", ()),
        ("fixed", "fixed", ()),
        ("batch:1=4", "batch", ((1, 4),)),
        ("batch:1-4=3,5-16=0", "batch", TABLE),
        ("batch:1-1=1,2=2,3-65535=4", "batch", ((1, 1), (2, 2), (65_535, 4))),
    ],
)
def test_a_policy_is_read_from_text(text: str, policy: str, depths: tuple[tuple[int, int], ...]) -> None:
    assert parse_speculation("ngram", text, "rejection") == SpeculationConfig(NgramConfig(), policy, depths, "rejection")


@pytest.mark.parametrize(
    ("text", "piece", "message"),
    [
        pytest.param("", "''", r"that is no proposer; give ngram:k=4,min=2,max=4 or draft:PATH", id="empty"),
        pytest.param("medusa:k=4", "'medusa:k=4'", "that is no proposer", id="unknown"),
        pytest.param("draft", "'draft'", "that is no proposer", id="no path"),
        pytest.param("draft:,k=4", "'draft:,k=4'", "that is no proposer", id="empty path"),
        pytest.param("draft:/a+b,k=4", "'b,k=4'", r"that is no proposer.* PATH holds no ',' and no '\+'", id="plus in a path"),
        pytest.param(
            "draft:/a,b,k=4", "'draft:/a,b,k=4'", r"'b' is no setting .* settings are k, tp: .* PATH holds no ','", id="comma in it"
        ),
        pytest.param("draft:a+", "''", "that is no proposer", id="nothing within"),
        pytest.param("ngram+draft:a", "'ngram'", "it has no model that another could propose to; put it last", id="within ngram"),
        pytest.param("ngram:tp=2", "'ngram:tp=2'", "'tp=2' is no setting .* settings are k, min, max", id="another's setting"),
        pytest.param("ngram:", "'ngram:'", "'' is no setting", id="no setting"),
        pytest.param("ngram:k=4.0", "'ngram:k=4.0'", "'k=4.0' is no setting with a whole number", id="no whole number"),
        pytest.param("ngram:k=" + "9" * 5000, "'ngram:k=9*'", "'k=9*' is no setting with a whole number", id="endless"),
        pytest.param("ngram:k=²", "'ngram:k=²'", "is no setting with a whole number", id="another alphabet"),
        pytest.param("ngram:k=1,k=2", "'ngram:k=1,k=2'", "k is there twice; leave one out", id="twice"),
        pytest.param("draft:a,k=4+ngram:k=17", "'ngram:k=17'", "k is 17; it must be a whole number from 1 to 16", id="k too large"),
        pytest.param("draft:a,k=0+ngram", "'draft:a,k=0'", "k is 0; it must be a whole number from 1 to 16", id="k too small"),
        pytest.param(
            "ngram:min=5", "'ngram:min=5'", "min_n is 5; it must be a whole number from 1 to 4: max_n is the limit", id="min above max"
        ),
        pytest.param("ngram:max=17", "'ngram:max=17'", "max_n is 17; .* from 1 to 16", id="max"),
        pytest.param("draft:a,tp=0", "'draft:a,tp=0'", "tp is 0; .* from 1 to 65535", id="tp"),
        pytest.param("draft:a" + "+draft:b" * 4, "'draft:a'", "5 proposers are within each other; 4 is the limit", id="too many"),
    ],
)
def test_a_proposer_that_cannot_be_read(text: str, piece: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_speculation(text)
    assert re.match(f"speculation '.*', in {piece}: ", str(raised.value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "policies are goodput, fixed and batch:RANGES, such as batch:1-4=6,5-16=3", id="empty"),
        pytest.param("fixed:4", "policies are goodput, fixed", id="an argument"),
        pytest.param("batch", "'' is no range of sequences with a depth", id="no table"),
        pytest.param("batch:1-4", "'1-4' is no range of sequences with a depth; give such as batch:1-4=6,5-16=3", id="no depth"),
        pytest.param("batch:1-4=3,", "'' is no range", id="a comma too many"),
        pytest.param("batch:2-4=3", "'2-4=3' should begin with 1", id="from two"),
        pytest.param("batch:1-4=3,6-8=2", "'6-8=2' should begin with 5", id="a gap"),
        pytest.param("batch:1-4=3,4-8=2", "'4-8=2' should begin with 5", id="an overlap"),
        pytest.param("batch:1-0=3", "'1-0=3' should begin with 1 and not end before", id="backwards"),
        pytest.param("batch:1-4=5", "a depth in depths is 5; it must be a whole number from 0 to 4: the proposer's k", id="deeper than k"),
        pytest.param("batch:1-65536=2", "a number of sequences in depths is 65536; .* from 1 to 65535", id="too many sequences"),
    ],
)
def test_a_policy_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_speculation("ngram", text)
    assert str(raised.value).startswith(f"speculation 'ngram' with the policy {text!r}: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proposer": "ngram"}, "proposer is 'ngram'; give an NgramConfig or a DraftConfig"),
        ({"policy": "best"}, "policy is 'best'; choose one of goodput, fixed, batch"),
        ({"verify": "typical"}, "verify is 'typical'; choose one of match, rejection"),
        ({"policy": "batch"}, r"policy is 'batch' and depths are \(\); depths belong to the policy 'batch', which needs them"),
        ({"depths": TABLE}, "policy is 'goodput' and depths are .*; depths belong to the policy 'batch'"),
        ({"policy": "batch", "depths": ((4, 3), (4, 2))}, "their numbers of sequences must rise"),
        ({"policy": "batch", "depths": (4, 3)}, r"depths are \(4, 3\); give pairs"),
        ({"policy": "batch", "depths": ((4, True),)}, "a depth in depths is True"),
        ({"policy": "batch", "depths": "4=3"}, "depths are '4=3'; give pairs"),
    ],
)
def test_speculation_that_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationConfig(**{"proposer": NgramConfig(), **fields})


@pytest.mark.parametrize("model", ["", None, b"a"], ids=repr)
def test_a_drafts_model_is_text(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"the draft's model is .*; give the path of its directory as text, or 'demo'"):
        DraftConfig(model)


def test_what_is_within_a_draft_is_a_proposer() -> None:
    inner: Any = "ngram"
    with pytest.raises(ConfigError, match="inner is 'ngram'; give an NgramConfig, a DraftConfig or None"):
        DraftConfig("a", inner=inner)


@pytest.mark.parametrize(
    "config",
    [
        SpeculationConfig(NgramConfig(k=3, min_n=1, max_n=2), "batch", TABLE[:1], "rejection"),
        SpeculationConfig(DraftConfig("a", tp=2), "fixed"),
        SpeculationConfig(STAGED),
    ],
    ids=["ngram", "draft", "staged"],
)
def test_it_travels_as_plain_values(config: SpeculationConfig) -> None:
    plain = config.to_plain()
    assert SpeculationConfig.from_plain(json.loads(json.dumps(plain))) == config
    assert SpeculationConfig.from_plain(decode_value(*ValueEncoder().encode(plain))) == config
    assert hash(SpeculationConfig.from_plain(plain)) == hash(config)  # no list is left in it


def test_plain_values_are_checked_again() -> None:
    plain = SpeculationConfig(NgramConfig()).to_plain()
    plain["proposer"]["k"] = 17
    with pytest.raises(ConfigError, match="k is 17"):
        SpeculationConfig.from_plain(plain)


def test_its_drafts_and_their_models() -> None:
    config = SpeculationConfig(STAGED, "fixed", verify="rejection")
    assert config.k == 4
    assert [draft.model for draft in config.drafts] == ["a", "b"]
    resolved = config.with_models(lambda model: f"/models/{model}")
    assert [(draft.model, draft.tp, draft.k) for draft in resolved.drafts] == [("/models/a", 2, 4), ("/models/b", 1, 3)]
    assert resolved.with_models(lambda model: model[-1]) == config
    assert SpeculationConfig(NgramConfig()).drafts == ()


@pytest.mark.parametrize("config", [NgramConfig(), STAGED, SpeculationConfig(STAGED)], ids=lambda config: type(config).__name__)
def test_it_is_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)


def test_an_engine_takes_none_a_text_or_a_config() -> None:
    config = SpeculationConfig(NgramConfig(), "fixed")
    assert EngineConfig().speculation is None
    assert EngineConfig(speculation=config).speculation is config
    with pytest.raises(ConfigError, match="speculation 'off', in 'off': that is no proposer"):
        EngineConfig(speculation="off")
    wrong: Any = NgramConfig()
    with pytest.raises(ConfigError, match=r"speculation is NgramConfig\(.*; give a SpeculationConfig, or a text such as 'ngram:k=4'"):
        EngineConfig(speculation=wrong)
