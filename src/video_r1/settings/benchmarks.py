"""Settings of `video-r1 eval` that concern benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from video_r1.settings.base import Problem, Settings, setting


@dataclass(kw_only=True)
class BenchmarkSettings(Settings):
    """Benchmarks"""

    bench: list[str] | None = setting(
        None, "benchmarks by name (vsibench, mvbench, ...) or manifest files, in place of one manifest"
    )
    annotation: Literal["published", "reference"] | None = setting(
        None, "the benchmark's own annotation or Video-R1's eval_<name>.json (default: what is there)"
    )
    allow_missing: bool = setting(False, "evaluate what is there when media or questions are missing")
    compare: Literal["paper"] | None = setting(None, "print the paper's figures for the same frames beside")
    temporal_gap: bool = setting(
        False, "ask in both frame orders, and draw which questions need the order (temporal-gap.html)"
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.bench is not None and (not self.bench or len(set(self.bench)) < len(self.bench)):
            yield "bench", f"is {self.bench}; name one or more benchmarks, each once"
        if self.bench is None and (self.compare or self.annotation):
            name = "compare" if self.compare else "annotation"
            yield name, "is about benchmarks; name some with bench"
