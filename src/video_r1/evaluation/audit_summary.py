"""From pass rates to the figures of an audit: by source and type, as a table, and in sentences.

A question counts as answered with what was shown when most of its K answers are right. Of questions whose
answer is one of n options, a fixed guess is right in 1/n: `chance` is its mean, 0 for all other types.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from video_r1.data.manifests.records import Sample
from video_r1.evaluation.metrics import mean_figure, paired_difference
from video_r1.evaluation.summary import cell
from video_r1.settings.frames import Contrast, Order
from video_r1.tables import table

VIEWS: tuple[Order, ...] = ("blind", "single", "frozen", "dropped", "shuffled", "reversed", "ordered")
"""What may be shown of a clip, roughly from nothing to all of it."""
SHOWN = {"blind": "blind", "frozen": "one frame"}
"""What people call some of them."""
ANSWERED = 0.5  # of its answers are right, and more
GROUPS_SHOWN = 40

Rates = Mapping[str, float]
Audited = Sequence[tuple[Sample, Rates]]
_GROUPINGS = {"by_modality": "data_type", "by_type": "problem_type", "by_source": "data_source"}


def audit_figures(audited: Audited, contrast: Contrast, samples: int) -> dict[str, Any]:
    """Figures over all questions, and those of each modality, problem type and source.

        {"all": {"questions", "chance",
                 "views": {view: {"rate", "interval95", "questions", "answered": {"share", "interval95"}}},
                 "needs_order": {"share", "interval95", "questions", "other_way"},
                 "temporal_gap": {"gap", "interval95", "questions"},
                 "never_right", "always_right"},
         "by_modality": {name: as "all"}, "by_type": …, "by_source": …,
         "pairs": [K + 1][K + 1] questions by right answers with the contrast (row) and in order (column)}

    needs_order: answered in order and not with the contrast clip; other_way: the reverse, which only chance
    explains. Both and the gap are over the videos that have both rates.
    """
    figures: dict[str, Any] = {"all": _figures(audited, contrast)}
    for name, field in _GROUPINGS.items():
        groups: dict[str, list[tuple[Sample, Rates]]] = {}
        for sample, rates in audited:
            groups.setdefault(getattr(sample, field) or "(no source)", []).append((sample, rates))
        ranked = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
        figures[name] = {group: _figures(members, contrast) for group, members in ranked}
    pairs = [[0] * (samples + 1) for _ in range(samples + 1)]
    for _, rates in _with_both(audited, contrast):
        pairs[round(rates[contrast] * samples)][round(rates["ordered"] * samples)] += 1
    return figures | {"pairs": pairs}


def _with_both(audited: Audited, contrast: Contrast) -> Audited:
    return [(sample, rates) for sample, rates in audited if {contrast, "ordered"} <= rates.keys()]


def _figures(audited: Audited, contrast: Contrast) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "questions": len(audited),
        "chance": fmean(1 / len(sample.options) if sample.options else 0.0 for sample, _ in audited),
        "views": {},
    }
    for view in VIEWS:
        if asked := [(sample.shown, rates[view]) for sample, rates in audited if view in rates]:
            clips, values = zip(*asked, strict=True)
            answered = mean_figure([value > ANSWERED for value in values], clips).as_json("share")
            figures["views"][view] = mean_figure(values, clips).as_json("rate") | {"answered": answered}
    if paired := _with_both(audited, contrast):
        clips = [sample.shown for sample, _ in paired]
        both = [(rates["ordered"], rates[contrast]) for _, rates in paired]
        needs = mean_figure([ordered > ANSWERED >= other for ordered, other in both], clips).as_json("share")
        other_way = fmean(other > ANSWERED >= ordered for ordered, other in both)
        figures["needs_order"] = needs | {"other_way": other_way}
        figures["temporal_gap"] = paired_difference(*zip(*both, strict=True), clips=clips).as_json("gap")
    in_order = [rates["ordered"] for _, rates in audited if "ordered" in rates]
    for name, extreme in (("never_right", 0.0), ("always_right", 1.0)):
        figures[name] = fmean(value == extreme for value in in_order) if in_order else 0.0
    return figures


def shown(view: str) -> str:
    return SHOWN.get(view, view)


def audit_rows(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """All questions, then the largest groups of each grouping of more than one: (name, figures)."""
    rows = [("all", summary["all"])]
    for grouping in _GROUPINGS:
        groups = summary[grouping]
        rows += [(name, groups[name]) for name in [*groups][:GROUPS_SHOWN]] if len(groups) > 1 else []
    return rows


def audit_table(summary: Mapping[str, Any]) -> str:
    """Mean pass rates in percent, 95 % intervals in brackets."""
    views = list(summary["all"]["views"])
    head = ("pass rates", "questions", "a guess", *map(shown, views), "temporal gap")
    rows = [
        (
            name if not place else f"  {name}",
            f"{figures['questions']:,}",
            f"{100 * figures['chance']:.0f}",
            *(cell(figures["views"].get(view), "rate", 100, 0) for view in views),
            cell(figures.get("temporal_gap"), "gap", 100, 0),
        )
        for place, (name, figures) in enumerate(audit_rows(summary))
    ]
    return table(head, rows)


def audit_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the figures say, in plain words; videos first."""
    sentences, contrast = [], summary["contrast"]
    for kind in ("video", "image"):
        if (figures := summary["by_modality"].get(kind)) is None:
            continue
        views = figures["views"]
        sentences.append(
            f"{figures['questions']:,} questions on {kind}s; answered: most of {summary['samples']} "
            f"answers are right, and a fixed guess is right in {percent(figures['chance'])}:"
        )
        told = {"blind": f"can be answered without the {kind}", "frozen": "can be answered from one frame"}
        told |= {contrast: told.get(contrast, f"can be answered with its frames {contrast}")}
        told |= {"ordered": f"can be answered with the {kind}" + " in order" * (kind == "video")}
        sentences += [
            f"  {_share(views[view]['answered'])} {words}" for view, words in told.items() if view in views
        ]
        if needs := figures.get("needs_order"):
            sentences.append(
                f"  {_share(needs)} need what the {contrast} clip lacks: answered in order, not with it "
                f"(the other way round, by chance: {percent(needs['other_way'])})"
            )
        sentences.append(
            f"  {percent(figures['never_right'])} are never right with it, "
            f"{percent(figures['always_right'])} always: RL learns nothing from either"
        )
    for name, words in (("no_answer", "say none that could be read"), ("cut_off", "were cut off")):
        if summary[name] > 0.05:
            sentences.append(
                f"{percent(summary[name])} of the answers {words}: the rates may be too low by as much"
            )
    return sentences


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(figure: Mapping[str, Any]) -> str:
    """`31 % [28, 34]`"""
    low, high = (f"{100 * end:.0f}" for end in figure["interval95"])
    return f"{percent(figure['share'])} [{low}, {high}]"
