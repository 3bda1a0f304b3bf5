"""The application on Ray Serve: starts the entrance and the replicas, and drains them.

`PrefixRouter` chooses the replica for a request: one that has the prompt's beginning in its cache, or the least busy one.
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
from bessemer.serving.ray.entrance import Entrance
from bessemer.serving.ray.forwarding import Forwarded, PrefixMemory, ResponsePart
from bessemer.serving.ray.replica import EngineReplica, ModelStatistics
from bessemer.serving.responses.store import MemoryStore
from bessemer.serving.runtime.bodies import overloaded
from bessemer.serving.runtime.models import ModelSetup
from bessemer.serving.runtime.served import Served
from bessemer.serving.server import KEEP_ALIVE_SECONDS, address_of, ask_questions, listen, open_many_files, request_log

#: Least share of a prompt that a replica must have seen to be preferred.
_MATCH_RATE = 0.25
#: Most requests above those of the least busy replica, for a preferred one.
_IMBALANCE = 4
_PAUSE_SECONDS = 0.002


class PrefixRouter(FIFOMixin, RequestRouter):
    """Ray's request router for `EngineReplica.answer`.

    A replica gets the request that it was chosen for, or the oldest one if that was routed elsewhere. `FIFOMixin` does the
    latter: without it, Ray 2.59 loses a request whose routing task ends while others are routed.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Ray's constructor."""
        self._memory = PrefixMemory()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas in order of preference; Ray takes the least busy one of a group that accepts."""
        if pending_request is None:
            # for a moment, Ray has more routing tasks than requests: without a pause they block the event loop
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            # else Ray retries without a pause while no replica has a place
            pending_request.routing_context.should_backoff = True
        prompt = _prompt(pending_request)
        names = [_name(replica.replica_id) for replica in candidate_replicas]
        matches = self._memory.matches(prompt, names) if prompt else {}
        busy = {replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas}
        least = min(busy.values(), default=0)
        best_match = max(_MATCH_RATE, max(matches.values(), default=0))
        preferred = [
            replica
            for name, replica in zip(names, candidate_replicas, strict=True)
            if matches.get(name, 0) >= best_match and busy[replica.replica_id] - least <= _IMBALANCE
        ]
        others = [replica for replica in candidate_replicas if replica not in preferred]
        # Ray asks each replica of a group how busy it is: two random ones are enough
        pair = random.sample(others, min(2, len(others)))
        return [group for group in (preferred, pair) if group]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was chosen for; Ray calls it first."""
        pending: PendingRequest | None = self._get_pending_request_matching_internal_request_id(request_metadata)
        return pending

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Remember which replica got the prompt."""
        if prompt := _prompt(pending_request):
            self._memory.remember(prompt, _name(replica_id))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray gives the new list of replicas."""
        super().update_replicas(replicas)
        self._memory.keep([_name(replica.replica_id) for replica in replicas])


def _prompt(pending: PendingRequest | None) -> str:
    arguments: Sequence[object] = () if pending is None else pending.args
    return next((argument.prompt for argument in arguments if isinstance(argument, Forwarded)), "")


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)


# Ray kills a proxy that is not ready in time, by default 5 s, which a busy machine exceeds; read when the proxy starts
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

_APPLICATION = "bessemer"
#: No limit in practice.
_MOST_REQUESTS = 100_000
#: Seconds between two health checks of a replica.
_HEALTH_SECONDS = 5.0
#: Seconds for a broadcast.
_ALL_SECONDS = 60.0
#: Seconds for a replica to stop; the entrance has drained before.
_GRACE_SECONDS = 2.0
#: Makes the pages, in the process of each replica.
MakePages = Callable[[], Callable[[Served], Pages]]


class RayReplicas:
    """`Replicas` behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def send(self, request: Forwarded) -> AsyncGenerator[ResponsePart, None]:
        answering = self._streaming.answer.remote(request)
        try:
            async for part in answering:
                yield part
        except (DeploymentUnavailableError, RayError):
            raise overloaded("the replica that answered has ended; try again in a moment") from None
        finally:
            # nothing to cancel in a finished response; one that never began raises its error again
            with suppress(Exception):
                answering.cancel()

    async def broadcast(self, request: Forwarded) -> Sequence[Sequence[ResponsePart]]:
        """As `Replicas.broadcast`. Raises ApiError where a replica does not respond."""
        responses = await self._call_all("whole_answer", request)
        if any(isinstance(response, BaseException) for response in responses):
            raise overloaded("a replica did not answer; try again in a moment")
        return responses

    async def measure(self) -> Sequence[Sequence[ModelStatistics]]:
        return [models for models in await self._call_all("measured") if not isinstance(models, BaseException)]

    async def count_ready(self) -> int:
        return sum(is_ready is True for is_ready in await self._call_all("is_ready"))

    async def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        """The result of each replica's method, or its exception; empty where there is no replica."""
        try:
            results: list[Any] = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=_ALL_SECONDS, return_exceptions=True
            )
        except (DeploymentUnavailableError, RayError, TimeoutError):
            return []
        return results


class Ingress:
    """The actor that Ray runs as the entrance."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engines: Any, name: str, config: ServingConfig, public: Collection[str]
    ) -> None:
        """engines: handle of the deployment of `EngineReplica`."""
        open_many_files()
        # Ray collects this process's log
        self._log = request_log(config.request_log)
        self._log.__enter__()
        self.entrance = Entrance(RayReplicas(engines), name, config, public)
        self._watching = asyncio.create_task(self.entrance.watch_keys())

    def drain(self) -> None:
        self.entrance.is_draining = True

    def requests(self) -> int:
        return self.entrance.requests


async def _application(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application of the entrance's actor."""
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
    setup: ModelSetup,
    config: ServingConfig,
    replicas: int,
    *,
    say: Callable[[str], None] = print,
    make_pages: MakePages | None = None,
    public: Collection[str] = (),
    questions: Sequence[str] = (),
) -> None:
    """Serve a model by several replicas until interrupted, on the cluster of RAY_ADDRESS or on one that is started here.

    The files of the model and its adapters must exist on every machine. make_pages, public: pages beside the API, and those of
    their paths that need no key. say, questions: as for `serve`. SIGTERM drains for `config.drain_seconds`; a second one stops.

    Raises ConfigError for more replicas than the cluster has room for, and BessemerError for replicas that do not start.
    """
    with listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        url = address_of(listener)
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"--engine ray: no cluster answers: {_last_line(error)}") from None
    stop, is_ours = _Stop(), False
    try:
        options = _share(setup, replicas)
        if _is_running():
            raise ConfigError("--engine ray: Ray Serve runs on this cluster already; stop it, or use another cluster")
        is_ours = True
        ray_serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS),
            logging_config=LoggingConfig(enable_access_log=False),
        )
        keeper = ray.remote(MemoryStore).options(num_cpus=0, max_restarts=-1).remote()
        # the entrance checks the keys
        behind = config.with_changes(api_key=None, keys=None)
        engines = ray_serve.deployment(
            name="Engine",
            num_replicas=replicas,
            # Ray must not limit requests: a full replica refuses completions itself, and must still answer other requests
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
                ingress.bind(engines.bind(setup, behind, make_pages, keeper), setup.name, config, public),
                name=_APPLICATION,
                route_prefix="/",
                logging_config=LoggingConfig(enable_access_log=False),
            )
        except RuntimeError as error:
            raise BessemerError(f"the replicas did not start: {_last_line(error)}") from None
        shown = "" if make_pages is None else f"chat at {url} · "
        say(f"{setup.name}: {shown}OpenAI API at {url}/v1 · {replicas} replicas · Ctrl-C stops")
        if questions:
            ask_questions(f"{url}/v1", setup.name, questions, say)
            return
        stop.wait()
        if stop.is_gentle:
            _drain(handle, config.drain_seconds, stop)
    finally:
        # Ray prints the tasks that it cancels
        with suppress(Exception), redirect_stderr(io.StringIO()):
            if is_ours:
                ray_serve.shutdown()
            ray.shutdown()
        stop.close()


class _Stop:
    """Waits for SIGTERM or Ctrl-C; handles both from construction until `close`."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._signals = 0
        #: Whether to drain: a single SIGTERM.
        self.is_gentle = False
        self._before = {each: signal.signal(each, self._hear) for each in (signal.SIGTERM, signal.SIGINT)}

    @property
    def is_urgent(self) -> bool:
        """Whether a second signal came."""
        return self._signals > 1

    def wait(self) -> None:
        """Wait for the first signal."""
        # on Windows, a wait without a timeout is not interrupted by signals
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
    """Refuse new requests, and wait for the others."""
    handle.drain.remote().result()
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.is_urgent and handle.requests.remote().result() > 0:
        time.sleep(0.1)


def _is_running() -> bool:
    """Whether Ray Serve already runs on the cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _share(setup: ModelSetup, replicas: int) -> dict[str, Any]:
    """Ray's resources of each replica: one GPU where there are any, else a share of the CPUs. Raises ConfigError."""
    total = ray.cluster_resources()
    if setup.device in ("auto", "cuda") and total.get("GPU", 0) > 0:
        each, what = 1.0, "GPU"
    else:
        # a replica runs on one machine
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        each = float(setup.engine.threads or max(1, min(int(total.get("CPU", 0)) // replicas, int(largest))))
        what = "CPU"
    if each * replicas > total.get(what, 0):
        raise ConfigError(
            f"--replicas {replicas}: each needs {each:g} of the cluster's {total.get(what, 0):g} {what}s; ask for fewer, or "
            "give each fewer --threads"
        )
    return {"num_cpus": 1, "num_gpus": each} if what == "GPU" else {"num_cpus": each}


def _last_line(error: Exception) -> str:
    """The last line of an error that holds another process's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
