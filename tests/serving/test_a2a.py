"""The Agent2Agent protocol in both versions, by hand and by the official SDK's client."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys
from tests.serving.engine import ScriptedEngine

#: Methods that send and stream, and what a message's role and the state of a finished task are called, by version.
NAMES = {
    "0.3": ("message/send", "message/stream", "tasks/get", "tasks/cancel", "user", "completed"),
    "1.0": ("SendMessage", "SendStreamingMessage", "GetTask", "CancelTask", "ROLE_USER", "TASK_STATE_COMPLETED"),
}


def call(url, method, params=None, headers=None, **more):
    body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params or {}, **more}
    return httpx.post(url + "/a2a", json=body, headers=headers)


def said(text, role="user", **more):
    return {"message": {"messageId": "m1", "role": role, "parts": [{"kind": "text", "text": text}], **more}}


@pytest.mark.parametrize("version", NAMES)
def test_a_message_becomes_a_task_whose_context_goes_on(version, start, tokenizer):
    send, _, get, cancel, role, completed = NAMES[version]
    engine = ScriptedEngine(tokenizer, "It is warm.", "21 degrees.")
    url = start(engine)
    answer = call(url, send, said("Is it warm?", role)).json()
    assert answer["id"] == 7
    task = answer["result"] if version == "0.3" else answer["result"]["task"]
    assert task["status"]["state"] == completed and task["artifacts"][0]["parts"][0]["text"] == "It is warm."
    assert task.get("kind") == ("task" if version == "0.3" else None)
    assert task["history"][0]["role"] == role and task["history"][0]["messageId"] == "m1"
    assert call(url, get, {"id": task["id"]}).json()["result"] == task
    assert "history" not in call(url, get, {"id": task["id"], "historyLength": 0}).json()["result"]
    assert call(url, cancel, {"id": task["id"]}).json()["error"]["code"] == -32002
    call(url, send, said("How warm?", role, contextId=task["contextId"]))
    assert (
        engine.prompts[1].index("Is it warm?") < engine.prompts[1].index("It is warm.") < engine.prompts[1].index("How warm?")
    )


@pytest.mark.parametrize("version", NAMES)
def test_a_stream_begins_with_the_task_and_ends_with_its_state(version, start, tokenizer):
    _, stream, get, _, role, completed = NAMES[version]
    url = start(ScriptedEngine(tokenizer, "It is warm."))
    reply = call(url, stream, said("Is it warm?", role))
    assert reply.headers["content-type"].startswith("text/event-stream")
    results = [
        json.loads(line.removeprefix("data: "))["result"] for line in reply.text.splitlines() if line.startswith("data: ")
    ]
    first, *texts, last = results
    if version == "1.0":
        first, last = first["task"], last["statusUpdate"]
        texts = [one["artifactUpdate"] for one in texts]
    else:
        assert last["final"] and {one["kind"] for one in texts} == {"artifact-update"}
    assert "".join(one["artifact"]["parts"][0]["text"] for one in texts) == "It is warm."
    assert [one["append"] for one in texts] == [False, *[True] * (len(texts) - 1)]
    assert last["status"]["state"] == completed and last["taskId"] == first["id"]
    assert call(url, get, {"id": first["id"]}).json()["result"]["artifacts"][0]["parts"][0]["text"] == "It is warm."


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("message/sing", {}, -32601),
        ("message/send", {}, -32602),
        ("message/send", said("a", parts=[]), -32602),
        ("message/send", said("a", role="system"), -32602),
        ("message/send", said("a", parts=[{"kind": "file", "file": {"uri": "file:///etc/passwd"}}]), -32005),
        ("message/send", said("a", taskId="task_none"), -32001),
        ("tasks/get", {"id": "task_none"}, -32001),
        ("tasks/cancel", {"id": "task_none"}, -32001),
        ("tasks/get", {"id": 7}, -32602),
        ("message/send", said("x" * 5000), -32602),
    ],
)
def test_what_is_wrong_is_an_error_of_the_protocol(method, params, code, start, tokenizer):
    answer = call(start(ScriptedEngine(tokenizer)), method, params).json()
    assert answer["error"]["code"] == code and answer["id"] == 7 and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(("text", "code"), [("{", -32700), ("[]", -32600), ('{"id": 1, "method": "tasks/get"}', -32600)])
def test_what_is_no_call_is_an_error_too(text, code, start, tokenizer):
    assert httpx.post(start(ScriptedEngine(tokenizer)) + "/a2a", content=text).json()["error"]["code"] == code


def test_the_card_needs_no_key_and_tasks_and_contexts_are_their_owners(start, tokenizer, tmp_path):
    write_keys(tmp_path / "keys.json", [KeyRecord(name=name, hash=hash_key(name)) for name in ("ann", "bob")])
    engine = ScriptedEngine(tokenizer, "One.", "Two.")
    url = start(engine, keys=tmp_path / "keys.json")
    card = httpx.get(url + "/.well-known/agent-card.json").json()
    assert card["url"] == f"{url}/a2a" and card["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert call(url, "tasks/get", {"id": "x"}).status_code == 401
    ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    task = call(url, "message/send", said("My secret.", contextId="shared"), ann).json()["result"]
    assert call(url, "tasks/get", {"id": task["id"]}, bob).json()["error"]["code"] == -32001
    call(url, "message/send", said("What was said?", contextId="shared"), bob)
    assert "My secret." not in engine.prompts[1]


@pytest.mark.peer(name="protocols")
@pytest.mark.parametrize("version", NAMES)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_official_client(version, streaming, start, tokenizer):
    from a2a.client import A2ACardResolver, ClientConfig, ClientFactory
    from a2a.types import a2a_pb2 as types

    url = start(ScriptedEngine(tokenizer, "It is warm.", "21 degrees."))

    async def use():
        async with httpx.AsyncClient() as http:
            card = await A2ACardResolver(http, url).get_agent_card()
            assert card.capabilities.streaming and card.skills[0].id == "chat"
            chosen = [one for one in card.supported_interfaces if one.protocol_version == version]
            del card.supported_interfaces[:]
            card.supported_interfaces.extend(chosen)
            client = ClientFactory(ClientConfig(httpx_client=http, streaming=streaming)).create(card)
            texts, task = [], None
            for question in ("Is it warm?", "How warm?"):
                message = types.Message(message_id="m", role=types.Role.ROLE_USER, parts=[types.Part(text=question)])
                if task is not None:
                    message.context_id = task.context_id
                text = ""
                async for event in client.send_message(types.SendMessageRequest(message=message)):
                    kind = event.WhichOneof("payload")
                    if kind == "task":
                        task = event.task
                        text += "".join(part.text for one in task.artifacts for part in one.parts)
                    elif kind == "artifact_update":
                        text += event.artifact_update.artifact.parts[0].text
                    elif kind == "status_update":
                        assert event.status_update.status.state == types.TaskState.TASK_STATE_COMPLETED
                texts.append(text)
            kept = await client.get_task(types.GetTaskRequest(id=task.id))
            assert kept.status.state == types.TaskState.TASK_STATE_COMPLETED
            return texts

    assert asyncio.run(use()) == ["It is warm.", "21 degrees."]
