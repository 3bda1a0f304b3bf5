from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.data.sources.web import Site


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server on this machine."""
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()
