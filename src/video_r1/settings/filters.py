"""The language of `keep`: which questions are trained on, by their pass rates. Nothing in it is executed.

    ordered - shuffled > 0.1
    0.2 < ordered < 0.9 and not blind > 0.5

Names of pass rates, numbers, + - * and brackets; < <= > >= == !=, several in a row too; and, or, not. The
text is parsed by `ast` and made of the few functions below; whatever else it holds is refused.

A rate that a question lacks (images have none without frame order) is unknown, and so is what is computed of
it. As in SQL, `and`, `or` and `not` go on with what is known, and a question is dropped only where the whole
is false: what cannot be said about a question is no reason to drop it.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_r1.errors import ConfigError

PASS_RATES = "pass_rates"
"""The field of a row that has them."""
LONGEST, DEEPEST = 500, 60  # characters, and levels of the parsed tree
TOO_DEEP = "it is nested too deeply"
ROUNDING = 1e-9  # 4/10 − 3/10 is not above 0.1, whatever binary fractions make of it

Rates = Mapping[str, float | None]
Number = Callable[[Rates], float | None]
Truth = Callable[[Rates], bool | None]

_SUMS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_COMPARED: dict[type[ast.cmpop], Callable[[float], bool]] = {  # of the difference left − right
    ast.Gt: lambda by: by > ROUNDING,
    ast.GtE: lambda by: by >= -ROUNDING,
    ast.Lt: lambda by: by < -ROUNDING,
    ast.LtE: lambda by: by <= ROUNDING,
    ast.Eq: lambda by: abs(by) <= ROUNDING,
    ast.NotEq: lambda by: abs(by) > ROUNDING,
}


@dataclass(frozen=True)
class Keep:
    """A parsed expression. `names`: the rates that it is about."""

    text: str
    names: frozenset[str]
    truth: Truth

    def keeps(self, rates: Rates) -> bool:
        """Whether a question with these rates stays."""
        return self.truth(rates) is not False


def parse_keep(text: str) -> Keep:
    """Raises ConfigError with the part of the expression that is not understood."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters; at most {LONGEST} are read")
        tree = ast.parse(" ".join(text.split()), mode="eval")  # a recipe may break lines
        if _depth(tree) > DEEPEST:
            raise ValueError(TOO_DEEP)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        return Keep(text, frozenset(names), _truth(tree.body))
    except SyntaxError as error:
        reason = f"{error.msg} (at character {error.offset})"
    except (RecursionError, MemoryError):
        reason = TOO_DEEP
    except ValueError as error:
        reason = str(error)
    shown = text if len(text) <= 80 else f"{text[:79]}…"
    raise ConfigError(
        f"keep {shown!r}: {reason}. It compares pass rates, as in 'ordered - shuffled > 0.1' or "
        "'0.2 < ordered < 0.9 and blind < 0.5'"
    )


def _depth(node: ast.AST) -> int:
    return 1 + max(map(_depth, ast.iter_child_nodes(node)), default=0)


def _truth(node: ast.expr) -> Truth:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARED for op in ops):
            numbers = [_number(each) for each in (left, *others)]
            pairs = zip(numbers, [_COMPARED[type(op)] for op in ops], numbers[1:], strict=False)
            return _all([_comparison(*pair) for pair in pairs])
        case ast.BoolOp(op=ast.And(), values=values):
            return _all([_truth(each) for each in values])
        case ast.BoolOp(op=ast.Or(), values=values):
            return _not(_all([_not(_truth(each)) for each in values]))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _not(_truth(operand))
    raise ValueError(f"{ast.unparse(node)!r} is no comparison")


def _number(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if type(value) is not bool:
            if abs(value) > 1e9 or not math.isfinite(value):
                raise ValueError(f"{ast.unparse(node)[:20]} is out of the range of pass rates")
            return lambda rates: float(value)
        case ast.Name(id=name):
            return lambda rates: rates.get(name)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            factor, number = (-1.0 if isinstance(sign, ast.USub) else 1.0), _number(operand)
            return _known(lambda value: factor * value, number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
            return _known(_SUMS[type(op)], _number(left), _number(right))
    raise ValueError(f"{ast.unparse(node)!r} is no pass rate, number, sum or product")


def _known(function: Callable[..., Any], *numbers: Number) -> Callable[[Rates], Any]:
    """`function` of the numbers; None where one of them is."""

    def of(rates: Rates) -> Any:
        values = [number(rates) for number in numbers]
        return None if None in values else function(*values)

    return of


def _comparison(left: Number, holds: Callable[[float], bool], right: Number) -> Truth:
    return _known(lambda first, second: holds(first - second), left, right)


def _all(truths: Sequence[Truth]) -> Truth:
    def of(rates: Rates) -> bool | None:
        values = [truth(rates) for truth in truths]
        return False if False in values else None if None in values else True

    return of


def _not(truth: Truth) -> Truth:
    return _known(operator.not_, truth)
