"""Pictures of the web app for the documentation: `python docs/tools/web_pictures.py RUN [--runs runs]`.

Serves the model of a finished run and photographs its pages in a real browser, so that what the documentation shows is what
there is.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from pathlib import Path
from typing import Any

from bessemer.inference.engine import Engine
from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, create_server, listen
from bessemer.webapp.app import WebSettings, web_pages

IMAGES = Path(__file__).parents[1] / "images"
QUESTION = "What does a list's append method do?"


def chat(page: Any, url: str) -> None:
    """An answer, and one of its tokens."""
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate(
        "document.querySelector('[name=temperature]').value = 0; document.querySelector('[name=max_tokens]').value = 48"
    )
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.click(".tokens.pressable button >> nth=2")
    page.wait_for_selector("#token-lens table")


def xray(page: Any, url: str) -> None:
    """A sentence from inside."""
    page.goto(f"{url}/xray?text=Returns+the+number+of+items+in+the+list")
    page.wait_for_selector("#without")


def runs(page: Any, url: str, run: str) -> None:
    """The run with its curves."""
    page.goto(f"{url}/runs?run={run}&stage=pretrain")
    page.wait_for_selector("figure.chart")


def data(page: Any, url: str, run: str) -> None:
    """What was dropped."""
    page.goto(f"{url}/data?run={run}&folder=select/rejected")
    page.wait_for_selector("#documents li")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    model = (arguments.runs / arguments.run / "model").resolve()
    settings = WebSettings(model, runs=arguments.runs, run=arguments.run)
    listener = listen("127.0.0.1", 0)
    server = create_server(Engine(model), arguments.run, ServingConfig(), web_pages(settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = address_of(listener)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            for name, show in (
                ("chat", lambda: chat(page, url)),
                ("xray", lambda: xray(page, url)),
                ("runs", lambda: runs(page, url, arguments.run)),
                ("data", lambda: data(page, url, arguments.run)),
            ):
                show()
                page.wait_for_timeout(600)
                page.screenshot(path=IMAGES / f"web-{name}.jpg", type="jpeg", quality=72)
                print(IMAGES / f"web-{name}.jpg")
            browser.close()
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
