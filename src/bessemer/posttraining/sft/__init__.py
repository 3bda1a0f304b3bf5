"""Supervised fine-tuning: the stage `sft`, and the command `bessemer finetune` (any model, any table)."""
