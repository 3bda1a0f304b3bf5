"""One greedy decode step of a plain model, traced: a reader who follows it opens few files, none of them long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bessemer
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.cpu_kernels import library, unavailable
from tests.inference.models import small_decoder, small_tokenizer

#: Engine, core, scheduler with its tables and pool, batch, runner, compiled step, sampler, request, and text of tokens.
MOST_FILES = 13
MOST_LINES = 400
PACKAGE = Path(bessemer.__file__).parent


def files_of(call):
    """The files of the package that a call passes through, relative to it."""
    files = set()

    def watch(frame, event, _):
        if event == "call":
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {Path(file).relative_to(PACKAGE).as_posix() for file in files if Path(file).is_relative_to(PACKAGE)}


@pytest.fixture
def engine(tmp_path):
    """An engine of a dense model, with a block size that the traced steps pass."""

    def of(**settings):
        return Engine(small_decoder("dense"), small_tokenizer(tmp_path), config=EngineConfig(block_size=4, **settings))

    return of


def decode_steps(engine, count=10):
    """The files of each of some decode steps of one greedy request, after the step that reads its prompt."""
    request = engine.prepare([1, 2, 3], SamplingParams(temperature=0, max_tokens=count + 2, ignore_eos=True))
    engine.begin(request)
    engine.step()
    steps = [files_of(engine.step) for _ in range(count)]
    assert len(request.token_ids) == count + 1, "each step makes a token"
    return steps


def test_a_greedy_step_passes_few_files_none_of_them_long(engine):
    if library() is None:
        pytest.skip(unavailable())
    for files in decode_steps(engine(cpu_kernels="on", threads=1)):
        assert "inference/engine_core.py" in files and "inference/execution/compiled_steps.py" in files
        assert len(files) <= MOST_FILES, " ".join(sorted(files))
        long = [file for file in files if len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) > MOST_LINES]
        assert not long


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_a_greedy_step_stays_out_of_speculation(engine, kernels):
    if kernels == "on" and library() is None:
        pytest.skip(unavailable())
    for files in decode_steps(engine(cpu_kernels=kernels)):
        assert not [file for file in files if "speculation" in file or "beam_search" in file]


def test_a_greedy_step_passes_no_long_file_where_the_modules_compute_it(engine):
    # the parts of the decoder are files of their own, so there are more
    for files in decode_steps(engine(cpu_kernels="off")):
        assert "inference/execution/runner.py" in files
        assert not [file for file in files if len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) > MOST_LINES]
