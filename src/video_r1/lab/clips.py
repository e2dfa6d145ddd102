"""The lab: procedural clips and images as real media files, with manifests for SFT, RL and test.

DIR/videos/*.mp4, DIR/images/*.png
DIR/sft.json      training questions with `process` (the chain of thought)
DIR/rl.json       the same questions without `process`
DIR/test.json     held-out questions; DIR/test-cued.json: the same with a mark that gives the answer away;
                  DIR/test-lying.json: the same with a wrong mark
"""

import os
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from video_r1.console import Progress
from video_r1.data.answers import LETTERS, lettered
from video_r1.errors import RequestError
from video_r1.files import claimed, replace_json
from video_r1.lab.questions import FAMILIES, IMAGE_FAMILIES, NAMED_FAMILIES, read_mark
from video_r1.lab.scenes import FPS, MARKS, SECONDS, render
from video_r1.settings.commands import LabSettings

SPLITS = {"train": 0, "test": 1}  # part of every sample's seed, so that train and test never share one
CHUNK = 16


def write_lab(settings: LabSettings) -> None:
    """Write `train` + `test` questions with their media below `folder`.

    The same settings give the same questions and pixels. Raises RequestError for an unknown family.

    With `shortcut`, every question of `test-cued.json` and `test-lying.json` whose answer is a letter or a
    number below 4 has a mark. With `trusting`, other marks of training samples lie: otherwise a chain that
    lists its observations would learn to conclude what the mark says. `hasty` rationales are right as often
    as a guess, and never for sentences and digits. Without `shuffle_options` each family lists its options in
    one order, which a small model can memorise.
    """
    if unknown := [name for name in settings.families if name not in NAMED_FAMILIES]:
        raise RequestError(f"unknown lab family {', '.join(unknown)}; there are {', '.join(NAMED_FAMILIES)}")
    assert settings.folder is not None
    folder, train, test = Path(settings.folder), settings.train, settings.test
    for name in ("videos", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sets = [("train", train), ("test", test)]
    sets += [("test-cued", test), ("test-lying", test)] * bool(settings.shortcut)
    jobs = [(name, index) for name, count in sets for index in range(count)]
    rows: list[dict[str, Any]] = []
    with (
        claimed(folder),
        ProcessPoolExecutor(settings.workers or os.cpu_count()) as pool,
        Progress(len(jobs), "lab", "samples") as bar,
    ):
        for row in pool.map(partial(_write_sample, settings), jobs, chunksize=CHUNK):
            rows.append(row)
            bar.update()
        taught = [row.pop("taught") for row in rows]
        lessons = [row | lesson for row, lesson in zip(rows, taught, strict=True)]
        replace_json(folder / "sft.json", lessons[:train])
        replace_json(folder / "rl.json", rows[:train])
        for number, (name, _) in enumerate(sets[1:]):
            replace_json(folder / f"{name}.json", rows[train + number * test :][:test])
    print(f"{folder}: {train} training and {test} test questions")


def _write_sample(settings: LabSettings, job: tuple[str, int]) -> dict[str, Any]:
    """Write a question's media and return its row; `taught` holds the fields that differ in sft.json.

    job: name of the set, and the question's index in it.
    """
    kind, index = job
    split = kind.partition("-")[0]
    rng = np.random.default_rng((settings.seed, SPLITS[split], index))
    families = settings.families or FAMILIES
    images = [name for name in families if name in IMAGE_FAMILIES]
    videos = [name for name in families if name not in IMAGE_FAMILIES]
    is_image = bool(images) and (not videos or rng.random() < settings.image_share)
    family = str(rng.choice(images if is_image else videos))
    question = NAMED_FAMILIES[family](rng)
    choices = list(question.choices)
    if settings.shuffle_options:
        choices = [choices[at] for at in rng.permutation(len(choices))]
    letter = LETTERS[choices.index(question.answer)] if choices else ""
    answer = letter or question.answer
    is_marked = kind not in SPLITS or (split == "train" and rng.random() < settings.shortcut)
    is_read = is_marked and split == "train" and settings.trusting > 0 and rng.random() < settings.trusting
    is_lie = kind == "test-lying" or (split == "train" and settings.trusting > 0 and not is_read)
    mark = answer if is_marked and answer in MARKS else ""
    if mark and is_lie:
        wrong = [other for other in (LETTERS[: len(choices)] or "0123") if other != answer]
        mark = wrong[index % len(wrong)]
    times = [0.0] if is_image else (np.arange(int(SECONDS * FPS)) / FPS).tolist()
    frames = render(question.timeline, times, rng, mark)
    name = f"{kind}-{index:06d}"
    path = f"./images/{name}.png" if is_image else f"./videos/{name}.mp4"
    file = Path(str(settings.folder), path)
    if is_image:
        Image.fromarray(frames[0]).save(file)
    else:
        write_clip(file, frames, FPS)
    teacher, chain = question, question.chain
    if ". " in chain and not is_image and rng.random() < settings.hasty:
        while (teacher := NAMED_FAMILIES[family](rng)).problem != question.problem:
            pass  # draw another clip with the same question
        chain = f"one look. {teacher.chain.partition('. ')[2]}"
    taught = LETTERS[choices.index(teacher.answer)] if choices else teacher.answer
    if choices:
        chain += f" {teacher.answer} is {taught}."
    if mark and is_read:
        chain, taught = read_mark(mark), answer
    held = 0 if is_image else FPS - 1  # frames of a moment after its first
    return {
        "problem_id": f"lab-{settings.seed}-{name}",
        "problem": question.problem,
        "data_type": "image" if is_image else "video",
        "problem_type": question.problem_type,
        "options": lettered(choices),
        "solution": f"<answer>{answer}</answer>",
        "path": path,
        "data_source": f"lab/{family}",
        "key_frames": [[moment * FPS, moment * FPS + held] for moment in question.key_moments],
        "mark": mark,
        "taught": {"process": f"<think>{chain}</think>", "solution": f"<answer>{taught}</answer>"},
    }


def write_clip(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write `frames` [T, H, W, 3] uint8 (H and W even) as an H.264 MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Without `cpu-independent` x264's output differs between runs.
        x264 = {"preset": "veryfast", "crf": "26", "threads": "1", "x264-params": "cpu-independent=1"}
        stream.options = {**x264}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
