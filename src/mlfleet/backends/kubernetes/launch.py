"""The command of a container: the project's command for bash, under a shell that passes signals on. Pure."""

from __future__ import annotations

__all__ = ["escape", "launch"]

# Process 1 of a container ignores every signal that it has no handler for, so that a Python program there would not
# end by SIGTERM. This shell is process 1 instead: it has a handler, and passes the signal to the command's group.
# stderr goes where stdout does: the runtime reads the two apart, and would lose their order. What this shell itself has
# to say ("Killed") is for nobody. A shell that has reaped
# its child by itself tells the child's end only to the next `wait`; 127 is also "no such child".
_SUPERVISE = """\
exec 2>/dev/null
[ -n "$BASH_VERSION" ] && set -m
"$1" -c "$0" </dev/null 2>&1 &
p=$!
trap 'kill -TERM -$p || kill -TERM $p' TERM INT QUIT
while :; do wait $p; c=$?; kill -0 $p || break; done
wait $p; d=$?
[ $d = 127 ] || c=$d
exit $c
"""
# Not every image has bash. The command stays one argument from here to the shell that runs it.
_CHOOSE = 'if command -v bash >/dev/null 2>&1; then exec bash -c "$1" "$0" bash; fi; exec sh -c "$1" "$0" sh'


def launch(command: str) -> list[str]:
    """``command`` of a container, for the project's command."""
    return ["sh", "-c", _ESCAPED[0], escape(command), _ESCAPED[1]]


def escape(text: str) -> str:
    """`text` as Kubernetes gives it back: it makes ``$(NAME)`` the value of a variable, and ``$$`` a dollar sign.

    https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
    """
    return text.replace("$", "$$")


_ESCAPED = escape(_CHOOSE), escape(_SUPERVISE)
