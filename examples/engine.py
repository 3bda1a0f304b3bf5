"""Generate with a model: `python engine.py [MODEL]`, a folder or a GGUF file; without one, what `tiny_model.py` made.

Needs the extra serve.
"""

import json
import sys

from bessemer import Engine, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "runs/tiny/model"
with Engine(model) as engine:
    # several prompts are computed together, each with settings of its own
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    drawn = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=7)
    for completion in engine.generate(["The name of", "An expression is"], [greedy, drawn]):
        print(repr(completion.text), completion.finish_reason)

    # as it comes
    for chunk in engine.stream("The statement", greedy):
        print(chunk.text, end="", flush=True)
    print()

    # log-probabilities of the tokens, and of the two likeliest at each place
    (completion,) = engine.generate(["The"], SamplingParams(max_tokens=3, temperature=0.0, logprobs=2))
    for sampled in completion.log_probs or []:
        print(sampled.token, sampled.log_probs)

    # a text that fits a schema, whatever the model knows
    schema = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"], "additionalProperties": False}
    (completion,) = engine.generate(["Is steel hot?"], SamplingParams(max_tokens=64, temperature=0.0, json_schema=schema))
    print(json.loads(completion.text))
