import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bessemer.core.errors import ArtefactError, StorageError, as_storage_error, as_user_error, failed_allocation, writing_to
from bessemer.core.store import new_file, new_folder


@pytest.mark.parametrize(
    ("error", "bytes_asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total of 79 GiB"), 21495808),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2 << 30),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 512 bytes"), 0),
        (RuntimeError("std::bad_alloc"), 0),
        (MemoryError(), 0),
        (RuntimeError("shapes do not match"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_the_amount_is_read_from_what_libraries_say(error, bytes_asked):
    assert failed_allocation(error) == bytes_asked


def test_real_refusals_are_known():
    for allocate in (lambda: torch.empty(1 << 58), lambda: np.empty(1 << 57)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert failed_allocation(caught.value) > 1 << 59


def test_the_cause_is_looked_at_too():
    try:
        try:
            raise MemoryError("Unable to allocate 8.00 KiB for an array")
        except MemoryError as error:
            raise ValueError("a layer failed") from error
    except ValueError as error:
        assert failed_allocation(error) == 8192


FULL = "the disk is full while writing to {}; free some space and run the same command again, finished work is kept"
READ_ONLY = "{}: the file system is read-only; name a place that can be written"
DENIED = "{}: permission denied; let this user read and write it, or name another place"


def refusal(code, *files):
    return OSError(code, os.strerror(code), *files)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refusal(errno.ENOSPC), FULL.format("place")),
        (refusal(errno.ENOSPC, "other/file"), FULL.format("other/file")),
        # shutil.copyfile names what it reads first
        (OSError(errno.ENOSPC, "No space left on device", "read", None, "written"), FULL.format("written")),
        # tokenizers and safetensors
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL.format("place")),
        (Exception("Read-only file system (os error 30)"), READ_ONLY.format("place")),
        (Exception("Permission denied (os error 13)"), DENIED.format("place")),
        # Arrow
        (OSError(errno.EROFS, "Failed to open local file '/r/a.parquet'. Detail: Read-only"), READ_ONLY.format("/r/a.parquet")),
        (Exception("database or disk is full"), FULL.format("place")),
        (Exception("attempt to write a readonly database"), READ_ONLY.format("place")),
        (refusal(errno.EACCES, "models/.out.71.partial/model.safetensors"), DENIED.format(str(Path("models/out")))),
        (refusal(errno.EROFS, b"bytes"), READ_ONLY.format("bytes")),
    ],
)  # fmt: skip
def test_what_libraries_say_of_a_disk_becomes_one_line_with_the_path(error, line):
    assert str(as_storage_error(error, "place")) == line


def test_what_was_refused_is_no_storage_error_where_no_file_is_named_or_another_error_came_of_it():
    # a port, a signal
    assert as_storage_error(refusal(errno.EACCES), "place") is None
    try:
        try:
            raise refusal(errno.EACCES, "cache")
        except OSError:
            raise ValueError("a mistake of the code that went on without the cache")  # noqa: B904
    except ValueError as error:
        assert as_storage_error(error, "place") is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refusal(errno.ENOTDIR, "a/b"), "a/b: not a directory"),
        (refusal(errno.ENAMETOOLONG, "long"), "long: file name too long"),
        (refusal(errno.ECONNREFUSED), "the network does not answer (Connection refused); check the address and the connection"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "No usable temporary directory found in ['/tmp']; let TMPDIR name a folder that can be written",
        ),
        (refusal(errno.EINVAL), None),
        (ValueError("x"), None),
    ],
)
def test_an_error_of_the_system_that_names_a_file_is_one_line(error, line):
    told = as_user_error(error)
    assert (told and str(told)) == line


def test_a_library_that_fails_on_a_full_disk_says_what_was_written(tmp_path):
    with pytest.raises(StorageError, match="while writing to out;"), writing_to("out"):
        raise RuntimeError("No space left on device (os error 28)")


def test_a_file_is_whole_or_absent_and_what_was_there_stays(tmp_path):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    with pytest.raises(StorageError, match=f"{tmp_path / 'a'};"), new_file(tmp_path / "a") as unfinished:
        unfinished.write_text("half", encoding="utf-8")
        raise refusal(errno.ENOSPC)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a": "old"}
    with new_file(tmp_path / "a") as unfinished:
        unfinished.write_text("new", encoding="utf-8")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a": "new"}


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    with pytest.raises(ArtefactError, match="exists already"), new_folder(tmp_path / "a") as unfinished:
        (unfinished / "mine").touch()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
