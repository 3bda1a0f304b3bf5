"""How the chat page keeps up: a real browser, slowed down, with a fast model and with a long conversation.

    python benchmarks/web.py [--rounds 5] [--model MODEL]

- `stream`: 2,000 tokens at 400 a second, drawn by a processor that is four times as slow (Chromium's own throttle). What counts
  is the longest task of the page: above 50 ms a key that is pressed waits to be seen. Also how long after the last token the
  answer is whole.
- `open`: a conversation of 500 messages, from the click on it until all of it is there, without a throttle.
- `inside`, with a model (SmolLM2 as GGUF): from the click on a token until its recorded numbers stand in the panel, until all
  of it does; the steps of its forward pass; an X-ray's first sections, and all. Without a throttle.

Medians of the rounds, each in a new context. The stream is made by a stand-in of the engine, so that its rate is what it should
be; the pages and their server are the real ones. Result: `web.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn

import recording
from bessemer.inference.engine import Engine
from bessemer.model.config import ModelStageConfig
from bessemer.model.stage import build_model
from bessemer.serving.app import create_app
from bessemer.serving.server import address_of, listen
from bessemer.tokenization.bpe import byte_level_bpe
from bessemer.tokenization.folder import write_folder
from bessemer.webapp.app import WebSettings, web_pages

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/webapp", "src/bessemer/serving")

TOKENS, RATE, THROTTLE, MESSAGES = 2000, 400, 4, 500
#: What a long answer looks like: prose, a list, code.
_TEXT = (
    "The **Bessemer process** blows air through molten pig iron.\n\n- carbon burns\n- the melt heats *itself*\n\n"
    "```python\nfor blow in range(20):\n    carbon -= 0.2\n```\n\nThen the vessel is turned, and `steel` runs out. "
)
_WORDS = [part + " " for part in _TEXT.replace("\n", " \n ").split(" ")]


async def paced(scope: Any, receive: Any, send: Any) -> None:
    """A chat completion in stream, at the rate, whatever is asked."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    begin = time.perf_counter()

    def event(delta: dict[str, str], ended: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": ended, "token_ids": [65]}
        body = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [choice], "usage": None}
        return f"data: {json.dumps(body)}\n\n".encode()

    for number in range(TOKENS):
        await asyncio.sleep(max(0.0, begin + number / RATE - time.perf_counter()))
        delta = {"content": _WORDS[number % len(_WORDS)]} | ({"role": "assistant"} if number == 0 else {})
        await send({"type": "http.response.body", "body": event(delta), "more_body": True})
    usage = {"prompt_tokens": 3, "completion_tokens": TOKENS, "total_tokens": TOKENS + 3}
    last = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [], "usage": usage}
    tail = event({}, "stop") + f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode()
    await send({"type": "http.response.body", "body": tail})


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """A server of an application; its address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served() -> Iterator[str]:
    """The real pages on a real server, with the stand-in in place of the model's answers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "tokenizer", byte_level_bpe([bytes([byte]) for byte in range(256)], split="qwen2"))
        build_model(ModelStageConfig.parse("qwen3-1m"), folder / "tokenizer", folder, seed=7)
        app = create_app(Engine(folder / "model"), "tiny", pages=web_pages(WebSettings(folder / "model")))

        async def with_stand_in(scope: Any, receive: Any, send: Any) -> None:
            is_chat = scope["type"] == "http" and scope["path"] == "/v1/chat/completions"
            await (paced if is_chat else app)(scope, receive, send)

        with listening(with_stand_in) as url:
            yield url


def stream(page: Any, url: str) -> dict[str, float]:
    """A long answer on a slow processor."""
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": THROTTLE})
    page.evaluate(
        """() => {
          window.tasks = [];
          new PerformanceObserver((list) => tasks.push(...list.getEntries().map((one) => one.duration))).observe({ type:
          "longtask" }); }"""
    )
    page.fill("#prompt", "Go on")
    start = time.perf_counter()
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant:not(.working) .facts-of-answer", timeout=60_000)
    seconds = time.perf_counter() - start
    tasks = page.evaluate("tasks")
    return {
        "longest_task_ms": max(tasks, default=0.0),
        "long_tasks": len(tasks),
        "behind_seconds": max(0.0, seconds - TOKENS / RATE),
    }


def conversation() -> dict[str, Any]:
    """A conversation of many messages, as the page exports it."""
    nodes: dict[str, Any] = {}
    for number in range(MESSAGES):
        role = "user" if number % 2 == 0 else "assistant"
        content = f"Question {number}" if role == "user" else _TEXT * 3
        parent = f"m{number - 1}" if number else None
        nodes[f"m{number}"] = {"id": f"m{number}", "parent": parent, "role": role, "content": content, "at": number + 1}
    return {
        "format": 1,
        "id": "long",
        "title": "Long",
        "created": 1,
        "updated": 1,
        "system": "",
        "nodes": nodes,
        "leaf": f"m{MESSAGES - 1}",
    }


def open_long(page: Any, url: str) -> dict[str, float]:
    """A long conversation, from the click to its last message."""
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    content = json.dumps({"conversations": [conversation()]}).encode()
    page.set_input_files("#import-file", {"name": "long.json", "mimeType": "application/json", "buffer": content})
    page.wait_for_selector("#conversations button.open")
    page.click("#new")
    page.wait_for_selector("article", state="detached")
    seconds = page.evaluate(
        f"""async () => {{
          const start = performance.now();
          document.querySelector("#conversations button.open").click();
          while (document.querySelectorAll("#log > article").length < {MESSAGES}) await new Promise(requestAnimationFrame);
          await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)));
          return (performance.now() - start) / 1000;
        }}"""
    )
    return {"seconds": seconds}


def inside(page: Any, url: str) -> dict[str, float]:
    """What the page shows of a model's inside. The first forward pass copies the model."""
    page.set_default_timeout(300_000)
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate(
        "for (const [name, value] of [['temperature', 0], ['max_tokens', 24]]) "
        "document.querySelector(`[name=${name}]`).value = value"
    )
    page.fill("#prompt", "Name three colours of the rainbow.")
    page.press("#prompt", "Enter")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.wait_for_selector("#side[data-place='0']")
    clicks = [
        page.evaluate(
            """async (place) => {
              const start = performance.now();
              document.querySelectorAll(".tokens.pressable button")[place].click();
              const numbers = performance.now() - start;
              const side = document.querySelector("#side");
              while (side.dataset.place !== String(place)) await new Promise((go) => setTimeout(go, 1));
              return [numbers, performance.now() - start];
            }""",
            place,
        )
        for place in (4, 7, 3, 11, 9)
    ]
    start = time.perf_counter()
    page.click("text=Follow its way")
    page.wait_for_selector(".parts li")
    steps = time.perf_counter() - start
    page.wait_for_selector(".forward[data-whole]")
    page.goto(f"{url}/xray")
    page.fill("[name=text]", "The capital of France is a city on the river")
    start = time.perf_counter()
    page.click("text=Look inside")
    page.wait_for_selector("#lens")
    first = time.perf_counter() - start
    page.wait_for_function("() => document.querySelector('#state').textContent === ''", timeout=300_000)
    return {
        "numbers_ms": median(one for one, _ in clicks),
        "panel_ms": median(whole for _, whole in clicks),
        "steps_seconds": steps,
        "xray_first_seconds": first,
        "xray_seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file, for what is seen of its inside")
    arguments = parser.parse_args()
    where = shutil.which("chromium") or shutil.which("google-chrome")
    if where is None:
        recording.not_run("there is no chromium on the PATH")
    recording.needs("playwright", install="pip install playwright")
    from playwright.sync_api import sync_playwright

    parts: dict[str, Callable[[Any, str], dict[str, float]]] = {"stream": stream, "open": open_long}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    with ExitStack() as stack:
        urls = dict.fromkeys(parts, stack.enter_context(served()))
        if arguments.model is not None:
            app = create_app(Engine(arguments.model), "model", pages=web_pages(WebSettings(arguments.model)))
            urls["inside"], parts["inside"], found["inside"] = stack.enter_context(listening(app)), inside, []
        playwright = stack.enter_context(sync_playwright())
        chromium = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        version = chromium.version
        for number in range(arguments.rounds):
            for name, measure in parts.items():
                context = chromium.new_context(viewport={"width": 1280, "height": 800})
                found[name].append(measure(context.new_page(), urls[name]))
                context.close()
                print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)
        chromium.close()
    figures = {name: {key: median(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}
    asked = {"tokens": TOKENS, "rate": RATE, "throttle": THROTTLE, "messages": MESSAGES}
    print(recording.save("web", {"asked": asked, "median": figures, "rounds": found}, peers={"chromium": version}))


if __name__ == "__main__":
    main()
