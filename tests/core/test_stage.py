"""Which stage above feeds which role of another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bessemer.core.config import Config
from bessemer.core.errors import ConfigError
from bessemer.core.stage import Input, StageSpec


def stage(kind, *, needs=None, makes=("documents",), **rest):
    made = dict.fromkeys(makes, "made")
    return StageSpec(kind, "", Config, 1, needs=needs or {}, makes=made, run=lambda context: {}, **rest)


COLLECT, PRETRAIN = stage("collect"), stage("pretrain", makes=("model", "tokenizer"), trains=True)
SFT, QUANTIZE = stage("sft", makes=("model",), trains=True), stage("quantize", makes=("model",))
ABOVE = {"collect": COLLECT, "pretrain": PRETRAIN, "sft": SFT, "quantize": QUANTIZE}
READER = stage("reader", needs={"model": "model", "documents": "documents", "weights": "adapter?"})


def wired(spec, above=ABOVE, sources=None):
    return spec.wire(Config(), above, sources, lambda: "here")


def refusal(spec, sources=None, above=ABOVE):
    with pytest.raises(ConfigError) as error:
        wired(spec, above, sources)
    return str(error.value)


def test_the_nearest_stage_that_makes_it_feeds_a_role_and_what_may_be_missing_is():
    assert wired(READER) == {"model": Input("quantize", "model"), "documents": Input("collect", "documents")}


def test_the_recipe_may_name_the_stage_of_the_first_role_or_of_any():
    assert wired(READER, sources="sft")["model"] == Input("sft", "model")
    assert wired(READER, sources={"documents": "collect", "model": "pretrain"})["model"] == Input("pretrain", "model")


def test_a_stage_that_is_not_above_or_makes_something_else_is_refused_by_name():
    assert refusal(READER, "sfft") == "here: there is no stage 'sfft' above it; did you mean 'sft'?"
    assert refusal(READER, "collect") == "here: the stage 'collect' makes documents, not model"


def test_a_missing_artefact_is_said_with_a_line_that_makes_it():
    assert refusal(READER, above={"collect": COLLECT}) == "here: needs model, and no stage above makes it"
    with pytest.raises(ConfigError, match=r"add pretrain: \{minutes: 1\}"):
        READER.wire(Config(), {}, None, lambda: "here", lambda kind: "pretrain: {minutes: 1}")


def test_a_role_that_the_settings_leave_unread_is_neither_fed_nor_chosen():
    unread = replace(READER, unread=lambda config: ("documents",))
    assert list(wired(unread)) == ["model"]
    assert refusal(unread, {"documents": "collect"}).startswith("here: from: documents is not read under these settings")


def test_models_are_those_that_the_settings_name_or_all_that_a_stage_above_has_trained():
    compares = stage("compare", models_named=lambda config: ["quantize", "sft"])
    assert wired(compares) == {"model:quantize": Input("quantize", "model"), "model:sft": Input("sft", "model")}
    everything = replace(compares, models_named=lambda config: [])
    assert list(wired(everything)) == ["model:pretrain", "model:sft"]
    assert list(wired(replace(compares, models_named=None))) == []
