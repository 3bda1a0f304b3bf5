"""Tinker's own client against the server, and its messages beside ours. Tested with tinker 0.38."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from bessemer.serving.tinker.wire import (
    SampledTokens,
    messages,
    read_forward_backward,
    write_forward_backward_output,
    write_sample_response,
)
from tests.serving.tinker_server import tinker_server, tiny_folder

tinker = pytest.importorskip("tinker", reason="beside tinker")
from tinker import types  # noqa: E402
from tinker.proto import tinker_public_pb2  # noqa: E402
from tinker.proto.request_conv import forward_backward_request_to_proto  # noqa: E402
from tinker.proto.response_conv import deserialize_proto_response  # noqa: E402

pytestmark = pytest.mark.peer(name="tinker")

TOKENS = [5, 9, 3, 14, 22, 8]


def datum(tokens=TOKENS, **inputs):
    given = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1), **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    place = tmp_path_factory.mktemp("tinker")
    with tinker_server(tiny_folder(place), place / "states") as url:
        yield url


@pytest.fixture
def service(url):
    with tinker.ServiceClient(base_url=url, api_key="tml-any") as service:
        yield service


def test_our_messages_have_the_fields_of_the_clients():
    theirs = tinker_public_pb2.DESCRIPTOR.message_types_by_name
    left_out = {"OtherChunk"}
    for name, ours in messages().items():
        if name in left_out:
            continue
        known = {field.number: field for field in theirs[name].fields}
        for field in ours.DESCRIPTOR.fields:
            other = known[field.number]
            # an enum is a number, and what we do not read is an empty message
            kinds = {field.type, 14 if field.type == 5 else field.type}
            assert (field.name, field.is_repeated) == (other.name, other.is_repeated) and other.type in kinds


def test_a_request_of_the_client_is_read_as_it_was_meant():
    sparse = types.TensorData(
        data=[7, 8], dtype="int64", shape=[5, 3], sparse_crow_indices=[0, 1, 1, 2, 2, 2], sparse_col_indices=[2, 0]
    )
    given = types.ForwardBackwardRequest(
        types.ForwardBackwardInput([datum(target_tokens=sparse)], "ppo", {"clip_low_threshold": 0.7, "mode": "x"}), "run", 3
    )
    body = forward_backward_request_to_proto(given)
    body.forward_only = True
    read = read_forward_backward(body.SerializeToString())
    assert (read.model_id, read.seq_id, read.loss, read.forward_only) == ("run", 3, "ppo", True)
    assert read.config == {"clip_low_threshold": 0.7, "mode": "x"}
    (found,) = read.data()
    assert found.tokens_T.tolist() == TOKENS[:-1] and found.inputs["weights"].tolist() == [1.0] * 5
    assert found.inputs["target_tokens"].tolist() == [[0, 0, 7], [0, 0, 0], [8, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_answers_are_read_by_the_client_as_they_were_written():
    arrays = [np.array([1.0, 2.0], np.float32), np.ones((3, 2), np.float32), np.array([4.0], np.float32)]
    output = deserialize_proto_response(
        write_forward_backward_output({"logprobs": arrays}, {"loss:sum": 2.5}), types.ForwardBackwardOutput
    )
    assert output.metrics == {"loss:sum": 2.5}
    assert [each["logprobs"].to_numpy().tolist() for each in output.loss_fn_outputs] == [each.tolist() for each in arrays]
    samples = [SampledTokens([3, 4], [-0.5, -1.0], True, [[(3, -0.5)], [(4, -1.0), (5, -2.0)]]), SampledTokens([], [], False)]
    response = deserialize_proto_response(
        write_sample_response(samples, [float("nan"), -1.5], cached_tokens=1), types.SampleResponse
    )
    first, second = response.sequences
    assert (first.tokens, first.logprobs, first.stop_reason) == ([3, 4], [-0.5, -1.0], "length")
    assert first.topk_logprobs == [[(3, -0.5)], [(4, -1.0), (5, -2.0)]]
    assert second.tokens == [] and second.stop_reason == "stop"
    assert response.prompt_logprobs == [None, -1.5] and response.prompt_cache_hit_tokens == 1


def test_the_clients_loop_trains_samples_saves_and_loads(service, caplog):
    caplog.set_level(logging.INFO)
    training = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    assert "train_unembed has no effect" in caplog.text
    losses = []
    for _ in range(3):
        loss = training.forward_backward([datum(), datum(TOKENS[::-1])], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(loss.result().metrics["loss:sum"])
        assert step.result().metrics["grad_norm"] > 0
    assert losses[2] < losses[0]
    sampling = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, temperature=1.0, stop=[])
    sampled = sampling.sample(types.ModelInput.from_ints(TOKENS[:2]), 2, params).result()
    whole = TOKENS[:2] + sampled.sequences[0].tokens
    expected = sampling.compute_logprobs(types.ModelInput.from_ints(whole)).result()
    np.testing.assert_allclose(sampled.sequences[0].logprobs, expected[2:], atol=1e-4)
    state = training.save_state("here").result().path
    again = service.create_training_client_from_state_with_optimizer(state).result()
    clients = (training, again)
    results = [client.forward([datum()], "cross_entropy").result().metrics for client in clients]
    assert results[0] == results[1] and again.get_info().lora_rank == 4
    saved = training.save_weights_for_sampler("sampled").result().path
    scores = service.create_sampling_client(model_path=saved).result().compute_logprobs(types.ModelInput.from_ints(whole))
    np.testing.assert_allclose(scores.result()[1:], expected[1:], atol=1e-4)


def test_a_loss_of_the_clients_own_has_the_gradients_of_one_of_the_servers(service):
    named, own = (service.create_lora_training_client("tiny", rank=4, seed=1).result() for _ in range(2))

    def mean(data, log_probs):
        loss = sum(-each.mean() for each in log_probs)
        return loss, {"mine": float(loss)}

    weighted = datum(weights=[0.2] * 5)
    for _ in range(2):
        first = named.forward_backward([weighted], "cross_entropy").result()
        second = own.forward_backward_custom([datum()], mean).result()
        assert second.metrics["mine"] == pytest.approx(first.metrics["loss:sum"], rel=1e-5)
        norms = [each.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"] for each in (named, own)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_mistake_is_the_clients_own_error(service):
    training = service.create_lora_training_client("tiny", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\]: target_tokens has an id"):
        training.forward_backward([datum([1, 2, 99999])], "cross_entropy").result()
    assert training.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
    with pytest.raises(tinker.NotFoundError, match="this server has 'tiny' alone"):
        service.create_lora_training_client("other").result()


def test_runs_and_weights_are_listed_and_deleted(service, url):
    training = service.create_lora_training_client("tiny", rank=2, user_metadata={"purpose": "list"}).result()
    path = training.save_state("here", ttl_seconds=3600).result().path
    rest = tinker.RestClient(base_url=url, api_key="tml-any")
    run = rest.get_training_run_by_tinker_path(path).result()
    assert (run.lora_rank, run.user_metadata, run.last_checkpoint.tinker_path) == (2, {"purpose": "list"}, path)
    assert run.last_checkpoint.expires_at is not None
    assert training.model_id in [each.training_run_id for each in rest.list_training_runs().result().training_runs]
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(training.model_id).result().checkpoints == []
    assert [each.model_name for each in rest.get_server_capabilities().result().supported_models] == ["tiny"]
