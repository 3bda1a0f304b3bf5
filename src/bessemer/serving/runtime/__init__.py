"""What all APIs share: access, request bodies, streams, the engine's thread, models, metrics."""
