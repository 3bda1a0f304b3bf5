"""The one who computes a model's steps: the compiled kernels where they can, else the model's own modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.inference.batch import Batch, Executor
from bessemer.inference.engine_config import EngineConfig
from bessemer.inference.kernel_executor import KernelExecutor
from bessemer.inference.module_executor import ModuleExecutor
from bessemer.inference.paged_cache import PagedMemory
from bessemer.model.decoder import Decoder
from bessemer.model.kernels.build import library, unavailable
from bessemer.model.quantised_linear import multiplied_by

# Shapes: R wanted rows, V vocabulary.


class AdaptingExecutor:
    """The kernels for sequences of the model as it is, its modules for those with an adapter, over the same pages.

    The modules multiply by the codes that the kernels packed: read out of codes anew in each step, weights would take longer
    than all the rest.
    """

    invariant, own_threads = True, True

    def __init__(self, kernels: KernelExecutor, modules: ModuleExecutor) -> None:
        self.model, self.kernels, self.modules = kernels.model, kernels, modules
        self._products = kernels.products()

    def forward(self, batch: Batch) -> Tensor:
        adapted = [sequence for sequence, adapter in enumerate(batch.adapters) if adapter is not None]
        if not adapted:
            return self.kernels.forward(batch)
        plain = [sequence for sequence, adapter in enumerate(batch.adapters) if adapter is None]
        logits_RV = torch.empty(len(batch.wanted), self.model.config.vocab_size)
        if plain:
            part, places = batch.part(plain)
            logits_RV[places] = self.kernels.forward(part)
        part, places = batch.part(adapted)
        with multiplied_by(self._products):
            logits_RV[places] = self.modules.forward(part)
        return logits_RV

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self.kernels.copy_blocks(copies)

    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        self.kernels.restore_states(restored)

    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        self.kernels.keep_states(kept)

    def weights_changed(self) -> None:
        self.kernels.weights_changed()
        self._products = self.kernels.products()


def new_executor(
    model: Decoder, memory: PagedMemory, config: EngineConfig, opened: bool, modules_only: bool = False
) -> Executor:
    """Compiled kernels pack the weights, which takes time and memory: they are for models that are opened to be served. Models
    that are not plain run by their modules, with compiled attention and with the products of quantised layers by packed codes.

    opened: whether this one is. modules_only: states inside the model are wanted, which kernels do not give. Raises
    ConfigError where kernels are asked for and cannot be built.
    """
    wanted = config.kernels == "on" or (config.kernels == "auto" and opened and model.device.type == "cpu")
    if wanted and not modules_only and KernelExecutor.supports(model) is None:
        kernels = KernelExecutor(model, memory, config.threads)
        return AdaptingExecutor(kernels, ModuleExecutor(model, memory, config.batch_invariant, compiled=True))
    if config.kernels == "on" and library() is None:
        raise ConfigError(f"kernels: on: {unavailable()}")
    compiled = wanted and ModuleExecutor.can_compile(model)
    packed = wanted and model.device.type == "cpu" and library() is not None
    return ModuleExecutor(model, memory, config.batch_invariant, compiled, packed, config.threads)
