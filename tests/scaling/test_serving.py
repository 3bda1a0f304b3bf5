"""What serving takes, beside cases worked by hand."""

import json

import pytest

from bessemer.cli.main import main
from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig, preset_config
from bessemer.model.presets import PRESET_VOCABULARIES
from bessemer.scaling.hardware import find_card
from bessemer.scaling.serving import ServingJob, serving_plan


def preset(name: str) -> ModelConfig:
    return preset_config(name, PRESET_VOCABULARIES[name])


def test_a_dense_model_by_hand():
    job = ServingJob(preset("llama-3.1-8b"), find_card("h100"), prompt=1000, answer=200)
    # 32 layers, 8 heads of 128 for keys and for values, two bytes each
    assert job.kv_bytes_per_token == 32 * 8 * 128 * 2 * 2
    parameters = job.model.parameters()
    assert job.weight_bytes == 2 * parameters
    left = job.card.memory * 0.92 * 0.95 - 2 * parameters
    assert job.conversations(1200) == int(left // (1200 * 131_072))
    # one sequence waits for memory alone: weights and 1,100 tokens of keys and values
    assert job.step_seconds(1) == pytest.approx((2 * parameters + 1100 * 131_072) / (0.8 * job.card.bandwidth))
    load = job.at(16)
    assert load.answer_rate == pytest.approx(16 * 200 / (16 * job.prompt_seconds() + 200 * job.step_seconds(16)))
    assert load.dollars_per_million(3600.0) == pytest.approx(1e6 / load.answer_rate)


def test_more_at_once_is_cheaper_in_all_and_slower_for_each():
    loads = serving_plan(ServingJob(preset("llama-3.1-8b"), find_card("h100")), 3.0)["loads"]
    assert [one["conversations"] for one in loads] == sorted(one["conversations"] for one in loads)
    for key, rising in (("answer_tokens_per_second", True), ("tokens_per_second_each", False)):
        values = [one[key] for one in loads]
        assert values == sorted(values, reverse=not rising), key


def test_of_many_experts_one_sequence_reads_those_that_it_chose():
    job = ServingJob(preset("qwen3-30b-a3b"), find_card("h100"))
    assert job.read_bytes(1) == pytest.approx(2 * job.model.active_parameters())
    assert job.read_bytes(10**6) == pytest.approx(job.weight_bytes)
    assert job.read_bytes(1) < job.read_bytes(8) < job.weight_bytes


def test_what_does_not_fit_says_what_to_do():
    model, card = preset("llama-3.1-70b"), find_card("h100")
    with pytest.raises(ConfigError, match="take more cards"):
        serving_plan(ServingJob(model, card), 1.0)
    assert serving_plan(ServingJob(model, card, weights="int4"), 1.0)["conversations"] > 10
    one, four = (ServingJob(model, card, gpus).step_seconds(1) for gpus in (2, 8))
    assert 2 < one / four < 4


def test_the_command_plans_and_refuses(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "llama-3.1-8b", "--serve", "--gpu", "h100", "--json", "--price", "2"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and found["price_per_gpu_hour"] == 2 and found["loads"][0]["conversations"] == 1
    with pytest.raises(SystemExit):
        main(["plan", "llama-3.1-8b", "--serve"])
    assert "$ / 1M tokens" in capsys.readouterr().out
    for wrong, message in ((["--weights", "int3"], "int8"), (["--prompt-tokens", "9000000"], "context")):
        with pytest.raises(SystemExit) as ended:
            main(["plan", "llama-3.1-8b", "--serve", *wrong])
        assert ended.value.code == 2 and message in capsys.readouterr().err
