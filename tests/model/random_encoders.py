"""Random encoders of `transformers`, written to folders."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
#: By kind: their config, and what it is called with beside `SMALL`.
KINDS = {
    "bert": (transformers.BertConfig, {"pad_token_id": 0}),
    "roberta": (transformers.RobertaConfig, {"type_vocab_size": 1}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {"type_vocab_size": 1, "hidden_act": "gelu_new"}),
    "mpnet": (transformers.MPNetConfig, {}),
    "modernbert": (transformers.ModernBertConfig, {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}),
}


def written(kind, folder, model_class, **settings):
    """A random model of theirs, in evaluation, written to a folder."""
    config_class, own = KINDS[kind]
    torch.manual_seed(3)
    config = config_class(**(SMALL | own | settings), attn_implementation="eager")
    model = model_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model
