"""Text to a model, in some seconds: `python tiny_model.py`. The model is far too small to know anything.

Needs the extras data, train; with report too, the run has a report.
"""

from pathlib import Path
from pydoc_data.topics import topics

import bessemer

Path("texts").mkdir(exist_ok=True)
for name, text in list(topics.items())[:30]:
    Path("texts", f"{name}.txt").write_text(text, encoding="utf-8")

Path("tiny.yaml").write_text(
    """\
format: 1
name: tiny
collect:
  - {source: files, paths: texts}
tokenize: {vocab_size: 512}
model: {preset: qwen3-1m, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, max_position_embeddings: 256}
pretrain: {steps: 30, batch_size: 8, context_length: 64, compile: false, evaluate_tokens: 2048}
""",
    encoding="utf-8",
)
result = bessemer.run("tiny.yaml", {"pretrain.learning_rate": 5e-3}, name="tiny")

print(f"{result.folder}: {', '.join(made.stage.name for made in result.made)} in {result.seconds:.1f} s")
model = bessemer.load_model(result.folder / "model")
print(f"{model.config.parameters():,} parameters")
