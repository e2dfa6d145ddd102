"""The addresses of evaluations: two side by side, and the questions that one wins and the other loses."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from video_r1.evaluation.metrics import mean_figure
from video_r1.report.run_data import finite, prediction_files, text
from video_r1.studio.answers import Answer, number
from video_r1.studio.data import manifests, row_of
from video_r1.studio.folders import Found
from video_r1.studio.manifest_index import ManifestIndex
from video_r1.studio.runs import readers
from video_r1.studio.tail import Tail, parse

OPEN_FILES = 24  # of predictions whose scores are kept in memory
MAX_PREDICTIONS = 1_000_000
PAGE = 20  # questions of one answer
MAX_GROUPS = 80  # rows of the table
TEXT = 20_000  # characters of an output
READ_SECONDS = 20.0
GROUPINGS = {"task": "task_type", "type": "problem_type", "media": "data_type", "source": "data_source"}


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer in one order: its score, what it is counted with, and its place in the file."""

    score: float
    groups: tuple[str, ...]
    place: tuple[int, int]


class Predictions:
    """The scores of one predictions file, as far as it was written."""

    def __init__(self, found: Found, file: str) -> None:
        self.found, self.lock = found, threading.Lock()
        self.tail = Tail(found, file)
        self._forget()

    def _forget(self) -> None:
        self.scored: dict[str, dict[str, Scored]] = {}  # by order and question

    def read(self) -> dict[str, dict[str, Scored]]:
        with self.lock:
            self.tail.read(self._take, self._forget, READ_SECONDS)
            return self.scored

    def _take(self, place: int, size: int, record: dict[str, Any]) -> None:
        score, order = finite(record.get("score")), text(record.get("order", ""))
        by_id = self.scored.setdefault(order, {}) if len(self.scored) < 10 else self.scored.get(order, {})
        if score is not None and len(by_id) < MAX_PREDICTIONS:
            groups = tuple(text(record.get(field) or "")[:80] for field in GROUPINGS.values())
            by_id[text(record.get("problem_id", ""))] = Scored(score, groups, (place, size))

    def record(self, scored: Scored) -> dict[str, Any]:
        """The whole answer, {} where it is there no more."""
        with self.found.open(self.tail.name) as file:
            file.seek(scored.place[0])
            return parse(file.read(scored.place[1])) or {}


class Evaluations:
    """Predictions that somebody looks at, by folder and file."""

    def __init__(self) -> None:
        self._open: dict[tuple[Found, str], Predictions] = {}
        self._lock = threading.Lock()

    def predictions(self, found: Found, file: str) -> Predictions:
        with self._lock:
            opened = self._open.pop((found, file), None) or Predictions(found, file)
            self._open[found, file] = opened
            while len(self._open) > OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            return opened


def list_evaluations(request: Request) -> Answer:
    """What can be compared: evaluations, and folders with several of them, one a benchmark."""
    found = _evaluations(request)
    above: dict[str, list[str]] = {}
    for name in found:
        parent, _, benchmark = name.rpartition("/")
        if parent and parent not in found:
            above.setdefault(parent, []).append(benchmark)
    rows = [{"name": name, "frames": _frames(folder), "benchmarks": 1} for name, folder in found.items()]
    rows += [
        {"name": f"{name}/", "frames": [], "benchmarks": len(below)}
        for name, below in above.items()
        if len(below) > 1
    ]
    return Answer({"evaluations": sorted(rows, key=lambda row: row["name"])})


def versus(request: Request) -> Answer:
    """`left` and `right` with `frames` (default: the most that both have) in `order`: accuracies over the
    questions that both have answered, with 95 % intervals, and the difference, paired.
    """
    pairs, order = _pairs(request), request.query_params.get("order", "ordered")
    rows, frames, orders = [], set[str](), set[str]()
    for benchmark, (left, right) in pairs.items():
        first, second, count = _both(request, left, right)
        frames |= set(_frames(left)) & set(_frames(right))
        orders |= first.read().keys() & second.read().keys()
        a, b = first.read().get(order, {}), second.read().get(order, {})
        both = [problem for problem in a if problem in b]
        if both:
            rows.append(
                {"benchmark": benchmark, "group": "", "name": "", "frames": count, **_row(a, b, both)}
            )
            rows += _group_rows(benchmark, count, a, b, both)
    shown = sorted(frames, key=int)
    return Answer({"rows": rows, "frames": shown, "orders": sorted(orders), "benchmarks": list(pairs)})


def _group_rows(
    benchmark: str, frames: str, a: Mapping[str, Scored], b: Mapping[str, Scored], both: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for place, grouping in enumerate(GROUPINGS):
        members: dict[str, list[str]] = {}
        for problem in both:
            members.setdefault(a[problem].groups[place], []).append(problem)
        names = sorted(name for name in members if name)
        if len(names) > 1:
            rows += [
                {"benchmark": benchmark, "group": grouping, "name": name, "frames": frames}
                | _row(a, b, members[name])
                for name in names[:MAX_GROUPS]
            ]
    return rows


def _row(a: Mapping[str, Scored], b: Mapping[str, Scored], problems: Sequence[str]) -> dict[str, Any]:
    first, second = ([side[problem].score for problem in problems] for side in (a, b))
    difference = [x - y for x, y in zip(first, second, strict=True)]
    figures = {"left": first, "right": second, "difference": difference}
    return {
        "questions": len(problems),
        "wins": sum(by > 0 for by in difference),
        "losses": sum(by < 0 for by in difference),
        **{
            name: dict(zip(("mean", "low", "high"), mean_figure(values)[:3], strict=True))
            for name, values in figures.items()
        },
    }


def questions(request: Request) -> Answer:
    """Questions of one `benchmark` that `left` answers better (`who=left`) or worse (`right`), the largest
    difference first, 20 from `at` on, with both outputs and the row of a manifest that they are from.
    """
    asked = request.query_params
    pairs, order, at = _pairs(request), asked.get("order", "ordered"), max(0, number(asked, "at"))
    benchmark = asked.get("benchmark", next(iter(pairs)))
    if benchmark not in pairs:
        raise HTTPException(404, "both have no such benchmark")
    first, second, _ = _both(request, *pairs[benchmark])
    a, b = first.read().get(order, {}), second.read().get(order, {})
    sign = -1 if asked.get("who") == "right" else 1
    by = {problem: sign * (a[problem].score - b[problem].score) for problem in a if problem in b}
    won = sorted((problem for problem in by if by[problem] > 0), key=lambda problem: -by[problem])
    if asked.get("group") in GROUPINGS:
        place = list(GROUPINGS).index(asked["group"])
        won = [problem for problem in won if a[problem].groups[place] == asked.get("name")]
    indexes = manifests(request).indexes()
    shown = [_question(indexes, p, first.record(a[p]), second.record(b[p])) for p in won[at : at + PAGE]]
    return Answer({"total": len(won), "shown": shown, "next": at + PAGE if at + PAGE < len(won) else None})


def _question(
    indexes: Sequence[ManifestIndex], problem: str, left: dict[str, Any], right: dict[str, Any]
) -> dict[str, Any]:
    answer = text(left.get("answer", ""))
    return {
        "id": problem[:200],
        "answer": answer[:2000],
        "type": text(left.get("problem_type", ""))[:80],
        "task": text(left.get("task_type") or "")[:80],
        "left": _output(left),
        "right": _output(right),
        "row": row_of(indexes, problem, answer),
    }


def _output(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": text(record.get("output", ""))[:TEXT],
        "truncated": record.get("finish_reason") == "length",
        "rewards": {"accuracy": finite(record.get("score"))},
        "tokens": finite(record.get("tokens")),
        "total": None,
        "advantage": None,
    }


def _evaluations(request: Request) -> dict[str, Found]:
    runs = readers(request).library.runs()
    return {name: found for name, found in runs.items() if prediction_files(found.folder)}


def _frames(found: Found) -> list[str]:
    counts = (path.stem.removeprefix("predictions-") for path in prediction_files(found.folder))
    return sorted((count for count in counts if count.isdecimal()), key=int)


def _pairs(request: Request) -> dict[str, tuple[Found, Found]]:
    """The two folders of each benchmark that both have. Raises HTTPException 404."""
    found = _evaluations(request)
    sides = []
    for side in ("left", "right"):
        name = request.query_params.get(side, "")
        if name.endswith("/"):
            below = {n.rpartition("/")[2]: f for n, f in found.items() if n.rpartition("/")[0] == name[:-1]}
        else:
            below = {"": found[name]} if name in found else {}
        if not below:
            raise HTTPException(404, f"there is no such evaluation: {name[:100]!r} was moved or removed")
        sides.append(below)
    left, right = sides
    pairs = {name: (left[name], right[name]) for name in left if name in right}
    if not pairs:
        raise HTTPException(400, "these two have no benchmark in common; choose two of a kind")
    return pairs


def _both(request: Request, left: Found, right: Found) -> tuple[Predictions, Predictions, str]:
    """The predictions of both with one frame count. Raises HTTPException 400."""
    common = [count for count in _frames(left) if count in _frames(right)]
    wanted = request.query_params.get("frames")
    if not common:
        raise HTTPException(400, "these two were not evaluated with the same number of frames")
    count = wanted if wanted in common else common[-1]
    opened: Evaluations = request.app.state.evaluations
    first, second = (opened.predictions(found, f"predictions-{count}.jsonl") for found in (left, right))
    return first, second, count


ROUTES = [
    Route("/api/evaluations", list_evaluations),
    Route("/api/versus", versus),
    Route("/api/questions", questions),
]
