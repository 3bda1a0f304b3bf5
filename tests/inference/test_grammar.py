from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.core.errors import RequestError
from bessemer.inference.sampling import grammar as grammar_module
from bessemer.inference.sampling.grammar import GrammarCompiler
from bessemer.inference.sampling.sampler import SamplingParams, SamplingState, sample_rows
from bessemer.inference.speculation.verification import verify
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

#: A model's vocabulary is often padded.
PADDED = VOCAB_SIZE + 9

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["cat", "dog", None]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "type": "array",
        "items": {"$ref": "#/$defs/node"},
        "maxItems": 2,
    },
    {"anyOf": [{"const": 7}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
]
REGEXES = [r"[a-c]{3}", r"\d{4}-\d{2}", r"(yes|no)[.!]?", r"[é日]{2}", "the in a{2,5}"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, PADDED)


def state_of(compiler, tokenizer, **settings):
    params = SamplingParams(**settings)
    return SamplingState(params, prompt=[1], vocab_size=PADDED, end_tokens=tokenizer.eos_ids, grammar=compiler.matcher(params))


def random_logits(row, seed=0):
    """What a model that has learnt nothing says: noise, the same for the same answer."""
    generator = torch.Generator().manual_seed(hash((seed, *row.answer)) % 2**40)
    return torch.randn(1, PADDED, generator=generator) * 4


def written(row, tokenizer, limit=600, logits=random_logits):
    """The text of an answer that ended as its grammar lets it."""
    while not row.finished:
        (sampled,) = sample_rows(logits(row), [row])
        assert len(row.answer) < limit, "no end"
        if row.ends(sampled.token):
            break
    return tokenizer.decode(row.answer)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_generated_json_fits_its_schema(compiler, tokenizer, schema, seed):
    text = written(state_of(compiler, tokenizer, json_schema=schema, seed=seed), tokenizer)
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("regex", REGEXES)
def test_generated_text_matches_the_whole_expression(compiler, tokenizer, regex, temperature):
    text = written(state_of(compiler, tokenizer, regex=regex, seed=1, temperature=temperature), tokenizer)
    assert re.fullmatch(regex, text)


# hostile: quotes, escapes, one the beginning of another, what is markup in a grammar
@pytest.mark.parametrize("choice", [["yes", "no"], ['a"b\\', "é\n日", "/x/"], ["the", "then", "th"], ["%ignore", "start: x"]])
def test_the_answer_is_one_of_the_choices_and_each_can_be(compiler, tokenizer, choice):
    texts = {
        written(state_of(compiler, tokenizer, choice=choice, seed=seed), tokenizer, logits=lambda row: torch.zeros(1, PADDED))
        for seed in range(60)
    }
    assert texts == set(choice)


def test_ebnf_is_followed(compiler, tokenizer):
    grammar = 'start: expression\nexpression: "1" | "(" expression "+" expression ")"\n'
    for seed in range(5):
        text = written(
            state_of(compiler, tokenizer, ebnf=grammar, seed=seed, logit_bias={ord("1"): 3}),
            tokenizer,
            logits=lambda row: torch.zeros(1, PADDED),
        )
        assert re.fullmatch(r"[1+()]+", text) and isinstance(eval(text), int)


def test_a_model_with_random_weights_writes_json_that_fits(tokenizer):
    model = random_decoder(SHAPES["grouped"].with_changes(vocab_size=PADDED, max_position_embeddings=700))
    compiler = GrammarCompiler(tokenizer, PADDED)

    @torch.no_grad()
    def logits(row):
        return model(torch.tensor([[1, *row.answer]]))[:, -1]

    for schema in SCHEMAS[:2]:
        for temperature in (0, 1):
            row = state_of(compiler, tokenizer, json_schema=schema, seed=2, temperature=temperature)
            jsonschema.validate(json.loads(written(row, tokenizer, logits=logits)), schema)


def test_json_space_comes_to_an_end(compiler, tokenizer):
    """A model that likes white space best still gets to the end."""
    row = state_of(compiler, tokenizer, json_schema=SCHEMAS[1], temperature=0, logit_bias={32: 50, 10: 60, 9: 55})
    text = written(row, tokenizer)
    assert "\n" in text
    jsonschema.validate(json.loads(text), SCHEMAS[1])


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=40, deadline=None)
def test_a_matcher_taken_back_is_as_one_that_never_went_on(compiler, tokenizer, seed, data):
    params = SamplingParams(json_schema=SCHEMAS[seed % len(SCHEMAS)])
    rng = np.random.default_rng(seed)
    matcher, consumed = compiler.matcher(params), []
    for _ in range(data.draw(st.integers(1, 6))):
        for _ in range(data.draw(st.integers(0, 12))):
            if matcher.ended:
                break
            consumed.append(int(rng.choice(np.flatnonzero(matcher.allowed()))))
            matcher.consume(consumed[-1])
        back = data.draw(st.integers(0, len(consumed)))
        matcher.rollback(back)
        consumed = consumed[: len(consumed) - back]
        fresh = compiler.matcher(params)
        for token in consumed:
            fresh.consume(token)
        assert (matcher.ended, matcher.finished, matcher.complete) == (fresh.ended, fresh.finished, fresh.complete)
        if not matcher.ended:
            assert np.array_equal(matcher.allowed(), fresh.allowed())


def test_the_end_may_come_only_where_the_text_is_complete(compiler, tokenizer):
    matcher = compiler.matcher(SamplingParams(regex="ab?"))
    ends = list(tokenizer.eos_ids)
    seen = [matcher.allowed()[ends].tolist()]
    for token in b"ab":
        matcher.consume(token)
        seen.append(matcher.allowed()[ends].tolist())
    assert seen == [[False, False], [True, True], [True, True]]
    assert matcher.finished


def test_padding_of_the_vocabulary_is_never_allowed(compiler):
    matcher = compiler.matcher(SamplingParams(regex=r"[\s\S]*"))
    assert not matcher.allowed()[VOCAB_SIZE:].any() and matcher.allowed()[:128].any()


def test_drafts_that_do_not_fit_are_cut(compiler):
    matcher = compiler.matcher(SamplingParams(regex="abc"))
    assert matcher.valid_prefix(list(b"abx")) == 2
    assert matcher.valid_prefix(list(b"abc")) == 3
    assert np.flatnonzero(matcher.allowed()).tolist() == [ord("a")]


def test_verified_drafts_follow_the_grammar(compiler, tokenizer):
    for seed in range(6):
        plain = state_of(compiler, tokenizer, json_schema=SCHEMAS[0], seed=seed)
        written(plain, tokenizer)
        drafted = state_of(compiler, tokenizer, json_schema=SCHEMAS[0], seed=seed)
        while not drafted.finished:
            made = len(drafted.answer)
            # right for two tokens, then wrong
            draft = [*plain.answer[made : made + 2], ord("#")]
            logits = []
            for count in range(len(draft) + 1):
                drafted.answer += draft[:count]
                logits.append(random_logits(drafted)[0])
                del drafted.answer[made:]
            verify(torch.stack(logits), drafted, draft)
        assert drafted.answer == plain.answer


def test_min_tokens_gives_way_where_the_grammar_is_at_its_end(compiler, tokenizer):
    row = state_of(compiler, tokenizer, regex="(ab)?", min_tokens=5, temperature=0)
    assert written(row, tokenizer) == "ab"
    empty = state_of(compiler, tokenizer, regex="", min_tokens=5, temperature=0)
    assert written(empty, tokenizer) == ""


def test_a_grammar_without_an_end_goes_on(compiler, tokenizer):
    row = state_of(compiler, tokenizer, ebnf='start: "a" rest\nrest: "c" rest | "d" rest', seed=1)
    for _ in range(50):
        sample_rows(random_logits(row), [row])
    assert re.fullmatch("a[cd]{49}", tokenizer.decode(row.answer)) and not row.finished


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('start: "a" rest\nrest: "b" /[^\\s\\S]/', "ebnf: no text that fits goes on from here"),
        ('start: "a" start', "ebnf: parser error: Too many items"),  # endless, and each token is forced by the one before
    ],
)
def test_a_grammar_that_leads_nowhere_fails_its_own_request_in_one_line(compiler, tokenizer, grammar, reason):
    rows = [state_of(compiler, tokenizer, ebnf=grammar), state_of(compiler, tokenizer, temperature=0)]
    while len(rows[1].answer) < 5:
        stuck, other = sample_rows(random_logits(rows[1]).expand(2, -1), rows)
        if isinstance(stuck, RequestError):
            break
    assert str(stuck).startswith(reason) and "\n" not in str(stuck)
    assert other.token == rows[1].answer[-1]


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        (
            {"regex": "a(b"},
            'regex does not compile: at 1(8): invalid regex "a(b" (in regex): regex parse error: a(b error: unclosed group',
        ),
        ({"json_schema": {"type": "objec"}}, "json_schema does not compile: Invalid type: objec"),
        ({"json_schema": "{"}, "json_schema does not compile: EOF while parsing"),
        (
            {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
            "json_schema does not compile: Unsatisfiable schema",
        ),
        ({"ebnf": 'start: "x" | foo'}, 'ebnf does not compile: at 1(8): unknown name: "foo"'),
        ({"regex": r"[^\s\S]"}, "regex fits no text"),
        ({"regex": "[a&&b]"}, "regex fits no text"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_one_line(compiler, settings_, reason):
    with pytest.raises(RequestError) as refusal:
        compiler.matcher(SamplingParams(**settings_))
    assert str(refusal.value).startswith(reason) and "\n" not in str(refusal.value)


def test_a_grammar_is_compiled_once_while_it_is_in_use(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, PADDED)
    compiled = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda name, value: compiled.append(value) or compile_one(name, value))
    monkeypatch.setattr("bessemer.inference.sampling.grammar._KEPT", 2)
    for regex in ("a", "b", "a", "c", "a", "b"):  # the third puts out the one that is longest unused
        compiler.matcher(SamplingParams(regex=regex))
    assert compiled == ["a", "b", "c", "b"]


def test_matchers_of_one_grammar_do_not_disturb_each_other(compiler):
    first, second = (compiler.matcher(SamplingParams(regex="ab")) for _ in range(2))
    first.consume(ord("a"))
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a")]


def test_without_a_grammar_there_is_no_matcher(compiler):
    assert compiler.matcher(SamplingParams()) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"choice": [f"text {number}" for number in range(100_000)]}, "choice: 100,000 texts are more than the 4,096"),
        ({"choice": ["a" * 200_000, "b" * 200_000]}, "choice: 400,000 characters are more than the 262,144"),
        ({"regex": "a" * 300_000}, "regex: 300,000 characters"),
        ({"json_schema": {"enum": ["a" * 300_000]}}, "json_schema: 300,0"),
    ],
    ids=["texts", "characters", "regex", "schema"],
)
def test_a_grammar_that_is_too_large_is_refused_before_it_is_compiled(tokenizer, monkeypatch, settings, said):
    monkeypatch.setattr(GrammarCompiler, "_compile", None)
    with pytest.raises(RequestError, match=said):
        GrammarCompiler(tokenizer, PADDED).matcher(SamplingParams(**settings))


#: Computed for ever, and a chain of rules that overflows a stack and takes the process with it.
INTERSECTION = "start: A\nA: " + " & ".join(f"/.*{number:x}.*/" for number in range(60))
CHAIN = "start: a0\n" + "\n".join(f"a{number}: a{number + 1}" for number in range(12_000)) + '\na12000: "x"'


@pytest.mark.parametrize("ebnf", [INTERSECTION, CHAIN], ids=["intersection", "chain"])
def test_a_grammar_on_which_the_library_hangs_or_crashes_is_refused_in_time(tokenizer, monkeypatch, ebnf):
    compiler = GrammarCompiler(tokenizer, PADDED)
    compiler.matcher(SamplingParams(regex="a"))
    monkeypatch.setattr(grammar_module, "_COMPILE_SECONDS", 0.3)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"^ebnf does not compile: it takes too much time or memory; simplify it$"):
            compiler.matcher(SamplingParams(ebnf=ebnf))
    assert compiler.matcher(SamplingParams(regex="ab")) is not None


def test_a_grammar_that_is_kept_does_not_wait_for_one_that_is_compiled(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, PADDED)
    compiler.matcher(SamplingParams(regex="a"))
    begun, may_end = threading.Event(), threading.Event()

    def compile_slowly(name, value):
        begun.set()
        assert may_end.wait(30)
        raise RequestError("slow")

    monkeypatch.setattr(compiler, "_compile", compile_slowly)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(compiler.matcher, SamplingParams(regex="b"))
        assert begun.wait(30)
        assert pool.submit(compiler.matcher, SamplingParams(regex="a")).result(30) is not None
        assert not slow.done()
        may_end.set()
        with pytest.raises(RequestError, match="slow"):
            slow.result(30)
