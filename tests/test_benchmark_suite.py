"""All benchmarks in one run with the small model: figures, comparison, temporal gap, SIGKILL and restart."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import lab_clips, write_benchmarks
from browser import FilePage, chromium, find_chromium

from video_r1.cli import main
from video_r1.data.decoding.frame_cache import read_cached_at
from video_r1.data.manifests.records import Sample
from video_r1.evaluation.benchmarks import BENCHMARKS
from video_r1.evaluation.benchmarks.loading import Coverage, Questions
from video_r1.evaluation.figures import figure_rows, gain_marks, gain_page, gap_marks, gap_page
from video_r1.evaluation.paper import (
    COLUMNS,
    compare_with_paper,
    comparison_table,
    setup_differences,
)
from video_r1.evaluation.summary import summarise
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import CONTROLS

SMALL = shlex.split(
    "--fps 2 --max_frames 8 --frame_pixels 3136 --image_pixels 3136 --dtype float32 --max_new_tokens 4 "
    "--media_seconds 0 --device cpu --batch_size 4"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, lab_clips(tmp_path_factory.mktemp("lab")))
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "lab-base", "--media_root", str(root), "--out", str(out), *SMALL, *more]


def predictions(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("predictions-*.jsonl"))
    }


@pytest.mark.slow
def test_all_benchmarks_with_a_real_model(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    (tmp_path / "clip.mp4").write_bytes((root / "mmvu/videos/Chemistry/0.mp4").read_bytes())
    rows = [
        {
            "problem_id": 1,
            "problem": "What moves?",
            "data_type": "video",
            "problem_type": "free-form",
            "options": [],
            "solution": "<answer>a ball</answer>",
            "path": "clip.mp4",
        }
    ]
    own.write_text(json.dumps(rows))
    out = tmp_path / "out"
    names = ",".join([*COLUMNS, "videoholmes"])
    run = command(root, out, "--bench", names, "--frames", "4,8", "--temporal_gap")
    assert main(run) == 2
    refused = capsys.readouterr().err
    assert "VSI-Bench" in refused and "Video-Holmes" in refused  # every benchmark's problems at once
    assert main([*run, "--allow_missing", "--frame_cache", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert "VSI-Bench, mean over task types (part)" in printed
    assert "VSI-Bench, mean over questions (part)" in printed
    assert "MVBench: 5 of 4,000 questions" in printed
    summary = json.loads((out / "summary.json").read_text())
    counts = {"vsibench": 6, "videommmu": 4, "mmvu": 1, "mvbench": 5, "tempcompass": 4, "videomme": 2}
    for name, number in {**counts, "videoholmes": 2}.items():
        result = summary["benchmarks"][name]
        assert not result["complete"]
        for frames in ("4", "8"):
            figures = result["frames"][frames]
            assert figures["skipped"] == 0
            assert figures["ordered"]["questions"] == figures["shuffled"]["questions"] == number
            assert figures["temporal_gap"]["questions"] == number
            assert set(figures["by_task"]) == {
                json.loads(line)["task_type"]
                for line in (out / name / "predictions-8.jsonl").read_text().splitlines()
            }
    vsi = summary["benchmarks"]["vsibench"]["frames"]["8"]["ordered"]
    assert vsi["task_mean"]["questions"] == vsi["kind_mean"]["questions"] == vsi["questions"] == 6
    page = (out / "temporal-gap.html").read_text()
    assert all(BENCHMARKS[name].title in page for name in (*COLUMNS, "videoholmes"))
    assert "VSI-Bench: 6 of 5,130 questions." in page

    # Without the cache, and with other benchmarks and frame counts around it: the same answers, bit for bit.
    again = tmp_path / "again"
    both_again = ["--bench", "vsibench,mvbench", "--frames", "8,4", "--allow_missing", "--temporal_gap"]
    assert main(command(root, again, *both_again)) == 0
    both = predictions(again)
    assert len(both) == 4
    assert both.items() <= predictions(out).items()
    assert main(command(tmp_path, tmp_path / "mine", "--bench", str(own), "--frames", "8")) == 0
    assert json.loads((tmp_path / "mine/summary.json").read_text())["benchmarks"]["own"]["complete"]


def test_all_controls_in_one_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every benchmark; a clip is decoded once, whatever is asked about it."""
    decoded: list[str] = []

    def counted(sample: Any, *arguments: Any) -> Any:
        decoded.append(sample.path)
        return read_cached_at(sample, *arguments)

    clips: list[set[Any]] = []

    def recorded(records: Any, direct: Any = ()) -> Any:
        clips.append({record["clip"] for record in records})
        return summarise(records, direct)

    monkeypatch.setattr("video_r1.data.reading.read_cached_at", counted)
    monkeypatch.setattr("video_r1.evaluation.evaluate.summarise", recorded)
    run = command(root, tmp_path, "--bench", "mvbench,tempcompass", "--controls", "--allow_missing")
    assert main(run) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    for name, number in {"mvbench": 5, "tempcompass": 4}.items():
        figures = summary[name]["frames"]["8"]
        assert {order: figures[order]["questions"] for order in CONTROLS} == dict.fromkeys(CONTROLS, number)
        assert set(figures["temporal_gaps"]) == set(CONTROLS) - {"ordered", "shuffled"}
    assert len(decoded) <= 9  # neighbouring questions share a clip
    assert [len(shown) for shown in clips] == [5, 1]  # TempCompass' four questions are about one
    page = (tmp_path / "temporal-gap.html").read_text()
    assert all(f"{contrast}: " in page for contrast in CONTROLS[1:])


def test_direct_and_reasoned_answers_in_one_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are asked of every benchmark in every order, and continue a run that asked for one of them."""
    wanted = ["--bench", "vsibench,tempcompass", "--temporal_gap", "--allow_missing"]
    assert main(command(root, tmp_path, *wanted)) == 0
    before = predictions(tmp_path)
    assert "direct answers" not in capsys.readouterr().out and not (tmp_path / "reasoning.html").exists()
    assert main(command(root, tmp_path, *wanted, "--answer", "direct,reasoned")) == 0
    assert predictions(tmp_path) == before
    printed = capsys.readouterr().out
    assert (
        "reasoned − direct" in printed and "VSI-Bench, mean over questions, direct answers (part)" in printed
    )
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    for name, number in {"vsibench": 6, "tempcompass": 4}.items():
        assert summary[name]["answer"] == ["direct", "reasoned"]
        figures = summary[name]["frames"]["8"]
        direct = [json.loads(line) for line in (tmp_path / name / "direct-8.jsonl").read_text().splitlines()]
        assert len(direct) == 2 * number
        for order in ("ordered", "shuffled"):
            assert (
                figures["direct"][order]["questions"]
                == figures["reasoning_gains"][order]["questions"]
                == number
            )
    assert main(command(root, tmp_path, *wanted, "--answer", "direct")) == 0
    assert "VSI-Bench, mean over questions, direct answers (part)" in capsys.readouterr().out
    page = (tmp_path / "reasoning.html").read_text()
    assert "VSI-Bench" in page and "TempCompass: 4 of 7,540 questions." in page


def figure(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"accuracy": mean, "interval95": [low, high], "questions": 100}


def test_the_paper_beside_our_figures() -> None:
    ordered = figure(0.642, 0.61, 0.67)
    vsi = figure(0.35, 0.33, 0.37) | {f"{of}_mean": figure(0.30, 0.28, 0.32) for of in ("task", "kind")}
    vsi["kind_mean"] = figure(0.36, 0.33, 0.38)
    results = {
        "mmvu": {
            "frames": {"16": {"ordered": ordered}, "32": {"ordered": ordered}, "8": {"ordered": ordered}}
        },
        "vsibench": {"frames": {"64": {"ordered": vsi}, "16": {"shuffled": vsi}, "32": {"ordered": ordered}}},
        "videoholmes": {"frames": {"16": {"ordered": ordered}}},
    }
    found = compare_with_paper(results)
    at = {(each.benchmark, each.frames, each.model): each for each in found}
    assert len(at) == len(found) == 6 + 3 + 3  # all six rows at 16 frames, three at 32 and 64
    same = at["mmvu", 16, "Video-R1-7B"]
    assert (same.published, same.ours) == (64.2, pytest.approx(64.2))
    assert (same.difference, same.low, same.high) == pytest.approx((0.0, -3.2, 2.8))
    assert not same.outside
    base = at["mmvu", 16, "Qwen2.5-VL-7B, CoT prompt"]
    assert (base.difference, base.low, base.high) == pytest.approx((5.0, 1.8, 7.8))
    assert base.outside
    ours = at["vsibench", 64, "Video-R1-7B"]  # neither its mean over questions nor that over task types
    assert (ours.difference, ours.low, ours.high) == pytest.approx((-1.1, 33 - 37.1, 38 - 37.1))
    text = comparison_table(found, {"mmvu": "MMVU (mc)"})
    assert "MMVU (mc), 16 frames: ours 64.2" in text
    assert "vsibench, 64 frames, mean of the accuracy of choices and the MRA of numbers: ours 36.0" in text
    assert "Qwen2.5-VL-7B, CoT prompt   59.2    +5.0 [+1.8, +7.8] *\n" in text
    assert "Video-R1-7B                 64.2    +0.0 [-3.2, +2.8]\n" in text
    assert "no figures" in comparison_table(compare_with_paper({"videoholmes": results["videoholmes"]}), {})


def test_what_differs_from_the_papers_setup() -> None:
    part = Questions(
        "mvbench", "MVBench", (), Coverage(5, 5, 4000, ("a.mp4",)), "published", BENCHMARKS["mvbench"]
    )
    same = setup_differences(EvalSettings(), [])
    assert not any(" here and " in line for line in same)
    lines = setup_differences(EvalSettings(temperature=1.0, frame_pixels=3136, limit=9), [part])
    assert "temperature is 1 here and 0.01 there" in lines
    assert "frame_pixels is 3136 here and 200704 there" in lines
    assert "only the first 9 questions of each benchmark are asked" in lines
    assert not any("direct" in line for line in lines)
    assert any(
        "answers are direct" in line for line in setup_differences(EvalSettings(answer=["direct"]), [])
    )
    assert "MVBench: 5 of 4,000 questions, 1 media files missing" in lines
    assert any("whole clips" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "annotation", "cut", "protocol", "expected"),
    [
        ("tempcompass", "published", False, None, ["its own annotation", "captioning"]),
        ("tempcompass", "reference", False, None, []),
        ("mvbench", "published", False, None, ["its own annotation", "window is shown the", "episodic"]),
        ("mvbench", "reference", True, "reference", ["here 1 questions have clips cut", "episodic"]),
        ("mvbench", "published", True, "reference", ["its own annotation", "here 1 questions", "episodic"]),
        ("mvbench", "reference", False, "reference", ["episodic"]),
        ("vsibench", "reference", False, "reference", []),
        ("mine", None, False, "reference", []),
    ],
)
def test_what_a_benchmark_asks_in_another_way(
    name: str, annotation: Any, cut: bool, protocol: Any, expected: list[str]
) -> None:
    extra = {"cut": True} if cut else {}
    sample = Sample(1, "?", "video", "multiple choice", "<answer>A</answer>", "a.mp4", extra=extra)
    asked = Questions(name, "Title", (sample,), Coverage(1, 1, 1, ()), annotation, BENCHMARKS.get(name))
    settings = EvalSettings(protocol=protocol)
    found = [line for line in setup_differences(settings, [asked]) if line.startswith("Title: ")]
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def gap(mean: float, low: float, high: float) -> dict[str, Any]:
    return {
        "temporal_gap": {
            "gap": mean,
            "interval95": [low, high],
            "questions": 200,
            "ordered": 0.6,
            "shuffled": 0.6 - mean,
        }
    }


RESULTS: dict[str, Any] = {
    "mvbench": {
        "title": "MVBench",
        "coverage": "600 of 4,000 questions",
        "complete": False,
        "frames": {
            count: {
                **gap(0.05 + shift, 0.01, 0.09),
                "by_task": {
                    "action_antonym": gap(0.02 + shift, -0.03, 0.07),
                    "action_sequence": gap(0.21, 0.12, 0.30),
                    "object_<shuffle>": gap(-0.04, -0.12, 0.04),
                },
            }
            for count, shift in (("16", 0.0), ("32", 0.01))
        },
    },
    "tempcompass": {
        "title": "TempCompass",
        "coverage": "all 7,540 questions",
        "complete": True,
        "frames": {"16": {**gap(0.14, 0.12, 0.16), "by_task": {"order": gap(0.3, 0.2, 0.4), "action": {}}}},
    },
}


def other(name: str, mean: float) -> dict[str, Any]:
    figure = gap(mean, mean - 0.03, mean + 0.03)["temporal_gap"]
    return {name: {**figure, name: figure["shuffled"]}}


CONTROLLED: dict[str, Any] = {
    "mvbench": {
        **RESULTS["mvbench"],
        "frames": {
            "16": {
                **gap(0.05, 0.01, 0.09),
                "temporal_gaps": other("reversed", 0.01) | other("blind", 0.2),
                "by_task": {
                    "count": {**gap(0.02, -0.1, 0.1), "temporal_gaps": other("blind", 0.4)},
                    "order": gap(0.3, 0.2, 0.4),
                },
            }
        },
    }
}


def gained(gain: float, tokens: float) -> dict[str, Any]:
    figure = {"gain": gain, "interval95": [gain - 0.03, gain + 0.03], "questions": 50}
    means = {"reasoned": 0.5 + gain, "direct": 0.5, "tokens": {"reasoned": 149.2, "direct": tokens}}
    return {"reasoning_gains": {"ordered": figure | means}}


GAINS: dict[str, Any] = {
    "mvbench": {
        **RESULTS["mvbench"],
        "frames": {
            "16": {**gained(0.02, 8.0), "by_task": {"count": gained(-0.1, 7.6), "maths": gained(0.2, 9.0)}}
        },
    }
}


def test_rows_of_the_figures() -> None:
    rows = figure_rows(RESULTS, gap_marks)
    assert [(row.name, row.is_benchmark, len(row.marks)) for row in rows] == [
        ("MVBench", True, 2), ("action sequence", False, 2), ("action antonym", False, 2),
        ("object <shuffle>", False, 2), ("TempCompass", True, 1), ("order", False, 1),
    ]  # fmt: skip
    controlled = figure_rows(CONTROLLED, gap_marks)
    assert [(row.name, [mark.kind for mark in row.marks]) for row in controlled] == [
        ("MVBench", ["shuffled", "reversed", "blind"]),
        ("order", ["shuffled"]),  # sorted by the gap of shuffled frames, whatever else was asked
        ("count", ["shuffled", "blind"]),
    ]
    assert controlled[0].marks[2].other == pytest.approx(0.4)
    gains = figure_rows(GAINS, gain_marks)
    assert [(row.name, row.marks[0].gap) for row in gains] == [
        ("MVBench", 0.02),
        ("maths", 0.2),
        ("count", -0.1),
    ]


def test_text_of_the_figures() -> None:
    page = gap_page(RESULTS, "runs/rl & more")
    assert page == gap_page(RESULTS, "runs/rl & more")  # byte for byte
    assert "object &lt;shuffle&gt;" in page and "<shuffle>" not in page and "runs/rl &amp; more" in page
    assert "MVBench: 600 of 4,000 questions." in page and "all 7,540" not in page
    assert "60.0 − 55.0 = +5.0 [+1.0, +9.0]  (200)" in page
    assert "No question was asked both ways" in gap_page({}, "m")
    controlled = gap_page(CONTROLLED, "m")
    assert "reversed: the same frames from last to first" in controlled and "frozen:" not in controlled
    assert "reversed: the same" not in page
    assert "40.0 − 50.0 = −10.0 [−13.0, −7.0]  (50; 149 − 8 tokens)" in gain_page(GAINS, "m")


OVERLAPPING = """(() => {
  const box = document.querySelector('svg').getBoundingClientRect();
  const boxes = [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect());
  const beyond = b => b.left < box.left - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1;
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 &&
    a.top < b.bottom - 3 && b.top < a.bottom - 3;
  return boxes.filter((a, i) => beyond(a) || boxes.some((b, j) => j < i && meet(a, b))).length;
})()"""


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no chromium on this machine")
def test_figures_in_a_browser(tmp_path: Path) -> None:
    with chromium() as opened:
        for text in (gap_page(RESULTS, "runs/rl"), gain_page(GAINS, "m")):
            page = tmp_path / "page.html"
            page.write_text(text, encoding="utf-8")
            browser = FilePage(opened)
            browser.open(page)
            assert browser.problems == [] and browser.requests == [page.resolve().as_uri()]
            assert browser.run("document.querySelectorAll('svg text').length") > 10
            assert browser.run(OVERLAPPING) == 0
