"""Lines of a text form as tokens, with a caret under whatever is wrong.  The program and tile texts share it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from memcomp.ir.errors import ParseError, nearest

T = TypeVar("T")

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*'?)"
    r"|(?P<symbol>->|\+=|<<|>>|<=|>=|==|!=|//|[-+*/%&|<>=(){}\[\],:?@.']))"
)


@dataclass(frozen=True, slots=True)
class Token:
    """kind: name | number | symbol | end; `start` is the column (0-based) in the source line."""

    kind: str
    text: str
    start: int


def picture(number: int, source: str, start: int, width: int = 1) -> str:
    """The source line with its number, and carets under `width` characters from column `start`."""
    head = f"{number:4} | "
    pad = "".join("\t" if c == "\t" else " " for c in source[:start])
    return f"{head}{source}\n{' ' * (len(head) - 2)}| {pad}{'^' * max(1, width)}"


def spelled(token: Token) -> str:
    """A token in the user's words."""
    return "the end of the line" if token.kind == "end" else f"{token.text!r}"


@dataclass(slots=True)
class Line:
    """One source line being read from left to right; every `fail` shows the line with a caret."""

    number: int
    source: str
    tokens: tuple[Token, ...] = ()
    at: int = field(default=0)

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def peek(self, ahead: int = 1) -> Token:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def fail(self, what: str, hint: str, token: Token | None = None) -> NoReturn:
        t = token or self.next
        raise ParseError(what, picture(self.number, self.source, t.start, len(t.text)), hint)

    def take(self, *texts: str) -> Token | None:
        """The next token if it is one of `texts`."""
        t = self.next
        if t.kind in ("symbol", "name") and t.text in texts:
            self.at += 1
            return t
        return None

    def expect(self, text: str, hint: str) -> Token:
        t = self.take(text)
        if t is None:
            self.fail(f"expected {text!r}, found {spelled(self.next)}", hint)
        return t

    def name(self, what: str, hint: str) -> Token:
        t = self.next
        if t.kind != "name":
            self.fail(f"expected {what}, found {spelled(t)}", hint)
        self.at += 1
        return t

    def integer(self, what: str, hint: str) -> int:
        t = self.next
        if t.kind != "number" or not t.text.isdigit():
            self.fail(f"expected {what}, found {spelled(t)}", hint)
        self.at += 1
        return self.number_of(t)

    def number_of(self, t: Token, most: int = 2**63 - 1) -> int:
        """The integer that a token of digits says; it must fit the 64 bits of every index."""
        if len(t.text.lstrip("0")) > 19 or (value := int(t.text)) > most:
            self.fail("an integer does not fit 64 bits", f"the largest is {2**63 - 1}", t)
        return value

    def one_of(self, what: str, known: Iterable[str]) -> Token:
        """A name out of a known list; another spelling is an error that lists them."""
        names = tuple(known)
        t = self.name(what, f"known: {', '.join(sorted(names))}")
        if t.text not in names:
            self.fail(f"unknown {what} {t.text!r}", nearest(t.text, names), t)
        return t

    def listed(self, item: Callable[[Line], T], close: str = "") -> list[T]:
        """Items separated by commas; with `close`, up to that bracket (which is taken), possibly none."""
        out: list[T] = []
        if close and self.take(close):
            return out
        out.append(item(self))
        while self.take(","):
            out.append(item(self))
        if close and not self.take(close):
            self.fail(f"expected ',' or {close!r}, found {spelled(self.next)}", f"a list ends with {close!r}")
        return out

    def end(self, hint: str) -> None:
        if self.next.kind != "end":
            self.fail(f"expected the end of the line, found {spelled(self.next)}", hint)


def read_line(number: int, source: str) -> Line:
    """Tokens of one line; a comment (`#`) is dropped."""
    text = source.partition("#")[0].rstrip()
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            raise ParseError(
                f"unexpected character {text[start]!r}", picture(number, source, start),
                "names, numbers, brackets, commas and the operators + - * / // % << >> & | < <= > >= == != are known",
            )
        kind = m.lastgroup or ""
        tokens.append(Token(kind, m[kind], m.start(kind)))
        at = m.end()
    tokens.append(Token("end", "", len(text)))
    return Line(number, source, tuple(tokens))
