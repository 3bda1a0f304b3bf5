import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bessemer.model.folder import load_model
from bessemer.posttraining.conversations import Conversation
from bessemer.posttraining.packing import HeldOutBatches, PackedBatches, encode_conversation, pack_conversations
from bessemer.training.data.batches import IGNORE_INDEX
from bessemer.training.objectives import next_token_loss


def conversation(question, *answers):
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation.of(messages, "test")


@pytest.fixture
def conversations():
    return [conversation("Why? " * (number % 4 + 1), *["So. " * (number % 3 + 1)] * (number % 2 + 1)) for number in range(9)]


def packed(conversations, tokenizer, **changes):
    options = {"batch_size": 4, "context_length": 128, "seed": 1} | changes
    rows = pack_conversations(conversations, tokenizer, options.pop("context_length"))
    return PackedBatches(rows.batch, **options)


def test_packed_loss_and_gradient_are_those_of_each_conversation_alone(conversations, tokenizer, model_folder):
    model = load_model(model_folder)
    batches = packed(conversations, tokenizer)
    assert batches.rows < len(conversations) - 2, "several conversations must share a row"
    batch = packed(conversations, tokenizer, batch_size=batches.rows).batch(0)
    together = next_token_loss(model, batch)
    gradient = torch.autograd.grad(together, list(model.parameters()))

    total, count = torch.zeros(()), 0
    for alone in conversations:
        ids, said = tokenizer.encode_chat(alone.messages)
        targets = torch.tensor(ids[1:]).where(torch.tensor(said[1:]), IGNORE_INDEX)
        logits = model(torch.tensor([ids[:-1]]))[0]
        total = total + cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((targets != IGNORE_INDEX).sum())
    torch.testing.assert_close(together, total / count)
    alone_gradient = torch.autograd.grad(total / count, list(model.parameters()))
    torch.testing.assert_close(gradient, alone_gradient, rtol=1e-3, atol=1e-6)


def test_targets_are_what_the_assistant_says_and_its_end(tokenizer):
    example = encode_conversation(conversation("Who?", "Me.", "You."), tokenizer, 200)
    targets = example.targets[example.targets != IGNORE_INDEX]
    assert tokenizer.decode(targets.tolist(), skip_special=False) == "Me.<|im_end|>You.<|im_end|>"


def test_calls_of_tools_are_targets_and_their_results_are_not(tokenizer):
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    example = encode_conversation(Conversation.of(messages, "test", [{"name": "add", "description": "Adds."}]), tokenizer, 800)
    targets = tokenizer.decode(example.targets[example.targets != IGNORE_INDEX].tolist(), skip_special=False)
    assert targets == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>Two.<|im_end|>'
    assert "Adds." in tokenizer.decode(example.tokens.tolist())


def test_every_answer_is_ended_once(conversations, tokenizer):
    batches = packed(conversations, tokenizer)
    batch = packed(conversations, tokenizer, batch_size=batches.rows).batch(0)
    ends = int((batch.targets_BT == tokenizer.eos_ids[1]).sum())
    assert ends == sum(len(one.messages) // 2 for one in conversations)


def test_one_cut_before_the_assistant_speaks_is_left_out(tokenizer):
    long, short = conversation("word " * 200, "Yes."), conversation("Yes?", "Yes.")
    assert encode_conversation(long, tokenizer, 96) is None
    rows = pack_conversations([long, short], tokenizer, 128)
    assert (rows.skipped, rows.rows) == (1, 1)
    assert (packed([long, short], tokenizer).batch(0).targets_BT != IGNORE_INDEX).any(dim=1).all()
    assert pack_conversations([long], tokenizer, 96).rows == 0


def test_one_cut_in_an_answer_keeps_its_beginning(tokenizer):
    example = encode_conversation(conversation("Yes?", "word " * 200), tokenizer, 96)
    assert len(example.tokens) == 96 and example.targets[-1] != IGNORE_INDEX


def test_positions_restart_with_every_conversation(conversations, tokenizer):
    batch = packed(conversations, tokenizer).batch(0)
    changed = np.diff(batch.document_ids_BT.numpy(), axis=1) != 0
    assert changed.any()
    assert (batch.positions_BT.numpy()[:, 1:][changed] == 0).all()


def test_every_row_is_read_once_an_epoch(conversations, tokenizer):
    batches = packed(conversations, tokenizer, batch_size=1)
    rows = {tuple(batches.batch(step).tokens_BT[0].tolist()) for step in range(batches.rows)}
    assert len(rows) == batches.rows > 1


def test_parts_of_a_batch_in_a_row_are_the_batch(conversations, tokenizer):
    batches = packed(conversations, tokenizer)
    whole, parts = batches.batch(1), [batches.batch(1, slice(0, 3)), batches.batch(1, slice(3, 4))]
    for name in ("tokens_BT", "targets_BT", "positions_BT", "document_ids_BT"):
        tensor = getattr(whole, name)
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), tensor)


def test_held_out_rows_are_read_once_in_order_and_filled_up_without_targets(conversations, tokenizer):
    rows = pack_conversations(conversations, tokenizer, 128)
    batches = HeldOutBatches(rows.batch, rows.rows - 1)
    assert batches.steps == 2
    read = [batches.batch(step) for step in range(2)]
    targets = torch.cat([batch.targets_BT for batch in read])
    assert torch.equal(targets[: rows.rows], rows.batch.targets_BT)
    assert (targets[rows.rows :] == IGNORE_INDEX).all() and len(targets) == 2 * (rows.rows - 1)
