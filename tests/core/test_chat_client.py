"""The client against a server of this process."""

import json
import socket
import threading

import pytest

from bessemer.core.chat_client import ApiError, ChatClient, CutText
from bessemer.core.errors import ConfigError
from tests.chat_server import completion, serving


@pytest.fixture
def serve(monkeypatch):
    with serving(monkeypatch) as started:
        yield started


@pytest.fixture
def serve_bytes(monkeypatch):
    """A function that starts a server of bytes, the first response being the first of those given, then the last; it returns
    the URL and a list with an entry for each request."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    listening = []

    def started(*responses):
        server, requests = socket.create_server(("127.0.0.1", 0)), []
        listening.append(server)

        def loop():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, connection.makefile("rb") as stream:
                    lines = list(iter(stream.readline, b"\r\n"))
                    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
                    requests.append(stream.read(length))
                    connection.sendall(responses[min(len(requests), len(responses)) - 1])

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1", requests

    yield started
    for server in listening:
        server.close()


def http_response(head, body):
    return f"HTTP/1.1 {head}\r\nConnection: close\r\n\r\n".encode() + body


ANSWER = completion("A")[2]
WHOLE = http_response(f"200 OK\r\nContent-Length: {len(ANSWER)}", ANSWER)


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


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", r"broke off \(Remote end closed connection without response\)"),
        (http_response("200 OK\r\nTransfer-Encoding: chunked", b'40\r\n{"choices": ['), r"broke off \(IncompleteRead.*\)"),
        (http_response("200 OK\r\nContent-Length: 1500", b'{"choices": ['), r"broke off \(1,487 bytes are missing\)"),
        (b"\x15\x03\x01 nonsense\r\n\r\n", r"broke off \(BadStatusLine\('\\x15\\x03.*\)"),
        (http_response("503 Busy\r\nTransfer-Encoding: chunked", b'40\r\n{"error": "'), "answered 503 Busy"),
    ],
    ids=["nothing", "a chunk cut off", "less than its length", "no status", "an error cut off"],
)
def test_a_response_that_broke_off_is_asked_for_again(serve_bytes, broken, reason):
    url, requests = serve_bytes(broken, WHOLE)
    assert ChatClient(url, "m", first_wait=0.001).ask(["a"]) == ["A"] and len(requests) == 2
    url, requests = serve_bytes(broken)
    with pytest.raises(ApiError, match=f"{reason}, 2 times$"):
        ChatClient(url, "m", first_wait=0.001, attempts=2).ask(["a"])
    assert len(requests) == 2


def test_a_response_that_is_longer_than_what_is_read_is_not_asked_for_again(serve_bytes, monkeypatch):
    monkeypatch.setattr("bessemer.core.http_client._MOST_BYTES", 20)
    url, requests = serve_bytes(WHOLE)
    with pytest.raises(ApiError, match="something else than a chat completion"):
        ChatClient(url, "m", first_wait=0.001).ask(["a"])
    assert len(requests) == 1


@pytest.mark.parametrize("behind", ["?api-version=2&key=SECRET", "#SECRET"])
def test_what_stands_behind_the_path_of_a_url_is_refused_and_not_shown(behind):
    with pytest.raises(ConfigError, match=r"what stands behind \? or # would not be sent") as error:
        ChatClient(f"https://api.example.com/v1{behind}", "m")
    assert "SECRET" not in str(error.value)


def test_a_url_that_cannot_be_asked_is_not_tried_again():
    with pytest.raises(ApiError, match=r"URL can't contain control characters[^,]*$"):
        ChatClient("http://127.0.0.1:9/v 1", "m", first_wait=60).ask(["a"])


def test_an_answer_that_was_cut_is_told_apart_from_one_that_ended(serve):
    reasons = {"ended": "stop", "cut": "length", "unsaid": None}

    def respond(body, _):
        text = body["messages"][0]["content"]
        choice = {"message": {"content": text}, "finish_reason": reasons[text]}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    answers = ChatClient(serve(respond).url, "m").ask(list(reasons))
    assert answers == list(reasons) and [isinstance(one, CutText) for one in answers] == [False, True, False]


def test_an_answer_can_be_written_to_a_file_whatever_its_json_holds(serve):
    server = serve(lambda *_: completion("half \ud83d, whole \U0001f600"))
    assert ChatClient(server.url, "m").ask(["a"]) == ["half ?, whole \U0001f600"]
