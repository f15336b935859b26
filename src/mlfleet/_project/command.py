"""Renders the command for bash from an entry point and its parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

from mlfleet._project.parameters import ResolvedParameters
from mlfleet._project.shell import HOLE, Context, contexts, quote
from mlfleet._project.spec import EntryPoint
from mlfleet._text.documents import nearest
from mlfleet.errors import ParameterError, SpecError

__all__ = ["render"]

_log = logging.getLogger("mlfleet.project")

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

# Names that may stay in the command as they are.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_WORD = re.compile(r"[A-Za-z_]\w*", re.A)


def render(entry_point: EntryPoint, parameters: ResolvedParameters, downloaded: Mapping[str, str] | None = None) -> str:
    """Render the command for ``bash -c``, with every value quoted for the shell.

    ``{name}`` of a declared parameter is replaced by its value, quoted for where it stands: outside of quotes, in
    ``'…'``, ``"…"`` and ``$'…'`` any value arrives as it is. Where bash would read the value as code (here-documents,
    arithmetic, scripts for another shell, …) only plain values are taken.

    ``{{`` and ``}}`` are braces, as in the reference. All other braces stay as they are: ``${HOME}``, ``{}``, JSON,
    ``{name:format}``, ``{name!r}``, ``{unknown}``, and ``${name}`` even if a parameter has that name (in single quotes,
    where it is no variable, the parameter is meant). ``}}`` that closes two single braces, as in nested JSON, stays
    two. Comments stay as they are.

    Extra parameters are appended as ``--name value``.

    Args:
        entry_point: The entry point with the command.
        parameters: The parameters as resolved for it.
        downloaded: Parameter name → local path, for each of ``parameters.downloads``.

    Raises:
        SpecError: A value would be read as code where the command puts it; the text says where and what to do.
    """
    values = {**parameters.declared, **(downloaded or {})}
    _check_text(entry_point, values, parameters.extra)
    template = entry_point.command
    if parameters.extra:
        # The reference appends behind the newline that a block of YAML ends with, where it is another command.
        template = re.sub(r"(?<!\\)\n+\Z", "", template)
    text, names, places, end = _read(template, frozenset(values))
    pieces = iter(
        _placed(entry_point, name, values[name], context) for name, context in zip(names, places, strict=True)
    )
    command = re.sub(HOLE, lambda _: next(pieces), text)
    return " ".join([command, *_appended(entry_point, parameters.extra, end)])


@lru_cache(maxsize=256)
def _read(template: str, declared: frozenset[str]) -> tuple[str, tuple[str, ...], tuple[Context, ...], Context]:
    """Return the command with a hole for each placeholder, their names and contexts, and the context of its end.

    The result is cached, since it is the same for all runs of an entry point.
    """
    text, names, unknown = _with_holes(template, declared)
    for name in dict.fromkeys(unknown):
        _log.warning(
            "the command holds {%s}, which is not a declared parameter%s: bash gets it as it is",
            name,
            nearest(name, declared),
        )
    *places, end = contexts(text)
    return text, tuple(names), tuple(places), end


def _placed(entry_point: EntryPoint, name: str, value: str, context: Context) -> str:
    if context in (Context.VARIABLE, Context.COMMENT):
        if not _NAME.fullmatch(name):
            raise SpecError(f"the command of the entry point {entry_point.name!r}: {{{name}}} cannot stand {context}")
        return f"{{{name}}}"
    quoted = quote(value, context)
    if quoted is None:
        raise _unquotable(entry_point, f"{{{name}}} stands", context)
    return quoted


def _appended(entry_point: EntryPoint, extra: Mapping[str, str], end: Context) -> Iterator[str]:
    for name, value in extra.items():
        quoted = [quote(name, end), quote(value, end)]
        if None in quoted or end in (Context.COMMENT, Context.ESCAPED):
            raise _unquotable(entry_point, f"the undeclared parameter {name!r} would be appended", end)
        yield f"--{quoted[0]} {quoted[1]}"


def _unquotable(entry_point: EntryPoint, what: str, context: Context) -> SpecError:
    if context is Context.ARITHMETIC:
        rule = "where bash evaluates its value: only numbers can stand there"
    elif context is Context.COMMENT:
        rule = "where bash would not see it"
    else:
        rule = "where its value cannot be quoted: only letters, digits and _@%+=:,./- can stand there"
    hint = "; use the parameter outside of it, for instance to set a shell variable first: value={name}"
    return SpecError(f"the command of the entry point {entry_point.name!r}: {what} {context}, {rule}{hint}")


def _check_text(entry_point: EntryPoint, values: Mapping[str, str], extra: Mapping[str, str]) -> None:
    if HOLE in entry_point.command:
        raise SpecError(f"the command of the entry point {entry_point.name!r} holds a NUL character")
    wrong = [name for name, value in [*values.items(), *extra.items()] if HOLE in name or HOLE in value]
    if wrong:
        raise ParameterError(f"the parameters {wrong} hold a NUL character, which no command can", names=wrong)


def _with_holes(template: str, declared: Collection[str]) -> tuple[str, list[str], list[str]]:
    """Return the command with a hole for each placeholder, the names of the holes, and words that may be mistakes."""
    unknown: list[str] = []
    text: list[str] = []
    names: list[str] = []
    # For each open brace whether it was written twice.
    doubled: list[bool] = []
    in_single_quotes = False
    position = 0
    while match := _BRACES.search(template, position):
        text.append(template[position : match.start()])
        in_single_quotes ^= text[-1].count("'") % 2 == 1
        position = match.end()
        braces = match[0]
        if braces in ("{{", "{"):
            doubled.append(braces == "{{")
            text.append("{")
        elif braces in ("}}", "}"):
            if doubled and not doubled.pop() and braces == "}}":
                position -= 1  # two that were opened one by one are closed one by one
            text.append("}")
        elif match[1] in declared:
            names.append(match[1])
            text.append(HOLE)
        else:
            text.append(braces)
            # Neither ${name}, nor a part of JSON, nor a program of awk in single quotes.
            is_variable = template[max(match.start() - 1, 0) : match.start()] == "$"
            if _WORD.fullmatch(match[1]) and not (doubled or is_variable or in_single_quotes):
                unknown.append(match[1])
    return "".join([*text, template[position:]]), names, unknown
