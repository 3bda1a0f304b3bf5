"""Rollouts by servers of other kinds: what they are sent is what their protocols say, and they get every version."""

import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.http_client import ApiError
from bessemer.core.metrics import read_metrics
from bessemer.inference.engine import SamplingParams
from bessemer.posttraining.sampling.server_client import CompletionServer, WeightUpdate
from bessemer.posttraining.sampling.server_config import RolloutServers
from bessemer.posttraining.sampling.server_pool import ServerPool
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow
from tests.posttraining.stand_ins import StandIn, serving_as
from tests.posttraining.test_rl import data, run  # noqa: F401
from tests.posttraining.test_served_rollouts import serving

pytestmark = pytest.mark.usefixtures("one_thread")

#: What a push of weights is, and one of an adapter, at its first version and at the fourth.
ROUTES = {
    "vllm": (["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version"], "/v1"),
    "sglang": (["/update_weights_from_disk"], ""),
}


@pytest.mark.parametrize("kind", [slow("vllm"), "sglang"])
def test_every_step_is_sampled_with_the_weights_that_it_trains(kind, model_folder, data, tmp_path):  # noqa: F811
    stand_in = StandIn(serving(model_folder), kind)
    with serving_as(stand_in) as url:
        run(model_folder, data, tmp_path, rollouts=[url], steps=3, max_tokens=6, temperature=0.8, validation_share=0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 3 and max(line["log_ratio_max"] for line in lines) < 1e-4
    pushes = [path for path, _ in stand_in.calls if path not in ("/v1/completions", "/generate")]
    assert pushes == ROUTES[kind][0] * 3
    assert not (tmp_path / "served").exists(), "what was written for the servers is removed"


@pytest.mark.parametrize("kind", ["vllm", slow("sglang")])
def test_an_adapter_is_loaded_under_a_name_of_each_version(kind, model_folder, data, tmp_path):  # noqa: F811
    stand_in = StandIn(serving(model_folder), kind)
    with serving_as(stand_in) as url:
        run(model_folder, data, tmp_path, rollouts=[url], steps=4, max_tokens=6, adapter={"rank": 4}, validation_share=0)
    assert max(line["log_ratio_max"] for line in read_metrics(tmp_path / "metrics.jsonl")) < 1e-4
    loads = [body["lora_name"] for path, body in stand_in.calls if path == f"{ROUTES[kind][1]}/load_lora_adapter"]
    assert loads == [f"policy-{version}" for version in range(4)]
    assert stand_in.engine.adapters == ("policy-2", "policy-3"), "requests under way may still name the one before"


def opened(url, model_folder, temperature=1.0, **settings):
    pool = ServerPool(RolloutServers(servers=[url], **settings), load_tokenizer(model_folder), print)
    pool.open(temperature=temperature, longest=64)
    return pool


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_log_probabilities_of_another_temperature_than_that_of_the_samples_are_refused(kind, model_folder):
    with serving_as(StandIn(serving(model_folder), kind, processed=False)) as url:
        opened(url, model_folder).close()
        with pytest.raises(ConfigError, match=r"log-probabilities of temperature 1, and rl needs those of 0\.5"):
            opened(url, model_folder, temperature=0.5)
    with serving_as(StandIn(serving(model_folder), kind)) as url:
        opened(url, model_folder, temperature=0.5).close()


def test_a_server_without_token_ids_is_understood_by_the_texts_of_its_tokens(model_folder):
    engine = serving(model_folder)
    tokenizer = engine.tokenizer
    texts = [tokenizer.decode([id], skip_special=False) for id in range(tokenizer.vocab_size)]
    single = [id for id, text in enumerate(texts) if texts.count(text) == 1]
    shared = next(id for id, text in enumerate(texts) if texts.count(text) > 1)
    with serving_as(StandIn(engine, "openai")) as url:
        server = CompletionServer(url, RolloutServers(servers=[url]), tokenizer)
        server.connect()
        assert [server._id_of_text(texts[id]) for id in single] == single
        made = engine.rollouts([[1, 2, 3]], 1, SamplingParams(max_tokens=8, temperature=0)).tokens[0, 3:].tolist()
        assert set(made) <= set(single), "the model writes whole characters here"
        assert server.complete([1, 2, 3], 1, SamplingParams(max_tokens=8, temperature=0))[0].token_ids == made
        with pytest.raises(ApiError, match="is of no single token; take a server that sends them"):
            server._id_of_text(texts[shared])
        with pytest.raises(ConfigError, match="no server that takes new weights"):
            server.send_weights(WeightUpdate(1))


def test_a_model_that_the_server_has_not_is_named_with_those_that_it_has(model_folder):
    with (
        serving_as(StandIn(serving(model_folder), "vllm")) as url,
        pytest.raises(ConfigError, match="has no model 'other'; it has served"),
    ):
        opened(url, model_folder, model="other")
