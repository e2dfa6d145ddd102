"""Filter expressions of the setting `keep`: which questions to train on, by their pass rates.

    ordered - shuffled > 0.1
    0.2 < ordered < 0.9 and not blind > 0.5

Allowed are names of pass rates, numbers, + - * and brackets; < <= > >= == !=, also chained; and, or, not.
The text is parsed, never executed; simpleeval computes the numbers, restricted to four kinds of nodes.

A missing rate (images have none without frame order) is unknown, and so is everything computed from it.
`and`, `or` and `not` use SQL's three-valued logic. A question is dropped only if the expression is false.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache

from simpleeval import InvalidExpression, SimpleEval

from video_r1.errors import ConfigError

PASS_RATES = "pass_rates"
"""Field of a manifest row that holds its pass rates."""
LONGEST, DEEPEST = 500, 60  # characters; levels of the parsed tree
TOO_DEEP = "it is nested too deeply"
ROUNDING = 1e-9  # 4/10 − 3/10 is not above 0.1, whatever binary fractions make of it
FALSE, UNKNOWN, TRUE = 0.0, 0.5, 1.0  # so that and, or and not are min, max and 1 − x

_ARITHMETIC = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.USub: operator.neg, ast.UAdd: operator.pos},
}
_COMPARED: dict[type[ast.cmpop], Callable[[float], bool]] = {  # takes the difference left − right
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
        self._body = body
        self._numbers = SimpleEval(_ARITHMETIC, {})
        kinds = (ast.Name, ast.UnaryOp, ast.BinOp)
        nodes: dict[type[ast.AST], Callable[..., float]] = self._numbers.nodes or {}
        self._numbers.nodes = {kind: nodes[kind] for kind in kinds} | {ast.Constant: _constant}
        self.names = frozenset(node.id for node in ast.walk(body) if isinstance(node, ast.Name))
        self._order = tuple(self.names)
        self._cached = lru_cache(1 << 14)(self._evaluate)  # many questions have the same rates
        self.truth({})

    def truth(self, rates: Mapping[str, float | None]) -> float:
        """Evaluate the expression: TRUE, FALSE, or UNKNOWN because a rate is missing."""
        return self._cached(*map(rates.get, self._order))

    def _evaluate(self, *rates: float | None) -> float:
        known = (math.nan if rate is None else rate for rate in rates)
        self._numbers.names = dict(zip(self._order, known, strict=True))
        return self._truth(self._body)

    def keeps(self, rates: Mapping[str, float | None]) -> bool:
        """Return whether a question with these rates is kept."""
        return self.truth(rates) != FALSE

    def _truth(self, node: ast.expr) -> float:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others) if {*map(type, ops)} <= {*_COMPARED}:
                numbers = [self._number(each) for each in (left, *others)]
                pairs = zip(ops, numbers, numbers[1:], strict=False)
                return min(
                    UNKNOWN if math.isnan(first - second) else float(_COMPARED[type(op)](first - second))
                    for op, first, second in pairs
                )
            case ast.BoolOp(op=op, values=values):
                truths = [self._truth(each) for each in values]
                return min(truths) if isinstance(op, ast.And) else max(truths)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return TRUE - self._truth(operand)
        raise ValueError(f"{ast.unparse(node)!r} is no comparison")

    def _number(self, node: ast.expr) -> float:
        try:
            return self._numbers.eval("", previously_parsed=node)
        except (InvalidExpression, TypeError) as error:
            raise ValueError(f"{ast.unparse(node)!r} is no pass rate, number, sum or product") from error


def parse_keep(text: str) -> Keep:
    """Parse a filter expression. Raises ConfigError with the part that is not understood."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters; at most {LONGEST} are read")
        tree = ast.parse(" ".join(text.split()), mode="eval")  # a recipe may break lines
        if _depth(tree) > DEEPEST:
            raise ValueError(TOO_DEEP)
        return Keep(tree.body)
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


def _constant(node: ast.Constant) -> float:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if abs(value) > 1e9 or not math.isfinite(value):
        raise ValueError(f"{ast.unparse(node)[:20]} is out of the range of pass rates")
    return float(value)
