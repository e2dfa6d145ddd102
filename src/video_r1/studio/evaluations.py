"""Two evaluations side by side, or two orders of one, and the questions that one side answers better."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from video_r1.evaluation.metrics import Figure, mean_figure, paired_difference
from video_r1.report.reader import Found, Tail
from video_r1.report.run_data import ANSWERS
from video_r1.report.values import as_list, finite, score_of, text
from video_r1.settings.frames import Order
from video_r1.studio.manifests import ManifestIndex, row_of
from video_r1.studio.overview import last_written
from video_r1.studio.requests import Answer, number

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


Answers = Mapping[str, Mapping[str, Scored]]  # by order and problem_id
Pairs = Mapping[str, tuple[Scored, Scored]]  # the answers of both sides, by problem_id


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
        self.tail, self.lock = Tail(*file), threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self.scored: dict[str, dict[str, Scored]] = {}
        self.unscored = 0  # lines that cannot be used

    def read(self) -> Answers:
        with self.lock:
            self.tail.read(self._take, self._restart, READ_SECONDS)
            return self.scored

    @property
    def notes(self) -> list[str]:
        """Problems of the file, for the page."""
        name = f"{self.tail.found.name}/{self.tail.name}"
        said = f"{name}: skipped {self.unscored} answers without an order of frames or a score from 0 to 1"
        return [said] * bool(self.unscored) + self.tail.notes

    def _take(self, place: int, size: int, record: dict[str, Any]) -> None:
        score, order = score_of(record), text(record.get("order", ""))
        if score is None or order not in get_args(Order):
            self.unscored += 1
            return
        by_id = self.scored.setdefault(order, {})
        if len(by_id) < MAX_PREDICTIONS:
            groups = tuple(text(record.get(field) or "")[:80] for field in GROUPINGS.values())
            tokens = finite(record.get("tokens"))
            by_id[text(record.get("problem_id", ""))] = Scored(score, tokens, groups, (place, size))


def list_evaluations(request: Request) -> Answer:
    """Answer what can be compared: evaluations, their direct answers, and folders with several benchmarks."""
    rows = [
        {
            "name": name,
            "frames": sides[""].frames if "" in sides else [],
            "benchmarks": sorted(sides),
            "questions": sides[""].found.table("evaluation.json").get("questions") if "" in sides else None,
            "written": max(last_written(side.found) or 0.0 for side in sides.values()),
        }
        for name, sides in sorted(_comparable(request).items())
    ]
    return Answer({"evaluations": rows})


def versus(request: Request) -> Answer:
    """Answer the scores of `left` and `right` over the questions that both have answered.

    Asked for with `frames` (default: the most that both have), `order`, and `against`, the order of the left
    side if it is another one. Each row has both accuracies and their paired difference (right minus left)
    with 95 % intervals, and mean lengths in tokens. If both have several orders, each order has a row too,
    with the gaps (ordered minus this order) and their intervals.
    """
    wanted = request.query_params.get("order", "ordered")
    against = request.query_params.get("against", wanted)
    rows, frames, orders, notes = [], set[str](), set[str](), dict[str, None]()
    pairs = _pairs(request)
    for benchmark, sides in pairs.items():
        predictions, count = _both(request, sides)
        left, right = (opened.read() for opened in predictions)
        notes |= dict.fromkeys(note for opened in predictions for note in opened.notes)
        frames |= set(sides[0].frames) & set(sides[1].frames)
        asked = [name for name in get_args(Order) if _paired(left, right, name, name)]
        orders |= set(asked)
        both = _paired(left, right, against, wanted)
        tables = {("", ""): both}
        if len(asked) > 1 and against == wanted:
            tables |= {("order", name): _paired(left, right, name, name) for name in asked}
        for place, grouping in enumerate(GROUPINGS):
            names = sorted({answer.groups[place] for answer, _ in both.values()} - {""})
            for name in names[:MAX_GROUPS] if len(names) > 1 else ():
                tables[grouping, name] = {p: two for p, two in both.items() if two[0].groups[place] == name}
        for (group, name), members in tables.items() if both else ():
            row = {"benchmark": benchmark, "frames": count, "group": group, "name": name, **_row(members)}
            if group == "order":
                row["gaps"] = [_gap(side, name, members) for side in (left, right)]
            rows.append(row)
    return Answer({
        "rows": rows, "frames": sorted(frames, key=int), "benchmarks": list(pairs), "notes": list(notes),
        "orders": [name for name in get_args(Order) if name in orders],
    })  # fmt: skip


def _paired(left: Answers, right: Answers, against: str, order: str) -> Pairs:
    """Pair the answers to each question: those of `left` in the order `against`, of `right` in `order`."""
    a, b = left.get(against, {}), right.get(order, {})
    return {problem: (a[problem], b[problem]) for problem in a if problem in b}


def _row(both: Pairs) -> dict[str, Any]:
    left, right = zip(*both.values(), strict=True)
    a, b = ([answer.score for answer in side] for side in (left, right))
    return {
        "questions": len(both),
        "left_wins": sum(one > other for one, other in zip(a, b, strict=True)),
        "right_wins": sum(one < other for one, other in zip(a, b, strict=True)),
        "left": _figure(mean_figure(a)),
        "right": _figure(mean_figure(b)),
        "difference": _figure(paired_difference(b, a)),
        "tokens": [_mean([answer.tokens for answer in side]) for side in (left, right)],
    }


def _gap(side: Answers, contrast: str, problems: Iterable[str]) -> dict[str, float | None] | None:
    """Return the gap (ordered minus `contrast`) over the questions asked in both orders."""
    ordered = side.get("ordered", {}) if contrast != "ordered" else {}
    both = [(ordered[p].score, side[contrast][p].score) for p in problems if p in ordered]
    return _figure(paired_difference(*zip(*both, strict=True))) if both else None


def _figure(figure: Figure) -> dict[str, float | None]:
    low, high = figure.interval or (None, None)
    return {"mean": figure.mean, "low": low, "high": high}


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, None if there are no values or one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def questions(request: Request) -> Answer:
    """Answer 20 questions from `at` on: those that one side (`who`) answers better, the largest difference
    first, or that `both` answer right or `neither` does.

    The rest as for `versus`; `benchmark`, `group` and `name` choose a row of its table. Each question has
    both outputs and, if there is one, its row of a manifest.
    """
    asked = request.query_params
    pairs, at = _pairs(request), max(0, number(asked, "at"))
    group, name = asked.get("group", ""), asked.get("name", "")
    order = name if group == "order" else asked.get("order", "ordered")
    benchmark = asked.get("benchmark", next(iter(pairs)))
    if benchmark not in pairs:
        raise HTTPException(404, "both have no such benchmark")
    (left, right), _ = _both(request, pairs[benchmark])
    both = _paired(left.read(), right.read(), asked.get("against", order), order)
    if group in GROUPINGS:
        place = list(GROUPINGS).index(group)
        both = {problem: two for problem, two in both.items() if two[0].groups[place] == name}
    who = asked.get("who", "right")
    if who in ("left", "right"):
        by = {
            problem: (b.score - a.score) * (1 if who == "right" else -1) for problem, (a, b) in both.items()
        }
        chosen = sorted((problem for problem in by if by[problem] > 0), key=lambda problem: -by[problem])
    else:
        wanted = {"both": (True, True), "neither": (False, False)}.get(who)
        chosen = [p for p, (a, b) in both.items() if (a.score > 0.5, b.score > 0.5) == wanted]
    indexes = request.app.state.manifests.indexes()
    shown = []
    for problem in chosen[at : at + PAGE]:
        pair = zip((left, right), both[problem], strict=True)
        records = [side.tail.at(*answer.place) or {} for side, answer in pair]
        shown.append(_question(indexes, problem, *records))
    after = at + PAGE
    return Answer({"total": len(chosen), "shown": shown, "next": after if after < len(chosen) else None})


def _question(
    indexes: Sequence[ManifestIndex], problem: str, left: dict[str, Any], right: dict[str, Any]
) -> dict[str, Any]:
    answer = text(left.get("answer", ""))
    digest = text(left.get("question") or right.get("question") or "")  # missing in files of older versions
    row = row_of(indexes, problem, answer, digest)
    asked = row or (left if "problem" in left else right)
    return {
        "problem": text(asked.get("problem", ""))[:TEXT],
        "options": [text(option)[:2000] for option in as_list(asked.get("options"))[:26]],
        "id": problem[:200], "answer": answer[:2000], "type": text(left.get("problem_type", ""))[:80],
        "task": text(left.get("task_type") or "")[:80], "left": _output(left), "right": _output(right),
        "row": row,
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
                above = Found(parent, run.folder.parent, run.root)
                if parent and parent not in runs and "benchmarks" in above.table("summary.json"):
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


def _both(request: Request, sides: tuple[Side, Side]) -> tuple[tuple[Predictions, Predictions], str]:
    """Return the predictions of both with one number of frames. Raises HTTPException 400."""
    common = [count for count in sides[0].frames if count in sides[1].frames]
    if not common:
        raise HTTPException(400, "these two were not evaluated with the same number of frames")
    wanted = request.query_params.get("frames")
    count = wanted if wanted in common else common[-1]
    opened = request.app.state.predictions
    left, right = (opened((side.found, side.file(count))) for side in sides)
    return (left, right), count


ROUTES = [
    Route("/api/evaluations", list_evaluations),
    Route("/api/versus", versus),
    Route("/api/questions", questions),
]
