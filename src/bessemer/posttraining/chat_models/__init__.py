"""Models that write or judge data: behind the engine of this machine, or at a URL."""
