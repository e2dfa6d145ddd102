"""From predictions to figures: accuracy per order, temporal gap, what reasoning gains, per type, source and
task, and a table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, get_args

from video_r1.console import table
from video_r1.errors import RequestError
from video_r1.evaluation.metrics import (
    OVERLAP_SHARES,
    mean_figure,
    overlap_figures,
    paired_difference,
    task_mean,
)
from video_r1.settings.frames import Order

LOOK_GAPS = {"look_gap": "elsewhere", "no_look_gap": "no-look"}
ORDERS = ("ordered", "shuffled")  # the two columns of tables
COLLAPSED = 0.9  # share of the outputs with one answer, of at least FEWEST
FEWEST = 20
_GROUPINGS = {
    "by_modality": "data_type", "by_type": "problem_type", "by_source": "data_source", "by_task": "task_type"
}  # fmt: skip

Record = Mapping[str, Any]  # one line of a predictions file
NEEDED = frozenset(
    ("problem_id", "order", "output", "prediction", "score", "strict_score", "format", "finish_reason")
)  # its fields


def summarise(records: Sequence[Record], direct: Sequence[Record] = ()) -> dict[str, Any]:
    """Return the figures of one frame count.

    records: predictions, each question once per order; direct: direct answers to the same questions. Returns

        {"ordered":  {"accuracy", "interval95", "questions", "strict_accuracy", "format_rate",
                      "unparsable_rate", "truncated_rate", "warning" if nearly all outputs are one answer},
         "shuffled": the same, over the videos,
         "temporal_gap": {"gap", "interval95", "questions", "ordered", "shuffled"},
         "look_gap", "no_look_gap": as temporal_gap, for `elsewhere` and `no-look`,
         "temporal_gaps": {name: {"gap", "interval95", "questions", "ordered", name}},
         "by_modality": {name: {"ordered", "shuffled", "temporal_gap"}},
         "by_type": …, "by_source": …, "by_task": …, "by_pairs": …,
         "direct": the same of the direct answers,
         "reasoning_gains": {order: {"gain", "interval95", "questions", "reasoned", "direct", "tokens"}}}

    Every other contrast has figures beside `shuffled`, and its gap in `temporal_gaps`. A gap is over the
    questions asked both ways. An order whose records all name task types has `task_mean`, the mean over task
    types; one with regression and other questions `kind_mean`, the mean of the two means; one with grounding
    questions only `overlaps` (`overlap_figures`). `by_pairs` has figures over the sets that records name
    (`pair_records`). With direct answers only, all figures are theirs. Intervals resample records with an
    equal `clip` together.
    """
    if not records:
        return summarise(direct) if direct else {}
    figures = _figures(records, direct)
    _add_means(figures, records)
    for name, field in _GROUPINGS.items():
        groups, direct_groups = _grouped(records, field), _grouped(direct, field)
        if groups:
            figures[name] = {
                group: _figures(members, direct_groups.get(group, ()))
                for group, members in sorted(groups.items())
            }
    direct_pairs = pair_records(direct)
    for name, pairs in pair_records(records).items():
        own = figures.setdefault("by_pairs", {})[name] = _figures(pairs, direct_pairs.get(name, ()))
        _add_means(own, pairs)
    if direct:
        figures["direct"] = summarise(direct)
    return figures


def _add_means(figures: dict[str, Any], records: Iterable[Record]) -> None:
    for order, chosen in _by_order(records).items():
        tasks = [record.get("task_type", "") for record in chosen]
        kinds = [str(record.get("problem_type") == "regression") for record in chosen]
        means = {"task_mean": tasks} if all(tasks) else {}
        means |= {"kind_mean": kinds} if len(set(kinds)) == 2 else {}
        for name, groups in means.items():
            mean = task_mean(_scores(chosen), groups, _clips(chosen))
            figures[order][name] = mean.as_json("accuracy")


def check_pairs(problem_id: str | int, pairs: Any) -> None:
    """Raise RequestError unless `pairs` is {metric: [set, its questions]}."""
    try:
        fine = all(isinstance(size, int) and size > 0 for _, size in pairs.values())
    except (AttributeError, TypeError, ValueError):
        fine = False
    if not fine:
        raise RequestError(
            f"question {problem_id!r}: pairs is {pairs!r}; it must name the question's sets and how many "
            'questions each has, such as {"pair accuracy": ["17", 2]}'
        )


def pair_records(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return one record for each set of questions and order, by the name of the pair metric.

    A set has the score of its worst answer. Incomplete sets are skipped.
    """
    sets: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in records:
        for name, (which, size) in (record.get("pairs") or {}).items():
            sets.setdefault((name, str(which), record["order"], size), []).append(record)
    found: dict[str, list[Record]] = {}
    for (name, which, order, size), members in sets.items():
        if len(members) == size:
            worst = {
                field: min(one[field] for one in members) for field in ("score", "strict_score", "format")
            }
            cut_off = any(one["finish_reason"] == "length" for one in members)
            tasks = {one.get("task_type") for one in members}
            found.setdefault(name, []).append(
                {
                    **worst,
                    "problem_id": which,
                    "order": order,
                    "clip": _clips(members)[0],
                    "prediction": all(one["prediction"] for one in members),
                    "finish_reason": "length" if cut_off else "stop",
                    "tokens": sum(one.get("tokens", 0) for one in members),
                    "task_type": tasks.pop() if len(tasks) == 1 else "",
                }
            )
    return found


def _grouped(records: Iterable[Record], field: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.get(field):
            groups.setdefault(str(record[field]), []).append(record)
    return groups


def _figures(records: Iterable[Record], direct: Iterable[Record]) -> dict[str, Any]:
    reasoned = _by_order(records)
    figures = {order: _order_figures(chosen) for order, chosen in reasoned.items()}
    gaps = {}
    for contrast in (order for order in reasoned if order != "ordered"):
        pairs = {"ordered": reasoned.get("ordered", ()), contrast: reasoned[contrast]}
        if gap := _difference("gap", "score", pairs):
            gaps[contrast] = gap
    if "shuffled" in gaps:
        figures["temporal_gap"] = gaps.pop("shuffled")
    for name, control in LOOK_GAPS.items():
        if control in gaps:
            figures[name] = gaps.pop(control)
    if gaps:
        figures["temporal_gaps"] = gaps
    gains: dict[str, Any] = {}
    for order, chosen in _by_order(direct).items():
        pairs = {"reasoned": reasoned.get(order, ()), "direct": chosen}
        if gain := _difference("gain", "score", pairs):
            gains[order] = gain | {"tokens": _difference("difference", "tokens", pairs)}
    if gains:
        figures["reasoning_gains"] = gains
    return figures


def gaps_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gaps of figures by contrast, wherever `summarise` has put them."""
    named = {"temporal_gap": "shuffled"} | LOOK_GAPS
    gaps = {order: figures[name] for name, order in named.items() if name in figures}
    return gaps | dict(figures.get("temporal_gaps") or {})


def _difference(name: str, field: str, sides: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Return the paired difference of a field as `name`, with both sides' means; {} without pairs."""
    one, other = ({record["problem_id"]: record for record in records} for records in sides.values())
    both = [(one[question], other[question]) for question in one if question in other]
    if not both:
        return {}
    paired = {side: [pair[i][field] for pair in both] for i, side in enumerate(sides)}
    figure = paired_difference(*paired.values(), clips=_clips(pair[1] for pair in both))
    return figure.as_json(name) | {side: fmean(values) for side, values in paired.items()}


def _order_figures(records: Sequence[Record]) -> dict[str, Any]:
    measured = [record["overlaps"] for record in records if record.get("overlaps")]
    clips = _clips(records)
    overlaps = {"overlaps": overlap_figures(measured, clips)} if len(measured) == len(records) else {}
    return mean_figure(_scores(records), clips).as_json("accuracy") | {
        "strict_accuracy": fmean(record["strict_score"] for record in records),
        "format_rate": fmean(record["format"] for record in records),
        "unparsable_rate": fmean(not record["prediction"] for record in records),
        "truncated_rate": fmean(record["finish_reason"] == "length" for record in records),
        **overlaps,
        **_collapse(records),
    }


def _collapse(records: Sequence[Record]) -> dict[str, str]:
    """Return a `warning` if nearly all outputs have one answer, unless it is nearly always right."""
    given = [record for record in records if record.get("answer")]  # sets of questions have none
    for answer, count in Counter(record["prediction"] for record in given).most_common(1):
        right = fmean(record["answer"] == answer for record in given)
        if answer and len(given) >= FEWEST and count >= COLLAPSED * len(given) and right < COLLAPSED:
            share = f"{100 * count / len(given):.0f} % of the outputs are {answer}"
            return {
                "warning": f"{share}, which is right in {100 * right:.0f} %: they collapse onto one answer"
            }
    return {}


def _by_order(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {order: [] for order in get_args(Order)}
    for record in records:
        groups[record["order"]].append(record)
    return {order: chosen for order, chosen in groups.items() if chosen}


def _scores(records: Iterable[Record]) -> list[float]:
    return [record["score"] for record in records]


def _clips(records: Iterable[Record]) -> list[Any]:
    """Return each question's clip, by which intervals resample; the question itself if it is not known."""
    return [record.get("clip", record["problem_id"]) for record in records]


def summary_table(summary: Mapping[str, Any]) -> str:
    """Return a summary as text: a block for each frame count, 95 % intervals in brackets."""
    blocks = []
    for frames, figures in summary["frames"].items():
        rows = [_row("all", figures)]
        for grouping in (*_GROUPINGS, "by_pairs"):
            if len(groups := figures.get(grouping, {})) > (grouping != "by_pairs"):  # one group is all
                rows += [_row(f"  {name}", group) for name, group in groups.items()]
        head = ("", "questions", "ordered", "shuffled", "temporal gap")
        lines = [f"{frames} frames", table(head, rows), _order_table(figures)]
        if overlaps := _overlap_rows(figures):
            lines.append(table(("overlap with the truth", "questions", "mean", *OVERLAP_SHARES), overlaps))
        if same := figures.get("no_control"):
            lines.append(
                f"elsewhere: {same} questions not counted: their looks left no other half of the clip"
            )
        lines += [_gain_line(order, gain) for order, gain in figures.get("reasoning_gains", {}).items()]
        for kind, group in figures.get("by_type", {}).items():
            if "warning" in group.get("ordered", {}):
                lines.append(f"{kind}: {group['ordered']['warning']}")
        if figures["skipped"]:
            lines.append(f"{figures['skipped']} questions skipped: their media or prompts cannot be used")
        if skipped := figures.get("skipped_no_look"):
            lines.append(f"no-look: {skipped} questions skipped; quarantine.jsonl in its folder says why")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _overlap_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each grounding type, order and overlap: its mean and R@0.3, R@0.5, R@0.7."""
    rows = []
    for kind, group in figures.get("by_type", {}).items():
        for order in get_args(Order):
            for name, overlap in group.get(order, {}).get("overlaps", {}).items():
                shares = (cell(overlap[share], "share") for share in OVERLAP_SHARES)
                label = f"{kind}, {name}" + (f", {order}" if order != "ordered" else "")
                rows.append((label, str(overlap["questions"]), cell(overlap, "mean"), *shares))
    return rows


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    questions = max((figures[order]["questions"] for order in get_args(Order) if order in figures), default=0)
    ordered, shuffled = (cell(figures.get(order), "accuracy") for order in ORDERS)
    return name, str(questions), ordered, shuffled, cell(figures.get("temporal_gap"), "gap")


def cell(figure: Mapping[str, Any] | None, name: str, scale: int = 1, digits: int = 3) -> str:
    """Return a figure, multiplied by `scale`, with its interval if there is one; "-" for no figure."""
    if not figure:
        return "-"
    mean, *ends = (f"{scale * value:z.{digits}f}" for value in (figure[name], *(figure["interval95"] or ())))
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _gain_line(order: str, gain: Mapping[str, Any]) -> str:
    tokens = gain["tokens"]
    return (
        f"{order}, with reasoning − direct: accuracy {gain['reasoned']:.3f} − {gain['direct']:.3f} = "
        f"{cell(gain, 'gain')}, tokens {tokens['reasoned']:.1f} − {tokens['direct']:.1f} = "
        f"{cell(tokens, 'difference', digits=1)}"
    )


def _order_table(figures: Mapping[str, Any]) -> str:
    """Return a table of the frame orders, reasoned and direct: accuracy, its gap to ordered, and rates."""
    rows = []
    for way, own in (("", figures), (", direct", figures.get("direct", {}))):
        gaps = gaps_of(own)
        for order in get_args(Order):
            if figure := own.get(order):
                names = ("strict_accuracy", "format_rate", "unparsable_rate", "truncated_rate")
                rates = (f"{figure[name]:.3f}" for name in names)
                cells = (cell(figure, "accuracy"), cell(gaps.get(order), "gap"), *rates)
                rows.append(
                    (order + way, str(figure["questions"]), *cells, cell(figure.get("task_mean"), "accuracy"))
                )
    head = (
        "order",
        "questions",
        "accuracy",
        "gap",
        "strict",
        "in format",
        "unparsable",
        "cut off",
        "mean of tasks",
    )
    shown = len(head) - all(row[-1] == "-" for row in rows)
    return table(head[:shown], [row[:shown] for row in rows])
