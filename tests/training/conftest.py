import random

import pyarrow as pa
import pytest
import torch

from bessemer.core.hashing import hash_bytes
from bessemer.core.progress import Silent
from bessemer.data.corpus.reader import SCHEMA
from bessemer.data.corpus.writer import write_documents
from bessemer.model.config import ModelConfig, ModelStageConfig
from bessemer.model.device import is_fast
from bessemer.model.initialisation import initial_decoder
from bessemer.model.stage import build_model
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.stage import tokenize
from bessemer.training.pretrain_config import PretrainConfig

TINY = {
    "preset": None,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_NOUNS = ["table", "column", "graph", "node", "edge", "matrix", "vector", "token", "layer", "index", "cache", "batch"]
_VERBS = ["Return", "Compute", "Remove", "Draw", "Sort", "Merge", "Count", "Split"]


def fast_dtype():
    """The dtype in which this machine trains: bfloat16 where products in it are fast, else float32."""
    return "bfloat16" if is_fast(torch.bfloat16, torch.device("cpu")) else "float32"


class RecordedProgress(Silent):
    """Remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def documentation(count=240):
    """Made-up documented functions, every sixth of them held out: the same on every machine."""
    draw = random.Random(3)
    rows = []
    for number in range(count):
        verb, first, second = draw.choice(_VERBS), draw.choice(_NOUNS), draw.choice(_NOUNS)
        package = "held" if number % 6 == 0 else "known"
        qualname = f"{verb.lower()}_{first}_{number}"
        signature = f"{qualname}({first}, {second}={draw.randint(0, 9)})"
        text = f"{package}.{first}.{signature}\n\n{verb} the {first} of every {second}. More is said here.\n\nThe end.\n"
        metadata = {"package": package, "module": f"{package}.{first}", "qualname": qualname, "kind": "function"}
        rows.append((text, package, [*metadata.items(), ("signature", signature)]))
    return rows


def write_documentation(folder, rows):
    ids = [hash_bytes(b"test", str(number).encode()) for number in range(len(rows))]
    nothing = [None] * len(rows)
    columns = {
        "id": ids,
        "text": [text for text, _, _ in rows],
        "text_hash": ids,
        "source": ["test"] * len(rows),
        "url": nothing,
        "language": nothing,
        "license": nothing,
        "split": ["validation" if package == "held" else "train" for _, package, _ in rows],
        "metadata": [metadata for _, _, metadata in rows],
    }
    write_documents(folder, [pa.table(columns, schema=SCHEMA)])
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    return write_documentation(tmp_path_factory.mktemp("documentation") / "documents", documentation())


@pytest.fixture(scope="session")
def tokenized(documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenized")
    tokenize(TokenizeConfig(vocab_size=320), documents, out, seed=0, progress=Silent())
    return out


@pytest.fixture(scope="session")
def model_folder(tokenized, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    build_model(ModelStageConfig.parse(TINY), tokenized / "tokenizer", out, seed=1)
    return out / "model"


@pytest.fixture
def decoder():
    shape = {name: value for name, value in TINY.items() if name != "preset"}
    return initial_decoder(ModelConfig(**shape, vocab_size=97), seed=2).train()


@pytest.fixture
def settings():
    """A run of a few quick steps, with nothing left to measure."""
    return PretrainConfig(steps=6, batch_size=2, context_length=32, dtype="float32", compile=False, threads=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
