"""Names and types of the fields of `transformers.TrainingArguments`, read from its source.

Importing the class takes torch and some seconds; wrong options of `rl` and `sft` are refused without it.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal


@cache
def training_argument_types() -> dict[str, Any]:
    """Return name and type of every field of the constructor, an enum as the Literal of its values."""
    module, types = _module("training_args"), {}
    for node in _class_body(module, "TrainingArguments"):
        given = not isinstance(node, ast.AnnAssign) or "init=False" not in ast.unparse(node)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and given:
            types[node.target.id] = _type(node.annotation, module)
    return types


def _module(name: str) -> ast.Module:
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations
    return ast.parse(Path(package.submodule_search_locations[0], f"{name}.py").read_text(encoding="utf-8"))


def _class_body(module: ast.Module, name: str) -> list[ast.stmt]:
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return classes[0].body if classes else []


def _type(annotation: ast.expr, module: ast.Module) -> Any:
    """Evaluate an annotation. Types other than plain ones and enums, which no option can give, are Any."""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    known: dict[str, Any] = {"Any": Any, "Literal": Literal, "dict": dict, "list": list}
    known |= {kind.__name__: kind for kind in (bool, int, float, str)}
    choices = {name: found for name in names - known.keys() if (found := _choices(name, module))}
    sides = [annotation.left, annotation.right] if isinstance(annotation, ast.BinOp) else []
    if enums := [choices[side.id] for side in sides if isinstance(side, ast.Name) and side.id in choices]:
        return enums[0]
    known |= dict.fromkeys(names - known.keys(), Any) | choices
    return eval(compile(ast.Expression(annotation), "TrainingArguments", "eval"), {"__builtins__": {}}, known)


def _choices(name: str, module: ast.Module) -> Any:
    """Return the Literal of an enum's values, defined in the module or imported from a neighbour."""
    lines = (node.value for node in _class_body(module, name) if isinstance(node, ast.Assign))
    if values := tuple(value.value for value in lines if isinstance(value, ast.Constant)):
        return Literal[values]
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {one.name for one in node.names}:
            return _choices(name, _module(str(node.module)))
    return None
