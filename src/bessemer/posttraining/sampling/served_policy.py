"""A policy in training on servers: they get its weights, or its adapter, and complete messages with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.assistant.generation import Delta, Generation
from bessemer.core.errors import BessemerError, RequestError
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.adapters.trained import adapters_of
from bessemer.model.decoder import Decoder
from bessemer.model.storage.folder import load_model, save_model
from bessemer.posttraining.sampling.server_client import WeightUpdate
from bessemer.posttraining.sampling.server_config import RolloutServers
from bessemer.posttraining.sampling.server_pool import ServerPool
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.model_roles import ModelRoles

#: Versions kept on disk for servers that read folders: one may be being read while the next is written.
_KEPT = 2


class ServedPolicy:
    """Servers with the policy's weights. start: folder of the model from which training starts; written versions have its form
    and tokenizer. folder: where versions are written. temperature, longest: as in `ServerPool.open`.
    """

    def __init__(
        self,
        settings: RolloutServers,
        tokenizer: Tokenizer,
        start: Path,
        folder: Path,
        say: Callable[[str], None],
        *,
        temperature: float,
        longest: int,
    ) -> None:
        """Raises ConfigError for a malformed URL. Servers are called only when the first weights are sent."""
        self.pool = ServerPool(settings, tokenizer, say)
        self._start = start
        self._folder = folder
        self._temperature, self._longest = temperature, longest
        self._is_open = False
        self._sent: int | None = None
        self._base: Decoder | None = None

    def with_weights_of(self, models: ModelRoles) -> ServerPool:
        """The servers, after they have got the policy's current weights. All processes call this, and the first sends the
        weights; errors of `ServerPool.open` and `ServerPool.send_weights` are raised on all.
        """
        if self._sent == models.version:
            return self.pool
        # copy the weights: training changes them, and a server that has failed may need them later
        is_adapter = bool(adapters_of(models.policy.model))
        adapter = _copied(models.adapter()) if is_adapter else None
        weights = {} if is_adapter else models.full_weights()
        failure: BessemerError | None = None
        if models.mesh.leads:
            try:
                self._send(models.version, weights, adapter)
            except BessemerError as error:
                failure = error
        if not models.mesh.alone:
            holder = [failure]
            dist.broadcast_object_list(holder, src=0)
            (failure,) = holder
        if failure is not None:
            raise failure
        self._sent = models.version
        return self.pool

    def close(self) -> None:
        """Send no more requests, and remove the folders that were written for the servers."""
        self.pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, version: int, weights: Mapping[str, Tensor], adapter: Adapter | None) -> None:
        if not self._is_open:
            self.pool.open(temperature=self._temperature, longest=self._longest)
            self._is_open = True
        update = WeightUpdate(version, {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}, adapter)
        self.pool.send_weights(self._written(update) if self.pool.reads_folders else update)

    def _written(self, update: WeightUpdate) -> WeightUpdate:
        """The update with its folder."""
        if self._base is None:
            self._base = load_model(self._start)
        folder = self._folder / f"version-{update.version}"
        if update.adapter is not None:
            write_adapter(update.adapter, self._base, folder)
        else:
            own = self._base.state_dict()
            with torch.no_grad():
                for name, tensor in update.weights.items():
                    own[name].copy_(tensor)
            save_model(self._base, folder, tokenizer=self._start)
        written = sorted(self._folder.glob("version-*"), key=lambda place: int(place.name.rpartition("-")[2]))
        for old in written[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return WeightUpdate(update.version, update.weights, update.adapter, folder.resolve())


def _copied(adapter: Adapter) -> Adapter:
    return Adapter(
        {name: one.each(lambda tensor: tensor.detach().to("cpu", copy=True)) for name, one in adapter.updates.items()}
    )


class ServedModel:
    """The servers as the model of an assistant."""

    def __init__(self, pool: ServerPool, tokenizer: Tokenizer, context_length: int) -> None:
        """context_length: the most tokens of prompt and completion."""
        self._pool = pool
        self.tokenizer = tokenizer
        self.context_length = context_length

    def stream(self, generation: Generation) -> Generator[Delta, None, None]:
        """As of `ChatModel`: the whole completion when it has come. Raises as `complete`."""
        yield from self.complete(generation)

    def complete(self, generation: Generation) -> Sequence[Delta]:
        """The completion, a delta for each token. Raises RequestError for a prompt that does not fit, and as
        `ServerPool.complete`."""
        left = self.context_length - len(generation.token_ids)
        if left < 1:
            raise RequestError(
                f"the model's context is {self.context_length:,} tokens, and the prompt has {len(generation.token_ids):,}"
            )
        params = generation.params.with_changes(max_tokens=min(generation.params.max_tokens, left))
        (one,) = self._pool.complete(generation.token_ids, 1, params)
        last = len(one.token_ids) - 1
        reason = "length" if one.is_cut else "stop"
        return [
            Delta([id], [log_prob], version, finish_reason=reason if place == last else None)
            for place, (id, log_prob, version) in enumerate(zip(one.token_ids, one.log_probs, one.versions, strict=True))
        ]
