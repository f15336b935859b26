"""How the command of a run gets its Python: the caller's environment, or one that is built once and shared."""
