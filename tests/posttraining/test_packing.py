import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from bessemer.core.errors import SourceError
from bessemer.model.storage.folder import load_model
from bessemer.posttraining.data import packing
from bessemer.posttraining.data.encoding import RowCounts, encode_answer
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.data.formats import Answered, Labelled, Pair
from bessemer.posttraining.data.packing import (
    HeldOutBatches,
    PackedBatches,
    PairExample,
    encode_conversation,
    others_before,
    pack_answers,
    pack_conversations,
)
from bessemer.tokenization.tokenizer import load_tokenizer
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.objectives import next_token_loss
from tests.posttraining.test_formats import said


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
    _, targets = encode_conversation(conversation("Who?", "Me.", "You."), tokenizer)[0].example(200)
    targets = targets[targets != IGNORE_INDEX]
    assert tokenizer.decode(targets.tolist(), skip_special=False) == "Me.<|im_end|>You.<|im_end|>"


def test_calls_of_tools_are_targets_and_their_results_are_not(tokenizer):
    messages = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    )
    asked = Conversation.of(messages, "test", [{"name": "add", "description": "Adds."}])
    (encoded,) = encode_conversation(asked, tokenizer)
    ids, targets = encoded.example(800)
    targets = tokenizer.decode(targets[targets != IGNORE_INDEX].tolist(), skip_special=False)
    assert targets == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>Two.<|im_end|>'
    assert "Adds." in tokenizer.decode(ids.tolist())


def test_every_answer_is_ended_once(conversations, tokenizer):
    batches = packed(conversations, tokenizer)
    batch = packed(conversations, tokenizer, batch_size=batches.rows).batch(0)
    ends = int((batch.targets_BT == tokenizer.eos_ids[1]).sum())
    assert ends == sum(len(one.messages) // 2 for one in conversations)


def test_one_longer_than_a_row_is_left_out_and_counted(tokenizer):
    long, short = conversation("word " * 200, "Yes."), conversation("Yes?", "Yes.")
    rows = pack_conversations([long, short], tokenizer, 128)
    assert (rows.counts.too_long, rows.counts.left_out, rows.rows) == (1, 1, 1)
    assert rows.counts.sentences("2 conversations") == [
        "  1 of 2 conversations are left out: longer than 128 tokens (truncate: drop)"
    ]
    assert pack_conversations([long], tokenizer, 96).rows == 0


def test_a_judged_answer_longer_than_a_row_is_left_out_and_the_others_are_packed(tokenizer):
    words = ("Me.", "word " * 200, "You.")
    examples = [
        Labelled(Answered((said("user", "Who? " * (number + 1)),), (said("assistant", answer),)), number == 0)
        for number, answer in enumerate(words)
    ]
    packed = pack_answers(examples, tokenizer, 128)
    assert (packed.answers, packed.counts.too_long, packed.counts.left_out) == (2, 1, 1)
    assert packed.batch.per_sequence["is_desirable"].sum() == 1


def test_longer_ones_are_refused_with_their_number_and_the_longest_where_the_rule_says_so(tokenizer):
    long, short = conversation("word " * 200, "Yes."), conversation("Yes?", "Yes.")
    longest = encode_conversation(long, tokenizer)[0].inputs
    with pytest.raises(SourceError, match=f"2 conversations have more than 96 tokens, the longest {longest:,}; raise"):
        pack_conversations([long, long, short], tokenizer, 96, "refuse")


def learnt(rows, tokenizer):
    return tokenizer.decode(rows.batch.targets_BT[rows.batch.targets_BT != IGNORE_INDEX].tolist(), skip_special=False)


def test_of_one_cut_from_the_left_whole_answers_are_learnt_with_their_ends(tokenizer):
    chat = conversation("Why? " * 20, "Because. " * 8, "So.")
    (whole,) = encode_conversation(chat, tokenizer)
    rows = pack_conversations([chat], tokenizer, whole.inputs - 40, "left")
    assert (rows.counts.cut, rows.counts.left_out) == (1, 0)
    assert learnt(rows, tokenizer) == "Because. " * 8 + "<|im_end|>So.<|im_end|>"
    # the cut is in the first answer: it is read, and neither it nor its end is learnt
    first = int(np.flatnonzero(whole.is_learnt)[0])
    rows = pack_conversations([chat], tokenizer, whole.inputs - first - 3, "left")
    assert learnt(rows, tokenizer) == "So.<|im_end|>"


def test_an_answer_longer_than_a_row_teaches_nothing_by_any_rule(tokenizer):
    for rule in ("drop", "left"):
        rows = pack_conversations([conversation("Yes?", "word " * 200)] * 10, tokenizer, 96, rule)
        assert (rows.rows, rows.counts.too_long) == (0, 10)


def test_what_stands_behind_the_last_answer_does_not_make_a_conversation_too_long(tokenizer):
    chat = conversation("Yes?", "Yes.")
    longer = Conversation.of([*chat.messages, {"role": "user", "content": "word " * 200}], "test")
    rows = pack_conversations([longer], tokenizer, 96)
    assert rows.counts.left_out == 0 and learnt(rows, tokenizer) == "Yes.<|im_end|>"


def test_messages_of_weight_zero_are_read_and_not_learnt(tokenizer):
    chat = Conversation.of(
        [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Me.", "weight": 0},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "You.", "weight": 1},
        ],
        "test",
    )
    rows = pack_conversations([chat], tokenizer, 128)
    assert learnt(rows, tokenizer) == "You.<|im_end|>"
    assert "Me." in tokenizer.decode(rows.batch.tokens_BT[0].tolist())


def test_one_in_which_every_weight_is_zero_is_left_out_and_counted(tokenizer):
    silent = Conversation.of(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me.", "weight": 0}], "test"
    )
    rows = pack_conversations([silent, conversation("Yes?", "Yes.")], tokenizer, 128)
    assert (rows.rows, rows.counts.nothing_learnt) == (1, 1) and learnt(rows, tokenizer) == "Yes.<|im_end|>"


def test_one_in_which_the_template_marks_nothing_is_left_out_and_counted(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer.folder, tmp_path / "other")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and 'secret' not in m.content %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    rows = pack_conversations([conversation("Who?", "secret"), conversation("Who?", "Me.")], load_tokenizer(folder), 128)
    assert (rows.rows, rows.counts.nothing_learnt) == (1, 1) and learnt(rows, tokenizer) == "Me.<|im_end|>"


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


@pytest.mark.parametrize(
    ("rejected", "targets", "shared"),
    [
        ([5, 6, 7, 9], [-100, -100, 9, 1], 2),
        ([5, 6, 8, 9], [-100, -100, -100, 1], 2),
        ([5, 6, 7, 9], [-100, 7, 9, 1], 1),
        ([5, 6, 7], [-100, -100, -100], 2),
    ],
    ids=["until the first target", "until they differ", "until the rejected one's first target", "one token stays"],
)
def test_what_two_answers_share_is_read_once(rejected, targets, shared):
    chosen = np.array([5, 6, 7, 8]), np.array([-100, -100, 8, 1])
    pair = PairExample(chosen, (np.array(rejected), np.array(targets)))
    shorter, removed = pair.without_shared()
    assert removed == shared and shorter.chosen is chosen
    assert [part.tolist() for part in shorter.rejected] == [rejected[shared:], targets[shared:]]


def row(*tokens, first=1):
    """Inputs, and targets from the place `first` on."""
    tokens = np.array(tokens)
    return tokens, np.where(np.arange(len(tokens)) < first, IGNORE_INDEX, tokens + 100)


def test_pairs_lie_side_by_side_in_their_rows_with_what_is_known_of_them():
    pairs = [
        PairExample(row(1, 2, 3), row(1, 4), margin=0.5, weight=2.0),
        PairExample(row(5, 6), row(7, 8), confidence=0.75),
        PairExample(row(1, 2), row(9)),
    ]
    batch = packing.pack_pair_examples(pairs, 8, 77)
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 1, 4, 1, 2, 9], [5, 6, 7, 8, 77, 77, 77, 77]]
    assert batch.document_ids_BT.tolist() == [[1, 1, 1, 2, 2, 3, 3, 4], [1, 1, 2, 2, 0, 0, 0, 0]]
    assert (batch.sequences, batch.together, batch.visible_to_BT) == (4, 2, None)
    of = {name: values.tolist() for name, values in batch.per_sequence.items()}
    assert of == {
        "pair_weight": [[2, 2, 1, 1], [1, 1, 0, 0]],
        "margin": [[0.5, 0.5, 0, 0], [0, 0, 0, 0]],
        "confidence": [[1, 1, 1, 1], [0.75, 0.75, 0, 0]],
    }
    shared = packing.pack_pair_examples(pairs[:1] + pairs[2:], 8, 77, lambda rows: rows + 1, shares_prompts=True)
    assert shared.tokens_BT.tolist() == [[1, 2, 3, 4, 1, 2, 9, 77], [77] * 8] and "confidence" not in shared.per_sequence
    assert shared.positions_BT[0].tolist() == [0, 1, 2, 1, 0, 1, 0, 0]
    assert shared.visible_to_BT[0].tolist() == [2, 1, 1, 2, 3, 3, 4, 0]
    empty = packing.pack_pair_examples([], 8, 77)
    assert (empty.tokens_BT.shape, empty.per_sequence["margin"].shape, empty.sequences) == ((0, 8), (0, 2), 2)


def test_an_answer_of_a_pair_has_half_a_row_and_two_equal_ones_teach_nothing(tokenizer):
    pair = Pair("Who is it?", "It is me, and you.", "No.")
    whole = encode_answer(pair.prompt, pair.chosen, tokenizer).inputs
    for length, kept in ((2 * whole, 1), (2 * whole + 1, 1), (2 * whole - 1, 0)):
        rows = packing.pack_pairs([pair, Pair("a", "b", "b")], tokenizer, length)
        assert (rows.pairs, rows.counts.too_long, rows.equal, rows.rows) == (kept, 1 - kept, 1, kept)
    assert rows.figures == {"too_long": 1, "nothing_learnt": 0, "cut": 0, "equal": 1}
    assert rows.sentences("2 pairs")[-1] == "  1 of 2 pairs are left out: their two answers are the same"
    assert packing.pack_pairs([], tokenizer, 8).sentences("0 pairs") == []


def test_a_label_stands_at_each_answer_and_nothing_where_there_is_none():
    batch = packing._labelled_batch([[row(1, 2)], [row(3), row(4, 5)]], [[False], [True, False]], 4, 77)
    assert batch.tokens_BT.tolist() == [[1, 2, 77, 77], [3, 4, 5, 77]] and batch.sequences == 2
    assert batch.per_sequence["is_answer"].tolist() == [[1, 0], [1, 1]]
    assert batch.per_sequence["is_desirable"].tolist() == [[0, 0], [1, 0]]
    assert packing._labelled_batch([], [], 4, 77).sequences == 1
    last = HeldOutBatches(batch, 3).batch(0)
    assert last.per_sequence["is_answer"].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert HeldOutBatches(batch, 2).steps == 1 and HeldOutBatches(batch, 1).steps == 2
    assert packing.PackedConversations(batch, RowCounts(4)).filled == 5 / 8
    assert not packing.has_mismatched(batch) and packing.placed(batch, None) is batch


def test_what_is_forgotten_and_what_is_kept_take_turns_and_an_end_is_not_forgotten(tokenizer):
    forget, keep = (
        [Labelled(Answered(f"{name} {number} is", f" {number}."), name == "keep") for number in range(count)]
        for name, count in (("forget", 2), ("keep", 4))
    )
    sizes = [encode_answer(one.answered.prompt, one.answered.answer, tokenizer).inputs for one in (forget[0], keep[0])]
    rows = packing.pack_forgetting(forget, keep, tokenizer, sizes[0] + 2 * sizes[1])
    # at 1/4 and 3/4, and at 1/8, 3/8, 5/8 and 7/8
    assert rows.batch.per_sequence["is_desirable"].tolist() == [[1, 0, 1], [1, 0, 1]]
    assert rows.batch.per_sequence["is_answer"].tolist() == [[1, 1, 1], [1, 1, 1]] and (rows.answers, rows.rows) == (6, 2)
    targets = rows.batch.targets_BT[0]
    assert (targets == tokenizer.eos_ids[0]).sum() == 2
    nothing = [Labelled(Answered("a", ""), False)]
    assert packing.pack_forgetting(nothing, [], tokenizer, 64).answers == 0
    one_less = packing.pack_forgetting(forget, keep, tokenizer, sizes[0] + 2 * sizes[1] - 1)
    assert one_less.batch.per_sequence["is_desirable"].tolist()[0] == [1, 0]


def test_prompts_are_shared_where_the_model_can_and_a_row_is_on_one_rank(monkeypatch):
    for ranks, shares in ((1, True), (1, False), (2, True), (2, False)):
        monkeypatch.setattr(packing, "read_decoder_config", lambda _, shares=shares: SimpleNamespace(shares_prefixes=shares))
        config = SimpleNamespace(parallel=SimpleNamespace(context=ranks))
        assert packing.can_share_prompts(config, None) is (ranks == 1 and shares)


def test_held_out_rows_are_validated_at_the_steps_that_are_named_and_none_never(conversations, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "validation_metrics", lambda trainer, source, steps: {"steps": steps})
    config = SimpleNamespace(batch_size=2, validated_steps={3})
    rows = pack_conversations(conversations, tokenizer, 128)
    validate = packing.validation_on(rows.batch, config)
    assert [validate(step, None) for step in (2, 3)] == [{}, {"steps": -(-rows.rows // 2)}]
    assert packing.validation_on(pack_conversations([], tokenizer, 128).batch, config)(3, None) == {}


def test_the_nearest_answer_before_with_another_prompt_is_taken():
    assert [others_before(list(keys)) for keys in ("aabbc", "abca", "")] == [[4, 4, 1, 1, 3], [2, 0, 1, 2], []]
    with pytest.raises(SourceError, match="all of these have the same prompt"):
        others_before(list("aaa"))


def test_the_twin_of_an_answer_is_its_prompt_with_anothers_answer(tokenizer):
    examples = [Labelled(Answered(f"{name} is", f" {name}{name}."), name == "a") for name in "abc"]
    rows = pack_answers(examples, tokenizer, 16)
    twins = packing.mismatched(rows.batch)
    said_by = [tokenizer.decode(ids.tolist()) for ids in twins.tokens_BT]
    assert packing.has_mismatched(rows.batch) and rows.batch.per_sequence["is_answer"].sum() == 3
    assert all(text in "".join(said_by) for text in ("a is cc.", "b is aa.", "c is bb."))
    for mixed in ("texts", "messages"):
        other = Labelled(Answered((said("user", "c"),), (said("assistant", "d"),)), False)
        given = [examples[0], other] if mixed == "texts" else [other, examples[0]]
        with pytest.raises(SourceError, match="some rows are texts and some messages"):
            pack_answers(given, tokenizer, 64)
