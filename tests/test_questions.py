"""Which question comes when: batches, replacements and memory, all without a state that is carried along."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Reader
from video_r1.errors import MediaError, VideoR1Error
from video_r1.rollout.engine import prompt_seed
from video_r1.seeds import derived_seed
from video_r1.settings.frames import FrameBudget
from video_r1.training.questions import (
    QuestionSource,
    Slot,
    StepBatches,
    with_shuffled_options,
)

SAMPLES = [
    Sample(n, f"question {n}?", "video", "numerical", "<answer>1</answer>", f"/{n}.mp4") for n in range(10)
]


def source(
    bad: tuple[int, ...] = (), seed: int = 1, folder: Path | None = None
) -> QuestionSource[int, tuple]:
    def load(sample: Sample) -> int:
        if sample.problem_id in bad:
            raise MediaError(sample.path, "is damaged")
        return int(sample.problem_id)

    def build(sample: Sample, loaded: int, generator: torch.Generator) -> tuple[int, int]:
        return loaded, int(torch.randint(10**9, (), generator=generator))

    return QuestionSource(
        SAMPLES,
        load,
        build,
        seed=seed,
        reader=Reader(FrameBudget()),
        quarantine=folder / "quarantine.jsonl" if folder else Path(os.devnull),
    )


@pytest.mark.parametrize(
    ("questions", "size", "step_batches", "iterations", "batches"),
    [
        (5, 2, 1, 1, [[0, 1], [2, 3], [4, 0]]),
        (5, 2, 2, 1, [[0, 1], [2, 3], [4, 0], [1, 2]]),
        (4, 2, 1, 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        # a step of two micro-batches repeats as a whole, and the last one is filled up from the start
        (5, 2, 2, 2, [[0, 1], [2, 3], [0, 1], [2, 3], [4, 0], [1, 2], [4, 0], [1, 2]]),
        (1, 2, 1, 2, [[0, 0], [0, 0]]),
    ],
)
def test_step_batches(
    questions: int, size: int, step_batches: int, iterations: int, batches: list[list[int]]
) -> None:
    sampler = StepBatches(questions, size, step_batches, iterations)
    keys = list(sampler)
    assert [[index for index, _ in batch] for batch in keys] == batches
    assert len(sampler) == len(batches)
    expected = [(step // step_batches) % iterations for step in range(len(batches))]
    assert [batch[0][1] for batch in keys] == expected


def test_epochs_are_permutations_of_all_questions() -> None:
    questions = source()
    epochs = [[questions.draw(Slot(epoch, index)) for index in range(10)] for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] == epochs[2] != epochs[1]
    assert [source(seed=2).draw(Slot(0, index)) for index in range(10)] != epochs[0]


def test_slots_do_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    """A source that begins in the middle, as after resuming, gives the same questions and frame orders."""
    through = source(bad=(3, 7), folder=tmp_path)
    whole = [through.ready(Slot(epoch, index)) for epoch in range(3) for index in range(10)]
    fresh = source(bad=(3, 7))
    for position in (17, 29, 0, 11):
        later = fresh.ready(Slot(*divmod(position, 10)))
        assert (later.content, later.skipped) == (whole[position].content, whole[position].skipped)
    assert {entry.content[0] for entry in whole}.isdisjoint({3, 7})
    assert sum(entry.skipped for entry in whole) >= 6
    assert len({entry.content[1] for entry in whole}) == len(whole)  # every slot has its own generator
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2  # each bad file once


def test_nothing_usable() -> None:
    with pytest.raises(VideoR1Error, match=r"none of 10 questions could be used; the last one: .*is damaged"):
        source(bad=tuple(range(10))).ready(Slot(0, 0))


def test_memory_keeps_what_it_has_room_for() -> None:
    questions, made = source(), []

    def load(sample: Sample) -> torch.Tensor:
        made.append(sample.problem_id)
        return torch.zeros(50, dtype=torch.float64)  # 400 bytes

    questions.load, questions.cache_bytes = load, 800  # type: ignore[assignment]
    for index in (1, 2, 1, 3, 2, 3):
        assert len(questions.loaded(index)) == 50  # type: ignore[arg-type]
    assert made == [1, 2, 3, 3] and questions.kept_bytes == 800


def test_derived_seeds() -> None:
    seeds = {derived_seed(*parts) for parts in ((1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1, "a", 0))}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    # The numbers of runs that are there already: one that is continued has to draw them again.
    assert derived_seed(42, "epoch", 3) == 7348345438539461324
    assert derived_seed(42, "epoch", 3, bits=31) == 7348345438539461324 >> 32
    assert prompt_seed(42, 3) == 172245907461375283


def shuffled(options: tuple[str, ...], solution: str, seed: int) -> Sample:
    sample = Sample(1, "?", "video", "multiple choice", f"<answer>{solution}</answer>", "/v.mp4", options)
    return with_shuffled_options(sample, torch.Generator().manual_seed(seed))


def test_options_are_shuffled_with_the_letter_of_the_solution() -> None:
    options = ("A. left", "B. right", "C. up", "D. down")
    drawn = [shuffled(options, "B", seed) for seed in range(40)]
    assert all(sample.options["ABCD".index(sample.answer)][3:] == "right" for sample in drawn)
    assert {sample.answer for sample in drawn} == set("ABCD")
    assert all(tuple(option[:3] for option in s.options) == ("A. ", "B. ", "C. ", "D. ") for s in drawn)
    assert shuffled(options, "B", 7) == drawn[7]
    others = ("(A) left", "(B) right", "(C) none of the above")
    assert all(shuffled(others, "C", seed).options == others for seed in range(9))
    assert shuffled((), "3", 0).options == ()
