"""The Tinker server over HTTP: order, retries, several clients, keys, restarts, samples."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys
from tests.serving.tinker_server import DATA, RawClient, example, tinker_server, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with tinker_server(folder, tmp_path_factory.mktemp("states")) as url:
        yield url


@pytest.fixture
def client(url):
    client = RawClient(url)
    client.create()
    yield client
    client.http.post(f"sessions/{client.session}/finish", json={"reason": {"type": "success"}, "detail": None})


def train(client, steps, **adam):
    """Losses of steps on the same examples."""
    losses = []
    for _ in range(steps):
        losses.append(client.loss(DATA)[0])
        client.step(**{"learning_rate": 1e-2, **adam})
    return losses


def test_a_run_learns_and_says_what_it_is(client):
    losses = train(client, 3)
    assert losses[0] > losses[1] > losses[2]
    info = client.post("get_info", model_id=client.run)
    assert (info["is_lora"], info["lora_rank"], info["model_data"]["model_name"]) == (True, 4, "tiny")


def test_requests_are_computed_in_the_order_of_their_numbers(url, client):
    losses = train(client, 2)
    other = RawClient(url)
    other.create()
    with ThreadPoolExecutor(4) as threads:
        # the last comes first; each answer waits for its turn
        answers = [
            threads.submit(other.step, 4, learning_rate=1e-2),
            threads.submit(other.loss, DATA, number=3),
            threads.submit(other.step, 2, learning_rate=1e-2),
            threads.submit(other.loss, DATA, number=1),
        ]
        assert [answers[3].result()[0], answers[1].result()[0]] == losses


def test_a_request_that_is_sent_again_is_computed_once(client):
    client.loss(DATA)
    first, again = (client.send_step(2, learning_rate=1e-2) for _ in range(2))
    assert first == again and client.wait(first) == client.wait(again)
    # a second step would have found no gradients
    assert "grad_norm" in client.wait(again)["metrics"]


def test_two_clients_train_at_once_as_each_does_alone(url):
    def losses(seed):
        client = RawClient(url)
        client.create(seed=seed)
        return train(client, 4)

    alone = [losses(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(losses, (1, 2))) == alone


def test_log_probabilities_of_samples_are_those_of_forward(client):
    train(client, 3)
    session, prompt = client.sampler(), [5, 9, 3]
    message = client.sample(session, prompt, samples=3, max_tokens=8, temperature=1.0, stop=[], prompt_logprobs=True, seed=1)
    scored = np.frombuffer(message.prompt_logprobs, "<f4")
    assert math.isnan(scored[0]) and len(message.sequences) == 3
    for sequence in message.sequences:
        tokens, log_probs = np.frombuffer(sequence.tokens, "<i4"), np.frombuffer(sequence.logprobs, "<f4")
        assert len(tokens) == 8 and sequence.stop_reason == 1
        _, (found,) = client.loss([example([*prompt, *tokens])], forward_only=True)
        np.testing.assert_allclose(np.concatenate([scored[1:], log_probs]), found, atol=1e-4)


def test_samples_come_of_the_weights_that_their_session_was_made_of(client):
    prompt, base = [5, 9, 3, 14], client.sampler(base_model="tiny")
    before = client.sampler()
    train(client, 4)
    after = client.sampler()

    def score(session):
        message = client.sample(session, prompt, max_tokens=0, prompt_logprobs=True)
        return np.frombuffer(message.prompt_logprobs, "<f4")[1:]

    # an adapter changes nothing before its first step
    np.testing.assert_allclose(score(base), score(before), atol=1e-6)
    np.testing.assert_allclose(score(after), client.loss([example(prompt)], forward_only=True)[1][0], atol=1e-4)
    assert np.abs(score(after) - score(before)).max() > 0.1


def test_a_sample_ends_where_the_client_says(client):
    session = client.sampler()
    greedy = client.sample(session, [5, 9], 0, max_tokens=12, temperature=0.0, stop=[])
    tokens = np.frombuffer(greedy.sequences[0].tokens, "<i4").tolist()
    stopped = client.sample(session, [5, 9], 1, max_tokens=12, temperature=0.0, stop=[tokens[2]])
    cut = tokens[: tokens.index(tokens[2]) + 1]
    assert np.frombuffer(stopped.sequences[0].tokens, "<i4").tolist() == cut and stopped.sequences[0].stop_reason == 0


def test_the_likeliest_tokens_come_beside_samples_and_prompts(client):
    message = client.sample(
        client.sampler(), [5, 9, 3], max_tokens=2, temperature=0.0, stop=[], topk_sample_logprobs=3, topk_prompt_logprobs=2
    )
    sampled, top = message.sequences[0], message.sequences[0].topk_sampled_logprobs
    ids, values = np.frombuffer(top.token_ids, "<i4").reshape(2, 3), np.frombuffer(top.logprobs, "<f4").reshape(2, 3)
    assert ids[:, 0].tolist() == np.frombuffer(sampled.tokens, "<i4").tolist()
    assert (np.diff(values) <= 0).all()
    of_prompt = message.topk_prompt_logprobs
    assert (of_prompt.length, of_prompt.k) == (3, 2)
    # the first token has none
    assert np.frombuffer(of_prompt.logprobs, "<f4")[:2].tolist() == [-99999.0] * 2


def test_saved_weights_are_found_after_a_restart_and_go_on_bit_for_bit(folder, tmp_path):
    with tinker_server(folder, tmp_path) as url:
        client = RawClient(url)
        client.create()
        train(client, 2)
        path = client.save("here", user_metadata={"note": "two steps"})["path"]
        expected = train(client, 2)
        sampler = client.save("sampled", "save_weights_for_sampler")["path"]
        scores = client.sample(client.sampler(model_path=sampler), [5, 9, 3], max_tokens=0, prompt_logprobs=True)
    with tinker_server(folder, tmp_path) as url:
        client = RawClient(url)
        assert client.post("weights_info", tinker_path=path)["lora_rank"] == 4
        body = {"session_id": client.session, "model_seq_id": 0, "path": path, "optimizer": True}
        client.run = client.wait(client.post("load_weights", **body))["model_id"]
        assert train(client, 2) == expected
        again = client.sample(client.sampler(model_path=sampler), [5, 9, 3], max_tokens=0, prompt_logprobs=True)
        assert again.prompt_logprobs == scores.prompt_logprobs
        run = path.split("/")[2]
        listed = client.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
        assert [each["tinker_path"] for each in listed] == [sampler, path]
        assert client.http.get("training_runs").json()["cursor"]["total_count"] == 2
        assert client.http.delete(f"training_runs/{run}/checkpoints/weights/here").status_code == 204
        assert client.error("weights_info", tinker_path=path)[0] == 400


def test_a_key_finds_its_own_runs_alone(folder, tmp_path):
    write_keys(tmp_path / "keys.json", [KeyRecord(name=name, hash=hash_key(f"bsk-{name}")) for name in ("anna", "bert")])
    with tinker_server(folder, tmp_path / "states", keys=tmp_path / "keys.json") as url:
        # Tinker's client sends only keys that begin with tml-
        anna, bert = (RawClient(url, f"tml-bsk-{name}") for name in ("anna", "bert"))
        anna.create()
        path = anna.save("hers")["path"]
        bert.run = anna.run
        assert bert.error("optim_step", model_id=anna.run, seq_id=2, adam_params={})[0] == 404
        assert bert.error("weights_info", tinker_path=path) == (400, f"there is no training run {anna.run!r}")
        assert bert.http.post("retrieve_future", json={"request_id": f"{anna.run}:1"}).status_code == 404
        assert bert.http.get("training_runs").json()["training_runs"] == []
        assert anna.http.get(f"training_runs/{anna.run}").json()["lora_rank"] == 4
        anna.http.headers["x-api-key"] = "tml-bsk-nobody"
        assert anna.http.post("create_session", json={}).status_code == 401


def test_a_failed_request_says_why_and_the_run_goes_on(client):
    wrong = client.wait(client.send_loss([example([1, 9999, 2])]))
    assert wrong["category"] == "user" and "data[0]: model_input has an id" in wrong["error"]
    assert client.step()["error"].startswith("optim_step: there are no gradients")
    assert len(train(client, 1)) == 1


def test_a_refused_request_has_its_turn_so_that_those_behind_it_do_not_wait(client):
    client.loss(DATA)
    assert "learning_rate" in client.step(learning_rate=-1.0)["error"]
    assert "no name of weights" in client.save("..")["error"]
    assert (
        "is no address of weights"
        in client.wait(
            client.post("load_weights", model_id=client.run, seq_id=client.next_number(), path="here", optimizer=True)
        )["error"]
    )
    assert "grad_norm" in client.step(learning_rate=1e-2)["metrics"]


def test_refusals_say_what_to_do(client, url):
    lora = {"rank": 4}
    new = {"session_id": client.session, "model_seq_id": 7, "base_model": "tiny", "lora_config": lora}
    assert client.error("create_model", **{**new, "base_model": "other"}) == (
        404,
        "base_model 'other': this server has 'tiny' alone",
    )
    assert "there is no session" in client.error("create_model", **{**new, "session_id": "0" * 32})[1]
    rank = client.wait(client.post("create_model", **{**new, "lora_config": {"rank": 99999}}))
    assert rank["error"].startswith("lora_config.rank: 99999; between 1 and")
    unknown = {"optimizer_config": {"type": "dimuon", "version": 1}}
    assert client.error("create_model", **new, **unknown)[0] == 400
    # what has no value is nothing new to this server; what has one is refused
    assert client.post("create_model", **{**new, "model_seq_id": 8}, new_option=None)["model_id"].endswith(":8")
    assert "new_option" in client.error("create_model", **new, new_option=3)[1]
    assert client.http.post("retrieve_future", json={"request_id": "gone"}).status_code == 410
    assert client.http.post("forward_backward", json={}).status_code == 415


def test_a_base_model_may_be_named_by_its_folder(url, folder):
    client = RawClient(url)
    assert client.create(base_model=str(folder))["type"] == "create_model"
    assert client.create(base_model=os.path.relpath(folder))["type"] == "create_model"


def test_runs_beyond_the_limit_are_refused_until_a_session_ends(folder, tmp_path):
    with tinker_server(folder, tmp_path, {"max_runs": 1, "snapshots": 1}) as url:
        first, second = RawClient(url), RawClient(url)
        first.create()
        old, new = first.sampler(), first.sampler()
        assert "the latest 1 of those" in first.sample(old, [1, 2], max_tokens=1)["error"]
        assert first.sample(new, [1, 2], max_tokens=1).sequences
        asked = {"session_id": second.session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
        assert "1 training runs at once (--max-runs)" in second.error("create_model", **asked)[1]
        assert first.http.post(f"sessions/{first.session}/finish", json={}).status_code == 204
        second.create(rank=2)
        assert first.error("optim_step", model_id=first.run, seq_id=9, adam_params={})[0] == 404
