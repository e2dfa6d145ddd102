"""Benchmarks of `video-r1 eval --bench`, by name.

Each `<name>.toml` beside this file declares one; a declaration elsewhere is named by its path. Where fields
are not enough, `read`, `find_places` and `find_task` name functions of readers.py.
"""

import tomllib
from pathlib import Path

from video_r1.errors import RequestError
from video_r1.evaluation.benchmarks import readers
from video_r1.evaluation.benchmarks.spec import Benchmark

_FUNCTIONS = ("read", "find_places", "find_task")


def read_declaration(path: Path) -> Benchmark:
    """Return the benchmark that a TOML file declares, named by the file. Raises RequestError."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        functions = {name: getattr(readers, fields[name]) for name in _FUNCTIONS if name in fields}
        return Benchmark(name=path.stem, **fields | functions)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        text = str(error).removeprefix("Benchmark.__init__() ")
        raise RequestError(f"{path} declares no benchmark: {text}") from error


BENCHMARKS = {path.stem: read_declaration(path) for path in sorted(Path(__file__).parent.glob("*.toml"))}
