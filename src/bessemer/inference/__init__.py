"""The inference engine: continuous batching over a paged KV cache.

`engine.Engine` is the public interface, `engine_core.EngineCore` the loop of one step: `scheduling` decides what is computed, a
strategy of `execution.steps` computes it, `sampling` and `speculation` make tokens of logits. Words with one meaning in this
package:

- request: what the engine core serves: a `Request` for a completion, a `ScoreRequest`, a `CaptureRequest` or a `LogitsRequest`.
  A client's call of the HTTP API is an API request.
- sequence: the scheduler's view of a request, a `TokenSequence`.
- chunk: the tokens of a sequence that one step computes (`ScheduledChunk`); what it adds to a completion is a `request.Chunk`.
- block: the keys and values of `block_size` neighbouring positions, by number. A layer of the decoder is a layer.
- page: one layer's part of a block, in its tensors.
- group: layers with the same window, whose blocks are allocated and freed together (`BlockGroup`, `LayerGroup`).
- row: one token's line of a batch, of its hidden states or of its logits.
- score: the log-probabilities of a continuation (`scores.Score`). An attention score is a query times a key; a beam's rank is
  `Beam.score`. What a model gives tokens are logits.
- runner: computes the batch of a step, by a backend: what multiplies, attends and computes whole steps on a device.
- draft: draft tokens of speculative decoding, proposed by a `Proposer` and verified by the model.
"""
