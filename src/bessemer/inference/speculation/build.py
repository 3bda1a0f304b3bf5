"""Builds the proposer that an engine's settings ask for."""

from __future__ import annotations

import torch

from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.build import new_runner
from bessemer.inference.execution.kv_cache import layer_groups
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.scheduling.block_pool import BlockPool
from bessemer.inference.speculation.draft_length import DraftLengthPolicy
from bessemer.inference.speculation.draft_model import DraftModelProposer, open_draft_model
from bessemer.inference.speculation.draft_runner import draft_memory, is_draft_shared, share_draft
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


def new_proposer(
    config: EngineConfig, tokenizer: Tokenizer, runner: Runner, sharded: ShardedModel | None = None
) -> Proposer | None:
    """The proposer for a runner's model; None without speculative decoding. Raises ConfigError, ArtefactError.

    sharded: the model's shards, where worker processes hold some; they share the draft model too, where it can be.
    """
    speculation = config.speculation
    if speculation is None:
        return None
    policy = DraftLengthPolicy(speculation.tokens, speculation.adapt)
    if speculation.method == "ngram":
        return NGramProposer(policy)
    if speculation.method == "mtp":
        return MtpProposer(runner, policy, config.max_num_seqs)
    assert speculation.model is not None
    if sharded is not None and is_draft_shared(config):
        with sharded.workers.together():
            model = open_draft_model(speculation.model, runner.model, tokenizer, torch.device("cpu"))
            drafting, blocks = share_draft(model, config, runner.model.device, sharded.mesh, sharded.workers)
    else:
        model = open_draft_model(speculation.model, runner.model, tokenizer, runner.model.device)
        memory, blocks = draft_memory(model, config)
        drafting = new_runner(model, memory, config.with_changes(batch_invariant=False), opened=True)
    pool, groups = BlockPool(blocks, config.block_size), len(layer_groups(model.config))
    return DraftModelProposer(model, drafting, pool, groups, policy, config.max_num_batched_tokens)
