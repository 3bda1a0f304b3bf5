"""Settings that PyTorch reads once, when it is loaded: those that the command line makes; hypothesis; a local S3 server."""

import logging
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import settings

from bessemer.core.environment import set_environment

set_environment()

# No deadline: the time of an example depends on what else the machine does. The suite draws the same examples every time;
# `make fuzz` draws new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("suite")

#: Must stand in no file that a run leaves.
SECRET = "wootz-0f3a-never-to-be-written"
_BUCKETS = count()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: their content may change from one collection to the next, an id must not."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def object_server():
    """The address of an S3 server on this machine that holds its objects in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(object_server, monkeypatch):
    """A new bucket, with the credentials for it in the environment: what tests put into it and look for, by key."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": object_server,
        "AWS_ACCESS_KEY_ID": "furnace",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage = fsspec.filesystem("s3", use_listings_cache=False)
    name = f"ore-{next(_BUCKETS)}"
    storage.mkdir(name)
    return Bucket(name, storage)


@dataclass(frozen=True)
class Bucket:
    name: str
    storage: Any

    @property
    def address(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, content: bytes) -> None:
        self.storage.pipe_file(f"{self.name}/{key}", content)

    def objects(self, below: str = "") -> dict[str, bytes]:
        """Every object's content by its key behind `below`."""
        keys = self.storage.find(f"{self.name}/{below}")
        return {key[len(self.name) + 1 + len(below) :].lstrip("/"): self.storage.cat_file(key) for key in keys}
