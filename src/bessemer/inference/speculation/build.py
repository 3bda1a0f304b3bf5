"""Builds the proposer that an engine's settings ask for."""

from __future__ import annotations

from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.build import new_runner, page_layout
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups
from bessemer.inference.execution.kv_memory import longest_text, memory_budget, page_type, plan_blocks
from bessemer.inference.execution.runner import Runner
from bessemer.inference.scheduling.block_pool import BlockPool
from bessemer.inference.speculation.draft_length import DraftLengthPolicy
from bessemer.inference.speculation.draft_model import DraftModelProposer, open_draft_model
from bessemer.inference.speculation.mtp import MtpProposer, mtp_modules, spare_blocks
from bessemer.inference.speculation.ngram import NGramProposer
from bessemer.inference.speculation.proposer import Proposer
from bessemer.model.config import ModelConfig
from bessemer.tokenization.tokenizer import Tokenizer


def mtp_layers_of(config: EngineConfig, model: ModelConfig) -> tuple[int, int]:
    """MTP modules of a model that propose draft tokens, and the KV blocks that each needs beyond a layer's.

    Raises ConfigError where they are asked for and the model has none.
    """
    speculation = config.speculation
    if speculation is None or speculation.method != "mtp":
        return 0, 0
    return mtp_modules(model), config.max_num_seqs * spare_blocks(speculation.tokens, config.block_size)


def new_proposer(config: EngineConfig, tokenizer: Tokenizer, runner: Runner) -> Proposer | None:
    """The proposer for a runner's model; None without speculative decoding. Raises ConfigError, ArtefactError."""
    speculation = config.speculation
    if speculation is None:
        return None
    policy = DraftLengthPolicy(speculation.tokens, speculation.adapt)
    if speculation.method == "ngram":
        return NGramProposer(policy)
    if speculation.method == "mtp":
        return MtpProposer(runner, policy, config.max_num_seqs)
    assert speculation.model is not None
    model = open_draft_model(speculation.model, runner.model, tokenizer)
    device, dtype = runner.model.device, page_type(model, config)
    # nothing is shared and no window is followed: one pool serves all groups
    blocks = min(plan_blocks(model.config, config, dtype, memory_budget(config, device)))
    groups = len(layer_groups(model.config))
    by_head, spare = page_layout(model, config, dtype)
    counts = [blocks] * groups
    longest = longest_text(model.config, config, counts)
    memory = PagedMemory(model.config, counts, config.block_size, dtype, device, by_head=by_head, spare=spare, longest=longest)
    drafting = new_runner(model, memory, config.with_changes(batch_invariant=False), opened=True)
    return DraftModelProposer(
        model, drafting, BlockPool(blocks, config.block_size), groups, policy, config.max_num_batched_tokens
    )
