"""`bessemer index`, killed by signal 9 at moments of a build and of an update: the old index answers until the new one is
whole, and the next run makes it so, with nothing doubled or lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.index import open_index
from tests.retrieval.test_commands import run

lancedb = pytest.importorskip("lancedb")

#: Runs the command; the given moment, counted from 1 over what changes files, is its last. Moments are before and after each
#: call. Prints their number where it lives on.
PROGRAM = """
import os, shutil, signal, sys
from pathlib import Path
from lancedb.table import LanceTable
from bessemer.cli.main import main
from bessemer.retrieval import index, store, word_index

moment, count = int(sys.argv[1]), 0

def passed():
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(owner, name):
    original = getattr(owner, name)
    def call(*arguments, **named):
        passed()
        result = original(*arguments, **named)
        passed()
        return result
    setattr(owner, name, call)

index._CHARACTERS_AT_ONCE = 30
watched(index, "write_json")
watched(word_index, "write_json")
watched(word_index.np, "save")
watched(store, "build_word_index")
for name in ("add", "delete", "optimize", "create_index"):
    watched(LanceTable, name)
for name in ("__init__", "copy", "remove"):
    watched(store.StoreWriter, name)
watched(Path, "replace")
watched(shutil, "rmtree")
try:
    main(["index", *sys.argv[2:], "--embedder", "none"])
except SystemExit as ended:
    print("moments", count, ended.code)
"""

BEFORE = {name: f"# {name}\n\nThe old text of {name} is here.\n" for name in ("iron", "tin", "lead", "zinc", "gold")}
AFTER = {name: text for name, text in BEFORE.items() if name not in ("lead", "zinc")} | {
    "zinc": "# zinc\n\nThe new text of zinc.\n\n# More\n\nIt has two parts.\n", "silver": "The new text of silver.\n",
}  # fmt: skip


def write(folder, texts):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def killed_at(moment, docs, out):
    command = [sys.executable, "-c", PROGRAM, str(moment), str(docs), str(out)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[2], timeout=120)


def rows(out):
    """Every passage of an index, as often as it is stored."""
    values = json.loads((out / "index.json").read_text(encoding="utf-8"))
    table = lancedb.connect(str(out / "versions" / str(values["version"]))).open_table("passages")
    return sorted((row["document"], row["number"], row["text"]) for row in table.search().limit(1000).to_list())


def state_of(out):
    """The passages that the index finds by a word that all of them have; None where there is no index."""
    try:
        index = open_index(out)
    except ArtefactError as error:
        assert "no index of documents is here" in str(error)
        return None
    hits = [one.passage for one in index.store.by_words("text parts", 100)]
    found = sorted((passage.document, passage.number, passage.text) for passage in hits)
    assert found == rows(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["build", "update"])
def test_a_kill_at_any_moment_leaves_a_whole_index(tmp_path, capsys, kind):
    docs = tmp_path / "docs"
    whole = {}
    for name, texts in (("before", BEFORE), ("after", AFTER)):
        write(docs, texts)
        run(capsys, "index", str(docs), str(tmp_path / name), "--embedder", "none")
        whole[name] = state_of(tmp_path / name)
    assert whole["before"] != whole["after"] and len(whole["after"]) == 6

    def prepared(out):
        if kind == "update":
            write(docs, BEFORE)
            run(capsys, "index", str(docs), str(out), "--embedder", "none")
        write(docs, AFTER)

    prepared(tmp_path / "count")
    ended = killed_at(0, docs, tmp_path / "count")
    assert ended.returncode == 0 and "moments" in ended.stdout, ended.stderr
    moments = int(ended.stdout.split()[-2])
    assert moments >= 20
    seen = set()
    for step in range(10):
        # from the first moment to the last one, evenly
        moment = 1 + step * (moments - 1) // 9
        out = tmp_path / f"killed-{moment}"
        prepared(out)
        old = state_of(out)
        assert killed_at(moment, docs, out).returncode == -signal.SIGKILL
        left = state_of(out)
        assert left in (old, whole["after"]), moment
        seen.add(left == whole["after"])
        code, _, _ = run(capsys, "index", str(docs), str(out), "--embedder", "none")
        assert code == 0 and state_of(out) == whole["after"], moment
        assert {path.name for path in out.iterdir()} <= {"index.json", "versions", "cache", "roots.json", "access.json"}, moment
    assert seen == {False, True}
