"""The one who computes a model's steps: the compiled kernels where they can, else the model's own modules."""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.inference.engine_config import EngineConfig
from bessemer.inference.kernel_executor import KernelExecutor
from bessemer.inference.module_executor import ModuleExecutor
from bessemer.inference.paged_cache import PagedMemory
from bessemer.model.decoder import Decoder
from bessemer.model.kernels.build import library, unavailable


def new_executor(
    model: Decoder, memory: PagedMemory, config: EngineConfig, opened: bool, modules_only: bool = False
) -> KernelExecutor | ModuleExecutor:
    """Compiled kernels pack the weights, which takes time and memory: they are for models that are opened to be served.

    opened: whether this one is. modules_only: states inside the model are wanted, which kernels do not give. Raises
    ConfigError where kernels are asked for and cannot be built.
    """
    wanted = config.kernels == "on" or (config.kernels == "auto" and opened and model.device.type == "cpu")
    if wanted and not modules_only and KernelExecutor.supports(model) is None:
        return KernelExecutor(model, memory, config.threads)
    if config.kernels == "on" and library() is None:
        raise ConfigError(f"kernels: on: {unavailable()}")
    compiled = wanted and ModuleExecutor.can_compile(model)
    return ModuleExecutor(model, memory, config.batch_invariant, compiled)
