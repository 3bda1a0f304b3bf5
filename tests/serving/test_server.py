"""Listening: what can go wrong with an address is one line."""

from __future__ import annotations

import pytest

from bessemer.core.errors import BessemerError
from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, listen, serve
from tests.serving.engine import FakeEngine


def test_port_in_use_is_one_line_that_names_the_port_and_the_way_out():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BessemerError, match=rf"^port {port} on 127.0.0.1 is in use; .*--port$"):
            serve(FakeEngine(), "tiny", ServingConfig(port=port))


def test_host_of_another_machine_is_one_line():
    with pytest.raises(BessemerError, match=r"cannot listen on host '192\.0\.2\.1'"):
        listen("192.0.2.1", 0)


def test_address_of_all_interfaces_is_this_machine():
    with listen("0.0.0.0", 0) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
