"""Data sets of the hub by name: the protocol against a stand-in on this machine, the splits against those of `datasets`."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from bessemer.core.errors import ConfigError, SourceError
from bessemer.posttraining.data.examples import files_fingerprint, previewed, read_conversations
from bessemer.posttraining.data.hub import HubDataset, splits_by_name
from bessemer.posttraining.data.understanding import open_rows
from bessemer.posttraining.sft.config import FinetuneConfig, SFTConfig
from bessemer.posttraining.sft.finetune_plan import settings_of

COMMIT, CONVERTED = "a" * 40, "c" * 40


class StandIn(BaseHTTPRequestHandler):
    """The hub's API for data sets: a revision's commit and files, the tree, and each file with its commit and its etag."""

    repositories: ClassVar[dict[str, dict[str, dict[str, bytes]]]] = {}

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if path[:2] == ["api", "datasets"]:
            name, rest = "/".join(path[2:4]), path[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            files = self._files(name, revision)
            if files is None:
                return
            if rest[:1] == ["tree"]:
                listed = [{"type": "file", "path": one, "size": len(data), "oid": _etag(data)} for one, data in files.items()]
                self._send(json.dumps(listed).encode(), {}, with_body)
            else:
                info = {"id": name, "sha": _commit(revision), "siblings": [{"rfilename": one} for one in files]}
                self._send(json.dumps(info).encode(), {}, with_body)
        elif path[:1] == ["datasets"] and path[3:4] == ["resolve"]:
            files = self._files("/".join(path[1:3]), path[4])
            file = "/".join(path[5:])
            if files is None:
                return
            if file not in files:
                self._refuse("EntryNotFound")
                return
            self._send(files[file], {"X-Repo-Commit": _commit(path[4]), "ETag": f'"{_etag(files[file])}"'}, with_body)
        else:
            self._refuse("EntryNotFound")

    def _files(self, name, revision):
        known = self.repositories.get(name)
        if known is None:
            self._refuse("RepoNotFound")
            return None
        revisions = {"main": "main", COMMIT: "main", "refs/convert/parquet": "converted", CONVERTED: "converted"}
        files = known.get(revisions.get(revision, revision))
        if files is None:
            self._refuse("RevisionNotFound")
        return files

    def _refuse(self, why):
        self.send_response(404)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data, headers, with_body):
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def _commit(revision):
    return {"main": COMMIT, "refs/convert/parquet": CONVERTED}.get(revision, revision)


def _etag(data):
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def row(number):
    return {"question": f"Where is {number}?", "answer": f"{number} is here."}


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*.parquet
- config_name: socratic
  data_files: socratic/*.jsonl
---
# Questions
"""
REPOSITORIES = {
    "org/plain": {
        "main": {"README.md": b"# no head\n", "train.jsonl": lines(*map(row, range(20))), "test.jsonl": lines(row(99))}
    },
    "org/cards": {
        "main": {
            "README.md": CARD.encode(),
            "main/train-00000-of-00002.parquet": parquet(*map(row, range(12))),
            "main/train-00001-of-00002.parquet": parquet(*map(row, range(12, 20))),
            "main/test-00000-of-00001.parquet": parquet(row(99)),
            "socratic/a.jsonl": lines(row(50)),
        }
    },
    "org/script": {
        "main": {"README.md": b"", "script.py": b"raise SystemExit('never run')"},
        "converted": {"default/train/0000.parquet": parquet(row(1)), "default/test/0000.parquet": parquet(row(2))},
    },
    "org/pickles": {"main": {"data.pkl": b"..."}},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which the hub's library asks in place of the hub, with a cache of its own."""
    StandIn.repositories = REPOSITORIES
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def questions(name):
    return [record.values["question"] for record in open_rows(HubDataset.parse(name)).records]


def test_a_data_set_is_read_by_its_name_split_and_configuration(hub):
    asked = [f"Where is {number}?" for number in range(20)]
    assert questions("hub:org/plain") == questions("hub:org/plain@main#train") == asked
    assert questions("hub:org/cards") == questions("hub:org/cards#main/train") == asked
    assert questions("hub:org/cards#test") == questions("hub:org/plain#test") == ["Where is 99?"]
    assert questions("hub:org/cards#socratic/train") == ["Where is 50?"]
    assert questions("hub:org/cards#train[5:50%]") == asked[5:10]
    assert questions("hub:org/plain#train+test") == [*asked, "Where is 99?"]


def test_what_a_script_would_make_is_taken_from_what_the_hub_has_converted(hub):
    assert questions("hub:org/script") == ["Where is 1?"] and questions("hub:org/script#test") == ["Where is 2?"]


def test_its_columns_are_found_and_its_commit_is_the_fingerprint(hub, tmp_path):
    (first, *_) = read_conversations(HubDataset.parse("hub:org/cards"))
    assert first.source == "hub:org/cards" and first.messages[1]["content"] == "0 is here."
    name = "hub:org/cards#train"
    assert files_fingerprint([name], tmp_path) == {name: COMMIT}
    settings = settings_of(FinetuneConfig(also={"org/plain": 2.0}), "org/cards")
    assert settings["data"] == ["hub:org/cards", "hub:org/plain"] and settings["answer_column"] == "answer"
    assert SFTConfig(data=[name]).data == [name]
    assert previewed("org/cards").lines()[:2] == [
        "hub:org/cards: 2 files of Parquet",
        "  20 rows: questions and answers in two columns",
    ]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hub:org/none", "the hub has no such data set, or it is private"),
        ("hub:org/cards@v2", "has no revision 'v2'"),
        ("hub:org/cards#tset", "has no split 'tset'; did you mean 'test'"),
        ("hub:org/cards#other/train", "has no configuration 'other'; name one of main, socratic, as hub:org/cards#main/train"),
        ("hub:org/pickles", "has no revision 'refs/convert/parquet', or holds no table"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(hub, name, why):
    with pytest.raises(SourceError, match=r"^[^\n]*$") as error:
        open_rows(HubDataset.parse(name))
    assert why in str(error.value)


def test_what_was_fetched_is_read_where_the_hub_cannot_be_reached(hub, monkeypatch):
    asked = questions("hub:org/cards")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert questions("hub:org/cards") == asked
    with pytest.raises(SourceError, match="neither in the hub's cache nor can the hub be reached"):
        questions("hub:org/plain")


@pytest.mark.parametrize("name", ["hub:", "hub:a b", "hub:org/name#a/b/c", "hub:org/name#train[1]"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ConfigError, match="it is hub:ORGANISATION/NAME"):
        HubDataset.parse(name)


FILES = [
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test_sft-00000-of-00001.parquet"],
    ["train.csv", "dev.csv", "readme.csv"],
    ["en/train/a.jsonl", "en/train/b.jsonl", "en/validation/a.jsonl", "notes.jsonl"],
    ["my_train_file.jsonl", "my-eval-file.jsonl"],
    ["rows.jsonl", "more.jsonl"],
    ["a.csv", "b.parquet", "c.parquet"],
    ["trainer.jsonl", "contest.jsonl"],
    ["test/train.jsonl", "test/other.jsonl"],
]


@pytest.mark.parametrize("names", FILES, ids=" ".join)
def test_the_files_of_a_split_are_those_that_datasets_takes(tmp_path, names):
    datasets = pytest.importorskip("datasets")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = parquet({"a": number}) if name.endswith(".parquet") else f"a\n{number}\n".encode()
        (tmp_path / name).write_bytes(lines({"a": number}) if name.endswith(".jsonl") else content)
    expected = {
        str(split): sorted(path.removeprefix(f"{tmp_path}/") for path in files)
        for split, files in datasets.data_files.DataFilesDict.from_patterns(
            datasets.data_files.get_data_patterns(str(tmp_path)), base_path=str(tmp_path)
        ).items()
    }
    assert {split: sorted(files) for split, files in splits_by_name(sorted(names)).items()} == {
        split: kept for split, files in expected.items() if (kept := _commonest(files, names))
    }


def _commonest(files, names):
    """Of the files of a split those in the form that most files of the data set have, as `datasets` chooses a builder."""
    suffixes = [name.rpartition(".")[2] for name in names]
    commonest = max(set(suffixes), key=suffixes.count)
    return [name for name in files if name.endswith(commonest)]
