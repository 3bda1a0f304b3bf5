"""What the nearest tests notice: operators are changed in nine areas whose faults would be silent, one at a time.

    python benchmarks/mutation.py --seed 2028   # 100 changes, some minutes; with --journal FILE a stopped run goes on
    python benchmarks/mutation.py --again       # the recorded changes once more, in the code as it is now
    python benchmarks/mutation.py --control     # the nearest tests with nothing changed, and their seconds

A mutant is one changed operator, comparison, constant or `min` and `max`; loops that Numba compiles are left out, since each
would be compiled anew. `AREAS` names source files and beside each the test files of that code, chosen before anything is drawn:
what guards a loss are the tests of that loss. Every area has about the same number of mutants, and of an area every file. A
mutant that its nearest tests do not notice survives: either it changes nothing that can be seen, or a test is missing. The
tests of a file pass with nothing changed before its first mutant.

A mutant is named by its function, the statement and what is changed in it, so that `--again` finds it after lines moved; what
is not found again is listed as gone. Result: `mutation.json`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer", "tests")

ROOT = Path(__file__).parents[1]
NAME = "mutation"
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
_SWAPPED: Mapping[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}


#: Held while a child begins or a line is printed: a child has no other thread that would give a lock of its own back.
_ALONE = threading.Lock()


@dataclass(frozen=True)
class Mutant:
    """function: qualified within its module. statement: as `ast.unparse` writes it. ordinal: among equal changes in it."""

    function: str
    statement: str
    change: str
    ordinal: int


@dataclass(frozen=True)
class Place:
    """Where a mutant stands: bytes `start` to `end` of a file under `src/bessemer` become `new`."""

    file: str
    line: int
    start: int
    end: int
    new: bytes


def mutants(file: str, root: Path = ROOT) -> Iterator[tuple[Mutant, Place]]:
    """All mutants of a file, in the order of its text."""
    source = (root / "src" / "bessemer" / file).read_bytes()
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    seen: Counter[tuple[str, str, str]] = Counter()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    def between(left: ast.expr, right: ast.expr, old: str) -> tuple[int, int] | None:
        """The operator's own bytes; None where a bracket or a comment lies between its sides in a way that hides it."""
        begin, end = at(left.end_lineno or 0, left.end_col_offset or 0), at(right.lineno, right.col_offset)
        found = source[begin:end].find(old.encode())
        return None if found < 0 else (begin + found, begin + found + len(old))

    def changes(node: ast.AST) -> Iterator[tuple[str, int, int, bytes]]:
        sides: list[tuple[ast.AST, ast.expr, ast.expr]] = []
        match node:
            case ast.Compare():
                sides = list(zip(node.ops, [node.left, *node.comparators], node.comparators, strict=False))
            case ast.BinOp():
                sides = [(node.op, node.left, node.right)]
            case ast.BoolOp():
                sides = [(node.op, *pair) for pair in zip(node.values, node.values[1:], strict=False)]
            case ast.Constant(value=bool()):
                start = at(node.lineno, node.col_offset)
                yield f"{node.value} → {not node.value}", start, start + len(str(node.value)), str(not node.value).encode()
            case ast.Constant(value=int()):
                start, end = at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)
                yield f"{node.value} → {node.value + 1}", start, end, str(node.value + 1).encode()
            case ast.UnaryOp(op=ast.Not()):
                start = at(node.lineno, node.col_offset)
                yield "not → ", start, start + len("not"), b""
            case ast.Call(func=ast.Name(id="min" | "max" as name)):
                start, new = at(node.lineno, node.col_offset), "max" if name == "min" else "min"
                yield f"{name} → {new}", start, start + 3, new.encode()
        for operator, left, right in sides:
            if type(operator) in _SWAPPED:
                old, new = _SWAPPED[type(operator)]
                where = between(left, right, old)
                # a string that is joined or repeated only ends in an error
                if where is not None and not any(isinstance(side, ast.JoinedStr | ast.List) for side in (left, right)):
                    yield f"{old} → {new}", *where, new.encode()

    def visit(node: ast.AST, function: str, statement: ast.stmt | None) -> Iterator[tuple[Mutant, Place]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if any(isinstance(each, ast.Name) and each.id.startswith("compiled") for each in node.decorator_list):
                # Numba would compile the loop once more
                return
            inner = f"{function}.{node.name}".lstrip(".")
            for child in node.body:
                yield from visit(child, inner, child if isinstance(child, ast.stmt) else None)
            return
        # annotations and f-strings hold nothing that decides a result
        if isinstance(node, ast.JoinedStr | ast.arguments | ast.Raise | ast.Assert):
            return
        if isinstance(node, ast.stmt):
            statement = node
        if statement is not None and function:
            for change, start, end, new in changes(node):
                text = ast.unparse(statement).split("\n")[0]
                ordinal = seen[function, text, change]
                seen[function, text, change] += 1
                yield Mutant(function, text, change, ordinal), Place(file, getattr(node, "lineno", 0), start, end, new)
        # `strict` of `zip` is an assertion as well
        is_zip = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not (is_zip and isinstance(child, ast.keyword)):
                    yield from visit(child, function, statement)

    for child in ast.parse(source).body:
        yield from visit(child, "", None)


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


def noticed(tree: Path, tests: Sequence[str], limit: float) -> bool:
    """Whether one of the tests fails in `tree`, or does not end within the limit of seconds. In a child of this process, which
    has the heavy libraries loaded and nothing of Bessemer."""
    with _ALONE:
        child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree / "src"))
        os.environ["PYTHONPATH"] = str(tree / "src")
        sink = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(sink, descriptor)
        code = 1
        try:
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def judged(places: Mapping[Mutant, tuple[str, Place]], journal: Path, processes: int) -> dict[Mutant, str]:
    """Of every mutant: `noticed`, `survived`, or `no control`: its tests fail with nothing changed.

    journal: a line a mutant, from which a run that was stopped goes on at the same commit. processes: clones of the last commit
    in which tests run at the same time, beside the large files that they read.
    """
    commit = recording.when()["commit"]
    outcomes: dict[Mutant, str] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        kept = json.loads(line)
        if kept["commit"] == commit:
            outcomes[mutant_of(kept)] = kept["outcome"]
    with ExitStack() as stack:
        trees: SimpleQueue[Path] = SimpleQueue()
        for _ in range(processes):
            trees.put(_clone(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        written = stack.enter_context(journal.open("a", encoding="utf-8"))
        load_libraries()

        def judge(each: tuple[int, tuple[Mutant, str, Place]]) -> None:
            number, (mutant, area, place) = each
            tree = trees.get()
            try:
                tests = [f"tests/{test}" for test in AREAS[area][place.file]]
                seconds = _control(tree, tests)
                outcome = "no control"
                if seconds is not None:
                    outcome = "noticed" if _changed(tree, place, number, tests, 60 + 5 * seconds) else "survived"
            finally:
                trees.put(tree)
            outcomes[mutant] = outcome
            what = f"{place.file}:{place.line} {mutant.function}: {mutant.statement} [{mutant.change}]"
            with _ALONE:
                written.write(json.dumps(asdict(mutant) | {"outcome": outcome, "commit": commit}) + "\n")
                written.flush()
                print(f"{number}/{len(places)} {outcome:10} {what}", flush=True)

        numbered = enumerate(((mutant, *place) for mutant, place in places.items()), 1)
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(judge, [each for each in numbered if each[1][0] not in outcomes]))
    return outcomes


def _clone(folder: Path) -> Path:
    """The last commit in a folder of its own, beside the large files that tests read."""
    tree = folder / "bessemer"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    if (ROOT.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(ROOT.parent / "shared")
    return tree


#: By the tests the seconds that they took with nothing changed; None where one of them failed.
_CONTROLS: dict[tuple[str, ...], float | None] = {}


def _control(tree: Path, tests: list[str]) -> float | None:
    """Seconds that the tests take with nothing changed, measured once; None where one of them fails."""
    named = (*tests, str(tree))
    if named not in _CONTROLS:
        start = time.monotonic()
        _CONTROLS[named] = None if noticed(tree, tests, 1200) else time.monotonic() - start
    return _CONTROLS[named]


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
    """Where recorded mutants stand now, in the same files of `AREAS`, as far as there still are such."""
    files = {each["file"] for each in recorded} & {file for area in AREAS.values() for file in area}
    now = {file: dict(mutants(file)) for file in files if (ROOT / "src" / "bessemer" / file).exists()}
    places = {}
    for each in recorded:
        mutant = mutant_of(each)
        if mutant in now.get(each["file"], {}):
            places[mutant] = (each["area"], now[each["file"]][mutant])
    return places


def load_libraries() -> None:
    """Load what every test would, but nothing of Bessemer: a child begins with it."""
    from bessemer.core.environment import set_environment

    set_environment()
    for name in (
        "torch",
        "numpy",
        "pyarrow",
        "pytest",
        "hypothesis",
        "safetensors",
        "tokenizers",
        "pydantic",
        "jinja2",
        "httpx",
    ):
        __import__(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bessemer"]:
        del sys.modules[name]


def tables(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of every area how many mutants were drawn, how many noticed, and of how many that was lost when they were tried again."""
    first = figures["first"]["mutants"]
    noticed_first = [each for each in first if each["outcome"] == "noticed"]
    counts = [Counter(each["area"] for each in first), Counter(each["area"] for each in noticed_first)]
    columns = [("area", ""), ("changed", ",.0f"), ("noticed", ",.0f")]
    if "again" in figures:
        lost = {mutant_of(each) for each in figures["again"]["mutants"] if each["outcome"] not in ("noticed", "gone")}
        counts.append(Counter(each["area"] for each in noticed_first if mutant_of(each) in lost))
        columns.append(("noticed no longer", ",.0f"))
    rows = [(area, *(count[area] for count in counts)) for area in AREAS]
    rows.append(("all", *(count.total() for count in counts)))
    return {"areas": recording.table(columns, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants")
    parser.add_argument("--seed", type=int, default=2028)
    parser.add_argument("--again", action="store_true", help="those that are recorded, in the code as it is now")
    parser.add_argument("--journal", type=Path, help="a file from which a run that was stopped goes on")
    parser.add_argument("--control", action="store_true", help="run every file's tests with nothing changed")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "src", "tests"], capture_output=True).stdout:
        parser.error("src or tests have uncommitted changes; the mutants are made in clones of the last commit")
    if arguments.control:
        with tempfile.TemporaryDirectory() as folder:
            tree = _clone(Path(folder))
            load_libraries()
            for tests in dict.fromkeys(tests for files in AREAS.values() for tests in files.values()):
                seconds = _control(tree, [f"tests/{test}" for test in tests])
                print("fails" if seconds is None else f"{seconds:5.1f} s", *tests, flush=True)
        return
    if arguments.again:
        figures = dict(recording.load(NAME)["figures"])
        every, seed = figures["first"]["mutants"], figures["first"]["seed"]
        places = found_again(every)
    else:
        figures, places, seed = {}, drawn(arguments.count, arguments.seed), arguments.seed
        every = [asdict(mutant) | {"area": area, "file": place.file} for mutant, (area, place) in places.items()]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = judged(places, arguments.journal or Path(folder) / "journal.jsonl", arguments.processes)
    listed = []
    for each in every:
        mutant = mutant_of(each)
        line = {"line": places[mutant][1].line} if mutant in places else {}
        listed.append(each | {"outcome": outcomes.get(mutant, "gone")} | line)
    figures["again" if arguments.again else "first"] = {"mutants": listed, "seed": seed} | recording.when()
    print(recording.save(NAME, figures, tables=tables(figures)))
    print(Counter(each["outcome"] for each in listed))


if __name__ == "__main__":
    main()
