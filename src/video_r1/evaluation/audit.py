"""`video-r1 data audit`: which questions need the video, more than one frame, and the order of the frames.

    manifest ─► question_loop.py ─► answers-<frames>.jsonl ─► pass rates ─► OUT, audit.json
                (K answers each: blind, one frame,            (by the correct_threshold
                 the contrast clip, in order)                  of training)

Another `correct_threshold` asks nothing again, and another contrast asks only for its own answers. "One
frame" is the contrast `frozen`, one frame repeated: a shorter prompt would be another difference.
"""

import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from video_r1.console import table
from video_r1.data.answers import read_answer
from video_r1.data.balance import ConstantAnswer, constant_answers
from video_r1.data.manifests.records import Sample, load_manifest, placed_rows
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.data.scores import correctness, is_correct
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import RequestError, VideoR1Error, writing_to
from video_r1.evaluation.metrics import mean_figure, paired_difference
from video_r1.evaluation.question_loop import Answers, QuestionLoop, asked_with
from video_r1.evaluation.summary import cell
from video_r1.files import replace_json, replace_rows
from video_r1.processes import claimed_by_first, decided_by_first, process_group
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.engine_factory import open_engine, open_prompts
from video_r1.settings.decoding import AuditSettings
from video_r1.settings.filters import PASS_RATES
from video_r1.settings.frames import Contrast, Order

SETTINGS_FILE = "settings.json"
SCORED_FIELDS = ("problem_type", "options", "solution")  # the answers are kept as they were read by these
# From showing nothing of a clip to showing all of it.
VIEWS: tuple[Order, ...] = ("blind", "single", "frozen", "dropped", "shuffled", "reversed", "ordered")
ANSWERED = 0.5  # a question counts as answered when more than this share of its answers is right
GROUPS_SHOWN = 40
_GROUPINGS = {"by_modality": "data_type", "by_type": "problem_type", "by_source": "data_source"}

Audited = Sequence[tuple[Sample, Mapping[str, float]]]  # samples with their pass rates by view


def run_audit(settings: AuditSettings) -> dict[str, Any]:
    """Audit a manifest, print the table, and return the content of `audit.json` with OUT as `manifest`.

    OUT has the manifest's rows, and the pass rates of the questions that could be asked. The folder of its
    name has the other files. Started again with the same settings it continues. Raises ManifestError,
    ConfigError, RequestError (also when OUT was not written by an audit, or with other settings), and
    VideoR1Error when no question can be asked or a rank is lost.
    """
    assert settings.manifest is not None and settings.model is not None  # settings without them are refused
    manifest, out = settings.manifest, _audited_path(settings)
    folder = out.with_suffix("")
    with process_group(folder):
        samples = decided_by_first(lambda: load_manifest(manifest, **settings.manifest_options()))
        with claimed_by_first(folder), writing_to(folder):
            summary = _audit(samples, settings, out)
        print(f"{audit_table(summary)}\n\n" + "\n".join(audit_sentences(summary)))
        if summary["skipped"]:
            print(f"{summary['skipped']:,} questions skipped; the reasons: {folder / 'quarantine.jsonl'}")
        print(f"\nmanifest with pass rates: {out}; all figures: {folder / 'audit.json'}")
        root = media_root_of(manifest, settings.media_root)
        elsewhere = ["--media_root", root] if root != media_root_of(out, None) else []
        words = shlex.join(["--train_manifest", str(out), *elsewhere, "--keep"])
        keep = f"'ordered - {settings.temporal_contrast} > 0.1'"
        print(f"to train on the questions that need the order: {words} {keep}")
        if "video" in summary["by_modality"]:
            print(recommendation(summary["by_modality"]["video"], settings.temporal_contrast, out, words))
    return {"manifest": str(out), **summary}


def _audited_path(settings: AuditSettings) -> Path:
    """Return OUT. Raises RequestError when it has no default, or no audit has written it."""
    path = Path(str(settings.manifest))
    if settings.out is None and not path.is_file():
        raise RequestError(f"{settings.manifest} is not a local file; pass --out for the audited manifest")
    ending = ".jsonl" if path.suffix == ".jsonl" else ".json"
    out = Path(settings.out or path.with_name(f"{path.stem}.audited{ending}"))
    if out.exists() and not (out.with_suffix("") / SETTINGS_FILE).is_file():
        raise RequestError(f"{out} exists and was not written by an audit; choose another --out")
    return out


def _audit(samples: Sequence[Sample], settings: AuditSettings, out: Path) -> dict[str, Any]:
    builder, budget = open_prompts(settings)
    sampling = SamplingSettings.of(settings, settings.samples)
    wanted = ("blind", "frozen", settings.temporal_contrast, "ordered")
    orders: list[Order] = [view for view in VIEWS if view in wanted]
    with closing(open_engine(settings, builder)) as engine:
        made_with = asked_with(samples, builder, budget, settings, sampling, engine, SCORED_FIELDS)
        loop = Audit(
            samples[: settings.limit], engine, builder, budget, settings, out.with_suffix(""), sampling,
            orders, [settings.max_frames],
        )  # fmt: skip
        loop.run(made_with)

        def write() -> dict[str, Any]:
            (answers,) = loop.merge().values()
            rates = pass_rates_of(answers, samples, settings.correct_threshold)
            audited = [(sample, rates[sample.problem_id]) for sample in samples if sample.problem_id in rates]
            if not audited:
                raise VideoR1Error(f"none of the questions could be asked; {loop.quarantine} has the reasons")
            replace_rows(out, _audited_rows(settings, samples, rates))
            texts = [text for record in answers.values() for text in record["answers"]]
            summary = {
                "questions": len(samples),
                "skipped": loop.skipped(answers),
                "samples": settings.samples,
                "contrast": settings.temporal_contrast,
                "correct_threshold": settings.correct_threshold,
                "settings": {**made_with, "max_frames": settings.max_frames},
                "no_answer": sum(not text for text in texts) / len(texts),
                "cut_off": sum(record["cut_off"] for record in answers.values()) / len(texts),
                **audit_figures(audited, settings.temporal_contrast),
            }
            replace_json(loop.folder / "audit.json", summary)
            return summary

        return decided_by_first(write)


@dataclass(frozen=True)
class Audit(QuestionLoop):
    what: ClassVar = "an audit"
    doing: ClassVar = "auditing"
    answers: ClassVar = "answers"
    settings_file: ClassVar = SETTINGS_FILE
    needed: ClassVar = frozenset(("problem_id", "order", "answers", "scores", "cut_off"))

    def orders_of(self, sample: Sample) -> list[Order]:
        """Return the orders in which the sample is asked: images also blind, text only in order."""
        asked = {"video": self.orders, "image": ("blind", "ordered")}.get(sample.data_type, ("ordered",))
        return [order for order in self.orders if order in asked]

    def record(
        self, sample: Sample, prompt: Prompt, rollouts: Sequence[Rollout], frames: int
    ) -> dict[str, Any]:
        """Return the answers ("" for none), parsed tolerantly: an audit does not measure the format."""
        kind, options = sample.problem_type, sample.options
        answers = [read_answer(rollout.text, kind, options) for rollout in rollouts]
        return {
            "problem_id": sample.problem_id,
            "order": prompt.order,
            "answers": answers,
            "scores": [correctness(kind, answer, sample.answer) for answer in answers],
            "cut_off": sum(rollout.finish_reason == "length" for rollout in rollouts),
            "frames": frames,
        }


def pass_rates_of(
    answers: Answers, samples: Sequence[Sample], threshold: float
) -> dict[str | int, dict[str, float]]:
    """Return the share of correct answers of each question by view, in the order of VIEWS."""
    rates: dict[str | int, dict[str, float]] = {}
    for sample in samples:
        for view in VIEWS:
            if record := answers.get((sample.problem_id, view)):
                correct = [is_correct(sample.problem_type, score, threshold) for score in record["scores"]]
                rates.setdefault(sample.problem_id, {})[view] = fmean(correct)
    return rates


def _audited_rows(
    settings: AuditSettings, samples: Sequence[Sample], rates: Mapping[str | int, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """Yield the samples' rows unchanged, each with its pass rates if it has some.

    A sample's row is the first one with its id (`check_manifest`). Raises RequestError when the manifest no
    longer has these rows.
    """
    manifest, waiting = settings.manifest, deque(samples)
    for _, row in placed_rows(manifest, "train", media_root_of(manifest, settings.media_root)):
        name = row.get("problem_id") if isinstance(row, dict) else None
        if waiting and repr(name) == repr(waiting[0].problem_id):  # repr: True is not 1
            found = rates.get(waiting.popleft().problem_id)
            plain = {field: value for field, value in row.items() if field != PASS_RATES}
            yield {**plain, PASS_RATES: found} if found else plain
    if waiting:
        raise RequestError(
            f"{manifest}: the row of question {waiting[0].problem_id!r} has changed or gone since the audit "
            "began; start it again with another --out"
        )


# ---- Figures


def audit_figures(audited: Audited, contrast: Contrast) -> dict[str, Any]:
    """Return the figures over all questions, and over each modality, problem type and source.

    Their fields are in docs/data-format.md (`audit.json`). needs_order: share of questions that are answered
    in order and not with the contrast clip; other_way: the reverse, which only chance explains. These two and
    the gap are over the videos that have both rates.
    """
    constant = [str(each) for each in _constant(audited) if each.stands_out]
    figures: dict[str, Any] = {"constant_answers": constant, "all": _figures(audited, contrast)}
    for name, field in _GROUPINGS.items():
        groups: dict[str, list[Any]] = {}
        for sample, rates in audited:
            groups.setdefault(getattr(sample, field) or "(no source)", []).append((sample, rates))
        ranked = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
        figures[name] = {group: _figures(members, contrast) for group, members in ranked}
    return figures


def _constant(audited: Audited) -> list[ConstantAnswer]:
    return constant_answers((len(sample.options), sample.answer) for sample, _ in audited)


def _figures(audited: Audited, contrast: Contrast) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "questions": len(audited),
        "chance": sum(each.right for each in _constant(audited)) / len(audited),
        "views": {},
    }
    for view in VIEWS:
        if asked := [(sample.cluster, rates[view]) for sample, rates in audited if view in rates]:
            clips, values = zip(*asked, strict=True)
            answered = mean_figure([value > ANSWERED for value in values], clips).as_json("share")
            figures["views"][view] = mean_figure(values, clips).as_json("rate") | {"answered": answered}
    if paired := [each for each in audited if {contrast, "ordered"} <= each[1].keys()]:
        clips = [sample.cluster for sample, _ in paired]
        both = [(rates["ordered"], rates[contrast]) for _, rates in paired]
        needs = mean_figure([ordered > ANSWERED >= other for ordered, other in both], clips).as_json("share")
        other_way = fmean(other > ANSWERED >= ordered for ordered, other in both)
        figures["needs_order"] = needs | {"other_way": other_way}
        figures["temporal_gap"] = paired_difference(*zip(*both, strict=True), clips=clips).as_json("gap")
    shown = [view for view in VIEWS if view in ("blind", "frozen", contrast, "ordered")]
    if whole := [each for each in audited if each[1].keys() >= set(shown)]:
        clips = [sample.cluster for sample, _ in whole]
        answered = [[rates[view] > ANSWERED for _, rates in whole] for view in shown]
        guessed = [sum(each.right for each in _constant(whole)) / len(whole)] * len(whole)
        figures["gains"] = {
            view: paired_difference(here, less, clips).as_json("share")
            for view, here, less in zip(shown, answered, [guessed, *answered], strict=False)
        }
    in_order = [rates["ordered"] for _, rates in audited if "ordered" in rates]
    for name, extreme in (("never_right", 0.0), ("always_right", 1.0)):
        figures[name] = fmean(value == extreme for value in in_order) if in_order else 0.0
    return figures


def audit_table(summary: Mapping[str, Any]) -> str:
    """Return a table of mean pass rates in percent with 95 % intervals."""
    views: list[str] = list(summary["all"]["views"])
    groups = [("all", summary["all"])]
    for grouping in _GROUPINGS:
        groups += [*summary[grouping].items()][:GROUPS_SHOWN] if len(summary[grouping]) > 1 else []
    shown = ("one frame" if view == "frozen" else view for view in views)
    head = ("pass rates", "questions", "best guess", *shown, "temporal gap")
    rows = [
        (
            name if not place else f"  {name}",
            f"{figures['questions']:,}",
            f"{100 * figures['chance']:.0f}",
            *(cell(figures["views"].get(view), "rate", 100, 0) for view in views),
            cell(figures.get("temporal_gap"), "gap", 100, 0),
        )
        for place, (name, figures) in enumerate(groups)
    ]
    return table(head, rows)


def audit_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return the figures as sentences, videos first."""
    sentences, contrast = [], summary["contrast"]
    for kind in ("video", "image", "text"):
        if (figures := summary["by_modality"].get(kind)) is None:
            continue
        views = figures["views"]
        about = "without media" if kind == "text" else f"on {kind}s"
        sentences.append(
            f"{figures['questions']:,} questions {about}; answered: most of {summary['samples']} "
            f"answers are right; the best fixed guess is right in {percent(figures['chance'])}:"
        )
        told = {"blind": f"without the {kind}", "frozen": "from one frame"}
        told |= {contrast: told.get(contrast, f"with its frames {contrast}")}
        whole = {"video": "with the video in order", "image": "with the image", "text": "from their text"}
        told |= {"ordered": whole[kind]}
        sentences += [
            f"  {_share(views[view]['answered'])} can be answered {words}"
            for view, words in told.items()
            if view in views
        ]
        if needs := figures.get("needs_order"):
            sentences.append(
                f"  {_share(needs)} need what the {contrast} clip lacks: answered in order, not with it "
                f"(the other way round, by chance: {percent(needs['other_way'])})"
            )
        sentences.append(
            f"  {percent(figures['never_right'])} are always wrong, {percent(figures['always_right'])} "
            "always right: RL learns nothing from these"
        )
    sentences += summary.get("constant_answers", ())
    problems = {"no_answer": "contained no answer that could be parsed", "cut_off": "were cut off"}
    sentences += [
        f"{percent(summary[name])} of the outputs {words}: the rates may be too low by as much"
        for name, words in problems.items()
        if summary[name] > 0.05
    ]
    return sentences


def recommendation(figures: Mapping[str, Any], contrast: Contrast, out: Path, words: str) -> str:
    """Return one line: the largest shortcut of the videos, how many questions it answers, and the remedy.

    A shortcut counts if its gain, the questions that it answers less those that are answered without it, has
    an interval above 0. figures: of the videos. words: options of a training command, up to `--keep`.
    """
    remedies = {
        contrast: (
            f"the {contrast} clip answers {{}} more than one frame: the order is not needed",
            f"remove these questions: {words} 'ordered - {contrast} > 0.1'",
        ),
        "blind": (
            "the text alone answers {} more than the best fixed guess",
            f"remove these questions: {words} 'blind <= 0.5'",
        ),
        "frozen": (
            "one frame answers {} more than the text alone",
            f"add time-reversed copies (video-r1 data pairs {shlex.quote(str(out))} --out pairs.json), "
            "or try temporal_rule likelihood_gate",
        ),
    }
    gains = figures.get("gains", {})
    counted = {view: gains[view] for view in remedies if view in gains}
    clear = {view: gain for view, gain in counted.items() if (gain["interval95"] or [0.0])[0] > 0}
    if not clear:
        return "shortcut: none stands out" if counted else "shortcut: unknown, as no video has all views"
    view = max(clear, key=lambda each: clear[each]["share"])
    gain = clear[view]
    number = f"{gain['share'] * gain['questions']:.0f} of {gain['questions']:,} questions"
    found, remedy = remedies[view]
    return f"shortcut: {found.format(number)}; {remedy}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(figure: Mapping[str, Any]) -> str:
    """Return `31 % [28, 34]`."""
    return (
        cell(figure, "share", 100, 0).replace(" [", " % [")
        if figure["interval95"]
        else percent(figure["share"])
    )
