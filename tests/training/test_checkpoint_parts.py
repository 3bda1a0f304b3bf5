"""The notes by which processes write one checkpoint, seen from one of them; the others' files are made by hand."""

import io
import shutil

import pytest
import torch

from bessemer.core.errors import CheckpointError, StorageError
from bessemer.core.store import write_json
from bessemer.distributed.layout import Layout
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.training.checkpoint import state
from bessemer.training.checkpoint import storage as module
from bessemer.training.checkpoint.state import SourceState
from bessemer.training.checkpoint.storage import ProcessNotes

from .conftest import RecordedProgress

THREE = Layout(data_shard=3)


@pytest.fixture
def progress():
    return RecordedProgress()


@pytest.fixture
def parts_of(tmp_path, progress):
    """The notes as a rank of three sees them."""
    folder = tmp_path / ".step-000007.partial"
    folder.mkdir()
    return lambda rank: ProcessNotes(folder, tmp_path / "step-000007", Mesh(THREE, rank), progress)


@pytest.fixture
def meanwhile(monkeypatch):
    """Does something of another process instead of each pause, one thing after the other."""

    def meanwhile(*things):
        todo = list(things)
        monkeypatch.setattr(module.time, "sleep", lambda seconds: todo.pop(0)() if todo else None)

    return meanwhile


def note(tmp_path, number, **values):
    write_json(tmp_path / ".step-000007.partial" / f".part-{number}.json", values)


def test_the_first_process_waits_for_the_parts_of_all_and_gets_them_by_rank(parts_of, meanwhile, tmp_path):
    meanwhile(lambda: note(tmp_path, 2, files="two"), lambda: note(tmp_path, 1, files="one"))
    assert parts_of(0).gathered({"files": "zero"}) == [{"files": "zero"}, {"files": "one"}, {"files": "two"}]


def test_the_others_wait_for_the_final_name(parts_of, meanwhile, tmp_path):
    folder = tmp_path / ".step-000007.partial"
    meanwhile(lambda: None, lambda: folder.rename(tmp_path / "step-000007"))
    parts_of(1).leave({"files": "one"})
    assert (tmp_path / "step-000007" / ".part-1.json").exists()


@pytest.mark.parametrize(("full", "kind"), [(True, StorageError), (False, CheckpointError)])
def test_a_failure_is_raised_by_those_who_read_of_it_and_told_to_the_rest(full, kind, parts_of, meanwhile, tmp_path):
    note(tmp_path, 1, files="one")
    note(tmp_path, 2, rank=2, failure="the disk is full", storage=full)
    first, second = parts_of(0), parts_of(1)
    with pytest.raises(kind, match="the disk is full") as raised:
        first.gathered({})
    told = []

    def read():
        with pytest.raises(kind, match="the disk is full") as also:
            second.leave({"files": "one"})
        told.append(second.give_up(also.value))

    # the folder stays until process 1, too, has read why
    meanwhile(read)
    assert first.give_up(raised.value) is raised.value
    assert len(told) == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_goes_without_a_word_is_the_failure_of_another(parts_of, meanwhile, tmp_path):
    folder = tmp_path / ".step-000007.partial"
    meanwhile(lambda: shutil.rmtree(folder))
    with pytest.raises(CheckpointError, match="another process could not write its part"):
        parts_of(1).leave({"files": "one"})


def test_an_earlier_folder_of_the_final_name_is_not_taken_for_this_one(parts_of, meanwhile, tmp_path):
    (tmp_path / "step-000007").mkdir()
    folder = tmp_path / ".step-000007.partial"
    meanwhile(lambda: shutil.rmtree(folder))
    with pytest.raises(CheckpointError, match="another process could not write its part"):
        parts_of(1).leave({"files": "one"})


def test_a_process_whose_folder_was_removed_says_that_another_failed(parts_of, tmp_path):
    (tmp_path / ".step-000007.partial").rmdir()
    raised = parts_of(1).give_up(FileNotFoundError("__1_0.distcp"))
    assert isinstance(raised, CheckpointError) and "another process" in str(raised)


def test_a_full_disk_has_room_for_the_note(parts_of, tmp_path):
    written = tmp_path / ".step-000007.partial" / "__1_0.distcp"
    written.write_bytes(b"half")
    error = StorageError("the disk is full")
    assert parts_of(1).give_up(error) is error
    assert not written.exists() and (written.parent / ".part-1.json").exists()


def test_a_process_that_says_nothing_and_writes_nothing_is_given_up(parts_of, progress, monkeypatch):
    clock = iter(range(1_000_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="waited for process 1 to write its part, but no file"):
        parts_of(0).gathered({})
    assert set(progress.lines) == {"  step-000007: waiting for process 1 to write its part"}


def test_a_file_that_grows_is_waited_for(parts_of, monkeypatch, tmp_path):
    file = tmp_path / ".step-000007.partial" / "__1_0.distcp"
    clock = iter(range(1_000_000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    pauses = []

    def grow(seconds):
        pauses.append(seconds)
        with file.open("ab") as stream:
            stream.write(b"x")
        if len(pauses) == 3 * module._PATIENCE:
            note(tmp_path, 1, files="one")
            note(tmp_path, 2, files="two")

    monkeypatch.setattr(module.time, "sleep", grow)
    assert len(parts_of(0).gathered({})) == 3


@pytest.fixture
def clock(monkeypatch):
    """The times of pauses, which alone let time pass."""
    times = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: times.append(times[-1] + seconds))
    return times


def test_pauses_double_up_to_the_longest_and_what_is_waited_for_is_said_and_measured_at_its_times(parts_of, clock, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.125)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.5)
    monkeypatch.setattr(module, "_PATIENCE", 600)
    monkeypatch.setattr(module, "_SAY_EVERY", 100)
    notes, measured, said = parts_of(0), [], []
    monkeypatch.setattr(notes, "_size", lambda: measured.append(clock[-1]) or 0)
    monkeypatch.setattr(notes._progress, "say", lambda line: said.append(clock[-1]))
    with pytest.raises(CheckpointError, match="no file of this checkpoint grows any more"):
        notes.gathered({})
    assert clock[:5] == [0.0, 0.125, 0.375, 0.875, 1.375]
    # at the next to last measurement no file has grown for exactly as long as is waited
    assert measured == [10.375 + 10 * n for n in range(62)]
    assert said == [100.375 + 100 * n for n in range(6)]


def test_the_first_process_waits_for_readers_of_a_failure_as_long_as_is_said_and_no_longer(
    parts_of, clock, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "_READING", 1.0)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.25)
    folder = tmp_path / ".step-000007.partial"
    note(tmp_path, 2, failure="no")
    parts_of(0).give_up(ValueError())
    assert clock == [0.0, 0.25, 0.5, 0.75, 1.0] and not folder.exists()
    folder.mkdir()
    for number in (1, 2):
        note(tmp_path, number, failure="no")
    parts_of(0).give_up(ValueError())
    assert len(clock) == 5 and not folder.exists()


def test_of_a_folder_that_is_published_all_notes_are_gone(parts_of, tmp_path):
    for number in (1, 2):
        note(tmp_path, number)
    parts_of(0).remove_notes()
    assert not list((tmp_path / ".step-000007.partial").iterdir())


class Counted:
    """A source of batches that remembers one number."""

    step = 5

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, values):
        self.step = values["step"]


def test_a_source_goes_on_alone_and_is_refused_what_several_ranks_had_under_way():
    kept = SourceState(Counted(), ALONE).state_dict()
    source = Counted()
    source.step = 0
    SourceState(source, ALONE).load_state_dict(kept)
    assert source.step == 5
    stream = io.BytesIO()
    torch.save([{"step": 1}, {"step": 2}], stream)
    with pytest.raises(CheckpointError, match="of 2 data-parallel ranks, and this run has 1; resume with as many"):
        SourceState(source, ALONE).load_state_dict({"states": stream.getvalue()})
    assert source.step == 5


def test_of_ranks_that_read_the_same_rows_the_first_tells_their_place(monkeypatch):
    layout = Layout(data_shard=2, tensor=2)
    monkeypatch.setattr(state.dist, "all_gather_object", lambda everyone, own: everyone.__setitem__(slice(None), gathered(own)))

    def gathered(own):
        return [own | {"step": 10 * rank} for rank in range(layout.world_size)]

    kept = SourceState(Counted(), Mesh(layout, 0)).state_dict()
    for rank, expected in enumerate((0, 0, 20, 20)):
        source = Counted()
        SourceState(source, Mesh(layout, rank)).load_state_dict(kept)
        assert source.step == expected
