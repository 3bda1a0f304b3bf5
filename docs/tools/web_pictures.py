"""Pictures of the web app for the documentation: `python docs/tools/web_pictures.py RUN [--runs runs] [--model MODEL]`.

Serves the model of a finished run, and another one for what the chat shows of an answer, and photographs the pages in a real
browser, wide and on a phone, so that what the documentation shows is what there is.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bessemer.inference.engine import Engine
from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, create_server, listen
from bessemer.tasks.drawn import drawn_items
from bessemer.webapp.app import WebSettings, web_pages

IMAGES = Path(__file__).parents[1] / "images"
QUESTION = "Name three colours of the rainbow."
#: Width and height of the window, and what the picture's name ends in.
WINDOWS = ((1280, 860, ""), (400, 800, "-narrow"))


def ask(page: Any, url: str, question: str, settings: str = "temperature: 0, max_tokens: 30") -> None:
    """Ask, and wait for the answer."""
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate(
        f"""() => {{ for (const [name, value] of Object.entries({{ {settings} }})) for (const input of
        document.querySelectorAll(`[name=${{name}}]`)) input.value = value; }}"""
    )
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant:not(.working) .below button")


def tokens(page: Any, url: str, question: str = QUESTION) -> None:
    """An answer in its tokens, and one of them."""
    ask(page, url, question)
    page.click("article.assistant >> text=Tokens")
    page.click(".tokens.pressable button >> nth=4")
    page.wait_for_selector("#side[data-place='4']")


def picture(page: Any, url: str) -> None:
    """A picture, and where the first token of the answer looked in it."""
    (item,) = drawn_items(1, 24, about=("shape",), side=256)
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.evaluate("() => { document.querySelector('[name=temperature]').value = 0; }")
    page.set_input_files("#attach-files", {"name": "drawn.png", "mimeType": "image/png", "buffer": item.png})
    page.wait_for_selector("#pictures img")
    page.fill("#prompt", item.question)
    page.press("#prompt", "Enter")
    page.click("article.assistant:not(.working) >> text=Tokens")
    page.wait_for_selector("#side[data-place='0']")
    page.click(".strongest-heads button >> nth=0")
    page.wait_for_selector("#token-pictures[data-head]:not([data-head=''])")
    weights = page.evaluate("[...document.querySelectorAll('.heat rect')].map((one) => Number(one.dataset.weight))")
    page.locator(".heat rect").nth(weights.index(max(weights))).click()
    page.wait_for_selector(".patch-lens table")
    page.evaluate("document.querySelector('#token-pictures').scrollIntoView()")


def forward(page: Any, url: str) -> None:
    """A token's way, at one of the last layers."""
    tokens(page, url)
    page.click("text=Follow its way")
    page.wait_for_selector(".forward[data-whole]")
    page.click(f".parts li >> nth={page.locator('.parts li').count() - 4}")


def change(page: Any, url: str) -> None:
    """Another word, and how the text goes on."""
    tokens(page, url)
    page.click("text=Change it and see")
    page.wait_for_selector(".changing form")
    page.select_option("[name=kind]", "edit")
    page.fill("[name=text]", "animals")
    page.click("text=Go on with it")
    page.wait_for_selector(".results[data-done]")


def blind(page: Any, url: str) -> None:
    """Two answers whose names are hidden."""
    page.goto(url)
    page.wait_for_selector("[name=model] option", state="attached")
    page.click("#show-settings")
    page.check("#beside")
    page.check("#blind")
    page.fill("[data-side=second] [name=temperature]", "1.1")
    for name, value in (("max_tokens", "48"), ("seed", "2")):
        page.evaluate(f"for (const input of document.querySelectorAll('[name={name}]')) input.value = '{value}'")
    page.keyboard.press("Escape")
    page.fill("#prompt", "Why does iron rust?")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#verdicts >> text=A is better")


def growth(page: Any, url: str) -> None:
    """The tokens of an answer as a checkpoint saw them, and where its words come from."""
    tokens(page, url, "The furnace of the steel works")
    page.click("text=Through the checkpoints")
    page.wait_for_selector(".growth[data-model]")
    page.fill(".growth input", "2")
    page.click("text=Where the words come from")
    page.click(".origins .answered button >> nth=0")
    page.evaluate("document.querySelector('.growth').scrollIntoView({ block: innerWidth < 600 ? 'start' : 'nearest' })")


def xray(page: Any, url: str) -> None:
    """A sentence from inside."""
    page.goto(f"{url}/xray?text=The+furnace+of+the+steel+works+has+to+be+heated")
    page.wait_for_selector("#without")
    page.wait_for_selector("#ablation")


def runs(page: Any, url: str, run: str) -> None:
    """The run with its curves."""
    page.goto(f"{url}/runs?run={run}&stage=pretrain")
    page.wait_for_selector("figure.chart")


def data(page: Any, url: str, run: str) -> None:
    """What was dropped."""
    page.goto(f"{url}/data?run={run}&folder=select/rejected")
    page.wait_for_selector("#documents li")


@contextmanager
def served(model: Path, name: str, **settings: Any) -> Iterator[str]:
    """A server of a model; its address."""
    listener = listen("127.0.0.1", 0)
    server = create_server(Engine(model), name, ServingConfig(), web_pages(WebSettings(model, **settings)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", type=Path, help="for the pictures of an answer; default: the run's")
    parser.add_argument("--seeing", type=Path, help="a model of the recipe `pictures`, for the picture of a picture")
    parser.add_argument("--only", nargs="+", help="names of pictures")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    own = (arguments.runs / arguments.run / "model").resolve()
    model, run = arguments.model or own, arguments.run
    with ExitStack() as servers:
        of_run = servers.enter_context(served(own, run, runs=arguments.runs, run=run))
        of_model = servers.enter_context(served(model, "smollm2"))
        shots: dict[str, Callable[[Any], None]] = {
            "tokens": lambda page: tokens(page, of_model),
            "growth": lambda page: growth(page, of_run),
            "change": lambda page: change(page, of_model),
            "forward": lambda page: forward(page, of_model),
            "blind": lambda page: blind(page, of_model),
            "xray": lambda page: xray(page, of_run),
            "runs": lambda page: runs(page, of_run, run),
            "data": lambda page: data(page, of_run, run),
        }
        if arguments.seeing:
            of_seeing = servers.enter_context(served(arguments.seeing, arguments.seeing.parent.name))
            shots["picture"] = lambda page: picture(page, of_seeing)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for width, height, ending in WINDOWS:
                for name, show in shots.items():
                    # the pages of runs and data are shown wide alone
                    if (arguments.only and name not in arguments.only) or (ending and name in ("xray", "runs", "data")):
                        continue
                    page = browser.new_page(viewport={"width": width, "height": height})
                    page.set_default_timeout(180_000)
                    show(page)
                    page.wait_for_timeout(600)
                    page.screenshot(path=IMAGES / f"web-{name}{ending}.jpg", type="jpeg", quality=66)
                    print(IMAGES / f"web-{name}{ending}.jpg")
                    page.close()
            browser.close()


if __name__ == "__main__":
    main()
