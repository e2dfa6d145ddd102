"""Benchmarks of `video-r1 eval --bench`, by name.

Each is declared in `<name>.toml` beside this file; readers.py has what cannot be declared.
"""

import tomllib
from pathlib import Path

from video_r1.evaluation.benchmarks.readers import SPECIAL
from video_r1.evaluation.benchmarks.spec import Benchmark

_NAMES = (
    *("vsibench", "videommmu", "mmvu", "mvbench", "tempcompass", "videomme"),  # the paper's
    *("videoholmes", "tomato", "tvbench", "longvideobench"),
    *("vinoground", "mvp", "mvp_mini", "timeblind", "charades_sta"),
)


def _declared(name: str) -> Benchmark:
    text = Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8")
    return Benchmark(name=name, **tomllib.loads(text), **SPECIAL.get(name, {}))


BENCHMARKS: dict[str, Benchmark] = {name: _declared(name) for name in _NAMES}
