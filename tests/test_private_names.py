"""Private names of other libraries: every one is listed, and something fails when an upgrade changes it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import Trainer

from video_r1.models.loading import keep_angles_exact

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "video_r1"
DESIGN = ROOT / "docs" / "design.md"
LIBRARIES = ("transformers", "accelerate", "torch", "deepspeed", "vllm")
# Of these every module below the package counts as private; torch's modules are public by their names.
EXPORTED_AT_THE_TOP = ("transformers", "accelerate", "deepspeed", "vllm")
# Documented names of the standard library that begin with an underscore.
STANDARD = {"_replace", "_asdict", "_fields", "_make", "_exit"}


class Listed(NamedTuple):
    names: list[str]
    files: list[str]
    tests: list[str]


@cache
def listed() -> list[Listed]:
    section = DESIGN.read_text(encoding="utf-8").partition("## Private names of other libraries")[2]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if "`" in line]
    return [Listed(*(re.findall(r"`([^`]+)`", row[column]) for column in (1, 2, 4))) for row in rows if row]


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a file imports of the libraries, as (module, name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.split(".")[0] in LIBRARIES)


def private_imports(tree: ast.Module) -> set[str]:
    found = set()
    for module, name in imported(tree):
        library, *parts = module.split(".")
        if any(map(is_private, parts)) or (library in EXPORTED_AT_THE_TOP and parts):
            found.add(module)
        elif is_private(name):
            found.add(name)
    return found


@cache
def own_names() -> set[str]:
    """Names that the package itself gives to functions, methods, fields and attributes of `self`."""
    found = set()
    for node in (node for tree in trees().values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            found.add(node.attr)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_attributes(tree: ast.Module) -> set[str]:
    """Attributes with an underscore, also by setattr, of anything but `self` with a name of our own."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in STANDARD:
            if not (of_self(node) and node.attr in own_names()):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if node.func.id in ("getattr", "setattr", "hasattr") and is_private(str(name)):
                found.add(str(name))
    return found


def library_class(base: ast.expr, tree: ast.Module) -> type | None:
    """The class of one of the libraries that a base is, directly or through a class of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and isinstance(base, ast.Name) and node.module:
            if base.id not in [alias.asname or alias.name for alias in node.names]:
                continue
            if node.module.split(".")[0] in LIBRARIES:
                return getattr(pytest.importorskip(node.module), base.id)
            file = f"{node.module.removeprefix('video_r1.').replace('.', '/')}.py"
            if file in trees():
                return next(filter(None, map_bases(base.id, trees()[file])), None)
    if isinstance(base, ast.Attribute) and ast.unparse(base).startswith("nn."):
        return getattr(torch.nn, base.attr)
    return next(filter(None, map_bases(base.id, tree)), None) if isinstance(base, ast.Name) else None


def map_bases(name: str, tree: ast.Module) -> Iterator[type | None]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from (library_class(base, tree) for base in node.bases)


def private_overrides(tree: ast.Module) -> set[str]:
    """Private methods of a library's class that a class of this package has again."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
        for base in filter(None, (library_class(base, tree) for base in node.bases)):
            found |= {name for name in methods if is_private(name) and hasattr(base, name)}
    return found


def used(tree: ast.Module) -> set[str]:
    return private_imports(tree) | private_attributes(tree) | private_overrides(tree)


def last(name: str) -> str:
    """`Trainer._save` → `_save`; a module stays whole."""
    return name if name.split(".")[0] in LIBRARIES else name.rpartition(".")[2]


def test_the_scan_finds_what_it_looks_for() -> None:
    tree = ast.parse(
        "import torch._C\nfrom transformers import Trainer\nfrom transformers.trainer_utils import x\n"
        "from torch.utils.data import Dataset\nfrom torch.utils import _pytree\n"
        "class A(Trainer):\n    def _save(self): super()._load_best_model()\n"
        "    def _mine(self): self._theirs\n"
        "setattr(x, '_patched', 1)\nmodel.config._attn = 2\npair._replace(a=1)\n"
    )
    assert private_imports(tree) == {"torch._C", "transformers.trainer_utils", "_pytree"}
    assert private_attributes(tree) == {"_load_best_model", "_theirs", "_patched", "_attn"}
    assert private_overrides(tree) == {"_save"}


@pytest.mark.parametrize("file", trees())
def test_every_private_name_is_listed(file: str) -> None:
    known = {last(name) for row in listed() if file in row.files for name in row.names}
    missing = sorted(used(trees()[file]) - known)
    assert not missing, f"{file} touches {', '.join(missing)}: list each in {DESIGN.name} with a test"


@pytest.mark.parametrize("row", listed(), ids=lambda row: row.names[0])
def test_every_listed_name_is_there_and_has_its_tests(row: Listed) -> None:
    texts = {file: (SOURCE / file).read_text(encoding="utf-8") for file in row.files}
    for name in row.names:
        word = re.compile(rf"\b{re.escape(last(name))}\b")
        assert any(word.search(text) for text in texts.values()), f"{name} is gone from {row.files}"
    for file, text in texts.items():
        assert any(last(name) in text for name in row.names), f"{file} has none of {row.names}"
    assert row.tests
    for test in row.tests:
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"no test {test}"


def test_methods_of_the_trainer() -> None:
    """The Trainer calls the ones that are overridden, and all take what they are given here."""
    expected = {
        "_save_checkpoint": ["model", "trial"],
        "_save": ["output_dir", "state_dict"],
        "_get_output_dir": ["trial"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_best_model": [],
        "_determine_best_metric": ["metrics", "trial"],
    }
    source = inspect.getsource(Trainer)
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters
        assert f"self.{name}(" in source
    assert "self._train_batch_size = " in source


def test_rotary_frequencies_are_computed_again() -> None:
    """As ZeRO-3 leaves them: rounded to the weights' number format."""
    model: Any = tiny_model("qwen2_5_vl", tiny_tokenizer())
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert exact
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if "inv_freq" in name:
                setattr(module, name, buffer.bfloat16())
    keep_angles_exact(model)
    after = dict(model.named_buffers())
    for name, buffer in exact.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], buffer), name


def test_modules_of_vllm() -> None:
    pytest.importorskip("vllm")
    for tree in trees().values():
        for module, name in imported(tree):
            if module.startswith("vllm."):
                found = importlib.import_module(module)
                assert hasattr(found, name) or importlib.import_module(f"{module}.{name}")
