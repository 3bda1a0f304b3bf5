import multiprocessing
import os
from pathlib import Path

import pytest

from bessemer.core.errors import ArtefactError, StorageError, as_storage_error
from bessemer.core.store import Store, follow, link, read_json, write_json


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / ".store")


def make(store: Store, key: str, text: str = "content"):
    partial = store.partial(key)
    (partial / "deep").mkdir(parents=True)
    (partial / "deep" / "file.txt").write_text(text, encoding="utf-8")
    (partial / ".scratch").write_text("not part of it", encoding="utf-8")
    return store.publish(key, {"stage": "test"})


def test_an_unpublished_folder_is_not_found(store):
    store.partial("a").mkdir(parents=True)
    assert store.find("a") is None


def test_a_folder_without_manifest_is_not_found(store):
    (store.root / "a").mkdir(parents=True)
    assert store.find("a") is None


def test_published_artefact_is_found_with_its_hashes(store):
    make(store, "a")
    found = store.find("a")
    assert found is not None
    assert list(found.manifest["outputs"]) == ["deep/file.txt"]
    assert found.manifest["outputs"]["deep/file.txt"]["bytes"] == 7
    assert not store.partial("a").exists()
    found.verify()


def test_a_changed_file_fails_verification_by_name(store):
    artefact = make(store, "a")
    (artefact.folder / "deep" / "file.txt").write_text("CONTENT", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"file\.txt: differs"):
        artefact.verify()


def test_newer_manifest_format_is_refused_with_advice(store):
    artefact = make(store, "a")
    write_json(artefact.folder / "manifest.json", {**read_json(artefact.folder / "manifest.json"), "format": 99})
    with pytest.raises(ArtefactError, match="format 99, newer"):
        _ = artefact.manifest


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"manifest\.json: this manifest is damaged"):
        read_json(tmp_path / "manifest.json", "manifest")


def hold_lock(root: str, held, release) -> None:
    with Store(Path(root)).lock("a"):
        held.set()
        release.wait(30)


def test_second_process_waits_and_says_so(store):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(str(store.root), held, release))
    holder.start()
    try:
        assert held.wait(30)
        assert store.is_locked("a")
        waited = []

        def on_wait():
            waited.append(True)
            release.set()

        with store.lock("a", on_wait):
            assert waited == [True]
    finally:
        release.set()
        holder.join(30)


def test_who_asks_about_a_lock_does_not_take_it(store, monkeypatch):
    with store.lock("a"):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock", None)
        assert not store.is_locked("a")
    with store.lock("a"):
        monkeypatch.setattr("filelock.FileLock", None)
        assert all(store.is_locked("a") for _ in range(2))
    assert not store.is_locked("a")


def test_lock_of_a_killed_process_is_free(store):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold_lock, args=(str(store.root), held, release))
    holder.start()
    assert held.wait(30)
    holder.kill()
    holder.join(30)
    assert not store.is_locked("a")
    with store.try_lock("a") as held:
        assert held


def test_link_is_relative_and_replaced_whole(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        link(tmp_path / "run" / "model", tmp_path / name)
    assert follow(tmp_path / "run" / "model") == (tmp_path / "two").resolve()
    assert not (tmp_path / "run" / "model").readlink().is_absolute()


def test_pointer_file_stands_in_where_links_need_rights(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file.txt").write_text("x", encoding="utf-8")

    def refuse(*arguments, **options):
        raise OSError("links need rights")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link(tmp_path / "run" / "model", tmp_path / "target")
    assert (tmp_path / "run" / "model").is_file()
    assert follow(tmp_path / "run" / "model" / "file.txt").read_text(encoding="utf-8") == "x"


def test_removal_takes_the_lock_file_too(store):
    make(store, "a")
    with store.lock("a"):
        pass
    store.remove("a")
    assert not list(store.root.iterdir())


def test_a_full_disk_is_recognised_through_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("writer failed") from error
    except RuntimeError as error:
        found = as_storage_error(error, "runs")
    assert isinstance(found, StorageError)
    assert "disk is full" in str(found)


def test_another_error_is_not_taken_for_a_full_disk():
    assert as_storage_error(ValueError("x"), "runs") is None


def test_json_written_over_a_file_never_leaves_half(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_short_write_of_numpy_is_a_full_disk():
    assert isinstance(as_storage_error(OSError("9346985 requested and 1023936 written"), "runs"), StorageError)
