"""Loading of benchmarks: from a folder to checked questions; errors name missing files and their source.

media root/
  vsibench/ …        unpacked copies of the benchmarks' datasets (the declarations say how)
  eval_mmvu.json …   or the reference's evaluation JSONs, with Evaluation/… beside them
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from video_r1.data.manifests.records import Sample, check_manifest, load_manifest
from video_r1.data.sources.remote import local_file
from video_r1.errors import RequestError
from video_r1.evaluation.benchmarks import BENCHMARKS, read_declaration
from video_r1.evaluation.benchmarks.spec import Benchmark, annotation_files, manifest_rows, reference_rows
from video_r1.evaluation.metrics import answer_score
from video_r1.files import replace_json

Annotation = Literal["published", "reference"]
BENCHMARK_ROOT = "data/benchmarks"
_SHOWN = 10  # missing files in a message


class Coverage(NamedTuple):
    """Numbers of questions behind the figures."""

    questions: int  # asked
    whole: int  # in the benchmark or the user's manifest
    missing: tuple[str, ...]  # media files

    @property
    def complete(self) -> bool:
        return self.questions == self.whole

    def __str__(self) -> str:
        if self.complete:
            return f"all {self.questions:,} questions"
        why = f", {len(self.missing):,} media files missing" if self.missing else ""
        return f"{self.questions:,} of {self.whole:,} questions{why}"


class Questions(NamedTuple):
    """A benchmark's questions that can be asked, grouped by clip."""

    name: str
    title: str
    samples: tuple[Sample, ...]
    coverage: Coverage
    annotation: Annotation | None  # None for a user's manifest
    benchmark: Benchmark | None


def find_benchmark(name: str) -> Benchmark | None:
    """Return the benchmark of a name or of a declaration's path; None for a manifest. Raises RequestError."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if not Path(name).is_file():
        known = ", ".join(BENCHMARKS)
        raise RequestError(f"bench: {name!r} is neither a benchmark nor a manifest file; benchmarks: {known}")
    return read_declaration(Path(name)) if name.endswith(".toml") else None


def load_questions(
    name: str,
    media_root: str | Path | None,
    manifest_folder: Path,
    *,
    allow_missing: bool = False,
    annotation: Annotation | None = None,
) -> Questions:
    """Read, convert and check one benchmark, or a user's manifest.

    name: a benchmark's name, or the path of its declaration or of a manifest. media_root: by default
    `BENCHMARK_ROOT`, for a manifest its folder. annotation: the kind to read if both exist, by default the
    published one. The converted manifest is written to `manifest_folder`/manifest.json. Raises ManifestError
    for rows that are no questions, RequestError when there is no annotation, and, unless `allow_missing`,
    when media are missing or the number of questions or options is not the published one.
    """
    benchmark, problems = find_benchmark(name), []
    if benchmark is None:
        samples, source = load_manifest(name, media_root, bad_rows=None, score=answer_score), ""
        title = Path(name).stem
        kind, whole = None, len(samples)
    else:
        root, title, whole = Path(media_root or BENCHMARK_ROOT), benchmark.title, benchmark.questions
        kind, rows = _rows(benchmark, root, annotation)
        manifest_folder.mkdir(parents=True, exist_ok=True)
        manifest = manifest_folder / "manifest.json"
        replace_json(manifest, list(rows))
        checked = check_manifest(manifest, root, score=None)
        samples, source = checked.without_problems(manifest), f"; download: {where_to_get(benchmark)}"
        problems = _count_problems(benchmark, samples)
    present, missing = _split_by_media(samples)
    if missing:
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        listed = ", ".join(missing[:_SHOWN]) + more + source
        problems.append(f"{len(missing):,} media files are missing: {listed}")
    if problems and not (present and allow_missing):
        rest = ". Pass --allow_missing to evaluate the rest" if present else ""
        raise RequestError(f"{title}: {'; '.join(problems)}{rest}")
    return Questions(
        Path(name).stem, title, by_clip(present), Coverage(len(present), whole, missing), kind, benchmark
    )


def where_to_get(benchmark: Benchmark, root: Path | str = "DIR") -> str:
    """Return the command that downloads a benchmark into its folder, and how to unpack it."""
    folder = f"{root}/{benchmark.name}"
    return (
        f"hf download {benchmark.dataset} --repo-type dataset --local-dir {folder}; then {benchmark.unpack}"
    )


def by_clip(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Group the samples by clip, in the order of each clip's first question."""
    first: dict[tuple[object, ...], int] = {}
    placed = [(first.setdefault(sample.files, len(first)), sample) for sample in samples]
    return tuple(sample for _, sample in sorted(placed, key=lambda pair: pair[0]))


def _rows(benchmark: Benchmark, root: Path, wanted: Annotation | None) -> tuple[Annotation, Iterable[dict]]:
    files = annotation_files(benchmark, root / benchmark.name)
    if files and wanted != "reference":
        return "published", manifest_rows(benchmark, root)
    name = f"eval_{benchmark.name}.json"
    if wanted != "published" and (root / name).is_file():
        return "reference", reference_rows(benchmark, root / name)
    looked_for = {
        "published": f"{root / benchmark.name}/ has none of {', '.join(benchmark.files)}",
        "reference": f"{root / name} is not there (hf download Video-R1/Video-R1-eval --repo-type dataset)",
    }
    kinds = list(looked_for) if wanted is None else [wanted]
    found = "; ".join(looked_for[kind] for kind in kinds)
    raise RequestError(
        f"{benchmark.title}: no annotation: {found}. Download: {where_to_get(benchmark, root)}"
    )


def _split_by_media(samples: Sequence[Sample]) -> tuple[list[Sample], tuple[str, ...]]:
    """Return the samples whose files exist, and the missing files."""
    paths = dict.fromkeys(path for sample in samples for path in sample.paths)
    missing = {path for path in paths if (file := local_file(path)) and not os.path.exists(file)}
    present = [sample for sample in samples if missing.isdisjoint(sample.paths)]
    return present, tuple(path for path in paths if path in missing)


def _count_problems(benchmark: Benchmark, samples: Sequence[Sample]) -> list[str]:
    problems = []
    if len(samples) != benchmark.questions:
        problems.append(f"the annotation has {len(samples):,} questions, not {benchmark.questions:,}")
    fewest, most = benchmark.options
    counts = Counter(len(sample.options) for sample in samples if sample.problem_type == "multiple choice")
    odd = {options: number for options, number in counts.items() if not fewest <= options <= most}
    if odd:
        said = ", ".join(f"{number} with {options}" for options, number in sorted(odd.items()))
        problems.append(f"questions have {fewest} to {most} options, but here are {said}")
    return problems
