"""Errors a user can meet.  Three lines: what is wrong in the user's own words, the place, a hint.

Every error of memcomp derives from `MemcompError`; nothing else may reach a user on purpose.
"""

from __future__ import annotations


class MemcompError(Exception):
    """Base of all errors: `what` (one line), optional `where` (one line or a caret picture), `hint`.

    `str(error)` is at most three paragraphs: what, where, hint.
    """

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__("\n".join(s for s in (what, where, f"hint: {hint}" if hint else "") if s))


class ParseError(MemcompError):
    """The text is not a program; `where` is the source line with a caret under the fault."""


class VerifyError(MemcompError):
    """The program breaks an invariant of the IR."""


class Refusal(MemcompError):
    """Something is not done, and why.  Not a crash: the caller keeps the unfused form.

    `what` names the operator or edge, `where` the place, `hint` the missing law or limit.
    """


class OptionError(MemcompError):
    """An option, target or argument the user gave is not known or not legal."""


class InputError(MemcompError):
    """A file, model or tensor the user gave cannot be used."""


def nearest(word: str, known: object) -> str:
    """A hint that lists what is known, the closest spelling first."""
    import difflib

    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(word, names, n=1)
    did = f"did you mean {close[0]!r}? " if close else ""
    return f"{did}known: {', '.join(names)}"
