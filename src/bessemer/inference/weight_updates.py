"""Weights and adapters that change under in-flight requests: the half of the engine that a trainer uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.fair_lock import FairLock
from bessemer.inference.adapters import LoadedAdapters, copied_adapter
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.execution.tensor_parallel.weights import check_whole_weights
from bessemer.inference.execution.weights import WeightsStamp, replace_weights
from bessemer.inference.request import ScheduledRequest
from bessemer.model.adapter_folder import read_adapter
from bessemer.model.adapters import Adapter
from bessemer.model.decoder import Decoder


class WeightUpdates:
    """Updates of an engine's weights and adapters, and their version. No key that other weights computed is used again."""

    model: Decoder
    core: EngineCore
    _lock: FairLock
    _sharded: ShardedModel | None
    _adapters: LoadedAdapters
    _stamp: WeightsStamp

    @property
    def weight_version(self) -> int:
        """How often the weights were changed since the start, adapters' updates included; or the last version given."""
        return self.core.weight_version

    def update_weights(self, weights: Mapping[str, Tensor] | None = None, *, version: int | None = None) -> None:
        """Take other weights, by the names of the model's `state_dict`; None: those that were changed in place.

        In-flight requests go on with them, and their keys are computed again; adapters of DoRA are fitted to them. version: the
        `weight_version` from now on; None: one more. A model that several processes share takes whole tensors, by the names of
        the model in one process. Raises RequestError for a name or a shape that the model does not have, and changes nothing
        then; ConfigError where a shared model is given none.
        """
        with self._lock:
            if self._sharded is not None and self._sharded.axis is None:
                self._replace_shards(weights)
            elif weights is not None:
                replace_weights(self.model, weights)
            self._weights_changed(version)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._adapters.names

    def load_adapter(self, name: str, adapter: Path | str | Adapter) -> None:
        """Let requests name the adapter in a folder, or a copy of one in memory. One of the same name is replaced.

        In-flight requests keep the adapter that they began with. Raises ArtefactError for a folder that holds none, or
        one that was made for another model; RequestError for one in memory that does not fit the model.
        """
        loaded = self._own_adapter(adapter)
        with self._lock:
            self._adapters.load(name, loaded)

    def update_adapter(self, name: str, adapter: Adapter, *, version: int | None = None) -> None:
        """Take other numbers for a loaded adapter, which are copied; the base model and its packed weights stay.

        Its in-flight requests go on with them, and their keys are computed again. Blocks of the base model and of other
        adapters stay in the prefix cache. version: the `weight_version` from now on; None: one more. Raises RequestError for a
        name that is not loaded and an adapter that does not fit the model, and changes nothing then.
        """
        self._adapters.find(name)
        own = self._own_adapter(adapter)
        with self._lock:
            self.core.change_adapter(*self._adapters.update(name, own))
            self._count_version(version)

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for an adapter. In-flight requests keep it, and its memory is free when they have ended.

        Raises RequestError for a name that is not loaded.
        """
        with self._lock:
            self._adapters.unload(name)

    # -- inside

    def _notice_changes(self, request: ScheduledRequest) -> None:
        """Before a request begins: find weights changed in place, and updates of its adapter since it was prepared."""
        # the weights of several processes change by `update_weights` alone
        if not self.core.busy and self._sharded is None and not self._stamp.is_of(self.model):
            self._weights_changed()
        if request.adapter is not None and (updated := self._adapters.updated(request.adapter)) is not None:
            self.core.use_adapter(request, updated)

    def _own_adapter(self, adapter: Path | str | Adapter) -> Adapter:
        """The adapter in a folder, or a copy of one in memory, as this process computes it: of a sharded model its shard."""
        runner, samples = self.core.runner, None
        if isinstance(adapter, Adapter):
            if self._sharded is not None and adapter.has_magnitudes:
                raise RequestError("the adapter is DoRA's, whose norms are of whole weights, and this model is sharded")
            whole = copied_adapter(adapter, self.model)
        else:
            if self._sharded is not None:
                with self._lock:
                    samples = runner.weight_samples()
            whole = read_adapter(adapter, self.model, samples)
        if self._sharded is None:
            return whole
        with self._lock:
            return runner.share_adapter(whole)

    def _replace_shards(self, weights: Mapping[str, Tensor] | None) -> None:
        if weights is None:
            raise ConfigError("parallel: every process has weights of its own; give update_weights the whole tensors")
        check_whole_weights(self.model.config, weights)
        # an interrupt may come when the shards are replaced: no keys of the weights before are left then
        self._forget_keys()
        self.core.runner.replace_weights(weights)

    def _weights_changed(self, version: int | None = None) -> None:
        self._forget_keys()
        self.core.runner.weights_changed()
        self._adapters.refit(self.model)
        self._stamp = WeightsStamp(self.model)
        self._count_version(version)

    def _forget_keys(self) -> None:
        self.core.finish_step()
        self.core.scheduler.preempt_all()
        self.core.scheduler.forget()

    def _count_version(self, version: int | None) -> None:
        self.core.weight_version = self.core.weight_version + 1 if version is None else version
