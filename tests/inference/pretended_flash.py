"""FlashAttention's and FlashInfer's functions over pages, as their pages of reference describe them, in plain PyTorch.

Put in the place of the packages they show that the engine asks for the right thing. What the packages' own kernels answer is
compared in `tests/gpu`.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType

import torch

from bessemer.inference.execution import build as execution_build
from bessemer.inference.execution import flash_attention as in_place


def _attended(query_THC, keys_SKC, values_SKC, scale, window, softcap, slopes_H):
    """One sequence, its mask aligned to the last query and the last key: the result, and the log of the softmax's sum."""
    queries, heads = query_THC.shape[:2]
    group, keys = heads // keys_SKC.shape[1], len(keys_SKC)
    keys_SHC, values_SHC = (part.repeat_interleave(group, 1).float() for part in (keys_SKC, values_SKC))
    scores_HTS = torch.einsum("thc,shc->hts", query_THC.float(), keys_SHC) * scale
    if softcap:
        scores_HTS = softcap * torch.tanh(scores_HTS / softcap)
    distance_TS = (torch.arange(queries) + keys - queries)[:, None] - torch.arange(keys)
    if slopes_H is not None:
        scores_HTS = scores_HTS - slopes_H[:, None, None] * distance_TS.abs()
    left, right = window
    hidden_TS = distance_TS < -max(right, 0)
    if left >= 0:
        hidden_TS = hidden_TS | (distance_TS > left)
    scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    attended_THC = torch.einsum("hts,shc->thc", scores_HTS.softmax(-1), values_SHC)
    return attended_THC.to(query_THC.dtype), scores_HTS.logsumexp(-1)


def _pages(pages_PMKC, table, length):
    """Positions of a sequence in the pages of its table, and no others."""
    size = pages_PMKC.shape[1]
    return torch.cat([pages_PMKC[page] for page in table[: -(-int(length) // size)].tolist()])[:length]


def _flash_attn():
    called = []

    def each(query_list, keys, values, lengths, tables, softmax_scale, causal, window_size, softcap, alibi_slopes):
        assert causal and keys.stride(-1) == values.stride(-1) == 1 and tables.dtype == lengths.dtype == torch.int32
        window = (window_size[0], 0)
        parts = [
            _attended(query, _pages(keys, table, length), _pages(values, table, length), softmax_scale, window, softcap, slopes)
            for query, table, length, slopes in zip(query_list, tables, lengths, [alibi_slopes] * len(query_list), strict=True)
        ]
        return [one for one, _ in parts], [log for _, log in parts]

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, return_softmax_lse=False,
    ):  # fmt: skip
        called.append("flash_attn_with_kvcache")
        out, logs = each(
            list(q), k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal, window_size, softcap, alibi_slopes
        )
        return (torch.stack(out), torch.stack(logs)) if return_softmax_lse else torch.stack(out)

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, block_table,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_attn_probs=False,
    ):  # fmt: skip
        called.append("flash_attn_varlen_func")
        counts, lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert int(counts.max()) == max_seqlen_q and int(lengths.max()) == max_seqlen_k
        out, logs = each(
            q.split(counts.tolist()), k, v, lengths, block_table, softmax_scale, causal, window_size, softcap, alibi_slopes
        )
        return (torch.cat(out), torch.cat(logs, dim=1), None) if return_attn_probs else torch.cat(out)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = flash_attn_with_kvcache, flash_attn_varlen_func
    module.called = called
    return module


class _Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`."""

    plans = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, *, causal, sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type,
    ):  # fmt: skip
        type(self).plans += 1
        assert causal
        self.counts = qo_indptr.diff().tolist()
        pages = paged_kv_indptr.diff()
        self.tables = paged_kv_indices.split(pages.tolist())
        self.lengths = ((pages - 1) * page_size + paged_kv_last_page_len).tolist()
        self.shape, self.types = (num_qo_heads, num_kv_heads, head_dim_qk, page_size), (q_data_type, kv_data_type)
        self.options = sm_scale, (window_left, 0), logits_soft_cap

    def run(self, q, paged_kv_cache, return_lse=False):
        keys_PKMC, values_PKMC = paged_kv_cache
        assert self.shape == (q.shape[1], keys_PKMC.shape[1], q.shape[2], keys_PKMC.shape[2]) and q.is_contiguous()
        assert self.types == (q.dtype, keys_PKMC.dtype)
        keys, values = keys_PKMC.transpose(1, 2), values_PKMC.transpose(1, 2)
        parts = [
            _attended(query, _pages(keys, table, length), _pages(values, table, length), *self.options, None)
            for query, table, length in zip(q.split(self.counts), self.tables, self.lengths, strict=True)
        ]
        out = torch.cat([one for one, _ in parts])
        return (out, torch.cat([log for _, log in parts], 1).T / math.log(2)) if return_lse else out


def pretend(monkeypatch, library):
    """Let a library be installed and read pages on this processor. Returns its module."""
    if library == "flash":
        module = _flash_attn()
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    else:
        module = ModuleType("flashinfer")
        module.BatchPrefillWithPagedKVCacheWrapper = type("Wrapper", (_Wrapper,), {"plans": 0})
        monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(execution_build, "cannot_read", lambda asked, *_: None if asked == library else "not pretended")
    monkeypatch.setattr(in_place, "_WORKSPACE", 16)
    return module
