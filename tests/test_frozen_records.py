"""Records of the step are made once: no code of training/ and rewards/ writes to a field afterwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import video_r1

ROOT = Path(video_r1.__file__).parent
FILES = sorted(
    [*(ROOT / "training").glob("*.py"), *(ROOT / "rewards").glob("*.py"), ROOT / "data/rollouts.py"]
)
# of trainers, callbacks, models and settings, whose objects have a state of their own
OWNERS = {
    "self",
    "args",
    "control",
    "state",
    "model",
    "module",
    "trainer",
    "config",
    "parameter",
    "weight",
    "plugin",
    "hooks",
}


def records(tree: ast.Module) -> list[tuple[str, bool]]:
    """Names of the dataclasses of a file, and whether each is frozen."""
    found = []
    for node in ast.walk(tree):
        for mark in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            name = mark.func if isinstance(mark, ast.Call) else mark
            if isinstance(node, ast.ClassDef) and isinstance(name, ast.Name) and name.id == "dataclass":
                options = {k.arg: ast.unparse(k.value) for k in getattr(mark, "keywords", ())}
                found.append((node.name, options.get("frozen") == "True"))
    return found


def written(tree: ast.Module) -> list[str]:
    """Assignments to an attribute of something that is none of OWNERS."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in (part for one in targets for part in ast.walk(one)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                owner = ast.unparse(target.value).split(".")[0].split("(")[0]
                if owner not in OWNERS:
                    found.append(f"{target.lineno}: {ast.unparse(target)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_field_is_written_after_construction(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert written(tree) == []
    settings = {"TGRPOConfig", "SFTConfig", "RunArguments"}  # transformers writes to its arguments
    with_state = {"QuestionSource", "EpochSlots"}  # a reader and a dataset, no records
    assert [name for name, frozen in records(tree) if not frozen and name not in settings | with_state] == []


def test_a_written_field_would_be_found() -> None:
    assert written(ast.parse("group.advantages = 1\nbatch.x, self.y = 2, 3\ngroup.n += 1")) == [
        "1: group.advantages", "2: batch.x", "3: group.n",
    ]  # fmt: skip
    both = "@dataclass(slots=True)\nclass A: ...\n@dataclass(frozen=True)\nclass B: ..."
    assert records(ast.parse(both)) == [("A", False), ("B", True)]
