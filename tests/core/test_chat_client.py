"""The client against a server of this process."""

import json

import pytest

from bessemer.core.chat_client import ApiError, ChatClient
from tests.chat_server import completion, serving


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


def failure(status, message="no", **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def echo(body, _):
    return completion(body["messages"][0]["content"].upper())


def test_prompts_are_answered_in_their_order_with_the_key_of_the_environment(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    server = serve(echo)
    client = ChatClient(server.url + "/", "judge", key_variable="JUDGE_KEY", max_tokens=7)
    assert client.ask([f"prompt {number}" for number in range(20)]) == [f"PROMPT {number}" for number in range(20)]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sesame"
    assert {key: body[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "judge",
        "max_tokens": 7,
        "temperature": 0.0,
    }


def test_what_may_pass_is_tried_again(serve):
    statuses = {1: failure(503), 2: failure(429, **{"Retry-After": "0"})}
    server = serve(lambda body, number: statuses.get(number) or echo(body, number))
    assert ChatClient(server.url, "m", first_wait=0.001).ask(["a"]) == ["A"]
    assert len(server.requests) == 3


def test_what_does_not_pass_ends_in_one_error_after_all_tries(serve):
    server = serve(lambda *_: failure(503, "overloaded,\nsorry"))
    with pytest.raises(ApiError) as error:
        ChatClient(server.url, "m", first_wait=0.001, attempts=3, workers=1).ask(["a", "b", "c"])
    assert str(error.value) == f"{server.url}: answered 503 Service Unavailable (overloaded, sorry), 3 times"
    assert len(server.requests) == 3, "the others are not sent"


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (failure(401, "wrong key"), r"answered 401 Unauthorized \(wrong key\)$"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "answered 302"),
        ((200, {}, b"<html>"), "answered something else than a chat completion: '<html>'"),
        ((200, {}, b'{"choices": []}'), "something else than a chat completion"),
    ],
)
def test_a_refusal_is_not_tried_again_and_the_key_goes_nowhere_else(serve, monkeypatch, response, message):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    server = serve(lambda *_: response)
    with pytest.raises(ApiError, match=message) as error:
        ChatClient(server.url, "m", key_variable="JUDGE_KEY").ask(["a"])
    assert len(server.requests) == 1 and "sesame" not in str(error.value)


def test_a_server_that_is_not_there_is_said(serve):
    server = serve(echo)
    server.close()
    with pytest.raises(ApiError, match=r"cannot be reached \(.*refused.*\), 2 times"):
        ChatClient(server.url, "m", attempts=2, first_wait=0.001).ask(["a"])


def test_conversations_are_sent_as_they_are_with_a_seed_of_each(serve):
    server = serve(echo)
    said = [{"role": "system", "content": "brief"}, {"role": "user", "content": "why"}]
    assert ChatClient(server.url, "m", workers=1).ask([said, "so"], seeds=[5, 2**40 + 3]) == ["BRIEF", "SO"]
    bodies = [body for _, _, body in server.requests]
    assert [body["seed"] for body in bodies] == [5, 3]
    assert bodies[0]["messages"] == said and bodies[1]["messages"] == [{"role": "user", "content": "so"}]


@pytest.mark.parametrize(
    ("text", "top", "expected"),
    [
        # e^-1 and e^-2 of A and B, in two spellings, beside something else
        ("A", {"A": -1.5, " A": -1.9327521295671886, "B": -2.0, "The": -0.5}, [0.7310585786300049, 0.2689414213699951]),
        ("The", {"The": -0.1, "So": -3.0}, None),
        ("(B).", None, [0.0, 1.0]),
        ("Neither", None, None),
    ],
)
def test_an_option_is_as_probable_as_the_first_token_says(serve, text, top, expected):
    entries = None if top is None else [{"token": token, "logprob": value} for token, value in top.items()]
    logprobs = None if entries is None else {"content": [{"token": text, "logprob": -0.1, "top_logprobs": entries}]}
    choice = {"message": {"content": text}, "logprobs": logprobs}
    server = serve(lambda *_: (200, {}, json.dumps({"choices": [choice]}).encode()))
    (found,) = ChatClient(server.url, "m", max_tokens=90).choose(["A or B?"], ("A", "B"))
    assert found == (None if expected is None else pytest.approx(expected))
    (_, _, body) = server.requests[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
