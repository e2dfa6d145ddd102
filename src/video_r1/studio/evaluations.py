"""The addresses of evaluations: two side by side, and the questions that one wins and the other loses."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from video_r1.evaluation.metrics import mean_figure
from video_r1.report.run_data import ANSWERS, finite, text
from video_r1.settings.frames import Order
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
NAMED = {"reasoned": "", "direct": " (direct)"}  # how a page calls the answers of an evaluation


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer in one order: its score and length, what it is counted with, and its place in the file."""

    score: float
    tokens: float | None
    groups: tuple[str, ...]
    place: tuple[int, int]


class Side(NamedTuple):
    """An evaluation's answers of one way of asking."""

    found: Found
    way: str  # of ANSWERS

    def file(self, frames: str) -> str:
        return f"{ANSWERS[self.way]}-{frames}.jsonl"

    @property
    def frames(self) -> list[str]:
        """The frame counts that were asked with."""
        paths = self.found.folder.glob(self.file("*"))
        counts = (path.stem.partition("-")[2] for path in paths)
        return sorted((count for count in counts if count.isdecimal()), key=int)


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
            tokens = finite(record.get("tokens"))
            by_id[text(record.get("problem_id", ""))] = Scored(score, tokens, groups, (place, size))

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
    """What can be compared: evaluations, folders with several of them, one a benchmark, and direct answers
    as evaluations of their own.
    """
    rows = [
        {"name": name, "frames": sides[""].frames if "" in sides else [], "benchmarks": len(sides)}
        for name, sides in _comparable(request).items()
    ]
    return Answer({"evaluations": sorted(rows, key=lambda row: row["name"])})


def versus(request: Request) -> Answer:
    """`left` and `right` with `frames` (default: the most that both have) in `order`: accuracies over the
    questions that both have answered, with 95 % intervals, the difference, paired, and mean lengths in
    tokens. Where both have several orders, also those of each order, and how much less each contrast earns.
    """
    pairs, wanted = _pairs(request), request.query_params.get("order", "ordered")
    rows, frames, orders = [], set[str](), set[str]()
    for benchmark, (left, right) in pairs.items():
        opened, other, count = _both(request, left, right)
        first, second = opened.read(), other.read()
        frames |= set(left.frames) & set(right.frames)
        both = {name: [p for p in a if p in second[name]] for name, a in first.items() if name in second}
        asked = [name for name in get_args(Order) if both.get(name)]
        orders |= set(asked)
        about = {"benchmark": benchmark, "frames": count}
        if wanted in asked:
            a, b = first[wanted], second[wanted]
            rows.append({**about, "group": "", "name": "", **_row(a, b, both[wanted])})
            if len(asked) > 1:
                rows += [
                    {**about, "group": "order", "name": name, **_row(first[name], second[name], both[name])}
                    | {"gaps": [_gap(side, name, both[name]) for side in (first, second)]}
                    for name in asked
                ]
            rows += [{**about, **row} for row in _group_rows(a, b, both[wanted])]
    return Answer({
        "rows": rows, "frames": sorted(frames, key=int), "benchmarks": list(pairs),
        "orders": [name for name in get_args(Order) if name in orders],
    })  # fmt: skip


def _group_rows(
    a: Mapping[str, Scored], b: Mapping[str, Scored], both: Sequence[str]
) -> list[dict[str, Any]]:
    rows = []
    for place, grouping in enumerate(GROUPINGS):
        members: dict[str, list[str]] = {}
        for problem in both:
            members.setdefault(a[problem].groups[place], []).append(problem)
        names = sorted(name for name in members if name)
        if len(names) > 1:
            rows += [
                {"group": grouping, "name": name, **_row(a, b, members[name])} for name in names[:MAX_GROUPS]
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
        "tokens": [_mean_tokens(side, problems) for side in (a, b)],
    }


def _gap(side: Mapping[str, Mapping[str, Scored]], contrast: str, problems: Sequence[str]) -> float | None:
    """What the frames in order gain over a contrast, over the questions asked with both."""
    ordered = side.get("ordered", {})
    gains = [ordered[p].score - side[contrast][p].score for p in problems if p in ordered]
    return sum(gains) / len(gains) if gains and contrast != "ordered" else None


def _mean_tokens(side: Mapping[str, Scored], problems: Sequence[str]) -> float | None:
    """None where an answer's length is not known."""
    tokens = [side[problem].tokens for problem in problems]
    known = [count for count in tokens if count is not None]
    return sum(known) / len(known) if len(known) == len(tokens) else None


def questions(request: Request) -> Answer:
    """Questions of one `benchmark` that `left` answers better (`who=left`) or worse (`right`), the largest
    difference first, 20 from `at` on, with both outputs and the row of a manifest that they are from.
    """
    asked = request.query_params
    pairs, at = _pairs(request), max(0, number(asked, "at"))
    group, name = asked.get("group", ""), asked.get("name", "")
    order = name if group == "order" else asked.get("order", "ordered")
    benchmark = asked.get("benchmark", next(iter(pairs)))
    if benchmark not in pairs:
        raise HTTPException(404, "both have no such benchmark")
    first, second, _ = _both(request, *pairs[benchmark])
    a, b = first.read().get(order, {}), second.read().get(order, {})
    sign = -1 if asked.get("who") == "right" else 1
    by = {problem: sign * (a[problem].score - b[problem].score) for problem in a if problem in b}
    won = sorted((problem for problem in by if by[problem] > 0), key=lambda problem: -by[problem])
    if group in GROUPINGS:
        place = list(GROUPINGS).index(group)
        won = [problem for problem in won if a[problem].groups[place] == name]
    indexes = manifests(request).indexes()
    shown = [_question(indexes, p, first.record(a[p]), second.record(b[p])) for p in won[at : at + PAGE]]
    return Answer({"total": len(won), "shown": shown, "next": at + PAGE if at + PAGE < len(won) else None})


def _question(
    indexes: Sequence[ManifestIndex], problem: str, left: dict[str, Any], right: dict[str, Any]
) -> dict[str, Any]:
    answer = text(left.get("answer", ""))
    digest = text(left.get("question") or right.get("question") or "")  # not there in those of older versions
    return {
        "id": problem[:200],
        "answer": answer[:2000],
        "type": text(left.get("problem_type", ""))[:80],
        "task": text(left.get("task_type") or "")[:80],
        "left": _output(left),
        "right": _output(right),
        "row": row_of(indexes, problem, answer, digest),
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


def _comparable(request: Request) -> dict[str, dict[str, Side]]:
    """By name: an evaluation as {"": its answers}, a folder that holds several as {benchmark: answers}."""
    runs = readers(request).library.runs()
    found: dict[str, dict[str, Side]] = {}
    for name, run in runs.items():
        parent, _, benchmark = name.rpartition("/")
        for way, called in NAMED.items():
            side = Side(run, way)
            if side.frames:
                found.setdefault(f"{name}{called}", {})[""] = side
                if parent and parent not in runs:
                    found.setdefault(f"{parent}/{called}", {})[benchmark] = side
    return {name: sides for name, sides in found.items() if "" in sides or len(sides) > 1}


def _pairs(request: Request) -> dict[str, tuple[Side, Side]]:
    """The two sides of each benchmark that both have. Raises HTTPException 404, 400."""
    found, sides = _comparable(request), []
    for side in ("left", "right"):
        name = request.query_params.get(side, "")
        if name not in found:
            raise HTTPException(404, f"there is no such evaluation: {name[:100]!r} was moved or removed")
        sides.append(found[name])
    left, right = sides
    pairs = {name: (left[name], right[name]) for name in left if name in right}
    if not pairs:
        raise HTTPException(400, "these two have no benchmark in common; choose two of a kind")
    return pairs


def _both(request: Request, left: Side, right: Side) -> tuple[Predictions, Predictions, str]:
    """The predictions of both with one frame count. Raises HTTPException 400."""
    common = [count for count in left.frames if count in right.frames]
    wanted = request.query_params.get("frames")
    if not common:
        raise HTTPException(400, "these two were not evaluated with the same number of frames")
    count = wanted if wanted in common else common[-1]
    opened: Evaluations = request.app.state.evaluations
    first, second = (opened.predictions(side.found, side.file(count)) for side in (left, right))
    return first, second, count


ROUTES = [
    Route("/api/evaluations", list_evaluations),
    Route("/api/versus", versus),
    Route("/api/questions", questions),
]
