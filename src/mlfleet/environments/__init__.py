"""How the command of a run gets its Python."""
