"""Text to programs: the inverse of `memcomp.ir.show`.  Syntax only; meaning is checked by `memcomp.ir.verify`.

    program NAME [on TARGET]
    rank R [= EXTENT | = ?knob in 32|64] [<= BOUND] [iter]
    in|out|state|temp X[R, ...]: DTYPE [empty NUMBER]
    X[i, ...] [, Y[i, ...]] = [monoid{v, ...}] EXPR [where EXPR]
    group NAME: X, Y   followed by any of
      partition R: SIZE | space R, ... | loop-order R, ... | lane R | keep X, ... @ LEVEL
      phase X, ... @ UNIT, Y, ... @ UNIT | drain X, ... @ UNIT
    proof free text

Infix, loosest first: or, and, not, comparisons (which do not chain), + -, * / // %, << >> & |, unary -.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate, takewhile

from memcomp.ir.cascade import DTYPES, Cascade, Einsum, Knob, Rank, Reduce, Tensor
from memcomp.ir.errors import ParseError, nearest
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, depth
from memcomp.ir.lex import Line, Token, picture, read_line, spelled
from memcomp.ir.ops import MONOIDS, OPS
from memcomp.ir.program import Group, Mapping, Phase, Program
from memcomp.ir.show import COMPARE, INFIX, LEVELS, NOT, SUM

LITERALS: dict[str, bool | float] = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}
RESERVED = frozenset({*LITERALS, "and", "or", "not", "where", "iter", "in", "empty"})
ROLES = ("in", "out", "state", "temp")
HEADS = ("program", "rank", *ROLES, "group", "proof")
PARTS = ("partition", "space", "loop-order", "lane", "keep", "phase", "drain")
_HEADER = re.compile(r"\s*program\s+(?P<name>\S+)(?:\s+on\s+(?P<target>\S+))?\s*$")
_FIRST = "the first line is program NAME, or program NAME on cpu"
DEPTH = 200  # of an expression: rewrites walk it recursively
_EXPRESSION = "an expression is built from numbers, variables (m), sizes (M), accesses X[m], calls exp(x) and operators"


def _whole(line: Line, level: int = 0) -> Expr:
    """An expression that is no part of another."""
    first = line.next
    try:
        e: Expr | None = parse_expr(line, level) if _nested(line) <= DEPTH else None
    except RecursionError:
        e = None
    if e is None or depth(e) > DEPTH:
        line.fail("an expression is nested too deeply",
                  f"at most {DEPTH} operations deep; write parts of it to tensors of their own", first)
    return e


def _nested(line: Line) -> int:
    """How many brackets of the next expression stand in each other, at most."""
    opened = accumulate((t.text in ("(", "[")) - (t.text in (")", "]")) for t in line.tokens[line.at:])
    return max(takewhile(lambda n: n >= 0, opened), default=0)  # a bracket that was open before closes behind it


def parse_expr(line: Line, level: int = 0) -> Expr:
    """An expression whose operators bind at least as tightly as `level`."""
    if level <= NOT and line.next.text == "not" and line.peek().text != "[":
        line.at += 1
        left: Expr = Call("not", (parse_expr(line, NOT),))
    else:
        left = _unary(line)
    while line.next.text in LEVELS and (mine := LEVELS[line.next.text]) >= level:
        op = line.next
        line.at += 1
        left = Call(INFIX[op.text], (left, parse_expr(line, mine + 1)))
        if mine == COMPARE and LEVELS.get(line.next.text) == COMPARE:
            line.fail("comparisons do not chain", f"write `a {op.text} b and b {line.next.text} c`, or parentheses")
    return left


def _unary(line: Line) -> Expr:
    if not line.take("-"):
        return _primary(line)
    t = line.next
    if t.kind == "number" or (t.text in ("inf", "nan") and line.peek().text not in ("[", "(")):
        value = _primary(line, 2**63)
        return Const(-value.value) if isinstance(value, Const) else value
    return Call("neg", (_unary(line),))


def _primary(line: Line, most: int = 2**63 - 1) -> Expr:
    """most: the largest integer, if it is one."""
    t = line.next
    if line.take("("):
        e = parse_expr(line)
        line.expect(")", "a bracket that opens must close")
        return e
    if t.kind == "number":
        line.at += 1
        return Const(line.number_of(t, most) if t.text.isdigit() else float(t.text))
    if t.kind != "name":
        line.fail(f"expected an expression, found {spelled(t)}", _EXPRESSION)
    line.at += 1
    if line.take("["):
        return Access(t.text, tuple(line.listed(parse_expr, "]")))
    if line.take("("):
        return _apply(line, t)
    if t.text in MONOIDS and line.next.text == "{" and line.peek().kind != "end":
        line.fail("a reduction stands only at the start of the right-hand side",
                  f"give {t.text}{{...}} a statement of its own", t)
    if t.text in LITERALS:
        return Const(LITERALS[t.text])
    if t.text in RESERVED:
        line.fail(f"expected an expression, found {t.text!r}", _EXPRESSION, t)
    if t.text.endswith("'"):
        line.fail(f"{t.text!r} is a tensor, and needs its indices", f"write {t.text}[...]", t)
    if t.text == t.text.lower():
        return Var(t.text)
    if t.text == t.text.upper():
        return Size(t.text)
    line.fail(f"{t.text!r} is neither a variable nor a size", "a variable is lower case (m), a size upper case (M), "
              "a tensor has its indices (X[m])", t)


def _apply(line: Line, name: Token) -> Expr:
    if name.text == "ceil":  # the quotient is never rounded on its own: ceil(a/b) is one integer operator
        quotient = parse_expr(line)
        line.expect(")", "ceil takes one quotient: ceil(M/M0)")
        if isinstance(quotient, Call) and quotient.op == "div":
            return Call("ceildiv", quotient.args)
        line.fail("ceil needs a quotient of integers", "write ceil(M/M0)", name)
    if name.text not in OPS:
        line.fail(f"unknown operator {name.text!r}", nearest(name.text, OPS), name)
    args = tuple(line.listed(parse_expr, ")"))
    arity = OPS[name.text].arity
    if arity >= 0 and len(args) != arity and name.text not in ("and", "or"):
        line.fail(f"{name.text!r} takes {arity} argument{'s' * (arity != 1)}, found {len(args)}",
                  f"write {name.text}({', '.join('xyz'[:arity])})", name)
    return Call(name.text, args)


def _access(line: Line) -> Access:
    t = line.name("a tensor", "a statement starts with the tensor it writes: X[m] = ...")
    line.expect("[", f"write {t.text}[...] = ...")
    return Access(t.text, tuple(line.listed(_whole, "]")))


def _rank_name(line: Line) -> str:
    t = line.name("a rank", "a rank is an upper-case name")
    if t.text != t.text.upper() or t.text.endswith("'") or not any(c.isalpha() for c in t.text):
        line.fail(f"{t.text!r} is not a rank", f"a rank is an upper-case name: {t.text.strip(chr(39)).upper()}", t)
    if t.text.lower() in RESERVED:
        line.fail(f"a rank cannot be called {t.text!r}", f"its variable {t.text.lower()!r} is a word of the language",
                  t)
    return t.text


def _knob(line: Line) -> Expr | Knob:
    if not line.take("?"):
        return _whole(line, SUM)
    t = line.name("a knob", "write ?m0 in 32|64|128")
    line.expect("in", "write ?m0 in 32|64|128")
    choices = [line.integer("a choice", "write ?m0 in 32|64|128")]
    while line.take("|"):
        choices.append(line.integer("a choice", "write ?m0 in 32|64|128"))
    return Knob(t.text, tuple(choices))


def _rank(line: Line) -> Rank:
    name = _rank_name(line)
    extent = _knob(line) if line.take("=") else None
    bound = line.integer("a bound", "write rank M <= 8192") if line.take("<=") else None
    iterative = line.take("iter") is not None
    line.end("write rank M, rank M = 64, rank M = len[b] <= 512, rank M1 = ceil(M/M0) iter, or rank M0 = ?m0 in 32|64")
    return Rank(name, extent, bound, iterative)


def _tensor(line: Line, role: str) -> Tensor:
    hint = f"write {role} X[B, M]: f32"
    t = line.name("a tensor", hint)
    line.expect("[", hint)
    ranks = tuple(line.listed(_rank_name, "]"))
    line.expect(":", hint)
    dtype = line.one_of("dtype", DTYPES).text
    empty = 0.0
    if line.take("empty"):
        at = line.next
        value = _unary(line)
        if not isinstance(value, Const) or value.value != value.value:
            line.fail("an empty value is a number, inf or -inf", f"write {role} X[M]: f32 empty -inf", at)
        empty = float(value.value)
    line.end(f"write {role} X[B, M]: f32 empty -inf")
    return Tensor(t.text, ranks, dtype, role, empty)  # type: ignore[arg-type]


def _einsum(line: Line) -> Einsum:
    outs = tuple(line.listed(_access))
    line.expect("=", "a statement is X[m] = ..., or V[p, k], I[p, k] = topk{m} ...")
    reduce = None
    if line.next.kind == "name" and line.peek().text == "{":
        monoid = line.one_of("reduction", MONOIDS).text
        line.expect("{", "")
        over = line.listed(lambda ln: ln.name("a variable", f"write {monoid}{{m}}").text, "}")
        reduce = Reduce(monoid, tuple(over), line.one_of("dtype", DTYPES).text if line.take(":") else "")
    body = _whole(line)
    guard = _whole(line) if line.take("where") else None
    line.end("after the body only `where` and a condition may follow")
    return Einsum(outs, body, reduce, guard)


def _group(line: Line) -> Group:
    name = line.name("a group", "write group g0: X, Y").text
    line.expect(":", "write group g0: X, Y")
    tensors = () if line.next.kind == "end" else tuple(line.listed(_plain_name))
    line.end("write group g0: X, Y")
    return Group(name, tensors)


def _plain_name(line: Line) -> str:
    return line.name("a name", "names are separated by commas").text


def _part(line: Line, head: str, g: Group) -> Group:
    """One indented line of a group."""
    partition, space, loop_order, lane, keep, phases = g.partition, g.space, g.loop_order, g.lane, g.keep, g.phases
    if head == "partition":
        rank = _rank_name(line)
        line.expect(":", "write partition P: 64, or partition P: ?p0 in 32|64")
        partition += ((rank, _knob(line)),)
    elif head == "space":
        space += tuple(line.listed(_rank_name))
    elif head == "loop-order":
        loop_order += tuple(line.listed(_rank_name))
    elif head == "lane":
        lane = _rank_name(line)
    elif head in ("phase", "drain"):
        bind = _bound(line)
        while line.take(","):
            bind += _bound(line)
        phases += (Phase(bind, head == "drain"),)
    else:
        kept = line.listed(_plain_name)
        line.expect("@", "write keep RM, RD @ reg")
        level = _plain_name(line)
        keep += tuple((tensor, level) for tensor in kept)
    line.end(f"one {head} to a line")
    return Group(g.name, g.tensors, partition, space, loop_order, lane, keep, phases)


def _bound(line: Line) -> tuple[tuple[str, str], ...]:
    """Tensors and the unit that computes them."""
    tensors = line.listed(_plain_name)
    line.expect("@", "write phase S, LM @ array, RD @ vector")
    unit = _plain_name(line)
    return tuple((tensor, unit) for tensor in tensors)


def _header(number: int, source: str) -> tuple[str, str]:
    m = _HEADER.match(source.partition("#")[0])
    if m is None:
        raise ParseError("a program has one name and at most one target", picture(number, source, 0, len(source)),
                         "write program NAME, or program NAME on cpu")
    return m["name"], m["target"] or ""


def parse(text: str) -> Program:
    """The program a text says.

    Raises ParseError: what is wrong, the source line with a caret, a hint with the known spellings.
    """
    header: tuple[str, str] | None = None
    ranks: list[Rank] = []
    tensors: list[Tensor] = []
    einsums: list[Einsum] = []
    groups: list[Group] = []
    proofs: list[str] = []
    for number, source in enumerate(text.splitlines(), 1):
        word = source.split(maxsplit=1)[:1]
        if word == ["proof"]:
            proofs.append(source.strip()[len("proof"):].strip())
            continue
        if header is None and word == ["program"]:
            header = _header(number, source)
            continue
        line = read_line(number, source)
        t = line.next
        if t.kind == "end":
            continue
        if header is None:
            line.fail(f"expected a program, found {spelled(t)}", _FIRST)
        if t.kind == "name" and line.peek().text in ("[", "'"):
            einsums.append(_einsum(line))
            continue
        line.at += 1
        head = t.text
        if head == "loop" and [line.next.text, line.peek().text] == ["-", "order"]:
            line.at, head = line.at + 2, "loop-order"
        if head == "rank":
            ranks.append(_rank(line))
        elif head in ROLES:
            tensors.append(_tensor(line, head))
        elif head == "group":
            groups.append(_group(line))
        elif head in PARTS and groups:
            groups[-1] = _part(line, head, groups[-1])
        elif head in PARTS:
            line.fail(f"{head!r} belongs to a group", "write group g0: X, Y first", t)
        elif head == "program":
            line.fail("a second program in one text", "one text holds one program", t)
        else:
            line.fail(f"a line cannot start with {spelled(t)}", nearest(head, (*HEADS, *PARTS)) + ", or a statement "
                      "X[m] = ...", t)
    if header is None:
        raise ParseError("the text holds no program", hint=_FIRST)
    return Program(header[0], Cascade(tuple(ranks), tuple(tensors), tuple(einsums)), Mapping(tuple(groups)),
                   header[1], tuple(proofs))
