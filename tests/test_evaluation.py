"""Whole evaluations on real clips: restart, bad media, both orders, a scripted and a real engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from scripted_engine import ScriptedEngine
from tiny_models import moving_square, write_clip
from transformers import AutoModelForImageTextToText, AutoProcessor

from video_r1.data import reading
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.sources.media_types import ClipRef
from video_r1.errors import RequestError
from video_r1.evaluation import predictions
from video_r1.evaluation.metrics import OVERLAP_SHARES, share_figure
from video_r1.evaluation.summary import summary_table
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import LOOK_CONTROLS, FrameBudget, Order

BUDGET = FrameBudget(fps=8.0, frame_pixels=56 * 56, image_pixels=56 * 56)
BOTH = ["ordered", "shuffled"]
SPAN, TOLD, FOUND = '{"time": [2, 6]}', '{"time": [4, 8]}', '{"time": [4.0, 8.0]}'


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(AutoProcessor.from_pretrained(checkpoint))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", moving_square())
    Image.fromarray(moving_square()[0]).save(folder / "image.png")
    (folder / "text.mp4").write_text("no clip at all")
    return folder


def sample(problem_id: int | str, media: Path, name: str = "clip.mp4", **fields: Any) -> Sample:
    base = Sample(
        problem_id, "Which way does the square move?", "image" if name.endswith("png") else "video",
        "multiple choice", "<answer>B</answer>", str(media / name), ("A. left", "B. right"),
        data_source="lab/direction",
    )  # fmt: skip
    return replace(base, **fields)


def first_seen(prompt: Prompt, n: int) -> list[str]:
    """B of ordered and A of shuffled frames."""
    return ["<think>t</think><answer>B</answer>" if prompt.order == "ordered" else "It is A."]


def scripted(calls: int = 1000) -> ScriptedEngine:
    return ScriptedEngine(first_seen, calls)


def evaluate(
    samples: Sequence[Sample], engine: Any, builder: PromptBuilder, *, folder: Path, **settings: Any
) -> dict[str, Any]:
    return predictions.evaluate(
        samples, engine, builder, BUDGET, EvalSettings(**{"order": BOTH, "seed": 0, **settings}), folder
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_orders_of_clips_and_images(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    engine = scripted()
    samples = [sample(1, media), sample("two", media), sample(3, media, "image.png", data_source="lab/image")]
    summary = evaluate(samples, engine, builder, folder=tmp_path, frames=[8], max_new_tokens=4, batch_size=2)
    records = lines(tmp_path / "predictions-8.jsonl")
    assert [(record["problem_id"], record["order"]) for record in records] == [
        (1, "ordered"), (1, "shuffled"), ("two", "ordered"), ("two", "shuffled"), (3, "ordered"),
    ]  # fmt: skip
    assert len({record["question"] for record in records}) == 2  # of the same words, about a clip or an image
    assert records[1] | {"output": "It is A.", "prediction": "A", "score": 0.0, "frames": 8} == records[1]
    assert records[0]["strict_score"] == records[0]["score"] == records[0]["format"] == 1.0
    figures = summary["frames"]["8"]
    assert figures["ordered"]["accuracy"] == 1.0
    assert figures["ordered"]["questions"] == 3
    assert figures["shuffled"]["accuracy"] == 0.0
    assert figures["shuffled"]["questions"] == figures["temporal_gap"]["questions"] == 2
    assert figures["temporal_gap"]["gap"] == 1.0
    assert figures["shuffled"]["format_rate"] == 0.0
    assert figures["by_source"]["lab/image"].keys() == {"ordered"}
    assert figures["skipped"] == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert "1.000" in summary_table(summary)

    orders = []
    for asked, ordered, shuffled in ((engine, 0, 1), (engine, 2, 3), (scripted(), 0, 1)):
        if not asked.prompts:
            evaluate(samples, asked, builder, folder=tmp_path / "seed", frames=[8], seed=1)
        order, frames = asked.prompts[shuffled].permutation, asked.prompts[ordered].media[0].frames
        assert order is not None and torch.equal(asked.prompts[shuffled].media[0].frames, frames[order])
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 3 and tuple(range(8)) not in orders  # by question and by seed


def test_every_contrast_beside_the_ordered_clip(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    """Each is asked of videos alone, under its name; answers to the shuffled clip are what they were."""
    samples = [sample(1, media), sample(3, media, "image.png")]
    orders = [order for order in get_args(Order) if order not in LOOK_CONTROLS]
    figures = evaluate(
        samples, scripted(), builder, folder=tmp_path / "all", frames=[8], order=orders
    )["frames"]["8"]  # fmt: skip
    records = lines(tmp_path / "all" / "predictions-8.jsonl")
    assert [record["order"] for record in records] == [*orders, "ordered"]
    assert figures["temporal_gap"]["gap"] == 1.0
    assert {name: gap["gap"] for name, gap in figures["temporal_gaps"].items()} == dict.fromkeys(
        orders[2:], 1.0
    )
    evaluate(samples, scripted(), builder, folder=tmp_path / "two", frames=[8])
    assert lines(tmp_path / "two" / "predictions-8.jsonl") == [*records[:2], records[-1]]


def two_way_engine() -> ScriptedEngine:
    """With reasoning: right about the questions below 3, in 9 tokens. Directly: about those from 2, in 3."""

    def thinks(prompt: Prompt) -> bool:
        return "<think>" in prompt.messages[0]["content"][-1]["text"]

    def says(prompt: Prompt, n: int) -> list[str]:
        text = prompt.messages[0]["content"][-1]["text"]
        number = int(text[text.index("#") + 1])
        right = number < 3 if thinks(prompt) else number >= 2
        return [f"<answer>{'B' if right and prompt.order == 'ordered' else 'A'}</answer>"]

    return ScriptedEngine(says, tokens=lambda prompt: 9 if thinks(prompt) else 3)


def test_direct_and_reasoned_answers_are_compared(
    builder: PromptBuilder, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four questions 0, 1 and 2 are right with reasoning, 2 and 3 without: gains 1, 1, 0, -1."""
    read = []
    real = reading.read_media_at
    monkeypatch.setattr(reading, "read_media_at", lambda s, b, c: read.append(s.start) or real(s, b, c))
    samples = [
        sample(
            n, media, problem=f"Where, #{n}?", start=n * 0.01, data_source="lab/odd" if n % 2 else "lab/even"
        )
        for n in range(4)
    ]
    both = {"frames": [8], "batch_size": 2, "max_new_tokens": 500, "answer": ["direct", "reasoned"]}
    engine = two_way_engine()
    summary = evaluate(samples, engine, builder, folder=tmp_path / "both", **both)
    assert sorted(read) == [n * 0.01 for n in range(4)]  # decoded once, for both ways and both orders
    assert [sampling.max_tokens for sampling in engine.sampled] == [128, 500, 128, 500]
    figures = summary["frames"]["8"]
    assert figures["ordered"]["accuracy"] == 0.75 and figures["direct"]["ordered"]["accuracy"] == 0.5
    gain = figures["reasoning_gains"]["ordered"]
    assert (gain["gain"], gain["questions"], gain["reasoned"], gain["direct"]) == (0.25, 4, 0.75, 0.5)
    assert gain["interval95"] is None  # of four questions
    assert gain["tokens"] == {
        "difference": 6.0, "interval95": None, "questions": 4, "reasoned": 9.0, "direct": 3.0,
    }  # fmt: skip
    assert figures["reasoning_gains"]["shuffled"]["gain"] == 0.0
    assert figures["direct"]["temporal_gap"]["gap"] == 0.5
    by_source = {
        name: each["reasoning_gains"]["ordered"]["gain"] for name, each in figures["by_source"].items()
    }
    assert by_source == {"lab/even": 0.5, "lab/odd": 0.0}  # 1, 0 and 1, -1
    table = summary_table(summary)
    assert "ordered, with reasoning − direct: accuracy 0.750 − 0.500 = 0.250" in table
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert "ordered 4 0.750 - 0.750 0.000 0.000 0.000" in rows
    assert "ordered, direct 4 0.500 - 0.500 0.000 0.000 0.000" in rows

    # What is asked one way is what is asked beside the other, in a file of its own.
    for way, name in (("reasoned", "predictions-8.jsonl"), ("direct", "direct-8.jsonl")):
        alone = two_way_engine()
        settings = both | {"answer": [way]}
        one = evaluate(samples, alone, builder, folder=tmp_path / way, **settings)
        assert [path.name for path in (tmp_path / way).glob("*-8.jsonl")] == [name]
        assert (tmp_path / way / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
        assert one["frames"]["8"]["ordered"]["accuracy"] == (0.75 if way == "reasoned" else 0.5)
        assert "reasoning_gains" not in one["frames"]["8"]
        continued = two_way_engine()
        assert evaluate(samples, continued, builder, folder=tmp_path / way, **both) == summary
        assert len(continued.prompts) == 8
        assert not set(continued.seeds) & set(alone.seeds)


def test_chats_are_not_asked_for_direct_answers(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    chat = sample(1, media, messages=({"role": "user", "content": "Think, then say it."},))
    with pytest.raises(RequestError, match="messages"):
        evaluate([chat], scripted(), builder, folder=tmp_path, frames=[8], answer=["direct"])
    assert not list(tmp_path.iterdir())


def test_a_clip_is_decoded_once_for_all_frame_counts_orders_and_neighbouring_questions(
    builder: PromptBuilder, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[float | None, tuple[int, ...]]] = []
    real = reading.read_media_at

    def counting(clip: ClipRef, budget: FrameBudget, counts: Sequence[int]) -> Any:
        read.append((clip.start, tuple(counts)))
        return real(clip, budget, counts)

    monkeypatch.setattr(reading, "read_media_at", counting)
    # Two questions about each window, in one batch and across two batches.
    samples = [sample(number, media, start=number // 2 * 0.01) for number in range(6)]
    engine = scripted()
    evaluate(samples, engine, builder, folder=tmp_path, frames=[4, 8], batch_size=3)
    assert sorted(read) == [(0, (4, 8)), (0.01, (4, 8)), (0.02, (4, 8))]
    assert len(engine.prompts) == 6 * 2 * 2


@pytest.mark.parametrize("cut", ["none", "in the last line", "after the first line"])
def test_an_interrupted_run_continues_to_the_same_files(
    builder: PromptBuilder, media: Path, tmp_path: Path, cut: str
) -> None:
    samples = [sample(number, media) for number in range(5)]
    settings: dict[str, Any] = {"frames": [8], "batch_size": 2, "max_new_tokens": 4}
    whole = evaluate(samples, scripted(), builder, folder=tmp_path / "whole", **settings)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(samples, scripted(calls=2), builder, folder=folder, **settings)
    path = folder / "predictions-8.jsonl"
    content = path.read_bytes()
    assert content.count(b"\n") == 8
    first = content.index(b"\n") + 1
    size = len(content)
    keep = {"none": size, "in the last line": size - 40, "after the first line": first}[cut]
    path.write_bytes(content[:keep])
    engine = scripted()
    continued = evaluate(samples, engine, builder, folder=folder, **settings)
    assert continued == whole
    assert path.read_bytes() == (tmp_path / "whole" / "predictions-8.jsonl").read_bytes()
    assert len(engine.prompts) == {"none": 2, "after the first line": 10}.get(cut, 6)
    # and once more: nothing is left to do
    engine = scripted(calls=0)
    assert evaluate(samples, engine, builder, folder=folder, **settings) == whole


def test_one_bad_clip_costs_one_question(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    long_question = sample(4, media, problem="why " * 20_000)
    samples = [sample(1, media), sample(2, media, "text.mp4"), sample(3, media, "gone.mp4"), long_question,
               sample(5, media)]  # fmt: skip
    settings: dict[str, Any] = {"folder": tmp_path, "frames": [8], "batch_size": 4}
    summary = evaluate(samples, scripted(), builder, **settings)
    figures = summary["frames"]["8"]
    assert figures["ordered"] | {"accuracy": 1.0, "questions": 2} == figures["ordered"]
    assert figures["skipped"] == 3
    quarantine = lines(tmp_path / "quarantine.jsonl")
    assert [(entry["problem_id"], entry["kind"], entry["frames"]) for entry in quarantine] == [
        (2, "media", 8), (3, "media", 8), (4, "prompt", 8),
    ]  # fmt: skip
    assert all(entry["reason"] for entry in quarantine)

    # Started again it tries them once more, and asks the engine for nothing while they stay bad.
    assert evaluate(samples, scripted(calls=0), builder, **settings) == summary
    assert lines(tmp_path / "quarantine.jsonl") == quarantine
    gone = media / "gone.mp4"
    gone.write_bytes((media / "clip.mp4").read_bytes())
    try:
        repaired = evaluate(samples, scripted(), builder, **settings)
    finally:
        gone.unlink()
    assert repaired["frames"]["8"]["ordered"]["questions"] == 3
    assert repaired["frames"]["8"]["skipped"] == 2
    assert [entry["problem_id"] for entry in lines(tmp_path / "quarantine.jsonl")] == [2, 4]
    assert len(lines(tmp_path / "predictions-8.jsonl")) == 6


def test_two_evaluations_share_no_folder(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"folder": tmp_path, "frames": [8]}
    samples = [sample(1, media)]
    evaluate(samples, scripted(), builder, model="a", **settings)
    with pytest.raises(RequestError, match=r"other settings: model"):
        evaluate(samples, scripted(), builder, model="b", **settings)
    with pytest.raises(RequestError, match=r"other settings: model .*, seed"):
        evaluate(samples, scripted(), builder, seed=1, **settings)
    with pytest.raises(RequestError, match=r"prompts .*, questions"):
        evaluate([sample(2, media, problem="?")], scripted(), builder,
                 model="a", **settings)  # fmt: skip


def test_a_damaged_line_in_the_middle_is_named(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    samples = [sample(1, media), sample(2, media)]
    evaluate(samples, scripted(), builder, folder=tmp_path, frames=[8])
    path = tmp_path / "predictions-8.jsonl"
    content = path.read_text().splitlines(keepends=True)
    for damaged in ("not json\n", "7\n", '{"problem_id": 1}\n'):
        path.write_text("".join([content[0], damaged, *content[2:]]))
        with pytest.raises(RequestError, match=r"predictions-8\.jsonl, line 2"):
            evaluate(samples, scripted(), builder, folder=tmp_path, frames=[8])


def test_samples_that_cannot_be_asked(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    for samples, message in (([], "no samples"), ([sample(1, media)] * 2, "twice")):
        with pytest.raises(RequestError, match=message):
            evaluate(samples, scripted(), builder, folder=tmp_path)


@pytest.mark.parametrize(
    ("problem_type", "truth", "output", "prediction", "score", "strict", "in_format"),
    [
        ("multiple choice", "B", "<think>t</think><answer>B</answer>", "B", 1.0, 1.0, 1.0),
        ("multiple choice", "B", "The answer is (B).", "B", 1.0, 0.0, 0.0),
        ("multiple choice", "B", "no idea", "", 0.0, 0.0, 0.0),
        ("regression", "10", "<think>t</think><answer>8.5</answer>", "8.5", 0.7, 0.7, 1.0),
        ("regression", "10", "far", "", 0.0, 0.0, 0.0),
        ("OCR", "3 7 2 9", "3 7 9", "3 7 9", 0.75, 0.0, 0.0),
        ("temporal grounding", SPAN, "4s to 8s", FOUND, 1 / 3, 0.0, 0.0),
        ("temporal grounding", SPAN, f"<think>t</think><answer>{TOLD}</answer>", FOUND, 1 / 3, 1 / 3, 1.0),
    ],
)
def test_scores_of_outputs(
    media: Path, problem_type: Any, truth: str, output: str, prediction: str, score: float, strict: float,
    in_format: float,
) -> None:  # fmt: skip
    options = ("A. left", "B. right") if problem_type == "multiple choice" else ()
    question = sample(
        1, media, problem_type=problem_type, solution=f"<answer>{truth}</answer>", options=options
    )
    scored = predictions.score_output(question, output)
    assert scored.prediction == prediction
    assert (scored.score, scored.strict_score, scored.format) == pytest.approx((score, strict, in_format))


def spans(prompt: Prompt, n: int) -> list[str]:
    """2 s to 6 s of ordered frames and 4 s to 8 s of shuffled ones."""
    span = {"ordered": "[2, 6]", "shuffled": "[4, 8]"}[prompt.order]
    return [f'<think>t</think><answer>{{"time": {span}}}</answer>']


def test_overlaps_of_spans(builder: PromptBuilder, media: Path, tmp_path: Path) -> None:
    """tIoU with the truths [2, 6], [4, 8], [0, 10] and [8, 9]: in order 1, 1/3, 0.4 and 0, else 1/3, 1, 0.4
    and 0."""
    questions = [
        sample(str(span), media, problem_type="temporal grounding", options=(),
               solution=f'<answer>{{"time": {span}}}</answer>')
        for span in ([2, 6], [4, 8], [0, 10], [8, 9])
    ]  # fmt: skip
    summary = evaluate(questions, ScriptedEngine(spans), builder, folder=tmp_path, frames=[4])
    figures = summary["frames"]["4"]["by_type"]["temporal grounding"]
    ordered = figures["ordered"]["overlaps"]["tIoU"]
    assert ordered["mean"] == figures["ordered"]["accuracy"] == pytest.approx((1 + 1 / 3 + 0.4) / 4)
    shares = {name: (ordered[name]["share"], ordered[name]["questions"]) for name in OVERLAP_SHARES}
    assert shares == {"R@0.3": (0.75, 4), "R@0.5": (0.25, 4), "R@0.7": (0.25, 4)}
    assert ordered["R@0.3"]["interval95"] == list(share_figure(3, 4)[1:3])
    assert figures["shuffled"]["overlaps"]["tIoU"]["mean"] == pytest.approx((1 / 3 + 1 + 0.4) / 4)
    assert summary["frames"]["4"]["ordered"]["overlaps"]["tIoU"] == ordered
    table = summary_table(summary)
    assert "overlap with the truth" in table and "temporal grounding, tIoU, shuffled" in table
    assert "0.750 [0.301, 0.954]" in table  # Wilson's interval of 3 of 4
    [first, *_] = lines(tmp_path / "predictions-4.jsonl")
    assert first["overlaps"] == {"tIoU": 1.0}


def test_a_real_model_interrupted_and_continued(
    checkpoint: Path, builder: PromptBuilder, media: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    engine = TransformersEngine(model, builder.tokenizer)
    samples = [sample(number, media, problem=f"Which way {'now ' * number}?") for number in range(4)]
    samples.append(sample(4, media, "image.png"))
    # Sampled: equal only by equal seeds, of each answer whatever it is asked with.
    warm = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6}
    settings: dict[str, Any] = {"frames": [8], "batch_size": 2, **warm}
    whole = evaluate(samples, engine, builder, folder=tmp_path / "whole", **settings)
    expected = (tmp_path / "whole" / "predictions-8.jsonl").read_bytes()
    outputs = [record["output"] for record in lines(tmp_path / "whole" / "predictions-8.jsonl")]
    assert len(set(outputs)) > 1
    (tmp_path / "cut").mkdir()
    for name in ("evaluation.json", "predictions-8.jsonl"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    with (tmp_path / "cut" / "predictions-8.jsonl").open("rb+") as file:
        file.truncate(len(expected) // 2)
    smaller = settings | {"batch_size": 1}
    assert evaluate(samples, engine, builder, folder=tmp_path / "cut", **smaller) == whole
    assert (tmp_path / "cut" / "predictions-8.jsonl").read_bytes() == expected
