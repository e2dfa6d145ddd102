"""Audits on real clips and pictures, with a scripted engine whose figures are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from chat_endpoint import chat_endpoint, images_of, write_questions
from scripted_engine import ScriptedEngine

from video_r1.cli import main
from video_r1.data.manifests.records import Sample, kept_samples, load_manifest
from video_r1.data.prompts import Prompt
from video_r1.errors import RequestError, VideoR1Error
from video_r1.evaluation import audit
from video_r1.evaluation.audit import (
    VIEWS,
    audit_figures,
    audit_sentences,
    pass_rates_of,
    recommendation,
    run_audit,
)
from video_r1.settings.decoding import AuditSettings
from video_r1.settings.frames import LOOK_CONTROLS, Order

SIZES: dict[str, Any] = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56, "media_seconds": 0.0}
# Of each question's four answers, how many are right: blind, from one frame, shuffled and in order.
RIGHT = [
    {"blind": 4, "frozen": 4, "shuffled": 4, "ordered": 4},
    {"blind": 0, "frozen": 3, "shuffled": 3, "ordered": 4},
    {"blind": 0, "frozen": 1, "shuffled": 2, "ordered": 3},
    {"blind": 1, "frozen": 0, "shuffled": 4, "ordered": 0},
    {"blind": 3, "ordered": 4},  # pictures
    {"blind": 0, "ordered": 0},
]
KEEP = "ordered - shuffled > 0.1"


def question_of(prompt: Prompt) -> str:
    text = prompt.messages[0]["content"][-1]["text"]
    return f"q{text.split()[1].rstrip(':')}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four questions about a clip, two about a picture; the rows have fields of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_questions(folder, len(RIGHT), clips=4)
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row |= {"extra": {"ünder": [number, 0.1]}, "solution": " <answer>B. right</answer>"}
        row["data_source"] = "even" if number % 2 == 0 else "odd"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    """The engines of the next audits; without one, an engine must not be opened."""
    ready: list[ScriptedEngine] = []
    monkeypatch.setattr(audit, "open_engine", lambda settings, processor: ready[-1])
    return ready


def scripted(**more: int) -> ScriptedEngine:
    """Gives as many right answers as RIGHT says, and in further views as many as `more` does."""

    def says(prompt: Prompt, n: int) -> list[str]:
        assert (prompt.frames == 0) == (prompt.order == "blind")
        right = {**RIGHT[int(question_of(prompt)[1:])], **more}[prompt.order]
        wrong = ["It is A.", "no idea", "A", "<answer>A</answer>"]
        return ["<think>t</think><answer>B</answer>"] * right + wrong[: n - right]

    return ScriptedEngine(says)


def audited(data: Path, checkpoint: Path, **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"manifest": str(data), "model": str(checkpoint), "samples": 4, "batch_size": 2}
    return run_audit(AuditSettings(**{**SIZES, **given, **settings}))


def test_rates_rows_and_figures(
    data: Path, checkpoint: Path, engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    engines.append(scripted())
    summary = audited(data, checkpoint)
    out = data.with_name("manifest.audited.json")
    assert summary["manifest"] == str(out) and engines[0].closed
    rates = [{name: right / 4 for name, right in each.items()} for each in RIGHT]
    rows = [row | {"pass_rates": each} for row, each in zip(json.loads(data.read_text()), rates, strict=True)]
    assert json.loads(out.read_text()) == rows
    # Beside the manifest its paths hold.
    assert [sample.path for sample in load_manifest(out)] == [sample.path for sample in load_manifest(data)]
    assert sorted((question_of(prompt), prompt.order) for prompt in engines[0].prompts) == sorted(
        (f"q{n}", view) for n, each in enumerate(RIGHT) for view in each
    )
    assert all(sampling.temperature == sampling.top_p == 1.0 for sampling in engines[0].sampled)
    seeds = [seed for each in engines[0].seeds for seed in each]
    assert len(set(seeds)) == len(seeds) == 20

    assert summary["all"]["questions"] == 6 and summary["all"]["chance"] == 1.0  # the answer is always B
    views = summary["all"]["views"]
    assert {view: figure["rate"] for view, figure in views.items()} == {
        "blind": 8 / 24, "frozen": 8 / 16, "shuffled": 13 / 16, "ordered": 15 / 24,
    }  # fmt: skip
    video = summary["by_modality"]["video"]
    answered = {view: figure["answered"]["share"] for view, figure in video["views"].items()}
    # Two of four right are not most of them.
    assert answered == {"blind": 1 / 4, "frozen": 2 / 4, "shuffled": 3 / 4, "ordered": 3 / 4}
    needs = video["needs_order"]
    assert (needs["share"], needs["other_way"], needs["questions"]) == (1 / 4, 1 / 4, 4)
    assert video["temporal_gap"]["gap"] == pytest.approx((0 + 1 + 1 - 4) / 16)
    assert (video["never_right"], video["always_right"]) == (1 / 4, 2 / 4)
    assert summary["by_modality"]["image"]["views"].keys() == {"blind", "ordered"}
    assert "needs_order" not in summary["by_modality"]["image"]
    assert [summary["by_source"][name]["questions"] for name in ("even", "odd")] == [3, 3]
    assert summary["no_answer"] == pytest.approx(
        sum(right < 3 for each in RIGHT for right in each.values()) / 80
    )
    assert video["views"]["blind"]["answered"]["interval95"] is None  # four questions
    low, high = summary["all"]["views"]["blind"]["answered"]["interval95"]
    assert 0 <= low < 2 / 6 < high <= 1
    assert {"manifest": str(out), **json.loads((out.with_suffix("") / "audit.json").read_text())} == summary

    said = capsys.readouterr().out
    assert all(text in said for text in ("all", "even", "one frame"))
    assert "  25 % can be answered without the video\n" in said
    assert "answered: most of 4 answers are right; the best fixed guess is right in 100 %" in said
    assert f"--train_manifest {out} --keep '{KEEP}'\n" in said
    assert said.splitlines()[-1] == "shortcut: none stands out"  # in four questions
    kept = [sample.problem_id for sample in kept_samples(load_manifest(out), KEEP)]
    assert kept == ["q1", "q2", "q4", "q5"]


def test_what_may_change_when_it_is_continued(
    data: Path, checkpoint: Path, engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.with_name("manifest.audited.json")
    engines.append(scripted())
    audited(data, checkpoint, limit=2)
    assert [("pass_rates" in row) for row in json.loads(out.read_text())] == [True] * 2 + [False] * 4
    before = len(engines[0].prompts)
    assert audited(data, checkpoint)["all"]["questions"] == 6
    assert len(engines[0].prompts) == 20 and before == 8
    engines[0].calls_left = 0  # from here on a call is an interruption
    audited(data, checkpoint, limit=1)  # forgets nothing
    assert all("pass_rates" in row for row in json.loads(out.read_text()))
    audited(data, checkpoint, correct_threshold=0.3)
    engines.append(scripted(reversed=0))
    summary = audited(data, checkpoint, temporal_contrast="reversed")
    views = ["blind", "frozen", "shuffled", "reversed", "ordered"]
    assert list(json.loads(out.read_text())[0]["pass_rates"]) == views
    assert summary["contrast"] == "reversed" and summary["all"]["temporal_gap"]["gap"] == 11 / 16
    for settings, name in (({"samples": 2}, "sampling"), ({"seed": 1}, "seed"), ({"fps": 1.0}, "budget")):
        with pytest.raises(RequestError, match=rf"holds an audit with other settings: {name}\b"):
            audited(data, checkpoint, **settings)
    rows = json.loads(data.read_text())
    data.write_text(json.dumps(rows[::-1]))
    with pytest.raises(RequestError, match=r"other settings: prompts .*, questions"):
        audited(data, checkpoint)


def test_media_that_cannot_be_used_are_reported(
    tmp_path: Path, checkpoint: Path, engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path, 6, clips=4, bad=(1,))
    engines.append(scripted())
    summary = audited(data, checkpoint)
    assert summary["skipped"] == 1 and summary["all"]["questions"] == 5
    rows = json.loads(data.with_name("manifest.audited.json").read_text())
    assert [("pass_rates" in row) for row in rows] == [True, False, True, True, True, True]
    quarantine = (tmp_path / "manifest.audited" / "quarantine.jsonl").read_text()
    assert json.loads(quarantine)["problem_id"] == "q1"
    assert "1 questions skipped" in capsys.readouterr().out
    nothing = write_questions(tmp_path, 1, bad=(0,)).rename(tmp_path / "nothing.json")
    with pytest.raises(VideoR1Error, match="none of the questions could be asked"):
        audited(nothing, checkpoint)


def test_bad_rows_are_left_out_of_the_audit_and_of_out(
    data: Path, checkpoint: Path, engines: list[ScriptedEngine]
) -> None:
    rows: list[Any] = json.loads(data.read_text())
    rows[2]["problem_id"] = 1  # no True
    bad = [rows[0], "text", {**rows[1], "problem_id": "x", "solution": None}]
    data.write_text(json.dumps([*rows[:2], *bad, {**rows[2], "problem_id": True}, *rows[2:], rows[5]]))
    engines.append(scripted())
    assert audited(data, checkpoint, bad_rows="leave_out")["questions"] == 6
    out = data.with_name("manifest.audited.json")
    rates = [{name: right / 4 for name, right in each.items()} for each in RIGHT]
    assert json.loads(out.read_text()) == [
        row | {"pass_rates": each} for row, each in zip(rows, rates, strict=True)
    ]
    assert len(load_manifest(out)) == 6  # and trains as it is


def test_a_manifest_that_changes_meanwhile(data: Path) -> None:
    samples, rows = load_manifest(data), json.loads(data.read_text())
    data.write_text(json.dumps([*rows[:-1], {**rows[-1], "problem_id": "other"}]))
    settings = AuditSettings(manifest=str(data), model="m")
    with pytest.raises(RequestError, match="since the audit began"):
        list(audit._audited_rows(settings, samples, {}))


def test_where_it_goes(
    data: Path, checkpoint: Path, engines: list[ScriptedEngine], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Elsewhere the media root is said; files of others stay."""
    engines.append(scripted())
    out = tmp_path / "audits" / "mine.json"
    audited(data, checkpoint, out=str(out))
    words = f"--train_manifest {out} --media_root {data.parent.resolve()} --keep '{KEEP}'"
    assert words in capsys.readouterr().out
    assert len(load_manifest(out, data.parent)) == 6
    content = data.read_bytes()
    for wrong, message in ((data, "was not written by an audit"), (tmp_path / "x.txt", "must end in .json")):
        with pytest.raises(RequestError, match=message):
            audited(data, checkpoint, out=str(wrong))
    assert data.read_bytes() == content
    audited(out, checkpoint, media_root=str(data.parent), out=str(tmp_path / "part.json"), limit=2)
    rows = json.loads((tmp_path / "part.json").read_text())  # rates of another audit are not mixed with these
    assert [("pass_rates" in row) for row in rows] == [True] * 2 + [False] * 4
    with pytest.raises(RequestError, match="is not a local file; pass --out"):
        audited(Path("owner/questions"), checkpoint)
    assert main(["data", "audit", str(data)]) == 2
    assert "model is missing" in capsys.readouterr().err


def test_an_endpoint_is_asked_once_for_all_answers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_endpoint() as endpoint:
        words = ["--model", "teacher", "--engine", endpoint.url, "--samples", "4", "--media_seconds", "0"]
        assert main(["data", "audit", str(data), *words]) == 0
    assert [request["n"] for request in endpoint.requests] == [4] * 20
    assert sum(not images_of(request) for request in endpoint.requests) == 6  # blind
    assert "  100 % can be answered without the video" in capsys.readouterr().out


def test_figures_without_videos_and_with_an_unusual_contrast() -> None:
    assert set(VIEWS) == set(get_args(Order)) - {*LOOK_CONTROLS}
    image = Sample(1, "?", "image", "OCR", "<answer>x</answer>", "/x.png")
    summary: dict[str, Any] = {"contrast": "frozen", "samples": 2, "no_answer": 0.0, "cut_off": 0.1}
    summary |= audit_figures([(image, {"blind": 0.5, "ordered": 1.0})], "frozen")
    sentences = audit_sentences(summary)
    assert "  0 % can be answered without the image" in sentences[1]
    assert sentences[-1].startswith("10 % of the outputs were cut off")


def test_the_best_fixed_guess_is_named() -> None:
    """Of eleven questions with three options eight have the answer A."""
    audited = [
        (Sample(n, "?", "video", "multiple choice", f"<answer>{'A' if n < 8 else 'BC'[n % 2]}</answer>",
                f"/{n}.mp4", ("A. x", "B. y", "C. z")), {"ordered": 1.0})
        for n in range(11)
    ]  # fmt: skip
    figures = audit_figures(audited, "shuffled")
    assert figures["all"]["chance"] == 8 / 11
    (said,) = figures["constant_answers"]
    assert said.startswith("73 % of the 11 questions with 3 options have the answer A")


@pytest.mark.parametrize(
    ("contrast", "right", "said"),
    [  # how many of 40 questions each view answers; a fixed guess is right in 10
        ("shuffled", (10, 10, 11, 38), "shortcut: none stands out"),
        (
            "shuffled",
            (30, 31, 31, 38),
            "shortcut: the text alone answers 20 of 40 questions more than the best fixed guess; remove "
            "these questions: --keep 'blind <= 0.5'",
        ),
        (
            "shuffled",
            (10, 34, 34, 38),
            "shortcut: one frame answers 24 of 40 questions more than the text alone; add time-reversed "
            "copies (video-r1 data pairs 'a b.json' --out pairs.json), or try temporal_rule likelihood_gate",
        ),
        (
            "reversed",
            (10, 12, 30, 38),
            "shortcut: the reversed clip answers 18 of 40 questions more than one frame: the order is not "
            "needed; remove these questions: --keep 'ordered - reversed > 0.1'",
        ),
        (
            "frozen",
            (10, 34, 34, 38),
            "shortcut: one frame answers 24 of 40 questions more than the text alone",
        ),
        ("shuffled", (), "shortcut: unknown, as no video has all views"),
    ],
)
def test_the_largest_shortcut_and_its_remedy(contrast: Any, right: tuple[int, ...], said: str) -> None:
    views = ("blind", "frozen", contrast, "ordered")
    audited = []
    for n in range(40):
        rates = {view: float(n < count) for view, count in zip(views, right, strict=False)}
        solution = f"<answer>{'ABCD'[n % 4]}</answer>"
        options = ("A. w", "B. x", "C. y", "D. z")
        sample = Sample(n, "?", "video", "multiple choice", solution, f"/{n}.mp4", options)
        audited.append((sample, rates or {"ordered": 1.0}))
    figures = audit_figures(audited, contrast)["by_modality"]["video"]
    assert recommendation(figures, contrast, Path("a b.json"), "--keep").startswith(said)


def test_what_counts_as_right_is_what_training_counts() -> None:
    """A score above the threshold where scores are continuous, 1 elsewhere."""
    samples = [Sample(kind, "?", "video", kind, "", "/x") for kind in ("free-form", "numerical")]
    scores = {"scores": [0.0, 0.4, 0.6, 1.0]}
    answers = {(sample.problem_id, "ordered"): scores for sample in samples}
    assert pass_rates_of(answers, samples, 0.5) == {
        "free-form": {"ordered": 0.5},
        "numerical": {"ordered": 0.25},
    }
    assert pass_rates_of(answers, samples, 0.3)["free-form"] == {"ordered": 0.75}
