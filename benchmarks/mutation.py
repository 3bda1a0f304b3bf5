"""What the suite notices: operators of core files are changed, one at a time, and the tests that reach them are run.

    python benchmarks/mutation.py --count 300     # once: `pip install coverage`; about an hour on two cores
    python benchmarks/mutation.py --again         # the recorded changes once more, wherever their code has moved to

A mutant is one changed operator, comparison, constant or `min` and `max`, drawn by a seed from `FILES`. First the default suite
runs once under coverage, which tells for every line the tests that reach it. Of each mutant up to `MOST_TESTS` of them are run,
the fastest first, those within `MOST_SECONDS`. A mutant that no test notices survives: either it changes nothing that can be
seen, or a test is missing. A line that no test reaches counts as surviving too.

A mutant is named by its function, the statement and what is changed in it, not by file and line, so that `--again` finds it
after the code was moved; what is not found again is listed as gone. Result: `mutation.json`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import recording

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer", "tests")

ROOT = Path(__file__).parents[1]
NAME = "mutation"
SEED = 7
#: What decides results: of each package the files whose faults would be silent.
FILES = (
    *("core/statistics.py", "core/store.py", "core/records.py", "core/stage.py"),
    *("data/corpus/reader.py", "data/filters/urls.py", "data/stages/collect.py"),
    *(
        "tokenization/bpe.py",
        "tokenization/tokenizer.py",
        "tokenization/split.py",
        "tokenization/shards.py",
        "tokenization/chat.py",
    ),
    *(
        "model/layers/attention_backends.py",
        "model/layers/cache.py",
        "model/decoder.py",
        "model/layers/feed_forward.py",
        "model/costs.py",
    ),
    *("model/quantisation/integers.py", "model/adapters/__init__.py", "model/layers/delta_net.py"),
    *("training/loop.py", "training/trainer.py", "training/chunked_head.py", "training/data/packing.py"),
    *(
        "training/data/batch.py",
        "training/data/batches.py",
        "training/optim/muon.py",
        "training/checkpoint/manager.py",
        "training/objectives.py",
    ),
    *("posttraining/data/packing.py", "posttraining/data/encoding.py", "posttraining/data/splitting.py"),
    *("inference/scheduling/scheduler.py", "inference/scheduling/block_tables.py"),
    *("inference/sampling/distribution.py", "inference/sampling/penalties.py", "inference/sampling/sampler.py"),
    *("inference/speculation/verification.py", "inference/request.py", "inference/engine_core.py"),
    *("evaluation/baselines.py", "evaluation/comparison.py", "evaluation/quantisation.py", "evaluation/contamination.py"),
    *("serving/runtime/bodies.py", "serving/runtime/gate.py", "serving/runtime/models.py"),
)
_OUTCOMES = ("noticed", "survived", "not reached", "no control", "gone")
MOST_TESTS = 60
MOST_SECONDS = 15.0
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
                # coverage sees no line of a loop that Numba compiles
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
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, function, statement)

    for child in ast.parse(source).body:
        yield from visit(child, "", None)


def drawn(count: int, seed: int) -> dict[Mutant, Place]:
    """As many mutants of `FILES`, of every file about the same number."""
    rng = random.Random(seed)
    of_files = [list(mutants(file)) for file in FILES]
    for found in of_files:
        rng.shuffle(found)
    chosen: list[tuple[Mutant, Place]] = []
    while len(chosen) < count and any(of_files):
        chosen += [found.pop() for found in of_files if found]
    return dict(sorted(chosen[:count], key=lambda each: (each[1].file, each[1].start)))


def found_again(wanted: Sequence[Mutant]) -> dict[Mutant, Place]:
    """Where mutants stand now, in any file of the package."""
    files = [path.relative_to(ROOT / "src" / "bessemer").as_posix() for path in (ROOT / "src" / "bessemer").rglob("*.py")]
    # of equal code in two modules that of `FILES` is meant
    files.sort(key=lambda file: (file not in FILES, file))
    now: dict[Mutant, Place] = {}
    for file in files:
        for mutant, place in mutants(file):
            now.setdefault(mutant, place)
    return {mutant: now[mutant] for mutant in wanted if mutant in now}


def reached(files: set[str], tree: Path) -> dict[tuple[str, int], list[str]]:
    """The tests that reach each line of the files, the fastest first, from one run of the default suite in `tree`."""
    sources = ",".join(f"{tree}/src/bessemer/{file}" for file in sorted(files))
    settings = tree / "mutation.coveragerc"
    settings.write_text(
        f"[run]\ndynamic_context = test_function\nsource =\ninclude = {sources}\ndata_file = {tree}/.coverage\n",
        encoding="utf-8",
    )
    plugin = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "COVERAGE_CORE": "ctrace"}
    subprocess.run([*plugin, f"--junitxml={tree}/results.xml"], cwd=tree, env=environment, check=False)
    import coverage

    from suite import read_results

    seconds = {name: taken for name, (outcome, taken) in read_results(tree / "results.xml").items() if outcome == "passed"}
    # a context is a function; its parametrised cases share it
    cases: dict[str, list[str]] = defaultdict(list)
    for name in seconds:
        cases[name.partition("[")[0].replace("/", ".").replace("::", ".")].append(name)
    data = coverage.CoverageData(str(tree / ".coverage"))
    data.read()
    found: dict[tuple[str, int], list[str]] = {}
    for file in files:
        for line, contexts in data.contexts_by_lineno(f"{tree}/src/bessemer/{file}").items():
            names = {name for context in contexts for name in cases.get(context.removeprefix("tests."), ())}
            found[file, line] = sorted(names, key=lambda name: seconds[name])
    (tree / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return found


def of_a_mutant(tests: Sequence[str], seconds: Mapping[str, float]) -> list[str]:
    """Those of the tests that are run: the fastest, within the limits, at least three."""
    chosen, total = [], 0.0
    for test in tests[:MOST_TESTS]:
        total += seconds[test]
        if total > MOST_SECONDS and len(chosen) >= 3:
            break
        chosen.append(test)
    return chosen


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


def judged(places: Mapping[Mutant, Place], processes: int) -> dict[Mutant, str]:
    """Of every mutant: `noticed`, `survived`, `not reached` by a test, or `no control`: its tests fail with nothing changed."""
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(n) / "bessemer" for n in range(processes)]
        for tree in trees:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
            if (ROOT.parent / "shared").exists():
                (tree.parent / "shared").symlink_to(ROOT.parent / "shared")
        by_line = reached({place.file for place in places.values()}, trees[0])
        seconds = json.loads((trees[0] / "seconds.json").read_text(encoding="utf-8"))
        load_libraries()
        free: SimpleQueue[Path] = SimpleQueue()
        for tree in trees:
            free.put(tree)

        def judge(each: tuple[int, tuple[Mutant, Place]]) -> tuple[Mutant, str]:
            number, (mutant, place) = each
            tests = of_a_mutant(by_line.get((place.file, place.line), []), seconds)
            if not tests:
                return mutant, "not reached"
            tree = free.get()
            path = tree / "src" / "bessemer" / place.file
            whole = path.read_bytes()
            named = ["tests/" + test.replace("::", ".py::", 1) for test in tests]
            limit = 60 + 5 * sum(seconds[test] for test in tests)
            try:
                if noticed(tree, named, limit):
                    # what fails with nothing changed says nothing
                    outcome = "no control"
                else:
                    path.write_bytes(whole[: place.start] + place.new + whole[place.end :])
                    # a compiled module is told by the second and the size of its source
                    os.utime(path, (1e9 + number, 1e9 + number))
                    outcome = "noticed" if noticed(tree, named, limit) else "survived"
            finally:
                path.write_bytes(whole)
                shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
                free.put(tree)
            with _ALONE:
                print(f"{number + 1}/{len(places)} {outcome:10} {place.file}:{place.line} {mutant.change}", flush=True)
            return mutant, outcome

        with ThreadPoolExecutor(processes) as pool:
            return dict(pool.map(judge, enumerate(places.items())))


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
    rows = []
    for name in ("first", "again"):
        if name in figures:
            counts = Counter(each["outcome"] for each in figures[name]["mutants"])
            rows.append((figures[name]["commit"], *(counts[outcome] for outcome in _OUTCOMES)))
    columns = [("commit", ""), *((outcome, ",.0f") for outcome in _OUTCOMES)]
    return {"outcomes": recording.table(columns, rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants")
    parser.add_argument("--again", action="store_true", help="those that are recorded, in the code as it is now")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    recording.needs("coverage", install="pip install coverage")
    if subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "src", "tests"], capture_output=True).stdout:
        parser.error("src or tests have uncommitted changes; the mutants are made in clones of the last commit")
    if arguments.again:
        figures = dict(recording.load(NAME)["figures"])
        before = {
            Mutant(**{key: each[key] for key in Mutant.__annotations__}): each["outcome"]
            for each in figures["first"]["mutants"]
        }
        places = found_again(list(before))
    else:
        figures, before, places = {}, {}, drawn(arguments.count, SEED)
    outcomes = judged(places, arguments.processes)
    every = list(before) or list(places)
    listed = [
        asdict(mutant)
        | {"outcome": outcomes.get(mutant, "gone")}
        | ({"file": places[mutant].file, "line": places[mutant].line} if mutant in places else {})
        for mutant in every
    ]
    figures["again" if arguments.again else "first"] = {"mutants": listed, "seed": SEED} | recording.when()
    print(recording.save(NAME, figures, tables=tables(figures)))
    print(Counter(each["outcome"] for each in listed))
    for mutant, outcome in outcomes.items():
        if outcome != "noticed" and before.get(mutant, "noticed") == "noticed":
            place = places[mutant]
            print(f"{outcome}: {place.file}:{place.line} {mutant.function}: {mutant.statement} [{mutant.change}]")


if __name__ == "__main__":
    main()
