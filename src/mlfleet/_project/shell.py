r"""Finds the place of each value in a bash command, and the text that stands for the value there.

A value never becomes part of the text that bash parses: it is assigned to a variable before the command, and a
reference stands in its place. So the command is read as bash reads it (Bash Reference Manual, 3.1 to 3.5), to know
which quotes the reference needs, and where it would not help:

    outside of quotes              "${__mlfleet_1}"
    "…"                            ${__mlfleet_1}
    '…'  $'…'                      the quotes end, "${__mlfleet_1}", and begin again
    # comment                      left as it is
    arithmetic                     numbers only: bash evaluates what a variable holds there
    names of variables             plain values only: bash evaluates a[…] in them (4.3 of the manual)
    scripts for another shell      plain values only: the other shell parses its text, and does not have the variables
    everything else                plain values only

"Everything else" holds here-documents and what this reader does not follow to its end; from there on it trusts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate

__all__ = ["HOLE", "VARIABLE_PREFIX", "Context", "Place", "places", "reference"]

HOLE = "\0"
"""Stands for a value in the text of a command."""

VARIABLE_PREFIX = "__mlfleet_"
"""The names of the variables that hold values begin with it."""


class Context(StrEnum):
    """The context of a value, in words for a message."""

    UNQUOTED = "outside of quotes"
    SINGLE = "in single quotes"
    DOUBLE = "in double quotes"
    ANSI = "in $'…'"
    COMMENT = "in a comment"
    VARIABLE = "behind a $"
    ARITHMETIC = "in arithmetic"
    NAME = "as the name of a variable (declare, printf -v, test -v, read, unset, …)"
    ESCAPED = "behind a backslash"
    BACKTICKS = "in or after `…`"
    HERE_DOCUMENT = "in or after a here-document"
    EXPANSION = "in or after a ${…} with quotes or expansions in it"
    CALCULATION = "in or after arithmetic with quotes or expansions in it"
    CASE = "in or after a case inside of $(…)"
    AMBIGUOUS = "after a # or a split operator that can be read in two ways"
    UNCLOSED = "behind a quote or bracket that is not closed"
    SCRIPT = "in a script for another shell (sh -c, eval, ssh, …)"
    EXPORTED = "in a command that exports functions to another shell (export -f)"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a value.

    Attributes:
        context: Its context.
        option: True if a value that begins with a dash would be an option of bash or of printf.
    """

    context: Context
    option: bool = False


PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")

# Words that are syntax where a command begins (3.2.5 of the manual). "[[" and "!" are not plain.
_RESERVED = frozenset(
    "if then elif else fi time for in until while do done case esac coproc select function".split()  # noqa: SIM905
)

_COMMON = r"""
    (?P<escaped> \\\0 )
  | (?P<continued> \\\n )
  | (?P<escape> \\. )
  | (?P<last_escape> \\ )
  | (?P<variable> \$\0 )
  | (?P<self> \$\$ )
  | (?P<arithmetic> \$\(\( {command_arithmetic} )
  | (?P<old_arithmetic> \$\[ )
  | (?P<expansion> \$\{{ [\w@*#?!:=+%/^,.~\[\]-] [\w@*#?!:=+%/^,.~\[\]\ -]* \}} )
  | (?P<hard_expansion> \$\{{ )
  | (?P<backticks> `[^`'"\\]*` )
  | (?P<hard_backticks> ` )
  | (?P<hole> \0 )
"""
_DOUBLE = re.compile(
    _COMMON.format(command_arithmetic="") + r'| (?P<open> \$\( ) | (?P<unquote> " ) | (?P<other> [^\\$`\0"]+ | . )',
    re.X | re.S,
)
_COMMAND = re.compile(
    _COMMON.format(command_arithmetic=r"| \(\(")
    + r"""
  | (?P<single> '[^']*' )
  | (?P<ansi> \$'(?:\\.|[^\\'])*' )
  | (?P<unclosed> ' | \$' )
  | (?P<double> \$?" )
  | (?P<open> [$<>]?\( )
  | (?P<close> \) )
  | (?P<here_string> <<< )
  | (?P<here_document> << )
  | (?P<redirect> >\| | &>>? | [<>]&? )
  | (?P<hash> \# )
  | (?P<pipe> \|&? (?!\|) )
  | (?P<separator> && | \|\| | [;\n&] )
  | (?P<blank> [\ \t]+ )
  | (?P<other> [\w./:=,@%+-]+ | . )
    """,
    re.X | re.S,
)
_ARITHMETIC = re.compile(
    r"""
    (?P<variable> \$\0 )
  | (?P<expansion> \$\{[\w@*\#]+\} )
  | (?P<hole> \0 )
  | (?P<open> \( )
  | (?P<close> \) )
  | (?P<foreign> case(?!\w) | << | \$[(\[{] | [^\w\s+\-*/%=!&|^~?:,.$\[\]{};<>] )
  | (?P<other> \w+ | . )
    """,
    re.X | re.S,
)

_SHELL = re.compile(r"(?:.*/)?(?:r?ba|da|a|r?k|mk|pdk|r?z|fi|c|tc|ya)?sh[-.\d]*")
_SHELL_NAME = re.compile(r"sh\b|SHELL|BASH")
_UNKNOWN_SHELL = re.compile(r"SHELL|BASH|\$0|\$\{0\}|^\$\([^)]*[ /](?:ba|da|k|z)?sh\)")
_COMPARES = re.compile(r"\s-(?:eq|ne|lt|le|gt|ge)\s")
_DESCRIPTOR = re.compile(r"[0-9]+|\{\w+\}")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(?:\[.*\])?\+?=", re.S)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_QUOTING = re.compile(r"\\\n|\\|\$?['\"]")
_SCRIPT_OPTION = re.compile(r"-\w*c|--command|--session-command")
_SPLIT_OPTION = re.compile(r"-\w*S|--split-string")

_OPENS = frozenset({"{", "if", "while", "until"})
_GOES_ON = frozenset({"then", "do", "else", "elif", "!", "time"})
_CLOSES = frozenset({"}", "fi", "done", "esac"})
_BUILTIN_PREFIXES = frozenset({"command", "builtin", "exec"})
_WRAPPERS = frozenset(
    "sudo doas nohup env nice ionice time timeout stdbuf setsid xargs flock chroot taskset chrt strace unshare".split()  # noqa: SIM905
)
# Those whose first argument is not the command.
_SKIPS_ONE = frozenset({"timeout", "flock", "chroot", "taskset", "chrt"})

# What bash and other programs evaluate; only as the name of a command, "train.py eval {x}" is not an eval.
_BUILTINS = {
    **dict.fromkeys(("eval", "trap", "alias", "compgen", "complete", "fc"), Context.SCRIPT),
    **dict.fromkeys(("read", "mapfile", "readarray", "unset", "getopts", "wait"), Context.NAME),
    "let": Context.ARITHMETIC,
}
_DECLARES = frozenset({"declare", "typeset", "local", "readonly", "export"})
_TESTS = frozenset({"test", "["})
_READS_SCRIPT = frozenset({"source", ".", "at", "batch", "parallel"})
_EVALUATES = frozenset({"ssh", "rsh", "mosh", "pdsh", "su", "watch", "parallel", "tmux"})
_TAKES_SCRIPT = frozenset({"flock", "script", "runuser", "sg"})

_QUOTABLE = (Context.UNQUOTED, Context.SINGLE, Context.DOUBLE, Context.ANSI)


def reference(value: str, place: Place, text: str, at: int, variable: Callable[[], str]) -> str | None:
    """Return the text that makes bash see `value` in this context; None if that is impossible.

    A plain value is written as it is where it can only be a word or a part of a quoted text.

    Args:
        value: The value.
        place: The place of the hole.
        text: The command with its holes.
        at: The position of the hole in `text`.
        variable: Returns the name of the variable that is given the value.
    """
    is_plain = PLAIN.fullmatch(value) is not None and VARIABLE_PREFIX not in value
    context = place.context
    if place.option and value.startswith("-"):
        return None
    if context is Context.ARITHMETIC:
        return value if NUMBER.fullmatch(value) else None
    if context not in _QUOTABLE:
        return value if is_plain else None
    if context is Context.SINGLE:
        return value if is_plain else f"'\"${{{variable()}}}\"'"
    if context is Context.ANSI:
        return f"'\"${{{variable()}}}\"$'"
    is_word = is_plain and _is_apart(text, at)
    if context is Context.DOUBLE:
        return value if is_word else f"${{{variable()}}}"
    if not value:
        return "''"
    return value if is_word and _is_one_word(value, text, at) else f'"${{{variable()}}}"'


def _is_apart(text: str, at: int) -> bool:
    r"""Return False if what stands before a hole would take a literal value in: ``$a{x}``, ``{y}{x}``."""
    before = text[max(at - 2, 0) : at]
    return not before or not (before[-1] in "_$\0" or before[-1].isalnum() or before == "\\\n")


def _is_one_word(value: str, text: str, at: int) -> bool:
    """Return True if a plain value outside of quotes can only be (a part of) a word there."""
    after = text[at + 1 : at + 2]
    if "=" in value or value in _RESERVED or after.isalnum() or (after and after in "_(<>\\\0"):
        return False
    # In a brace expansion, "1,2" would be two words.
    return not ("," in value or ".." in value) or after in " \t\n;&|)"


def places(command: str) -> list[Place]:
    """Return the place of each `HOLE` in `command`, and last that of its end. The time is linear in the length."""
    return _Reader(command).read()


@dataclass(slots=True)
class _Command:
    """The simple command that is being read, as far as its words are known.

    Attributes:
        first: The number of holes before it.
        begun: True if something stands before its name, so that ``[[`` is not a reserved word any more.
        named: True once its name is known.
        wrapped: True if its name follows an external program such as sudo.
        slack: How many words may stand before its name that are arguments of a wrapper.
        name: The name, if it is one of those that evaluate their arguments.
        strict: The context of all further values.
        shell: "options" behind the name of a shell, "script" behind its -c, "arguments" behind its script.
        skip: True if the next word belongs to an option.
        takes_script: True if an option -c is followed by a script.
        reads_script: True if a script is read from the standard input.
        redirect: The operator whose file or text comes next.
        from_here: The number of holes at that operator.
        here: Ranges of holes in here-strings and in redirected process substitutions.
        count: The number of its arguments.
        previous: Its last argument; with a HOLE if that holds a value.
    """

    first: int = 0
    begun: bool = False
    named: bool = False
    wrapped: bool = False
    slack: int = 0
    name: str = ""
    strict: Context | None = None
    shell: str = ""
    skip: bool = False
    takes_script: bool = False
    reads_script: bool = False
    redirect: str = ""
    from_here: int = 0
    here: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0
    previous: str = ""

    def reads_standard_input(self) -> bool:
        return self.reads_script or self.shell == "options"

    def add_name(self, word: str) -> None:
        """Handle a word that may be the name of the command."""
        base = word.rpartition("/")[2]
        if self.wrapped and (word[:1] in "-+" or "=" in word):
            if (self.name == "env" and _SPLIT_OPTION.match(word)) or (self.takes_script and _SCRIPT_OPTION.match(word)):
                self.strict = Context.SCRIPT
            elif word[:1] == "-" and "=" not in word:
                self.slack += 1
            return
        if base in _WRAPPERS or (base in _BUILTIN_PREFIXES and not self.wrapped):
            self.begun = True
            self.wrapped = self.wrapped or base in _WRAPPERS
            self.slack += base in _SKIPS_ONE
            self.takes_script |= base in _TAKES_SCRIPT
            self.name = "env" if base == "env" else ""
            return
        if not self.wrapped and word[:1] == "-":
            self.slack += word.endswith("a")  # exec -a takes a word
            return
        is_known = True
        if not self.wrapped and base in _BUILTINS:
            self.strict = _BUILTINS[base]
        elif base in _EVALUATES:
            self.strict = Context.SCRIPT
        elif "$" in word or "`" in word:
            self.shell = "unknown"
        elif base in _DECLARES or base in _TESTS or base == "printf":
            self.name = base
        else:
            is_known = base in _TAKES_SCRIPT
        self.reads_script |= base in _READS_SCRIPT
        if not is_known and self.slack:
            self.slack -= 1
        else:
            self.named = True
            self.takes_script = base in _TAKES_SCRIPT

    def add_argument(self, word: str) -> None:
        """Handle a word behind the name of the command."""
        self.count += 1
        self.previous = word
        if self.skip:
            self.skip = False
        elif self.shell in ("options", "script", "unknown") and word[:1] in ("-", "+"):
            self.skip = word in ("-o", "+o", "-O", "+O", "--rcfile", "--init-file")
            letters = "" if word[1:2] == "-" else word[1:]
            if "c" in letters:
                self.shell = "script"
            elif "s" in letters:
                self.reads_script = True
        elif self.shell in ("script", "unknown") or (
            self.shell == "options" and word not in ("/dev/stdin", "/dev/fd/0")
        ):
            self.shell = "arguments"
        elif self.takes_script and _SCRIPT_OPTION.match(word):
            self.strict = Context.SCRIPT
        elif self.name in _DECLARES and word[:1] in ("-", "+"):
            if "i" in word:
                self.strict = Context.ARITHMETIC
            elif word[1:].strip("xrglup"):
                self.strict = Context.NAME


@dataclass(slots=True)
class _Test:
    """A ``[[ ]]``: one comparison of numbers makes arithmetic of all of it.

    Attributes:
        first: The number of holes before it.
        previous: Its last word.
        compares: True if numbers are compared.
    """

    first: int
    previous: str = ""
    compares: bool = False


@dataclass(slots=True)
class _Frame:
    """A piece of the command that ends by itself: the whole, ``( )``, ``=( )``, ``$( )`` or ``" "``.

    Attributes:
        kind: The text that it began with.
        forced: The context of all values in it, if it stands in a stricter one.
        pipeline: The number of holes before the present pipeline.
        command: The present simple command.
        word: The position at which the present word begins; None between words.
        word_hole: The number of holes before that.
        equals: True if there is a = in the present word.
        brackets: The depth of the subscript in the present word; None before the first bracket.
        nested: True if it is, or stands in, a ``$( )``.
        reads_script: True if a shell in it reads a script from the standard input of the frame.
        piped: True if the output of another command is the input of the present one.
        compounds: For each compound command that is open, the range of the holes in its pipeline before it.
        test: The ``[[ ]]`` that is open.
    """

    kind: str
    forced: Context | None = None
    pipeline: int = 0
    command: _Command = field(default_factory=_Command)
    word: int | None = None
    word_hole: int = 0
    equals: bool = False
    brackets: int | None = None
    nested: bool = False
    reads_script: bool = False
    piped: bool = False
    compounds: list[tuple[int, int]] = field(default_factory=list)
    test: _Test | None = None


# What this reader does not follow to its end, by the token that it begins with.
_LOST_AT = {
    "old_arithmetic": Context.CALCULATION,
    "hard_expansion": Context.EXPANSION,
    "hard_backticks": Context.BACKTICKS,
    "here_document": Context.HERE_DOCUMENT,
    "unclosed": Context.UNCLOSED,
    "last_escape": Context.ESCAPED,
    "ambiguous": Context.AMBIGUOUS,
}
_ENDS_WORD = frozenset({"blank", "redirect", "here_string", "here_document", "pipe", "separator", "hash", "close"})


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.frames = [_Frame("")]
        self.found: list[Place] = []
        # Ranges of holes whose context is a stricter one than it seemed.
        self.stricter: list[tuple[int, int, Context]] = []
        # Once set, nothing that follows is understood any more.
        self.lost: Context | None = None
        self.in_comment = False
        self.exports_functions = False

    def read(self) -> list[Place]:
        while self.position < len(self.text) and not self.lost:
            self.step()
        if self.lost:
            self.give_up(self.lost)
        end = self.end()
        for frame in reversed(self.frames):
            self.end_command(frame, len(self.text))
        if self.exports_functions:
            self.restamp(0, len(self.found), Context.EXPORTED)
            end = Context.EXPORTED if end in _QUOTABLE else end
        for context in (Context.ARITHMETIC, Context.SCRIPT, Context.EXPORTED):
            self.restrict(context)
        return [*self.found, Place(end)]

    def restrict(self, context: Context) -> None:
        changes = [0] * (len(self.found) + 1)
        for start, end, stricter in self.stricter:
            if stricter is context:
                changes[start] += 1
                changes[end] -= 1
        for index, depth in enumerate(accumulate(changes[:-1])):
            if depth and self.found[index].context in _QUOTABLE:
                self.found[index] = Place(context)

    def end(self) -> Context:
        if self.lost:
            return self.lost
        if len(self.frames) > 1:
            return Context.UNCLOSED
        if self.in_comment:
            return Context.COMMENT
        self.end_word(self.frames[0], len(self.text))
        return self.seen(Context.UNQUOTED, len(self.text))

    def give_up(self, lost: Context) -> None:
        """Handle the rest of the text, and what it may mean for the values before."""
        rest = self.text[self.position :]
        self.holes(rest, lost)
        script = "|" in rest and _SHELL_NAME.search(rest, rest.index("|")) is not None
        numbers = _COMPARES.search(rest) is not None
        for frame in self.frames:
            if script:
                self.restamp(frame.pipeline, len(self.found), Context.SCRIPT)
            if numbers and frame.test is not None:
                self.restamp(frame.test.first, len(self.found), Context.ARITHMETIC)

    def restamp(self, start: int, end: int, context: Context) -> None:
        if start < end:
            self.stricter.append((start, end, context))

    def owner(self) -> _Frame:
        """Return the frame of the command around the present position."""
        return self.frames[-2] if self.frames[-1].kind == '"' else self.frames[-1]

    def step(self) -> None:
        frame = self.frames[-1]
        start = self.position
        token = _token(_DOUBLE if frame.kind == '"' else _COMMAND, self.text, start)
        kind, text = str(token.lastgroup), token[0]
        before = self.text[start - 1 : start]
        if (kind == "hash" and before == ")") or (kind == "continued" and before and before in "$<>(&|["):
            kind = "ambiguous"
        elif kind == "hash" and frame.word is not None:
            kind = "other"
        if kind == "hash" or (kind == "ambiguous" and text == "#"):
            end = self.text.find("\n", start)
            text = self.text[start : end if end >= 0 else len(self.text)]
        self.position = start + len(text)
        self.in_comment = kind == "hash"
        self.lost = _LOST_AT.get(kind)
        if frame.kind != '"':
            self.track(frame, kind, start)
        self.place(frame, kind, text)
        self.nest(frame, kind, text, start)

    def track(self, frame: _Frame, kind: str, start: int) -> None:
        """Keep the words and the simple commands."""
        if kind in _ENDS_WORD:
            is_redirect = kind in ("redirect", "here_string", "here_document")
            if (
                is_redirect
                and frame.word is not None
                and _DESCRIPTOR.fullmatch(self.text, frame.word, min(start, frame.word + 64))
            ):
                frame.word = None  # 2>file
            self.end_word(frame, start)
            if is_redirect:
                frame.command.redirect = self.text[start : self.position]
                frame.command.from_here = len(self.found)
                return
            if kind == "separator" and self.text[start : self.position] in (";", "&"):
                frame.test = None
            if kind in ("pipe", "separator") and frame.test is None and frame.kind != "=(":
                self.end_command(frame, start)
                frame.command = _Command(len(self.found))
                frame.piped = kind == "pipe"
                if kind == "separator":
                    frame.pipeline = len(self.found)
        elif kind != "continued" and frame.word is None:
            frame.word, frame.word_hole = start, len(self.found)
            frame.equals, frame.brackets = False, None

    def place(self, frame: _Frame, kind: str, text: str) -> None:
        """Find the places in a token."""
        start = self.position - len(text)
        owner = self.owner()
        match kind:
            case "hole":
                self.add(Context.DOUBLE if frame.kind == '"' else Context.UNQUOTED, start)
            case "escaped":
                self.add(Context.ESCAPED, start)
            case "variable":
                self.found.append(Place(Context.VARIABLE))
            case "single":
                owner.equals |= "=" in text.partition(HOLE)[0]
                for _ in range(text.count(HOLE)):
                    self.add(Context.SINGLE, start)
            case "ansi":
                self.ansi(text, start)
            case "hash":
                self.found += [Place(Context.COMMENT)] * text.count(HOLE)
            case "backticks":
                self.holes(text, Context.BACKTICKS)
            case "ambiguous":
                self.holes(text, Context.AMBIGUOUS)
            case "other":
                owner.equals |= "=" in text

    def nest(self, frame: _Frame, kind: str, text: str, start: int) -> None:
        """Go into and out of what a token begins or ends."""
        match kind:
            case "arithmetic":
                self.arithmetic()
            case "double":
                self.frames.append(_Frame('"'))
            case "open":
                self.open(frame, text, start)
            case "unquote":
                self.frames.pop()
            case "close":
                self.close()
            case "other" if frame.kind != '"':
                self.other(frame, text, start)

    def open(self, frame: _Frame, text: str, start: int) -> None:
        owner = self.owner()
        context = self.seen(Context.UNQUOTED, start)
        forced = None if context is Context.UNQUOTED else context
        first = len(self.found)
        nested = text != "(" or owner.nested
        inner = _Frame(text, forced, pipeline=first, command=_Command(first), nested=nested)
        if text == "(":
            inner.forced = owner.forced
            inner.test = frame.test
            if frame.word is not None and self.text[start - 1 : start] == "=":
                inner.kind = "=("
                inner.forced = forced if forced is Context.ARITHMETIC else owner.forced
        elif not owner.command.redirect:
            # A script for a shell; or words that may be its options, one of which takes a script.
            is_script = text == "<(" and owner.command.reads_script
            if is_script or (owner.command.shell == "options" and frame.kind != '"'):
                inner.forced = Context.SCRIPT
        self.frames.append(inner)

    def close(self) -> None:
        frame = self.frames[-1]
        if not frame.kind:
            # A pattern of case: a command follows.
            frame.command, frame.pipeline, frame.piped = _Command(len(self.found)), len(self.found), False
            frame.test = None
            return
        self.end_command(frame, self.position - 1)
        self.frames.pop()
        outer = self.owner()
        if frame.kind == "(":
            # A subshell or the parentheses of a function: redirections may follow, or another command.
            outer.command = _Command(outer.command.first, reads_script=frame.reads_script)
            outer.word = None

    def other(self, frame: _Frame, text: str, start: int) -> None:
        """Handle the parts of words that change how the rest is read."""
        if text == "case" and frame.nested:
            # The parentheses of its patterns would close $( ) too early.
            self.lost = Context.CASE
        elif text == "[" and frame.word is not None:
            if frame.brackets:
                frame.brackets += 1
            else:
                is_name = _IDENTIFIER.fullmatch(self.text, frame.word, start) is not None
                frame.brackets = int(is_name or (frame.kind == "=(" and frame.word == start))
        elif text == "]" and frame.brackets:
            frame.brackets -= 1

    def end_word(self, frame: _Frame, end: int) -> None:
        if frame.word is None:
            return
        start, frame.word = frame.word, None
        if frame.kind == "=(":
            return
        raw = self.text[start : min(end, start + 256)]
        word = _QUOTING.sub("", raw)
        command = frame.command
        if command.redirect:
            if command.redirect == "<<<" or raw.startswith("<("):
                command.here.append((command.from_here, len(self.found)))
            command.redirect, command.begun = "", True
        elif frame.test is not None:
            self.end_word_of_test(frame, frame.test, raw)
        elif not command.named and not command.wrapped and self.is_syntax(frame, raw):
            pass
        elif _SHELL.fullmatch(word) or _UNKNOWN_SHELL.search(word):
            # Wherever it stands: docker exec, find -exec, …
            command.named, command.shell, command.takes_script = True, "options", False
        elif not command.named:
            if _ASSIGNMENT.match(raw):
                command.begun = True
            elif not raw.startswith("(("):
                command.add_name(word)
        elif (command.name in ("for", "select") and raw in ("do", "{")) or (command.name == "coproc" and raw in _OPENS):
            command.named, command.name = False, ""
        else:
            self.add_argument(frame, command, word)

    def add_argument(self, frame: _Frame, command: _Command, word: str) -> None:
        command.add_argument(word)
        if frame.word_hole < len(self.found) and not _ASSIGNMENT.match(word):
            command.previous = HOLE
        if command.name in _DECLARES and word[:1] == "-" and "f" in word:
            self.exports_functions |= command.name == "export" or "x" in word

    def is_syntax(self, frame: _Frame, word: str) -> bool:
        """Handle a reserved word; return False if it is none."""
        command = frame.command
        if word in _OPENS:
            frame.compounds.append((frame.pipeline, command.first))
            frame.pipeline, frame.piped = len(self.found), False
        elif word in _CLOSES:
            self.end_command(frame, self.position)  # a subshell may stand directly before
            if frame.compounds:
                frame.pipeline = frame.compounds.pop()[0]
            command.reads_script = frame.reads_script
        elif word in ("for", "select", "case"):
            frame.compounds.append((frame.pipeline, command.first))
            command.named, command.name = True, word
        elif word == "[[" and not command.begun and not command.slack:
            frame.test = _Test(frame.word_hole)
        elif word == "function":
            command.slack += 1
        elif word == "coproc":
            command.name = word
        elif word not in _GOES_ON:
            return False
        return True

    def end_word_of_test(self, frame: _Frame, test: _Test, word: str) -> None:
        if word == "]]":
            frame.test = None
        elif not test.compares and _COMPARES.fullmatch(f" {word} "):
            test.compares = True
            self.restamp(test.first, len(self.found), Context.ARITHMETIC)
        test.previous = word

    def end_command(self, frame: _Frame, end: int) -> None:
        self.end_word(frame, end)
        command = frame.command
        if not command.reads_standard_input():
            return
        for start, stop in command.here:
            self.restamp(start, stop, Context.SCRIPT)
        if frame.piped:
            self.restamp(frame.pipeline, command.first, Context.SCRIPT)
        else:
            frame.reads_script = True
            for start, stop in frame.compounds[-64:]:
                self.restamp(start, stop, Context.SCRIPT)
        if frame.kind == ">(":
            outer = self.frames[-2]
            self.restamp(outer.pipeline, len(self.found), Context.SCRIPT)
            outer.command.strict = Context.SCRIPT
            outer.command.reads_script = True

    def seen(self, context: Context, at: int) -> Context:
        """Return `context`, or a stricter one that follows from the command around it.

        Args:
            context: The context by the quotes.
            at: The position of the value.
        """
        frame = self.owner()
        command = frame.command
        if frame.forced is not None:
            return frame.forced
        if frame.brackets:
            return Context.ARITHMETIC
        if frame.test is not None:
            if frame.test.compares:
                return Context.ARITHMETIC
            return Context.NAME if frame.test.previous in ("-v", "-R") else context
        if command.redirect:
            return context
        if command.strict is not None:
            return command.strict
        if frame.word is not None and self.evaluated(frame, frame.word):
            return Context.SCRIPT
        if command.shell == "script":
            return Context.SCRIPT
        if command.name in _DECLARES:
            return context if frame.equals and command.previous != HOLE else Context.NAME
        begin = at if frame.word is None else frame.word
        if command.name == "printf" and (
            command.previous == "-v" or (not command.count and self.dequoted(begin, 16).startswith("-"))
        ):
            return Context.NAME
        if command.name in _TESTS and command.previous in ("-v", "-R", HOLE):
            return Context.NAME
        return context

    def add(self, context: Context, at: int) -> None:
        """Add the place of a value, by its quotes."""
        frame, context = self.owner(), self.seen(context, at)
        option = False
        if context in _QUOTABLE and not frame.command.redirect and frame.word is not None:
            is_first = frame.command.name == "printf" and not frame.command.count
            begins = at - frame.word < 4 and _QUOTING.sub("", self.text[frame.word : at]) == ""
            option = begins and (is_first or frame.command.shell == "options")
        self.found.append(Place(context, option))

    def evaluated(self, frame: _Frame, word: int) -> bool:
        """Return True if the word that begins at `word` is an option with a script."""
        command, text = frame.command, self.dequoted(word, 32)
        if command.takes_script and _SCRIPT_OPTION.match(text):
            return True
        return command.name == "env" and not command.named and _SPLIT_OPTION.match(text) is not None

    def dequoted(self, start: int, length: int) -> str:
        return _QUOTING.sub("", self.text[start : start + length])

    def holes(self, text: str, context: Context) -> None:
        for hole in re.finditer(r"\$?\0", text):
            self.found.append(Place(Context.VARIABLE if len(hole[0]) > 1 else context))

    def ansi(self, text: str, start: int) -> None:
        for match in re.finditer(r"\\.|\0", text, re.S):
            if match[0].endswith(HOLE):
                self.add(Context.ANSI if match[0] == HOLE else Context.ESCAPED, start)

    def arithmetic(self) -> None:
        """``$((…))`` or ``((…))``, which may as well be two subshells: the same parentheses close it."""
        depth = 2
        while depth and self.position < len(self.text):
            token = _token(_ARITHMETIC, self.text, self.position)
            match token.lastgroup:
                case "foreign":
                    self.lost = Context.CALCULATION
                    return
                case "variable":
                    self.found.append(Place(Context.VARIABLE))
                case "hole":
                    self.found.append(Place(Context.ARITHMETIC))
                case "open":
                    depth += 1
                case "close":
                    depth -= 1
            self.position = token.end()
        if depth:
            self.lost = Context.UNCLOSED


def _token(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    token = pattern.match(text, position)
    if token is None:
        raise AssertionError("the last alternative of every pattern takes any character")
    return token
