"""The tokenize stage in a recipe: what is refused before anything runs, and going on after an interruption."""

import json

import pytest

from bessemer.core.errors import ConfigError
from bessemer.pipeline.api import execute, prepare
from bessemer.pipeline.recipe import load_recipe
from bessemer.tokenization.shards import ShardWriter
from tests.tokenization.conftest import synthetic_corpus

_RECIPE = """
format: 1
name: small
collect: [{source: files, paths: [texts.jsonl], name: notes}]
tokenize: {vocab_size: 300, shard_tokens: 1000}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(_RECIPE, encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in synthetic_corpus(40)), encoding="utf-8"
    )
    return tmp_path


def test_a_missing_tokenizer_is_named_before_anything_runs(here):
    with pytest.raises(ConfigError, match=r"^tokenize\.tokenizer: nowhere: no such folder$"):
        prepare("recipe.yaml", ["tokenize.tokenizer=nowhere"])
    assert not (here / "runs").exists()


def test_a_weight_of_a_source_that_is_not_collected_is_refused_with_its_place(here):
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml:5: tokenize: source_weights: no source is named 'nots'; did you mean 'notes'\?"
    ):
        load_recipe("recipe.yaml", ["tokenize.source_weights={nots: 2}"])


def test_an_interrupted_stage_is_kept_resumed_and_ends_as_if_nothing_had_been(here, monkeypatch):
    whole = execute(prepare("recipe.yaml", runs="whole")).made[-1].artefact
    close_shard, closed = ShardWriter._close_shard, []

    def close_and_stop(writer):
        close_shard(writer)
        closed.append(writer)
        if len(closed) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_close_shard", close_and_stop)
        with pytest.raises(KeyboardInterrupt):
            execute(prepare("recipe.yaml"))
    monkeypatch.setattr("bessemer.tokenization.stage.train_vocabulary", lambda *_: pytest.fail("trained again"))
    runner = prepare("recipe.yaml")
    assert [planned.action for planned in runner.plan()] == ["reuse", "resume"]
    resumed = execute(runner).made[-1].artefact
    assert resumed.manifest["outputs"] == whole.manifest["outputs"]
    assert not any(path.name.startswith(".") for path in resumed.folder.iterdir())


def test_another_run_encodes_with_a_finished_tokenizer(here):
    execute(prepare("recipe.yaml"))
    result = execute(prepare("recipe.yaml", ["tokenize.tokenizer=runs/small/tokenizer", "tokenize.shard_tokens=5000"]))
    assert result.folder.name == "small-2"
    hashes = [execute(prepare("recipe.yaml")).run.metrics()["tokenize"], result.run.metrics()["tokenize"]]
    assert hashes[0]["tokenizer_hash"] == hashes[1]["tokenizer_hash"]
    assert hashes[0]["train"]["tokens"] == hashes[1]["train"]["tokens"]
