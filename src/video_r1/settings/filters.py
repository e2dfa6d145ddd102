"""Filter expressions of the setting `keep`: which questions to train on, by their pass rates.

    ordered - shuffled > 0.1
    0.2 < ordered < 0.9 and not blind > 0.5

Allowed are names of pass rates, numbers, + - * and brackets; < <= > >= == !=, also chained; and, or, not.
The text is parsed, never executed.

A missing rate (images have none without frame order) is unknown, and so is everything computed from it.
`and`, `or` and `not` use SQL's three-valued logic. A question is dropped only if the expression is false.
"""

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping

from video_r1.errors import ConfigError

PASS_RATES = "pass_rates"
"""Field of a manifest row that holds its pass rates."""
LONGEST = 500  # characters, so that nothing is nested too deeply
ROUNDING = 1e-9  # 4/10 − 3/10 is not above 0.1, whatever binary fractions make of it
FALSE, UNKNOWN, TRUE = 0.0, 0.5, 1.0  # so that and, or and not are min, max and 1 − x

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_COMPARED: dict[type, Callable[[float], bool]] = {  # takes the difference left − right
    ast.Gt: lambda by: by > ROUNDING,
    ast.GtE: lambda by: by >= -ROUNDING,
    ast.Lt: lambda by: by < -ROUNDING,
    ast.LtE: lambda by: by <= ROUNDING,
    ast.Eq: lambda by: abs(by) <= ROUNDING,
    ast.NotEq: lambda by: abs(by) > ROUNDING,
}


class Keep:
    """A parsed expression. names: the pass rates that it uses. Raises ValueError for anything else."""

    def __init__(self, body: ast.expr) -> None:
        self.body = body
        self.names = frozenset(node.id for node in ast.walk(body) if isinstance(node, ast.Name))
        self.truth({})

    def truth(self, rates: Mapping[str, float | None]) -> float:
        """Evaluate the expression: TRUE, FALSE, or UNKNOWN because a rate is missing."""
        return _truth(self.body, rates)

    def keeps(self, rates: Mapping[str, float | None]) -> bool:
        return self.truth(rates) != FALSE


def _truth(node: ast.expr, rates: Mapping[str, float | None]) -> float:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others) if {*map(type, ops)} <= _COMPARED.keys():
            pairs = itertools.pairwise(_number(each, rates) for each in (left, *others))
            differences = [first - second for first, second in pairs]
            return min(
                UNKNOWN if math.isnan(by) else float(_COMPARED[type(op)](by))
                for op, by in zip(ops, differences, strict=True)
            )
        case ast.BoolOp(op=op, values=values):
            return (min if isinstance(op, ast.And) else max)(_truth(each, rates) for each in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return TRUE - _truth(operand, rates)
    raise ValueError(f"{ast.unparse(node)!r} is no comparison")


def _number(node: ast.expr, rates: Mapping[str, float | None]) -> float:
    """Evaluate a sum or product of rates; NaN if one is missing."""
    match node:
        case ast.Name(id=name):
            rate = rates.get(name)
            return math.nan if rate is None else rate
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not abs(value) <= 1e9:
                raise ValueError(f"{ast.unparse(node)[:20]} is out of the range of pass rates")
            return float(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_number(operand, rates))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_number(left, rates), _number(right, rates))
    raise ValueError(f"{ast.unparse(node)!r} is no pass rate, number, sum or product")


def parse_keep(text: str) -> Keep:
    """Parse a filter expression. Raises ConfigError with the part that is not understood."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters; at most {LONGEST} are read")
        return Keep(ast.parse(" ".join(text.split()), mode="eval").body)  # a recipe may break lines
    except SyntaxError as error:
        reason = f"{error.msg} (at character {error.offset})"
    except (RecursionError, MemoryError):
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    shown = text if len(text) <= 80 else f"{text[:79]}…"
    raise ConfigError(
        f"keep {shown!r}: {reason}. It compares pass rates, as in 'ordered - shuffled > 0.1' or "
        "'0.2 < ordered < 0.9 and blind < 0.5'"
    )
