"""Tasks: items, their questions, and the judgement of answers. One definition for evaluations and for rewards.

A task is a YAML file over JSONL, CSV or Parquet, or a class. It knows no model: it gives `questions`, and `judge` says what a
model's answer to one is worth. An item is a row of the data. A question asks it in one form. A part of a question is one
context with the continuations whose likelihood is wanted.
"""
