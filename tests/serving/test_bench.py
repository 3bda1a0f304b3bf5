"""Load tests of a server: what is asked, how it arrives, and what the figures mean."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest

from bessemer.cli.main import main
from bessemer.core.errors import BessemerError, ConfigError, SourceError
from bessemer.serving.bench import LoadConfig, TimedResponse, bench, bodies, figures, waits
from tests.serving.running import babbling_engine, servers


def test_figures_of_a_worked_case():
    first = TimedResponse(started=10.0, first=10.2, ended=11.2, gaps=[0.25, 0.25, 0.5], prompt_tokens=100, tokens=5)
    second = TimedResponse(started=10.0, first=10.4, ended=10.4, gaps=[], prompt_tokens=50, tokens=1)
    lost = TimedResponse(started=10.0, error="503: busy")
    found = figures([first, second, lost], 2.0, LoadConfig(concurrency=2, goodput={"ttft": 300, "tpot": 260}))
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (2, 1, 150, 6)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1.0, 3.0, 78.0)
    assert found["request_goodput"] == 0.5
    assert found["mean_ttft_ms"] == pytest.approx(300) and found["p99_ttft_ms"] == pytest.approx(398)
    # time per token: (1.2 - 0.2) / 4; an answer of one token has none
    assert found["median_tpot_ms"] == pytest.approx(250) and found["mean_itl_ms"] == pytest.approx(1000 / 3)
    assert found["mean_e2el_ms"] == pytest.approx(800)


@pytest.mark.parametrize(("burstiness", "deviation"), [(1.0, 0.5), (0.25, 1.0), (4.0, 0.25)])
def test_arrivals_have_their_rate_and_their_burstiness(burstiness, deviation):
    found = [*itertools.islice(waits(LoadConfig(rate=2.0, burstiness=burstiness)), 20_000)]
    assert statistics.fmean(found) == pytest.approx(0.5, rel=0.04)
    assert statistics.pstdev(found) == pytest.approx(deviation, rel=0.05)


def test_the_same_settings_ask_the_same_and_no_two_prompts_begin_alike(tmp_path):
    config = LoadConfig(concurrency=1, input_tokens=12)
    once, again = ([*itertools.islice(bodies(config, "m"), 50)] for _ in range(2))
    assert once == again and len({body["prompt"].split()[0] for body in once}) == 50
    assert {len(body["prompt"].split()) for body in once} == {12}
    file = tmp_path / "asked.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt": "Again"}\n', encoding="utf-8")
    asked = itertools.islice(bodies(LoadConfig(concurrency=1, prompts=file, api="chat"), "m"), 3)
    assert [body["messages"][0]["content"] for body in asked] == ["Hi", "Again", "Hi"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of a model that has learned nothing."""
    made = babbling_engine(tmp_path_factory.mktemp("served"), 512)
    with servers() as start:
        yield start(made)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_closed_loop_of_clients_gets_every_answer(url, api):
    config = LoadConfig(concurrency=3, requests=9, warmup=1, input_tokens=5, output_tokens=6, api=api)
    measured = bench(f"{url}/v1", config)
    assert measured.figures["completed"] == 9 and measured.figures["failed"] == 0
    assert [answer.tokens for answer in measured.answers] == [6] * 9
    saved = measured.as_json(url, config)
    assert saved["output_lens"] == [6] * 9 and len(saved["ttfts"]) == len(saved["itls"]) == 9
    assert saved["mean_e2el_ms"] >= saved["mean_ttft_ms"] > 0
    json.dumps(saved, allow_nan=False)


def test_requests_that_arrive_do_not_wait_for_each_other(url):
    measured = bench(url, LoadConfig(rate=200.0, requests=10, warmup=0, input_tokens=5, output_tokens=20))
    starts = sorted(answer.started for answer in measured.answers)
    assert starts[-1] - starts[0] < 1.0 and measured.figures["completed"] == 10


def test_what_is_refused_is_counted_or_said(url, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "the"}\n' + json.dumps({"prompt": "the " * 2000}) + "\n", encoding="utf-8")
    measured = bench(url, LoadConfig(concurrency=2, requests=6, warmup=1, prompts=mixed, output_tokens=3))
    assert (measured.figures["completed"], measured.figures["failed"]) == (3, 3) and "400" in next(iter(measured.errors))
    with pytest.raises(BessemerError, match="refuses a request: 404"):
        bench(url, LoadConfig(concurrency=1, model="another"))
    with pytest.raises(BessemerError, match="does not answer"):
        bench("http://127.0.0.1:9", LoadConfig(concurrency=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give concurrency"),
        ({"concurrency": 1, "goodput": {"itl": 3}}, "ttft, tpot, e2el"),
        ({"rate": -1}, "rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoadConfig.parse(settings, "bench serve")


def test_the_command_shows_and_saves(url, tmp_path, capsys):
    saved = tmp_path / "result.json"
    asked = ["--concurrency", "2", "--requests", "4", "--output-tokens", "3", "--input-tokens", "4", "--goodput", "ttft:60000"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", url, *asked, "--save", str(saved)])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "time to first token" in shown and "good requests/s" in shown
    assert json.loads(saved.read_text(encoding="utf-8"))["max_concurrency"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", url])
    assert ended.value.code == 2 and "bench serve" in capsys.readouterr().err


def test_a_file_without_prompts_is_one_line_whenever_it_is_read(url, tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        bench(url, LoadConfig(concurrency=1, warmup=0, prompts=tmp_path / "none.jsonl"))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "the"}\n{"messages": []}\n', encoding="utf-8")
    with pytest.raises(SourceError, match="API chat"):
        bench(url, LoadConfig(concurrency=1, requests=4, prompts=mixed))
