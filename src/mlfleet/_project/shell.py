r"""Finds the quoting context of each value in a bash command, and quotes values for it.

`shlex.quote` alone is right only outside of quotes: in ``echo "{x}"`` it puts ``'$(rm -r .)'`` between double quotes,
and bash runs it. So the command is read as bash reads it (Bash Reference Manual, 3.1 and 3.5):

    outside of quotes           shlex.quote
    '…'  "…"  $'…'              escaped for that kind of quotes
    # comment                   left as it is
    arithmetic                  numbers only: bash evaluates what a variable or word holds there
    everything else             plain values only, which no context gives a meaning to

"Everything else" holds what cannot be quoted (here-documents, scripts for another shell) and what this reader does not
follow to its end; from there on it trusts nothing.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["HOLE", "Context", "contexts", "quote"]

HOLE = "\0"
"""Stands for a value in the text of a command."""


class Context(StrEnum):
    """The context of a value, in words for a message."""

    UNQUOTED = "outside of quotes"
    SINGLE = "in single quotes"
    DOUBLE = "in double quotes"
    ANSI = "in $'…'"
    COMMENT = "in a comment"
    VARIABLE = "behind a $"
    ARITHMETIC = "in arithmetic"
    ESCAPED = "behind a backslash"
    BACKTICKS = "in or after `…`"
    HERE_DOCUMENT = "in or after a here-document"
    EXPANSION = "in or after a ${…} with quotes or expansions in it"
    CALCULATION = "in or after arithmetic with quotes or expansions in it"
    CASE = "in or after a case inside of $(…)"
    AMBIGUOUS = "after a # or a split operator that can be read in two ways"
    UNCLOSED = "behind a quote or bracket that is not closed"
    SCRIPT = "in a script for another shell (sh -c, eval, ssh, …)"


PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")

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
    _COMMON.format(command_arithmetic="") + r'| (?P<open> \$\( ) | (?P<unquote> " ) | (?P<other> . )', re.X | re.S
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
  | (?P<hash> \#[^\n]* )
  | (?P<separator> && | [;|\n] )
  | (?P<blank> [\ \t&<>] )
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

# What may stand before the name of a command. Not every word can: "train.py eval {x}" is not an eval.
_BEFORE = (
    r"(?:^|[&!{]|\b(?:then|do|else|if|while|until|exec|command|builtin|sudo|nohup|time|env)\s)(?:\s|\\\n)*"
    r"(?:(?:\w+=|[<>])\S*\s+)*(?:\\|[^\s=]*/)?"
)
_EVALUATES = re.compile(_BEFORE + r"(?:eval|ssh|su|trap|watch|parallel)\s")
_RUNS_SCRIPT = re.compile(r"(?:^|[\s/])\w*sh\s(?:.*\s)?-\w*c\s", re.S)
_CALCULATES = re.compile(_BEFORE + r"(?:let|(?:declare|typeset|local|readonly|export)\s+(?:-\w+\s+)*-\w*i\w*)\s")
_COMPARES = re.compile(r"\s-(?:eq|ne|lt|le|gt|ge|v)\s")
_SUBSCRIPT = re.compile(r"[A-Za-z_]\w*\[[^\]]*")


def quote(value: str, context: Context) -> str | None:
    """Return the text that makes bash see `value` in this context; None if that is impossible.

    A comment and a variable (``${name}``) do not take a value: the caller leaves them as they are.
    """
    match context:
        case Context.UNQUOTED:
            return shlex.quote(value)
        case Context.SINGLE:
            return value.replace("'", "'\\''")
        case Context.DOUBLE:
            return re.sub(r'([\\"$`])', r"\\\1", value)
        case Context.ANSI:
            return re.sub(r"([\\'])", r"\\\1", value)
        case Context.ARITHMETIC:
            return value if NUMBER.fullmatch(value) else None
        case _:
            return value if PLAIN.fullmatch(value) else None


def contexts(command: str) -> list[Context]:
    """Return the context of each `HOLE` in `command`, and last that of its end."""
    return _Reader(command).read()


@dataclass(slots=True)
class _Frame:
    """A piece of the command that ends by itself: the whole, ``( )``, ``$( )`` or ``" "``.

    Attributes:
        kind: The text that it began with.
        command: The position at which the present simple command begins.
        word: The position at which the present word begins; None between words.
    """

    kind: str
    command: int
    word: int | None = None


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


@dataclass(slots=True)
class _Reader:
    text: str
    position: int = 0
    frames: list[_Frame] = field(default_factory=lambda: [_Frame("", 0)])
    found: list[Context] = field(default_factory=list)
    # Once set, nothing that follows is understood any more.
    lost: Context | None = None
    # Up to where numbers are compared in [[ ]].
    comparing_until: int = 0
    in_comment: bool = False

    def read(self) -> list[Context]:
        while self.position < len(self.text) and not self.lost:
            self.step()
        if self.lost:
            self.holes(self.text[self.position :], self.lost)
        self.found.append(self.end())
        return self.found

    def end(self) -> Context:
        if self.lost:
            return self.lost
        if len(self.frames) > 1:
            return Context.UNCLOSED
        if self.in_comment:
            return Context.COMMENT
        return self.seen(Context.UNQUOTED, len(self.text), begins=True)

    def step(self) -> None:
        frame = self.frames[-1]
        start = self.position
        token = _token(_DOUBLE if frame.kind == '"' else _COMMAND, self.text, start)
        kind, text = str(token.lastgroup), token[0]
        before = self.text[start - 1 : start]
        if (kind == "hash" and before == ")") or (kind == "continued" and before and before in "$<(&|["):
            kind = "ambiguous"
        elif kind == "hash" and frame.word is not None:
            kind, text = "other", "#"
        self.position = start + len(text)
        self.in_comment = kind == "hash"
        self.lost = _LOST_AT.get(kind)
        self.place(frame, kind, text, start)
        self.nest(frame, kind, text, start)
        if frame.kind != '"':
            self.track(frame, kind, text, start)

    def place(self, frame: _Frame, kind: str, text: str, start: int) -> None:
        """Find the places in a token."""
        match kind:
            case "hole" if frame.kind == '"':
                self.found.append(self.seen(Context.DOUBLE, start))
            case "hole":
                self.found.append(self.seen(Context.UNQUOTED, start, begins=frame.word is None))
            case "escaped":
                self.found.append(self.seen(Context.ESCAPED, start))
            case "variable":
                self.found.append(Context.VARIABLE)
            case "single":
                self.found += [self.seen(Context.SINGLE, start)] * text.count(HOLE)
            case "ansi":
                self.ansi(text, start)
            case "hash":
                self.found += [Context.COMMENT] * text.count(HOLE)
            case "backticks":
                self.holes(text, Context.BACKTICKS)
            case "ambiguous":
                self.holes(text, Context.AMBIGUOUS)

    def nest(self, frame: _Frame, kind: str, text: str, start: int) -> None:
        """Go into and out of what a token begins or ends."""
        match kind:
            case "arithmetic":
                self.arithmetic()
            case "double" | "open":
                self.frames.append(_Frame('"' if kind == "double" else text, self.position))
            case "unquote":
                self.frames.pop()
            case "close":
                self.close()
            case "other" if frame.kind != '"' and frame.word is None:
                self.word(text, start)

    def track(self, frame: _Frame, kind: str, text: str, start: int) -> None:
        """Keep the positions at which commands and words begin."""
        if kind == "separator" or (kind == "open" and text == "("):
            frame.command, frame.word = self.position, None
        elif kind in ("blank", "here_string", "hash"):
            frame.word = None
        elif kind not in ("close", "continued") and frame.word is None:
            frame.word = start

    def seen(self, context: Context, at: int, *, begins: bool = False) -> Context:
        """Return `context`, or a stricter one that follows from the command around it.

        Args:
            context: The context by the quotes.
            at: The position of the value.
            begins: True if a word begins there.
        """
        frame = next(frame for frame in reversed(self.frames) if frame.kind != '"')
        before = self.text[frame.command : at].lstrip()
        if at < self.comparing_until or _CALCULATES.search(before):
            return Context.ARITHMETIC
        if frame.word is not None and _SUBSCRIPT.fullmatch(self.text, frame.word, at):
            return Context.ARITHMETIC
        if _EVALUATES.search(before) or (not begins and _RUNS_SCRIPT.search(before)):
            return Context.SCRIPT
        return context

    def holes(self, text: str, context: Context) -> None:
        for hole in re.finditer(r"\$?\0", text):
            self.found.append(Context.VARIABLE if len(hole[0]) > 1 else context)

    def ansi(self, text: str, start: int) -> None:
        for match in re.finditer(r"\\.|\0", text, re.S):
            if match[0].endswith(HOLE):
                self.found.append(self.seen(Context.ANSI if match[0] == HOLE else Context.ESCAPED, start))

    def close(self) -> None:
        closed = self.frames[-1].kind
        if closed:
            self.frames.pop()
        if closed in ("", "("):
            # A pattern of case, or a subshell: another command may follow, the word is at its end.
            self.frames[-1].command, self.frames[-1].word = self.position, None

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
                    self.found.append(Context.VARIABLE)
                case "hole":
                    self.found.append(Context.ARITHMETIC)
                case "open":
                    depth += 1
                case "close":
                    depth -= 1
            self.position = token.end()
        if depth:
            self.lost = Context.UNCLOSED

    def word(self, text: str, start: int) -> None:
        """Handle the words that change how the rest is read."""
        if text == "case" and any(frame.kind not in ("", "(") for frame in self.frames):
            # The parentheses of its patterns would close $( ) too early.
            self.lost = Context.CASE
        elif self.text.startswith("[[", start):
            end = max(self.text.rfind("]]"), start)
            if _COMPARES.search(self.text, start, end):
                self.comparing_until = end


def _token(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    token = pattern.match(text, position)
    if token is None:
        raise AssertionError("the last alternative of every pattern takes any character")
    return token
