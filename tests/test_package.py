"""What a built package holds: every file of the source tree, and no rule for data matches nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import setup; setup(script_args=['-q', 'build_py', '--build-lib', 'built'])"


def test_a_built_package_has_all_data_and_every_rule_matches(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    built, source = tmp_path / "built" / "video_r1", ROOT / "src" / "video_r1"
    assert files(built) == {name for name in files(source) if "__pycache__" not in name}
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set(rules) == {"video_r1"}
    assert [rule for rule in rules["video_r1"] if not any(built.glob(rule))] == []


def test_the_pinned_versions_are_ones_that_the_package_takes() -> None:
    """What they contradict, pip refuses on a new machine, and only there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    asked = [(needed := Requirement(text), pinned.get(needed.name)) for text in wanted]
    assert sum(version is not None for _, version in asked) >= 25
    assert [
        f"{needed}: {version} is pinned"
        for needed, version in asked
        if version is not None and not needed.specifier.contains(version)
    ] == []
