"""A table of pictures, tuned on, served, and asked in a browser: the right answer to pictures that were not in it."""

import pytest

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.webapp.app import WebSettings, web_pages
from tests.serving.running import servers
from tests.serving.test_tuned_on_pictures import SHADES, base, shaded, tuned  # noqa: F401
from tests.webapp.test_chat import ANSWER, ask
from tests.webapp.test_pictures_page import give, greedy, waits_for


@pytest.mark.slow
@pytest.mark.parametrize("shade", SHADES)
def test_a_table_of_pictures_answers_in_the_browser(page, tuned, shade):  # noqa: F811
    engine = Engine(tuned[0], device="cpu", config=EngineConfig(kv_memory=0.01))
    with servers() as start_server:
        greedy(page, start_server(engine, web_pages(WebSettings(tuned[0] / "model"))))
        give(page, "drop", (f"{shade}.png", "image/png", shaded(shade, 2000)))
        waits_for(page, 1)
        ask(page, "dark or light?")
        page.wait_for_selector(ANSWER)
        assert page.inner_text("article.assistant .text").strip() == shade
