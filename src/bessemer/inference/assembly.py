"""An engine's parts put together by its settings: pages, executor, scheduler, who guesses ahead."""

from __future__ import annotations

from bessemer.inference.engine_config import EngineConfig
from bessemer.inference.executors import new_executor
from bessemer.inference.loop import Loop
from bessemer.inference.memory_plan import describe_pages, page_type, plan_blocks
from bessemer.inference.paged_cache import PagedMemory, layer_groups
from bessemer.inference.pages import BlockPool
from bessemer.inference.proposers import ahead_of, new_proposer
from bessemer.inference.scheduler import Group, Scheduler
from bessemer.model.decoder import Decoder
from bessemer.tokenization.tokenizer import Tokenizer


def assemble(model: Decoder, tokenizer: Tokenizer, config: EngineConfig, *, opened: bool) -> tuple[Loop, str]:
    """The loop of a model, and a line about its pages: how many, of which type, how much memory.

    opened: whether the model was opened to be served, and is not one that somebody trains. Raises ConfigError, and
    ArtefactError for a draft model that cannot be read.
    """
    dtype, device = page_type(model, config), model.device
    ahead, ahead_blocks = ahead_of(config, model.config)
    blocks = plan_blocks(model.config, config, dtype, device, ahead)
    slots = config.max_running if "linear_attention" in model.config.types else 0
    kept = config.speculation.tokens if config.speculation else 0
    memory = PagedMemory(model.config, blocks, config.block_size, dtype, device, slots, kept, ahead, ahead_blocks)
    executor = new_executor(model, memory, config, opened, modules_only=ahead > 0)
    groups = [
        Group(BlockPool(count, config.block_size), group.window)
        for count, group in zip(blocks, layer_groups(model.config), strict=True)
    ]
    scheduler = Scheduler(
        groups,
        max_running=config.max_running,
        max_step_tokens=config.max_step_tokens,
        max_waiting=config.max_waiting,
        state_slots=slots,
        align=config.block_size if config.batch_invariant else None,
        share_generated=not config.batch_invariant,
        share_prefixes=config.prefix_cache,
    )
    loop = Loop(scheduler, executor, new_proposer(config, tokenizer, executor))
    return loop, describe_pages(model.config, blocks, config, dtype, ahead)
