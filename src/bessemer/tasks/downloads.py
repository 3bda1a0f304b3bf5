"""Downloads of the data of tasks over files.

The task files are written for the rows of llm-foundry's evaluation gauntlet, where others have brought the data sets into one
form. They are fetched from one commit of it and checked by hash, so that everybody's scores are of the same items.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bessemer.core.errors import ArtefactError
from bessemer.core.metrics import size
from bessemer.core.store import write_text

_REPOSITORY, _COMMIT = "mosaicml/llm-foundry", "8c8dd48f72168c5d51e2f7b151595892a8fba43d"
_FOLDER = "scripts/eval/local_data"
_URL = f"https://raw.githubusercontent.com/{_REPOSITORY}/{_COMMIT}/{_FOLDER}"
_SECONDS = 30.0

#: How to download all of them at once, with those of CORE.
CLONE = f"git clone --depth 1 https://github.com/{_REPOSITORY}, then --data {_REPOSITORY.partition('/')[2]}/{_FOLDER}"


class DataFile(NamedTuple):
    """A file of rows. place: its path below the repository's folder of data.

    hub: the data set on the Hugging Face hub that it was made from, or how else it was made. license: as the page of that data
    set states it.
    """

    place: str
    items: int
    bytes: int
    license: str
    hub: str
    sha256: str

    @property
    def url(self) -> str:
        """Where it is fetched from."""
        return f"{_URL}/{self.place}"

    @property
    def terms(self) -> str:
        """Size, licence and data set, for a reader."""
        return f"{self.items:,} items, {size(self.bytes)}, licence {self.license}, {self.hub}"


# fmt: off
_FILES = (
    DataFile("world_knowledge/arc_easy.jsonl", 2_376, 636_665, "CC BY-SA 4.0", "allenai/ai2_arc",
             "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5"),
    DataFile("commonsense_reasoning/copa.jsonl", 100, 14_627, "not stated", "aps/super_glue",
             "595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846"),
    DataFile("language_understanding/lambada_openai_small.jsonl", 8, 3_033, "MIT", "EleutherAI/lambada_openai",
             "9df9ea3f93e03f5009b22d360eafc923ae959bf2b94c465099d6747a9e389343"),
    DataFile("commonsense_reasoning/openbook_qa.jsonl", 500, 88_043, "not stated", "allenai/openbookqa",
             "adb2e5c7f8db810ddad4d6b2bf53dcc86dcc545499f7aafcaf42a8e179476c09"),
    DataFile("commonsense_reasoning/piqa.jsonl", 1_838, 533_992, "not stated", "ybisk/piqa",
             "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0"),
    DataFile("symbolic_problem_solving/simple_arithmetic_nospaces.jsonl", 1_000, 51_711, "Apache-2.0", "made for the gauntlet",
             "2b68696de9e381e9bddbd0af21dfd745400903b0ca5abf1b500143315b443228"),
    DataFile("symbolic_problem_solving/svamp.jsonl", 300, 70_844, "MIT", "ChilleD/SVAMP",
             "6e9d75302c2663a8c8ce48927d784244480bc75cd0eda539677b6a92a2ff5b97"),
    DataFile("world_knowledge/triviaqa_small.jsonl", 32, 11_918, "not stated", "mandarjoshi/trivia_qa",
             "a484b8f1da8b890dab1d1501b0cafac7ffa2c694a9f234125482b103f3c6fa09"),
    DataFile("language_understanding/winograd_wsc.jsonl", 273, 60_523, "CC BY 4.0", "ErnestSDavis/winograd_wsc",
             "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e"),
)
# fmt: on
#: By the name of the file that a task asks for.
DATA_FILES: dict[str, DataFile] = {file.place.rpartition("/")[2]: file for file in _FILES}


def bring(name: str) -> str:
    """Where a missing file of data can be downloaded, as the end of a message; empty for a file that is not known here."""
    file = DATA_FILES.get(name)
    return "" if file is None else f"; it is {file.url} ({file.terms})"


def is_offline() -> bool:
    """Whether nothing may be fetched, by the variable that the hub's own library reads too."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "on", "yes", "true")


def fetch_data(names: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
    """Fetch the files of data that the folder lacks. A file is there whole or not at all.

    say: called with a line about each download. Raises ArtefactError, which names the file, when it cannot be fetched or has
    another hash.
    """
    for name in names:
        path, file = folder / name, DATA_FILES[name]
        if path.is_file():
            continue
        remedy = f"bring {file.url} and name its folder with --data"
        if is_offline():
            raise ArtefactError(f"{name}: not in {folder}, and HF_HUB_OFFLINE forbids to fetch it; {remedy}")
        say(f"fetching {name} ({file.terms}) into {folder}")
        try:
            with urllib.request.urlopen(file.url, timeout=_SECONDS) as answer:
                data = answer.read(file.bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ArtefactError(f"{name}: cannot be fetched ({getattr(error, 'reason', error)}); {remedy}") from None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ArtefactError(f"{name}: {file.url} holds another file now; {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, data.decode())
