"""The application on Ray Serve: starts the entrance and the replicas, and stops them when their requests have ended.

`PrefixRouter` chooses a replica for a request: one that has the beginning of its prompt in its cache, or the least busy one.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import random
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import redirect_stderr, suppress
from types import FrameType
from typing import Any, cast

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.serving.app import Pages
from bessemer.serving.config import ServingConfig
from bessemer.serving.ray.entrance import Entrance, unavailable
from bessemer.serving.ray.forwarding import Forwarded, Part, PrefixMemory
from bessemer.serving.ray.replica import EngineReplica, Measured
from bessemer.serving.responses.protocol import MemoryStore
from bessemer.serving.runtime.models import Opening
from bessemer.serving.runtime.served import Served
from bessemer.serving.server import KEEP_ALIVE_SECONDS, address_of, ask_questions, listen, open_many_files, request_log

#: Share of a prompt that a replica must have seen to be chosen for it.
_MATCH_RATE = 0.25
#: How many requests more than the least busy one it may have then.
_IMBALANCE = 4
_PAUSE_SECONDS = 0.002


class PrefixRouter(FIFOMixin, RequestRouter):
    """Ray's request router for `EngineReplica.answer`.

    A replica goes to the request that it was chosen for, and to the oldest one where that has found another. Without the
    second half, that is without `FIFOMixin`, Ray 2.59 forgets a request whose routing task ends while others are routed.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Ray calls it in place of a constructor."""
        self._memory = PrefixMemory()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; within one the least busy that accepts is taken."""
        if pending_request is None:
            # Ray has more tasks than requests for a moment: one that never pauses would keep all others from the event loop
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            # else Ray asks again and again without a pause while no replica has a place
            pending_request.routing_context.should_backoff = True
        prompt = _prompt(pending_request)
        matches = self._memory.matches(prompt, [_name(one.replica_id) for one in candidate_replicas]) if prompt else {}
        busy = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        least = min(busy.values(), default=0)
        chosen = [
            one
            for one in candidate_replicas
            if matches.get(_name(one.replica_id), 0) >= max(_MATCH_RATE, max(matches.values(), default=0))
            and busy[one.replica_id] - least <= _IMBALANCE
        ]
        others = [one for one in candidate_replicas if one not in chosen]
        # Ray asks the replicas of a rank how busy they are: two at random keep that cheap
        pairs = random.sample(others, min(2, len(others)))
        return [rank for rank in (chosen, pairs) if rank]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """Ray asks it first, for the request that a replica was chosen for."""
        found: PendingRequest | None = self._get_pending_request_matching_internal_request_id(request_metadata)
        return found

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """A request has been sent to a replica."""
        if prompt := _prompt(pending_request):
            self._memory.remember(prompt, _name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that there are from now on."""
        super().update_replicas(replicas)
        self._memory.keep([_name(one.replica_id) for one in replicas])


def _prompt(pending: PendingRequest | None) -> str:
    asked: Sequence[object] = () if pending is None else pending.args
    return next((one.prompt for one in asked if isinstance(one, Forwarded)), "")


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)


# read when Ray is loaded: on a busy machine its proxy takes longer than 5 s to load, and is then ended before it is there
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

_APPLICATION = "bessemer"
#: More than any process is asked at once.
_MOST_REQUESTS = 100_000
#: Seconds between two looks at a replica's health, and for which it may take to say.
_HEALTH_SECONDS = 5.0
#: For what all replicas are asked.
_ALL_SECONDS = 60.0
#: For a replica to end what it is in when it is stopped: the entrance has waited before.
_GRACE_SECONDS = 2.0
#: What makes the pages, in the process of each replica.
MakePages = Callable[[], Callable[[Served], Pages]]


class RayReplicas:
    """The replicas behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def ask(self, asked: Forwarded) -> AsyncGenerator[Part, None]:
        """The answer of one of them."""
        answering = self._streaming.answer.remote(asked)
        try:
            async for part in answering:
                yield part
        except (DeploymentUnavailableError, RayError):
            raise unavailable("the replica that answered has ended; try again in a moment") from None
        finally:
            # of an answer that is over, nothing happens; one that never began raises again what is told already
            with suppress(Exception):
                answering.cancel()

    async def ask_all(self, asked: Forwarded) -> Sequence[Sequence[Part]]:
        """The answers of all. Raises ApiError where one gives none."""
        found = await self._of_all("whole_answer", asked)
        if any(isinstance(one, BaseException) for one in found):
            raise unavailable("a replica did not answer; try again in a moment")
        return found

    async def measure(self) -> Sequence[Sequence[Measured]]:
        """The statistics of those that answer."""
        return [one for one in await self._of_all("measured") if not isinstance(one, BaseException)]

    async def count_ready(self) -> int:
        """How many can answer requests."""
        return sum(one is True for one in await self._of_all("is_ready"))

    async def _of_all(self, method: str, *given: Any) -> list[Any]:
        """What each replica returns, or the error that it ended in; none where there is no replica."""
        try:
            found: list[Any] = await self._handle.broadcast(method, *given).results_async(
                timeout_s=_ALL_SECONDS, return_exceptions=True
            )
        except (DeploymentUnavailableError, RayError, TimeoutError):
            return []
        return found


class Ingress:
    """What Ray runs as the entrance's replica."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engines: Any, name: str, config: ServingConfig, public: Collection[str]
    ) -> None:
        """engines: the handle of the deployment of `EngineReplica`."""
        open_many_files()
        # to the log of this process, which Ray keeps
        self._log = request_log(config.request_log)
        self._log.__enter__()
        self.entrance = Entrance(RayReplicas(engines), name, config, public)
        self._watching = asyncio.create_task(self.entrance.watch_keys())

    def drain(self) -> None:
        """Begin nothing new."""
        self.entrance.is_draining = True

    def requests(self) -> int:
        """Requests under way."""
        return self.entrance.requests


async def _application(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application of the entrance's replica."""
    if scope["type"] == "lifespan":
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})
        return
    ingress = ray_serve.get_replica_context().servable_object
    assert isinstance(ingress, Ingress)
    await ingress.entrance(scope, receive, send)


def _build() -> ASGIApp:
    return _application


def serve_on_ray(
    opening: Opening,
    config: ServingConfig,
    replicas: int,
    *,
    say: Callable[[str], None] = print,
    make_pages: MakePages | None = None,
    public: Collection[str] = (),
    questions: Sequence[str] = (),
) -> None:
    """Serve a model by several replicas until interrupted, on the cluster of RAY_ADDRESS or on one that is started here.

    The model's place, and those of its adapters, must be there on every machine. make_pages, public: what is shown beside the
    API, and its paths that need no key. say, questions: as for `serve`. After SIGTERM nothing new is begun, and what is under
    way gets `config.drain_seconds`; a second one ends it.

    Raises ConfigError for more replicas than the cluster has room for, and BessemerError for replicas that do not start.
    """
    with listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        url = address_of(listener)
    try:
        # a dashboard is of a cluster; one that is there already keeps its own
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"--engine ray: no cluster answers: {_last_line(error)}") from None
    stop, is_ours = _Stop(), False
    try:
        options = _share(opening, replicas)
        if _is_running():
            raise ConfigError("--engine ray: Ray Serve runs on this cluster already; stop it, or use another cluster")
        is_ours = True
        ray_serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS),
            logging_config=LoggingConfig(enable_access_log=False),
        )
        keeper = ray.remote(MemoryStore).options(num_cpus=0, max_restarts=-1).remote()
        # keys are the entrance's
        behind = config.with_changes(api_key=None, keys=None)
        engines = ray_serve.deployment(
            name="Engine",
            num_replicas=replicas,
            # a replica refuses generations itself when it is full, and answers all else
            max_ongoing_requests=_MOST_REQUESTS,
            ray_actor_options=options,
            health_check_period_s=_HEALTH_SECONDS,
            health_check_timeout_s=6 * _HEALTH_SECONDS,
            graceful_shutdown_timeout_s=_GRACE_SECONDS,
            request_router_config=RequestRouterConfig(request_router_class=cast(Any, PrefixRouter)),
        )(EngineReplica)
        ingress = ray_serve.deployment(
            name="Ingress",
            num_replicas=1,
            max_ongoing_requests=_MOST_REQUESTS,
            ray_actor_options={"num_cpus": 0},
            graceful_shutdown_timeout_s=_GRACE_SECONDS,
        )(ray_serve.ingress(_build)(Ingress))
        try:
            handle = ray_serve.run(
                ingress.bind(engines.bind(opening, behind, make_pages, keeper), opening.name, config, public),
                name=_APPLICATION,
                route_prefix="/",
                logging_config=LoggingConfig(enable_access_log=False),
            )
        except RuntimeError as error:
            raise BessemerError(f"the replicas did not start: {_last_line(error)}") from None
        shown = "" if make_pages is None else f"chat at {url} · "
        say(f"{opening.name}: {shown}OpenAI API at {url}/v1 · {replicas} replicas · Ctrl-C stops")
        if questions:
            ask_questions(f"{url}/v1", opening.name, questions, say)
            return
        stop.wait()
        if stop.is_gentle:
            _drain(handle, config.drain_seconds, stop)
    finally:
        # Ray tells of the tasks that it ends
        with suppress(Exception), redirect_stderr(io.StringIO()):
            if is_ours:
                ray_serve.shutdown()
            ray.shutdown()
        stop.close()


class _Stop:
    """SIGTERM and Ctrl-C, while there is something to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._signals = 0
        #: Whether what is under way may end by itself.
        self.is_gentle = False
        self._before = {each: signal.signal(each, self._hear) for each in (signal.SIGTERM, signal.SIGINT)}

    @property
    def is_urgent(self) -> bool:
        """Whether a second signal came."""
        return self._signals > 1

    def wait(self) -> None:
        """Until the first signal."""
        # a wait without a limit hears no signal on Windows
        while not self._asked.wait(0.5):
            pass

    def close(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.is_gentle = self._signals == 1 and number == signal.SIGTERM
        self._asked.set()


def _drain(handle: Any, seconds: float, stop: _Stop) -> None:
    """Begin nothing new, and wait for what is under way."""
    handle.drain.remote().result()
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.is_urgent and handle.requests.remote().result() > 0:
        time.sleep(0.1)


def _is_running() -> bool:
    """Whether somebody's Ray Serve runs on the cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _share(opening: Opening, replicas: int) -> dict[str, Any]:
    """What Ray reserves for each replica: its share of the processors, a GPU where there are some. Raises ConfigError."""
    there = ray.cluster_resources()
    if opening.device in ("auto", "cuda") and there.get("GPU", 0) > 0:
        each, what = 1.0, "GPU"
    else:
        # a replica computes on one machine
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        each = float(opening.engine.threads or max(1, min(int(there.get("CPU", 0)) // replicas, int(largest))))
        what = "CPU"
    if each * replicas > there.get(what, 0):
        raise ConfigError(
            f"--replicas {replicas}: each needs {each:g} of the cluster's {there.get(what, 0):g} {what}s; ask for fewer, or "
            "give each fewer --threads"
        )
    return {"num_cpus": 1, "num_gpus": each} if what == "GPU" else {"num_cpus": each}


def _last_line(error: Exception) -> str:
    """What an error that another process sent comes down to."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
