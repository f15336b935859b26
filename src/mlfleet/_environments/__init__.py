"""The Python environment of a run's command: the caller's environment, or one that is built once and shared."""
