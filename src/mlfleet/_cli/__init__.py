"""The command line, one module for each command.

Exit codes: 0 the run finished; 1 it failed, or its environment, its backend or tracking did; 2 there is a mistake in
the call or in the project; 128 and the signal's number if a signal ended it (130 for Ctrl-C, 143 for SIGTERM).

Standard output belongs to the project, or with ``--json`` to one JSON object. Messages of mlfleet itself go to standard
error.
"""

from mlfleet._cli.program import main

__all__ = ["main"]
