"""Two evaluations side by side, and the questions that one answers better than the other."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from video_r1.evaluation.metrics import mean_figure
from video_r1.report.run_data import ANSWERS, finite, text
from video_r1.settings.frames import Order
from video_r1.studio.folders import Found
from video_r1.studio.manifests import ManifestIndex, row_of
from video_r1.studio.requests import Answer, number
from video_r1.studio.tail import Tail, parse

OPEN_FILES = 24  # of predictions whose scores are kept in memory
MAX_PREDICTIONS = 1_000_000
PAGE = 20  # questions of one answer
MAX_GROUPS = 80  # rows of the table
TEXT = 20_000  # characters of an output
READ_SECONDS = 20.0
GROUPINGS = {"task": "task_type", "type": "problem_type", "media": "data_type", "source": "data_source"}
NAMED = {"reasoned": "", "direct": " (direct)"}  # what the page adds to an evaluation's name


class Scored(NamedTuple):
    """An answer in one order: its score and length, its values of GROUPINGS, and its place in the file."""

    score: float
    tokens: float | None
    groups: tuple[str, ...]
    place: tuple[int, int]


class Side(NamedTuple):
    """An evaluation's answers of one kind (a key of ANSWERS)."""

    found: Found
    kind: str

    def file(self, frames: str) -> str:
        return f"{ANSWERS[self.kind]}-{frames}.jsonl"

    @property
    def frames(self) -> list[str]:
        """Numbers of frames that the questions were asked with."""
        counts = (path.stem.partition("-")[2] for path in self.found.folder.glob(self.file("*")))
        return sorted((count for count in counts if count.isdecimal()), key=int)


class Predictions:
    """The scores of one predictions file, as far as it is written."""

    def __init__(self, file: tuple[Found, str]) -> None:
        self.found, self.lock = file[0], threading.Lock()
        self.tail = Tail(*file)
        self._restart()

    def _restart(self) -> None:
        self.scored: dict[str, dict[str, Scored]] = {}  # by order and problem_id

    def read(self) -> dict[str, dict[str, Scored]]:
        with self.lock:
            self.tail.read(self._take, self._restart, READ_SECONDS)
            return self.scored

    def _take(self, place: int, size: int, record: dict[str, Any]) -> None:
        score, order = finite(record.get("score")), text(record.get("order", ""))
        by_id = self.scored.setdefault(order, {}) if len(self.scored) < 10 else self.scored.get(order, {})
        if score is not None and len(by_id) < MAX_PREDICTIONS:
            groups = tuple(text(record.get(field) or "")[:80] for field in GROUPINGS.values())
            tokens = finite(record.get("tokens"))
            by_id[text(record.get("problem_id", ""))] = Scored(score, tokens, groups, (place, size))

    def record(self, scored: Scored) -> dict[str, Any]:
        """Return the whole answer, {} if the file does not have it any more."""
        with self.found.open(self.tail.name) as file:
            file.seek(scored.place[0])
            return parse(file.read(scored.place[1])) or {}


def list_evaluations(request: Request) -> Answer:
    """Answer what can be compared: evaluations, their direct answers, and folders with several benchmarks."""
    rows = [
        {"name": name, "frames": sides[""].frames if "" in sides else [], "benchmarks": len(sides)}
        for name, sides in _comparable(request).items()
    ]
    return Answer({"evaluations": sorted(rows, key=lambda row: row["name"])})


def versus(request: Request) -> Answer:
    """Answer the scores of `left` and `right` over the questions that both have answered.

    Asked for with `frames` (default: the most that both have) and `order`. Each row has both accuracies and
    their paired difference with 95 % intervals, and mean lengths in tokens. If both have several orders, each
    order has a row too, with the gaps (ordered minus this order).
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
        if wanted not in asked:
            continue
        a, b = first[wanted], second[wanted]
        new = [{"group": "", "name": "", **_row(a, b, both[wanted])}]
        if len(asked) > 1:
            new += [
                {"group": "order", "name": name, **_row(first[name], second[name], both[name])}
                | {"gaps": [_gap(side, name, both[name]) for side in (first, second)]}
                for name in asked
            ]
        for place, grouping in enumerate(GROUPINGS):
            members: dict[str, list[str]] = {}
            for problem in both[wanted]:
                members.setdefault(a[problem].groups[place], []).append(problem)
            names = sorted(name for name in members if name)
            if len(names) > 1:
                new += [
                    {"group": grouping, "name": name, **_row(a, b, members[name])}
                    for name in names[:MAX_GROUPS]
                ]
        rows += [{"benchmark": benchmark, "frames": count, **row} for row in new]
    return Answer({
        "rows": rows, "frames": sorted(frames, key=int), "benchmarks": list(pairs),
        "orders": [name for name in get_args(Order) if name in orders],
    })  # fmt: skip


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
    """Return the gap (ordered minus `contrast`) over the questions asked in both orders."""
    ordered = side.get("ordered", {})
    gains = [ordered[p].score - side[contrast][p].score for p in problems if p in ordered]
    return sum(gains) / len(gains) if gains and contrast != "ordered" else None


def _mean_tokens(side: Mapping[str, Scored], problems: Sequence[str]) -> float | None:
    """Return the mean length, None if an answer's length is unknown."""
    tokens = [side[problem].tokens for problem in problems]
    known = [count for count in tokens if count is not None]
    return sum(known) / len(known) if len(known) == len(tokens) else None


def questions(request: Request) -> Answer:
    """Answer 20 questions from `at` on that `left` answers better (`who=left`) or worse (`right`).

    The largest difference comes first. Each has both outputs and, if there is one, its row of a manifest.
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
    indexes = request.app.state.manifests.indexes()
    shown = [_question(indexes, p, first.record(a[p]), second.record(b[p])) for p in won[at : at + PAGE]]
    return Answer({"total": len(won), "shown": shown, "next": at + PAGE if at + PAGE < len(won) else None})


def _question(
    indexes: Sequence[ManifestIndex], problem: str, left: dict[str, Any], right: dict[str, Any]
) -> dict[str, Any]:
    answer = text(left.get("answer", ""))
    digest = text(left.get("question") or right.get("question") or "")  # missing in files of older versions
    return {
        "id": problem[:200], "answer": answer[:2000], "type": text(left.get("problem_type", ""))[:80],
        "task": text(left.get("task_type") or "")[:80], "left": _output(left), "right": _output(right),
        "row": row_of(indexes, problem, answer, digest),
    }  # fmt: skip


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
    """Return evaluations by name as {"": answers}, folders with several as {benchmark: answers}."""
    runs = request.app.state.library.runs()
    found: dict[str, dict[str, Side]] = {}
    for name, run in runs.items():
        parent, _, benchmark = name.rpartition("/")
        for kind, called in NAMED.items():
            side = Side(run, kind)
            if side.frames:
                found.setdefault(f"{name}{called}", {})[""] = side
                if parent and parent not in runs:
                    found.setdefault(f"{parent}/{called}", {})[benchmark] = side
    return {name: sides for name, sides in found.items() if "" in sides or len(sides) > 1}


def _pairs(request: Request) -> dict[str, tuple[Side, Side]]:
    """Return the two sides of each benchmark that both have. Raises HTTPException 404, 400."""
    found, sides = _comparable(request), []
    for side in ("left", "right"):
        name = request.query_params.get(side, "")
        if name not in found:
            raise HTTPException(404, f"there is no such evaluation: {name[:100]!r} was moved or removed")
        sides.append(found[name])
    left, right = sides
    pairs = {name: (left[name], right[name]) for name in left if name in right}
    if not pairs:
        raise HTTPException(400, "these evaluations used different benchmarks; choose another one")
    return pairs


def _both(request: Request, left: Side, right: Side) -> tuple[Predictions, Predictions, str]:
    """Return the predictions of both with one number of frames. Raises HTTPException 400."""
    common = [count for count in left.frames if count in right.frames]
    wanted = request.query_params.get("frames")
    if not common:
        raise HTTPException(400, "these two were not evaluated with the same number of frames")
    count = wanted if wanted in common else common[-1]
    opened = request.app.state.predictions
    first, second = (opened.get((side.found, side.file(count))) for side in (left, right))
    return first, second, count


ROUTES = [
    Route("/api/evaluations", list_evaluations),
    Route("/api/versus", versus),
    Route("/api/questions", questions),
]
