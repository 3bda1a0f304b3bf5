"""Settings that PyTorch reads once, when it is loaded: those that the command line makes; hypothesis; a local S3 server."""

import logging
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import settings

from bessemer.core.environment import set_environment

set_environment()

# How long an example takes depends on what else the machine does: no deadline, unless a test has one of its own.
settings.register_profile("bessemer", deadline=None)
settings.load_profile("bessemer")

#: Must stand in no file that a run leaves.
SECRET = "wootz-0f3a-never-to-be-written"
_BUCKETS = count()


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
