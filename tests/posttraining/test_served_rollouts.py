"""The stage `rl` with rollouts by servers: ours, which a run trains with as with its own engine, and several as one."""

import shutil
import threading

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.http_client import ApiError
from bessemer.core.metrics import read_metrics
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.weight_transfer import StagedWeights, pieces_of
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.rl.served_rollouts import ServedRolloutSource
from bessemer.posttraining.sampling.server_client import WeightUpdate
from bessemer.posttraining.sampling.server_config import RolloutServers
from bessemer.posttraining.sampling.server_pool import ServerPool
from bessemer.serving.app import no_pages
from bessemer.serving.config import ServingConfig
from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys
from bessemer.serving.server import create_server, listen
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.cases import slow
from tests.inference.models import small_decoder
from tests.posttraining.test_rl import data, run  # noqa: F401
from tests.serving.running import servers
from tests.training.conftest import RecordedProgress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def start():
    with servers() as started:
        yield started


def serving(model_folder, **settings):
    return Engine(model_folder, device="cpu", config=EngineConfig(threads=1, max_num_seqs=16, **settings))


def weights_of(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, slow({"adapter": {"rank": 4}})], ids=["weights", "adapter"])
def test_a_run_that_waits_for_its_server_is_the_run_without_one(model_folder, data, tmp_path, start, changes):  # noqa: F811
    changes |= {"steps": 3, "max_tokens": 6}
    run(model_folder, data, tmp_path / "own", **changes)
    url = start(serving(model_folder), accept_weights=True)
    run(model_folder, data, tmp_path / "served", rollouts=[url], **changes)
    own, served = (read_metrics(tmp_path / name / "completions.jsonl") for name in ("own", "served"))
    assert [one["completion"] for one in own] == [one["completion"] for one in served]
    first, second = weights_of(tmp_path / "own"), weights_of(tmp_path / "served")
    assert all((tensor - second[name]).abs().max() < 1e-5 for name, tensor in first.items())
    lines = read_metrics(tmp_path / "served" / "metrics.jsonl")
    assert {line["staleness_max"] for line in lines} == {0} and max(line["log_ratio_max"] for line in lines) < 1e-4
    assert not (tmp_path / "served" / "rollouts").exists(), "a run that is over leaves no journal"


AHEAD = {"steps": 6, "batch_size": 8, "max_tokens": 6, "checkpoint_every": 2, "validation_share": 0}


def ahead_of(url, staleness):
    return {"rollouts": {"servers": [url], "max_staleness": staleness}, **AHEAD}


def test_servers_sample_ahead_by_no_more_than_the_staleness_and_in_the_order_of_the_prompts(
    model_folder,
    data,  # noqa: F811
    tmp_path,
    start,
):
    run(model_folder, data, tmp_path / "own", **AHEAD)
    url = start(serving(model_folder), accept_weights=True)
    run(model_folder, data, tmp_path / "served", **ahead_of(url, 2))
    own, served = (read_metrics(tmp_path / name / "completions.jsonl") for name in ("own", "served"))
    assert [(one["step"], one["prompt"]) for one in own] == [(one["step"], one["prompt"]) for one in served]
    stale = [line["staleness_max"] for line in read_metrics(tmp_path / "served" / "metrics.jsonl")]
    assert stale[0] == 0 and 0 < max(stale) <= 2


class Killed(BaseException):
    """The end of a process, which no code of ours handles."""


def test_a_killed_run_goes_on_with_the_groups_that_were_complete(model_folder, data, tmp_path, start, monkeypatch):  # noqa: F811
    url = start(serving(model_folder), accept_weights=True)
    roll_out = ServedRolloutSource._roll_out

    def killed(source, step):
        if step == 5:
            raise Killed
        roll_out(source, step)

    with monkeypatch.context() as patched:
        patched.setattr(ServedRolloutSource, "_roll_out", killed)
        with pytest.raises(Killed):
            run(model_folder, data, tmp_path, **ahead_of(url, 1))
    before = read_metrics(tmp_path / "completions.jsonl")
    weights = {path.name: path for path in (tmp_path / "checkpoints").iterdir()}
    shutil.rmtree(weights["step-000004"])
    journal = tmp_path / "rollouts"
    with max(journal.iterdir()).open("a", encoding="utf-8") as file:
        file.write('{"fingerprint": "cut of')
    progress = RecordedProgress()
    run(model_folder, data, tmp_path, progress, **ahead_of(url, 1))
    assert any("groups of completions are there from before" in line for line in progress.lines)
    after = read_metrics(tmp_path / "completions.jsonl")
    # steps 3 to 5 were trained on already, and are trained on again with the very completions
    assert [one for one in after if one["step"] <= 5] == before
    assert [one["step"] for one in after] == [step for step in range(1, 7) for _ in range(8)]
    own = [one["prompt"] for one in after][::4]
    assert len(set(own[:12])) == 12, "no prompt comes twice in an epoch"


def test_another_server_takes_over_and_one_that_comes_back_gets_the_newest_weights(model_folder):
    lines: list[str] = []
    with servers() as first, servers() as second:
        made: list = []
        urls = [
            first(serving(model_folder), accept_weights=True, made=made),
            second(serving(model_folder), accept_weights=True),
        ]
        tokenizer = load_tokenizer(model_folder)
        pool = ServerPool(RolloutServers(servers=urls), tokenizer, lines.append, first_wait=0.02)
        pool.open(temperature=1.0, longest=32)
        weights = {name: tensor + 0 for name, tensor in load_model(model_folder).state_dict().items()}
        pool.send_weights(WeightUpdate(3, weights))
        params = SamplingParams(max_tokens=4, seed=1)
        expected = pool.rollouts([[1, 2, 3]], 2, params)
        assert expected.weight_version[expected.mask].tolist() == [3] * int(expected.mask.sum())
        made[0].should_exit = True
        while urls[0] in {member.server.url for member in pool._members if member.works}:
            assert pool.rollouts([[1, 2, 3]] * 4, 2, params).texts[:2] == expected.texts
        assert any("1 of 2 servers are left" in line for line in lines)
        host, port = urls[0].removeprefix("http://").split(":")
        weights = {name: tensor * 1.5 for name, tensor in weights.items()}
        pool.send_weights(WeightUpdate(4, weights))
        again = create_server(serving(model_folder), "tiny", ServingConfig(accept_weights=True), no_pages, None, ())
        thread = threading.Thread(target=again.run, kwargs={"sockets": [listen(host, int(port))]})
        thread.start()
        while not all(member.works for member in pool._members):
            pool.rollouts([[1, 2, 3]], 2, params)
        assert {member.server.version for member in pool._members} == {4}
        assert {tuple(pool._members[place].server.complete([1, 2, 3], 1, params)[0].versions) for place in (0, 1)} == {(4,) * 4}
        again.should_exit = True
        thread.join()
        pool.close()


def test_where_no_server_answers_the_run_ends_with_what_to_do(model_folder):
    settings = RolloutServers(servers=["http://127.0.0.1:9"], patience=0.1)
    pool = ServerPool(settings, load_tokenizer(model_folder), print, first_wait=0.02)
    with pytest.raises(ApiError, match=r"no server has answered for .*127\.0\.0\.1:9 cannot be reached.*run again"):
        pool.open(temperature=1.0, longest=32)
    pool.close()


def test_a_server_takes_weights_and_sleeps_only_where_it_says_so_and_for_who_may(model_folder, tmp_path):
    with servers() as start:
        closed, opened = start(serving(model_folder)), start(serving(model_folder), accept_weights=True)
        for path in ("/v1/weights/begin", "/sleep"):
            refused = httpx.post(closed + path, json={"version": 1})
            assert refused.status_code == 403 and "--accept-weights" in refused.json()["error"]["message"]
        keyed = start(serving(model_folder), accept_weights=True, keys=keys_file(tmp_path))
        for key, status in (("guest", 403), ("boss", 200)):
            begun = httpx.post(keyed + "/v1/weights/begin", json={"version": 1}, headers={"Authorization": f"Bearer {key}"})
            assert begun.status_code == status
        assert httpx.post(opened + "/sleep").json() == httpx.get(opened + "/is_sleeping").json() == {"is_sleeping": True}
        asked = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2}
        assert "the engine sleeps" in httpx.post(opened + "/v1/completions", json=asked).json()["error"]["message"]
        httpx.post(opened + "/wake_up")
        assert httpx.post(opened + "/v1/completions", json=asked).status_code == 200
        update = httpx.post(opened + "/v1/weights/begin", json={"version": 1}).json()["update"]
        piece = next(pieces_of({"norm.weight": torch.ones(3)}))
        wrong = httpx.post(opened + "/v1/weights/piece", params={"update": update}, content=piece)
        assert wrong.status_code == 400 and "'norm.weight' has shape" in wrong.json()["error"]["message"]
        empty = httpx.post(opened + "/v1/weights/commit", json={"update": update})
        assert empty.json()["error"]["message"] == "no tensor has come"
    with pytest.raises(ConfigError, match=r"anybody who reaches 0\.0\.0\.0 could replace the model"):
        ServingConfig.parse({"accept_weights": True, "host": "0.0.0.0"})


def keys_file(folder):
    path = folder / "keys.jsonl"
    write_keys(path, [KeyRecord(name=name, hash=hash_key(name), admin=name == "boss") for name in ("guest", "boss")])
    return path


@given(piece_bytes=st.sampled_from([200, 3000, 1 << 22]), order=st.randoms())
@settings(max_examples=8)
def test_weights_come_whole_however_they_are_cut_and_in_whatever_order(piece_bytes, order):
    model = small_decoder("dense")
    tensors = dict(model.state_dict())
    staged = StagedWeights(model)
    pieces = list(pieces_of(tensors, piece_bytes))
    order.shuffle(pieces)
    for piece in pieces[1:]:
        staged.add(piece)
    with pytest.raises(RequestError, match="has not come|no tensor has come" if len(pieces) > 1 else "no tensor"):
        check_whole(staged.weights(), tensors)
    staged.add(pieces[0])
    check_whole(staged.weights(), tensors)


def check_whole(found, tensors):
    if found.keys() != tensors.keys():
        raise RequestError("a tensor has not come")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
