"""Distributed training: the device mesh, and data, tensor, context, pipeline and expert parallelism applied to a model."""
