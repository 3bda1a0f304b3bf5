"""The one who guesses, as an engine's settings ask for it."""

from __future__ import annotations

from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.batch import Executor
from bessemer.inference.execution.build import new_executor, page_layout
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups
from bessemer.inference.execution.kv_memory import longest_text, memory_budget, page_type, plan_blocks
from bessemer.inference.execution.module_executor import ModuleExecutor
from bessemer.inference.scheduling.block_pool import BlockPool
from bessemer.inference.speculation.draft_length import DraftLengthPolicy
from bessemer.inference.speculation.draft_model import DraftModelProposer, open_draft_model
from bessemer.inference.speculation.mtp import MultiTokenProposer, extra_blocks, spare_blocks
from bessemer.inference.speculation.ngram import NGramProposer
from bessemer.inference.speculation.proposer import Proposer
from bessemer.model.config import ModelConfig
from bessemer.tokenization.tokenizer import Tokenizer


def ahead_of(config: EngineConfig, model: ModelConfig) -> tuple[int, int]:
    """Extra blocks of a model that are to guess, and the blocks of pages that they need beside the layers'.

    Raises ConfigError where they are asked for and the model has none.
    """
    speculation = config.speculation
    if speculation is None or speculation.method != "mtp":
        return 0, 0
    return extra_blocks(model), config.max_num_seqs * spare_blocks(speculation.tokens, config.block_size)


def new_proposer(config: EngineConfig, tokenizer: Tokenizer, executor: Executor) -> Proposer | None:
    """Who guesses ahead for an executor's model; nobody where none is asked for. Raises ConfigError, ArtefactError."""
    speculation = config.speculation
    if speculation is None:
        return None
    policy = DraftLengthPolicy(speculation.tokens, speculation.adapt)
    if speculation.method == "ngram":
        return NGramProposer(policy)
    if speculation.method == "mtp":
        assert isinstance(executor, ModuleExecutor)
        return MultiTokenProposer(executor, policy, config.max_num_seqs)
    assert speculation.model is not None
    model = open_draft_model(speculation.model, executor.model, tokenizer)
    device, dtype = executor.model.device, page_type(model, config)
    # nothing is shared and no window is followed: one pool serves all groups
    blocks = min(plan_blocks(model.config, config, dtype, memory_budget(config, device)))
    groups = len(layer_groups(model.config))
    by_head, spare = page_layout(model, config, dtype)
    counts = [blocks] * groups
    longest = longest_text(model.config, config, counts)
    memory = PagedMemory(model.config, counts, config.block_size, dtype, device, by_head=by_head, spare=spare, longest=longest)
    drafting = new_executor(model, memory, config.with_changes(batch_invariant=False), opened=True)
    return DraftModelProposer(
        model, drafting, BlockPool(blocks, config.block_size), groups, policy, config.max_num_batched_tokens
    )
