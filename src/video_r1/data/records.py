"""Samples: one question about one image or video, read from a manifest and checked."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ProblemType = Literal["multiple choice", "numerical", "OCR", "free-form", "regression"]


@dataclass(frozen=True, slots=True)
class Sample:
    problem_id: str | int
    problem: str
    data_type: Literal["image", "video"]
    problem_type: ProblemType
    solution: str
    path: str
    options: tuple[str, ...] = ()
    process: str | None = None
    data_source: str = ""
    start: float | None = None
    end: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.solution.removeprefix("<answer>").removesuffix("</answer>").strip()
