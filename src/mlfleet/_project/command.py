"""Renders the command for bash from an entry point and its parameters."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from mlfleet._project.parameters import ResolvedParameters, is_true
from mlfleet._project.shell import HOLE, VARIABLE_PREFIX, Context, Place, places, reference
from mlfleet._project.spec import EntryPoint, Parameter
from mlfleet._run_log import get_logger
from mlfleet._text.documents import nearest
from mlfleet.errors import ParameterError, SpecError

__all__ = ["MAX_LENGTH", "find_placeholders", "render", "substitute"]

_log = get_logger("mlfleet.project")

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

# Names that may stay in the command as they are.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_WORD = re.compile(r"[A-Za-z_]\w*", re.A)

# What may stand behind and before a placeholder that is a word, and before one that is the value of an option.
_LONGEST_LEAD = 1000  # characters that are looked at, so that the time stays linear
_ENDS_WORD = " \t\n;&|)"
_LEAD = r"(?:\A|(?<!\\)[ \t\n;&|(])(?:\\\n)*"
_WORD_BEGINS = re.compile(_LEAD + r"\Z")
_OWN_OPTION = re.compile(_LEAD + r"(?P<option>--?[A-Za-z][\w.-]*)(?P<gap>=|(?:[ \t]|\\\n)*[ \t](?:\\\n)*)\Z", re.A)
_ONE_WORD = re.compile(r"(?:[<>][&|]?|(?:\A|[\s;&|(])case[ \t])[ \t]*\Z")
_TEST = re.compile(r"\s*(?:(?:if|elif|while|until|then|do|else|!)\s+)*(?:\[\[?|test)\s")


MAX_LENGTH = 131_071
"""The bytes of the longest command. Linux takes no longer argument of a program (MAX_ARG_STRLEN in execve(2))."""

# What to do instead, where a value cannot stand.
_HINTS = {
    Context.ARITHMETIC: "calculate in the program that the command runs, which gets the parameter as an argument",
    Context.NAME: "write the name of the variable into the command",
    Context.COMMENT: "end the command without a comment",
    Context.HERE_DOCUMENT: "use a here-string in place of it: <<< {name}",
    Context.SCRIPT: "give it to the script as an argument: bash -c 'echo \"$1\"' _ {name}",
    Context.EXPORTED: "give it to the function as an argument",
}


def render(entry_point: EntryPoint, parameters: ResolvedParameters, downloaded: Mapping[str, str] | None = None) -> str:
    """Render the command for ``bash -c``, in which no value is parsed as a part of the command.

    ``{name}`` of a declared parameter is replaced by a reference to a variable, in the quotes that its place needs. The
    variables are assigned before the command, and not exported. Plain values (letters, digits and a few signs) are
    written as they are where they can only be a word. Where bash or another shell would evaluate a variable again
    (arithmetic, scripts, names of variables, …) only plain values are taken.

    ``{{`` and ``}}`` are braces, as in the reference. All other braces stay as they are: ``${HOME}``, ``{}``, JSON,
    ``{name:format}``, ``{name!r}``, ``{unknown}``, and ``${name}`` even if a parameter has that name (in single quotes,
    where it is no variable, the parameter is meant). ``}}`` that closes two single braces, as in nested JSON, stays
    two. Comments stay as they are.

    The placeholder of a flag, of a list, of an optional parameter, or of one with an option stands for whole words, if
    it is a word itself: see `_option_words`.

    Extra parameters are appended as ``--name value``.

    Args:
        entry_point: The entry point with the command.
        parameters: The parameters as resolved for it.
        downloaded: Parameter name → local path, for each of ``parameters.downloads``.

    Raises:
        SpecError: A value would be evaluated where the command puts it; the text says where and what to do. Or the
            command is longer than `MAX_LENGTH`.
        ParameterError: The command is longer than `MAX_LENGTH` because of a value.
    """
    values = {**parameters.declared, **(downloaded or {})}
    _check_text(entry_point, values, parameters.extra)
    template = entry_point.command
    if parameters.extra:
        # The reference appends behind the newline that a block of YAML ends with, where it is another command.
        template = re.sub(r"(?<!\\)\n+\Z", "", template)
    read = _read(template, frozenset(values))
    variables = _Variables()
    written: list[str] = []
    position = 0
    for hole, name, place in zip(re.finditer(HOLE, read.text), read.names, read.places, strict=True):

        def refer(value: str, name: str = name, place: Place = place, at: int = hole.start()) -> str:
            return _placed(entry_point, name, value, place, read.text, at, variables)

        parameter = entry_point.parameters[name]
        begin, words = hole.start(), None
        is_unquoted = place.context in (Context.UNQUOTED, Context.SCRIPT)
        if is_unquoted and (read.text[hole.end() : hole.end() + 1] or " ") in _ENDS_WORD:
            items = parameters.lists.get(name)
            begin, words = _option_words(parameter, values[name], items, read.text, hole.start(), refer)
        written += [read.text[position:begin], refer(values[name]) if words is None else " ".join(words)]
        position = hole.end()
    written.append(read.text[position:])
    command = " ".join(["".join(written), *_appended(entry_point, parameters.extra, read.end, variables)])
    command = variables.assignments() + command
    length = len(command.encode())
    if length > MAX_LENGTH:
        given = {**values, **parameters.extra}
        longest = max(given, key=lambda name: len(given[name]), default="")
        raise ParameterError(
            f"the command of the entry point {entry_point.name!r} is {length:,} bytes long with the values of its "
            f"parameters, the limit is {MAX_LENGTH:,}; the longest value is that of {longest!r}: write it to a file, "
            "and give its path",
            names=[longest],
        )
    return command


def substitute(command: str) -> list[str]:
    """Return the words of a simple command that `render` made, for those who run it without a shell.

    Raises:
        ValueError: A quote is not closed.
    """
    words = shlex.split(command)
    values: dict[str, str] = {}
    while words and (assignment := _ASSIGNED.fullmatch(words[0])):
        values[assignment[1]] = assignment[2]
        del words[0]
    return [_REFERENCE.sub(lambda match: values.get(match[1], match[0]), word) for word in words]


_ASSIGNED = re.compile(rf"({VARIABLE_PREFIX}\d+)=(.*);", re.S)
_REFERENCE = re.compile(rf"\$\{{({VARIABLE_PREFIX}\d+)\}}")


class _Variables:
    """The variables that hold the values of a command."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def name(self, value: str) -> str:
        return self._names.setdefault(value, f"{VARIABLE_PREFIX}{len(self._names) + 1}")

    def assignments(self) -> str:
        return "".join(f"{name}={shlex.quote(value)}; " for value, name in self._names.items())


@dataclass(frozen=True, slots=True)
class _Template:
    """The command of an entry point as it was read.

    Attributes:
        text: The command with a hole for each placeholder.
        names: The names of the holes.
        places: The places of the holes.
        end: The place of what is appended.
    """

    text: str
    names: tuple[str, ...]
    places: tuple[Place, ...]
    end: Place


@lru_cache(maxsize=256)
def _read(template: str, declared: frozenset[str]) -> _Template:
    """Read a command. The result is cached, since it is the same for all runs of an entry point."""
    text, names, unknown = find_placeholders(template, declared)
    for name in [*dict.fromkeys(unknown)][:20]:
        _log.warning(
            "the command holds {%s}, which is not a declared parameter%s: bash gets it as it is",
            name,
            nearest(name, declared),
        )
    *found, end = places(text)
    return _Template(text, tuple(names), tuple(found), end)


def _option_words(
    parameter: Parameter,
    text: str,
    items: tuple[str, ...] | None,
    command: str,
    at: int,
    refer: Callable[[str], str],
) -> tuple[int, list[str] | None]:
    """Return the words for a placeholder that ends a word, and the position of the text that they replace.

    Four cases, by what stands directly before the placeholder:

    1. A part of its word other than ``--name=``, or something that needs one word: the value, as in quotes.
    2. An option (``--name {name}``, ``--name={name}``), where the parameter has no other one: the value of that option,
       which is repeated for each item of a list, and left out with an optional value that is empty.
    3. Nothing, and the parameter has an option: the option and the value; once for each item of a list, and the option
       alone for a ``bool`` that is true.
    4. Nothing, and it has no option: the value, or nothing for an optional value that is empty.

    Args:
        parameter: The parameter.
        text: Its value.
        items: The items of a list; None for other types.
        command: The command.
        at: The position of the placeholder.
        refer: Returns the text for a value.

    Returns:
        The position at which the words begin, and the words; None: the value as it is.
    """
    is_list, is_flag = parameter.type == "list", parameter.type == "bool"
    is_left_out = parameter.optional and not text
    if not (is_list or is_flag or is_left_out or parameter.option is not None) or _needs_word(command, at):
        return at, None
    values = () if is_left_out else (items or ()) if is_list else (text,)
    own = _OWN_OPTION.search(command, max(at - _LONGEST_LEAD, 0), at)
    if own is not None and parameter.option in (None, own["option"], own["option"] + "="):
        if is_flag and not is_left_out:
            return at, None
        joint = "=" if own["gap"] == "=" else " "
        return own.start("option"), [f"{own['option']}{joint}{refer(value)}" for value in values]
    if _WORD_BEGINS.search(command, max(at - _LONGEST_LEAD, 0), at) is None:
        return at, None
    option = parameter.option
    if option is None and (is_list or is_flag):
        option = shlex.quote(f"--{parameter.name}")
    if is_flag:
        return at, [option.removesuffix("=")] if option and values and is_true(text) else []
    if not option:
        return at, [refer(value) for value in values]
    joint = "" if option.endswith("=") else " "
    return at, [f"{option}{joint}{refer(value)}" for value in values]


def _needs_word(command: str, at: int) -> bool:
    """Return True where bash needs one word: in ``[``, ``[[`` and ``test``, and after ``case``, ``<`` and ``>``."""
    before = command[max(at - _LONGEST_LEAD, 0) : at]
    is_test = before.rfind("[[ ") > before.rfind("]]") or _TEST.match(re.split(r"[;&|\n(]", before)[-1]) is not None
    return is_test or _ONE_WORD.search(before) is not None


def _placed(
    entry_point: EntryPoint, name: str, value: str, place: Place, text: str, at: int, variables: _Variables
) -> str:
    if place.context in (Context.VARIABLE, Context.COMMENT):
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"the command of the entry point {entry_point.name!r}: {{{name}}} cannot stand {place.context}"
            )
        return f"{{{name}}}"
    found = reference(value, place, text, at, lambda: variables.name(value))
    if found is None:
        raise _unquotable(entry_point, f"{{{name}}} stands", name, place)
    return found


def _appended(entry_point: EntryPoint, extra: Mapping[str, str], end: Place, variables: _Variables) -> Iterator[str]:
    for name, value in extra.items():
        option = reference(name, end, f"--{HOLE} ", 2, partial(variables.name, name))
        argument = reference(value, end, f" {HOLE}", 1, partial(variables.name, value))
        if option is None or argument is None or end.context in (Context.COMMENT, Context.ESCAPED):
            raise _unquotable(entry_point, f"the undeclared parameter {name!r} would be appended", name, end)
        yield f"--{option} {argument}"


def _unquotable(entry_point: EntryPoint, what: str, name: str, place: Place) -> SpecError:
    context: str = place.context
    if place.context is Context.ARITHMETIC:
        rule = "where bash evaluates its value: only numbers can stand there"
    elif place.context is Context.COMMENT:
        rule = "where bash would not see it"
    elif place.option:
        context, rule = "as the first argument of a shell or of printf", "where a value cannot begin with a dash"
    else:
        rule = "where its value could be code: only letters, digits and _@%+=:,./- can stand there"
    hint = _HINTS.get(place.context, "give it to a program as an argument of its own").replace("{name}", f"{{{name}}}")
    return SpecError(f"the command of the entry point {entry_point.name!r}: {what} {context}, {rule}; {hint}")


def _check_text(entry_point: EntryPoint, values: Mapping[str, str], extra: Mapping[str, str]) -> None:
    if HOLE in entry_point.command:
        raise SpecError(f"the command of the entry point {entry_point.name!r} holds a NUL character")
    length = len(entry_point.command.encode())
    if length > MAX_LENGTH:
        raise SpecError(
            f"the command of the entry point {entry_point.name!r} is {length:,} bytes long, the limit is "
            f"{MAX_LENGTH:,}; move it to a script of the project"
        )
    wrong = [name for name, value in [*values.items(), *extra.items()] if HOLE in name or HOLE in value]
    if wrong:
        raise ParameterError(f"the parameters {wrong} hold a NUL character, which no command can", names=wrong)


def find_placeholders(template: str, declared: Collection[str]) -> tuple[str, list[str], list[str]]:
    """Return a command with a hole for each placeholder, the names of the holes, and words that may be mistakes.

    Args:
        template: The command as it is declared.
        declared: The names of the parameters.
    """
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
