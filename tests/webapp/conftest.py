from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest

from bessemer.inference.engine import Engine
from bessemer.model.storage.folder import save_model
from bessemer.webapp.app import WebSettings, web_pages
from tests.cases import slow
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.running import servers
from tests.webapp.firefox import firefox, write_launcher

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model that has learned nothing: it babbles to the end of its context."""
    path = tmp_path_factory.mktemp("web")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=4096)
    save_model(random_decoder(shape), path / "model", tokenizer=tokenizer)
    return path / "model"


@pytest.fixture(scope="session")
def engine(model_folder) -> Engine:
    return Engine(model_folder, device="cpu")


@pytest.fixture(scope="module")
def plain_server(engine, model_folder) -> Iterator[Callable[[], str]]:
    """The server without settings, which the tests of a module share; started by the first that asks."""
    with servers() as start_server:
        urls: list[str] = []

        def url() -> str:
            if not urls:
                urls.append(start_server(engine, web_pages(WebSettings(model_folder))))
            return urls[0]

        yield url


@pytest.fixture
def start(engine, model_folder, plain_server) -> Iterator[Callable[..., str]]:
    """A server with its pages: `start(**settings)` gives its URL, and starts one of its own where there are settings. web:
    settings of the pages; {}: none, but a server of its own."""
    with servers() as start_server:

        def start(served=engine, web: dict | None = None, **settings) -> str:
            if served is engine and web is None and not settings:
                return plain_server()
            return start_server(served, web_pages(WebSettings(model_folder, **(web or {}))), **settings)

        yield start


@pytest.fixture(scope="package")
def playwright():
    """Of this folder: as long as it lives, Playwright runs an event loop in this thread, and nothing else may run one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


def pytest_generate_tests(metafunc):
    """Every test of a page runs in Chromium, and the slow ones once more in Firefox."""
    if "browser" in metafunc.fixturenames:
        browsers = ["chromium", *([] if metafunc.definition.get_closest_marker("chromium") else [slow("firefox")])]
        metafunc.parametrize("browser", browsers, indirect=True, scope="package")


@pytest.fixture(scope="package")
def browser(request, tmp_path_factory):
    """A real browser, headless; tests that need one are skipped where there is none."""
    with launched(request.getfixturevalue, request.param, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@contextmanager
def launched(fixture, name, folder):
    """The browser of a name. fixture: gives a fixture by its name."""
    where = firefox() if name == "firefox" else next(filter(None, map(shutil.which, CHROMIUM)), None)
    if where is None:
        pytest.skip(name)
    playwright = fixture("playwright")
    if name == "firefox":
        browser = playwright.firefox.launch(channel="moz-firefox", executable_path=write_launcher(folder / "firefox"))
    else:
        # pages are drawn by the processor either way, and without this by a process that stands in for a card
        browser = playwright.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
    yield browser
    browser.close()


@pytest.fixture(scope="package")
def profile(browser):
    """A profile of the browser that tests share, and what forgets what a test kept in it. With one of its own each test would
    start a process and compile all scripts anew, longer than most tests take. Firefox has no such way to forget."""
    if browser.browser_type.name != "chromium":
        yield None
        return
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    tools = context.new_cdp_session(context.new_page())

    def forget(origins: Iterable[str]) -> None:
        context.clear_cookies()
        for origin in origins:
            tools.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})

    yield context, forget
    context.close()


@pytest.fixture
def page(browser, profile, start):
    """A page whose faults, and whose requests to anywhere but its own server, fail the test; closed before the servers."""
    if profile is None:
        context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    else:
        context, forget = profile
    before = context.pages
    context.set_default_timeout(60_000)
    page = context.new_page()
    wrong: list[str] = []
    asked: set[str] = set()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.add(request.url))
    page.wrong = wrong
    yield page
    if profile is None:
        context.close()
    else:
        for opened in context.pages:
            if opened not in before:
                opened.close()
        forget({"/".join(url.split("/")[:3]) for url in asked if url.startswith("http")})
    wrong += [url for url in asked if not _is_own(url)]
    assert not wrong, wrong


def _is_own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "blob:", "data:", "file:"))
