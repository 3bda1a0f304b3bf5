"""The mesh of processes, and a single-device model put on it: data, tensor, context, pipeline and expert parallelism."""
