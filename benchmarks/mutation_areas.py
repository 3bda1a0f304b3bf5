"""What the nearest tests notice: operators are changed in nine areas whose faults would be silent, one at a time.

    python benchmarks/mutation_areas.py --seed 2027   # 100 changes, some minutes; with --journal FILE a stopped run goes on
    python benchmarks/mutation_areas.py --again       # the recorded changes once more, in the code as it is now
    python benchmarks/mutation_areas.py --survivors   # of those the ones alone that no test noticed when they were drawn
    python benchmarks/mutation_areas.py --control     # the nearest tests with nothing changed, and their seconds

Changes are those of `mutation.py`. That one runs the fastest tests of the whole suite that reach a line, as coverage tells;
this one runs the test files that stand in `AREAS` beside each source file, chosen before anything is drawn: what guards a loss
are the tests of that loss. Every area has about the same number of changes, and of an area every file. The tests of a file
pass with nothing changed before its first change. Result: `mutation_areas.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recording
from mutation import ROOT, Mutant, Place, load_libraries, mutants, noticed

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer", "tests")

NAME = "mutation_areas"
_SCHEDULER = ("inference/test_scheduler.py", "inference/test_block_pool.py", "inference/test_scheduler_states.py")
_CHECKPOINTS = ("training/test_checkpoint_parts.py", "training/test_checkpoint.py")
#: Of each area its files under `src/bessemer`, and of each file its nearest tests under `tests`.
AREAS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "losses": {
        "posttraining/preference/losses.py": ("posttraining/test_pair_losses.py", "posttraining/test_kto.py"),
        "posttraining/rl/losses.py": ("posttraining/test_policy_losses.py", "posttraining/test_policy_objective.py"),
        "posttraining/distillation/losses.py": ("posttraining/test_distillation_losses.py",),
        "training/objectives.py": ("training/test_objectives.py", "training/test_moe_losses.py"),
    },
    "masks": {
        "model/layers/attention_mask.py": ("model/test_positions.py", "model/test_attention_backends.py"),
        "posttraining/data/encoding.py": (
            *("posttraining/test_encoding.py", "posttraining/test_turns.py", "posttraining/test_packing.py"),
        ),
        "posttraining/data/packing.py": (
            *("posttraining/test_packing.py", "posttraining/test_preference_objective.py", "posttraining/test_kto.py"),
            "posttraining/test_unlearning.py",
        ),
        "training/data/packing.py": ("training/test_packing.py", "training/test_document_batches.py"),
    },
    "scheduler": {
        "inference/scheduling/scheduler.py": _SCHEDULER,
        "inference/scheduling/queues.py": _SCHEDULER,
        "inference/scheduling/block_tables.py": _SCHEDULER,
    },
    "auth": {
        "serving/runtime/gate.py": ("serving/test_gate.py", "serving/test_keys.py"),
        "serving/runtime/clients.py": ("serving/test_keys.py",),
    },
    "resume": {
        "training/checkpoint/manager.py": _CHECKPOINTS,
        "training/checkpoint/state.py": _CHECKPOINTS,
        "training/checkpoint/storage.py": _CHECKPOINTS,
    },
    "deduplication": {
        "data/deduplication/minhash.py": ("data/deduplication/test_near.py",),
        "data/deduplication/near.py": ("data/deduplication/test_near.py", "data/deduplication/test_chain.py"),
        "data/deduplication/removals.py": ("data/deduplication/test_removals.py", "data/deduplication/test_chain.py"),
        "data/deduplication/words.py": ("data/deduplication/test_words.py", "data/deduplication/test_exact.py"),
    },
    "filters": {
        "data/filters/measures.py": (
            *("data/test_gopher.py", "data/test_gopher_repetition.py", "data/test_c4.py", "data/test_fineweb.py"),
        ),
        "data/filters/rules.py": (
            *("data/test_gopher.py", "data/test_gopher_repetition.py", "data/test_c4.py", "data/test_fineweb.py"),
        ),
        "data/filters/code.py": ("data/test_code.py",),
        "data/filters/urls.py": ("data/test_scores.py",),
    },
    "tokenizers": {
        "tokenization/bpe.py": ("tokenization/test_bpe.py",),
        "tokenization/split.py": ("tokenization/test_split.py",),
        "tokenization/control_tokens.py": ("tokenization/test_control_tokens.py",),
        "tokenization/tokenizer.py": (
            *("tokenization/test_tokenizer.py", "tokenization/test_offsets.py", "tokenization/test_chat.py"),
            "tokenization/test_continuations.py",
        ),
        "tokenization/shards.py": ("tokenization/test_shards.py",),
    },
    "limits": {
        "serving/runtime/admission.py": ("serving/test_worker.py", "serving/test_model_pool.py"),
        "serving/runtime/bodies.py": ("serving/test_protocol.py", "serving/test_limits.py"),
        "core/sandbox/resources.py": ("core/sandbox/test_cgroup.py", "core/sandbox/test_sandbox.py"),
    },
}


def drawn(count: int, seed: int) -> dict[Mutant, tuple[str, Place]]:
    """So many mutants with their areas: in turns one of each area, of an area in turns one of each of its files."""
    rng = random.Random(seed)
    queues: dict[str, Iterator[tuple[Mutant, Place]]] = {}
    for area, files in AREAS.items():
        of_files = [list(mutants(file)) for file in files]
        for found in of_files:
            rng.shuffle(found)
        queues[area] = _in_turns(of_files)
    chosen: dict[Mutant, tuple[str, Place]] = {}
    while len(chosen) < count:
        before = len(chosen)
        for area, queue in queues.items():
            if len(chosen) < count and (each := next(queue, None)) is not None:
                chosen[each[0]] = (area, each[1])
        assert len(chosen) > before, "fewer mutants than asked for"
    return chosen


def _in_turns(lists: list[list[Any]]) -> Iterator[Any]:
    while any(lists):
        for each in lists:
            if each:
                yield each.pop()


@contextmanager
def _clone() -> Iterator[Path]:
    """The last commit in a folder of its own, beside the large files that tests read."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "bessemer"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        if (ROOT.parent / "shared").exists():
            (tree.parent / "shared").symlink_to(ROOT.parent / "shared")
        yield tree


def judged(places: Mapping[Mutant, tuple[str, Place]], journal: Path) -> dict[Mutant, str]:
    """Of every mutant: `noticed`, `survived`, or `no control`: its tests fail with nothing changed.

    journal: a line a mutant, from which a run that was stopped goes on at the same commit.
    """
    commit = recording.when()["commit"]
    outcomes: dict[Mutant, str] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        kept = json.loads(line)
        if kept["commit"] == commit:
            outcomes[mutant_of(kept)] = kept["outcome"]
    with _clone() as tree, journal.open("a", encoding="utf-8") as written:
        load_libraries()
        controls: dict[tuple[str, ...], float | None] = {}
        for number, (mutant, (area, place)) in enumerate(places.items(), 1):
            if mutant in outcomes:
                continue
            named = AREAS[area][place.file]
            tests = [f"tests/{test}" for test in named]
            if named not in controls:
                controls[named] = _control(tree, tests)
            seconds = controls[named]
            if seconds is None:
                outcome = "no control"
            else:
                outcome = "noticed" if _changed(tree, place, number, tests, 60 + 5 * seconds) else "survived"
            outcomes[mutant] = outcome
            written.write(json.dumps(asdict(mutant) | {"outcome": outcome, "commit": commit}) + "\n")
            written.flush()
            what = f"{mutant.function}: {mutant.statement} [{mutant.change}]"
            print(f"{number}/{len(places)} {outcome:10} {place.file}:{place.line} {what}", flush=True)
    return outcomes


def _control(tree: Path, tests: list[str]) -> float | None:
    """Seconds that the tests take with nothing changed; None where one of them fails."""
    start = time.monotonic()
    return None if noticed(tree, tests, 1200) else time.monotonic() - start


def _changed(tree: Path, place: Place, number: int, tests: list[str], limit: float) -> bool:
    path = tree / "src" / "bessemer" / place.file
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: place.start] + place.new + whole[place.end :])
        # a compiled module is told by the second and the size of its source
        os.utime(path, (1e9 + number, 1e9 + number))
        return noticed(tree, tests, limit)
    finally:
        path.write_bytes(whole)
        os.utime(path, (1e9, 1e9))


def mutant_of(recorded: Mapping[str, Any]) -> Mutant:
    """The mutant that a line of a journal or of a result names."""
    return Mutant(**{key: recorded[key] for key in Mutant.__annotations__})


def found_again(recorded: list[dict[str, Any]]) -> dict[Mutant, tuple[str, Place]]:
    """Where recorded mutants stand now, in the same files."""
    now = {file: dict(mutants(file)) for file in dict.fromkeys(each["file"] for each in recorded)}
    places = {}
    for each in recorded:
        mutant = mutant_of(each)
        if mutant in now[each["file"]]:
            places[mutant] = (each["area"], now[each["file"]][mutant])
    return places


def tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of every area how many mutants were drawn, how many noticed at once, and, once they were tried again, how many of the
    survivors tests notice since."""
    first = figures["first"]["mutants"]
    counts = [
        Counter(each["area"] for each in first),
        Counter(each["area"] for each in first if each["outcome"] == "noticed"),
    ]
    columns = [("area", ""), ("changed", ",.0f"), ("noticed", ",.0f")]
    later = next((figures[name]["mutants"] for name in ("survivors", "again") if name in figures), None)
    if later is not None:
        survived = {mutant_of(each) for each in first if each["outcome"] != "noticed"}
        noticed_since = (each["area"] for each in later if each["outcome"] == "noticed" and mutant_of(each) in survived)
        counts.append(Counter(noticed_since))
        columns.append(("survivors that tests notice since", ",.0f"))
    rows = [(area, *(count[area] for count in counts)) for area in AREAS]
    rows.append(("all", *(count.total() for count in counts)))
    return {"areas": recording.table(columns, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants")
    parser.add_argument("--seed", type=int, default=2027)
    parser.add_argument("--again", action="store_true", help="those that are recorded, in the code as it is now")
    parser.add_argument("--survivors", action="store_true", help="of these alone those that no test noticed when drawn")
    parser.add_argument("--journal", type=Path, help="a file from which a run that was stopped goes on")
    parser.add_argument("--control", action="store_true", help="run every file's tests with nothing changed")
    arguments = parser.parse_args()
    if subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "src", "tests"], capture_output=True).stdout:
        parser.error("src or tests have uncommitted changes; the mutants are made in a clone of the last commit")
    if arguments.control:
        with _clone() as tree:
            load_libraries()
            for tests in dict.fromkeys(tests for files in AREAS.values() for tests in files.values()):
                seconds = _control(tree, [f"tests/{test}" for test in tests])
                print("fails" if seconds is None else f"{seconds:5.1f} s", *tests, flush=True)
        return
    run = "survivors" if arguments.survivors else "again" if arguments.again else "first"
    if run != "first":
        figures = dict(recording.load(NAME)["figures"])
        every, seed = figures["first"]["mutants"], figures["first"]["seed"]
        if arguments.survivors:
            every = [each for each in every if each["outcome"] != "noticed"]
        places = found_again(every)
    else:
        figures, places, seed = {}, drawn(arguments.count, arguments.seed), arguments.seed
        every = [asdict(mutant) | {"area": area, "file": place.file} for mutant, (area, place) in places.items()]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = judged(places, arguments.journal or Path(folder) / "journal.jsonl")
    listed = []
    for each in every:
        mutant = mutant_of(each)
        line = {"line": places[mutant][1].line} if mutant in places else {}
        listed.append(each | {"outcome": outcomes.get(mutant, "gone")} | line)
    figures[run] = {"mutants": listed, "seed": seed} | recording.when()
    print(recording.save(NAME, figures, tables=tables(figures)))
    print(Counter(each["outcome"] for each in listed))


if __name__ == "__main__":
    main()
