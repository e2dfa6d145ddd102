"""The lab of looks: can a model learn where to look, and does it need what it sees?

    python -m research.look_again.experiment runs/look --seeds 0,1,2

A clip lasts 64 seconds and shows a white object of one of four shapes, a sign that lasts: the shape says in
which of four windows of four seconds something happens (circle 0 to 4 s, square 16 to 20 s, and so on;
nobody tells the model). There the object has another colour for one second, between the frames of the
overview. A question asks for the object's colour at that moment, or for its shape, which needs no look. The
cold start names the shape and mostly calls `look`, at a random window. It lists the colours that it sees, and
answers "white", which is wrong, where none but white is there.

OUT/base/              the lab's base, with tokens of their own for the words of a call
OUT/SEED/data/         clips, sft.json, plain.json (without calls), rl.json, test.json
OUT/SEED/{tool,plain}/ cold starts
OUT/SEED/ARM/          RL runs; OUT/SEED/NAME.json: what an arm did in the test

Everything that is there already is kept, so that the command can be interrupted and continued.
"""

import argparse
import json
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from research.temporal_credit.experiment import read_rows, video_r1
from video_r1.data.answers import LETTERS, lettered
from video_r1.data.tools import look
from video_r1.files import replace_json
from video_r1.lab.clips import write_clip
from video_r1.lab.model import base_folder
from video_r1.lab.scenes import COLOURS, SHAPES, Look, listing, render

EVERY, WINDOW, RATE = 16, 4, 2  # seconds from window to window, of a window, frames a second
SECONDS = len(SHAPES) * EVERY
OVERVIEW, LOOKED = 8, 8  # frames
BETWEEN = (1, 3)  # seconds of a window in which the overview has no frame, whichever window
LESSONS, QUESTIONS, TESTS = 1800, 600, 300
SFT_STEPS, RL_STEPS = 300, 60
TEMPERATURE = 0.7
RL = {"learning_rate": 3e-4, "beta": 0.02, "temperature": TEMPERATURE}
ASKED = {"sft": 0.8, "rl": 0.8, "test": 0.5}  # share of the questions about the colour
TOOLS = {"tools": "look", "max_looks": 1, "look_frames": LOOKED, "look_fps": 2, "max_prompt_length": 1024}
FRAMES = {"max_frames": OVERVIEW}
PLAIN = {"max_frames": OVERVIEW + LOOKED}  # the same visual tokens
NONE = {"temporal_rule": "off", "reward_funcs": "accuracy"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("tool", {**FRAMES, **TOOLS, **NONE}),
    "t-grpo": ("tool", {**FRAMES, **TOOLS, "temporal_rule": "margin", "reward_funcs": "accuracy,temporal"}),
    "no-tool": ("plain", {**PLAIN, **NONE}),
}
"""Cold start and settings of each arm, besides those of the recipe lab-tgrpo."""
CALLED = 0.8  # share of the lessons that call
_CALL = '</think>\n<tool_call>\n{"name": "look", "arguments": {"start": '
WORDS = (', "end": ', "}}\n</tool_call>", "<tool_response>", "</tool_response>", " s:")
NUMBERS = ("16", "20", "32", "36", "48", "52")
"""Texts that get a token of their own, as in Qwen's tokenizers: the base's spell them out. So does a shape
with the call behind it: so small a model does not learn from rewards to attend to a word (README.md).
"""
_LOOK = re.compile(r"\[look\(start=([\d.]+), end=([\d.]+)")


def make_base(folder: Path) -> None:
    """Copy the lab's base, with tokens for WORDS and for the description of the tool."""
    from video_r1.data.templates import TOOLS_MESSAGE
    from video_r1.data.tools import get_json_schema
    from video_r1.models.loading import load_model, load_processor

    if (folder / "config.json").exists():
        return
    processor = load_processor(str(base_folder()))
    model: Any = load_model(str(base_folder()), "float32")
    described = TOOLS_MESSAGE.format(json.dumps(get_json_schema(look)))
    words = [*(f" {shape}{_CALL}" for shape in SHAPES), *WORDS, *NUMBERS, described]
    processor.tokenizer.add_tokens(words)
    torch.manual_seed(0)
    rows = model.resize_token_embeddings(len(processor.tokenizer)).weight.data
    # As long as trained words: those of transformers would nearly equal each other (cosines of 0.997).
    rows[-len(words) :] = torch.randn(len(words), rows.shape[1]) / rows.shape[1] ** 0.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---- Clips and questions


def write_question(folder: Path, seed: int, job: tuple[str, int]) -> dict[str, Any]:
    """Write a clip; return its row, with the lessons of both cold starts in `taught`."""
    kind, index = job
    rng = np.random.default_rng((seed, ("sft", "rl", "test").index(kind), index))
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice([name for name in COLOURS if name != "white"]))
    start = EVERY * SHAPES.index(shape)
    event = start + int(rng.choice(BETWEEN))
    timeline = [Look("white", shape, "large")] * SECONDS
    timeline[event] = replace(timeline[event], colour=colour)
    path = f"./videos/{kind}-{index:05d}.mp4"
    if not (folder / path).exists():
        write_clip(folder / path, render(timeline, (np.arange(SECONDS * RATE) / RATE).tolist(), rng), RATE)
    rng = np.random.default_rng((seed, ("sft", "rl", "test").index(kind), index, 1))  # of the question
    needs_look = bool(rng.random() < ASKED[kind])
    choices: list[str] = [*(COLOURS if needs_look else SHAPES)]
    answer = colour if needs_look else shape
    looked = EVERY * int(rng.integers(len(SHAPES))) if rng.random() < CALLED else None
    seen = "white" if needs_look and looked != start else answer
    letter = LETTERS[choices.index(seen)]
    concluded, call = f"it is {seen}. {seen} is {letter}.", None
    if looked is not None:
        concluded = f"{listing(timeline[looked : looked + WINDOW], 'colours')}. {concluded}"
        call = [
            {"role": "assistant", "content": f"<think>shape: {shape}</think>",
             "tool_calls": [{"type": "function", "function":
                             {"name": "look", "arguments": {"start": looked, "end": looked + WINDOW}}}]},
            {"role": "tool", "content": ""},
        ]  # fmt: skip
    tool = {
        "process": f"<think>{concluded}</think>" if call else f"<think>shape: {shape}. {concluded}</think>",
        "solution": f"<answer>{letter}</answer>",
        **({"messages": call} if call else {}),
    }
    true = LETTERS[choices.index(answer)]
    plain = {"process": f"<think>it is {answer}. {answer} is {true}.</think>"}
    return {
        "problem_id": f"look-{seed}-{kind}-{index}",
        "problem": "Which colour was it then?" if needs_look else "Which shape is it?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": lettered(choices),
        "solution": f"<answer>{true}</answer>",
        "path": path,
        "data_source": "look/colour" if needs_look else "look/shape",
        "event": event,
        "taught": {"tool": tool, "plain": plain},
    }


def make_data(folder: Path, seed: int, workers: int) -> None:
    if (folder / "test.json").exists():
        return
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    counts = {"sft": LESSONS, "rl": QUESTIONS, "test": TESTS}
    jobs = [(kind, index) for kind, count in counts.items() for index in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(partial(write_question, folder, seed), jobs, chunksize=16))
    taught = [row.pop("taught") for row in rows]
    lessons = list(zip(rows[:LESSONS], taught[:LESSONS], strict=True))
    replace_json(folder / "sft.json", [row | lesson["tool"] for row, lesson in lessons])
    replace_json(folder / "plain.json", [row | lesson["plain"] for row, lesson in lessons])
    replace_json(folder / "rl.json", rows[LESSONS : LESSONS + QUESTIONS])
    replace_json(folder / "test.json", rows[LESSONS + QUESTIONS :])


# ---- Training and tests


def begin(seed: int, folder: Path, base: Path, kind: str, steps: int) -> None:
    """Make a cold start."""
    start, data = folder / kind, folder / "data"
    if not (start / "model.safetensors").exists():
        lessons = data / ("sft.json" if kind == "tool" else "plain.json")
        given = {**FRAMES, **TOOLS} if kind == "tool" else PLAIN
        video_r1(
            "sft", "lab-sft", model_name_or_path=base, train_manifest=lessons, output_dir=start, seed=seed,
            max_steps=steps, media_cache_mb=2048, **given,
        )  # fmt: skip


def train(seed: int, folder: Path, arm: str, steps: int) -> None:
    """Make the RL run of an arm."""
    kind, settings = ARMS[arm]
    if not (folder / arm / "model.safetensors").exists():
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path=folder / kind, train_manifest=folder / "data/rl.json",
            output_dir=folder / arm, seed=seed, max_steps=steps, max_completion_length=96,
            media_cache_mb=2048, **RL, **settings,
        )  # fmt: skip


def test(folder: Path, name: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint does in the test, sampled as in RL, and write it to NAME.json."""
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    out, tools = folder / f"{name}-test", "tools" in settings
    given = {key: value for key, value in settings.items() if key not in NONE}
    video_r1(
        "eval", "lab-eval", model=folder / model, manifest=folder / "data/test.json", out=out,
        order="ordered,elsewhere" if tools else "ordered", max_new_tokens=96, temperature=TEMPERATURE,
        seed=0, **given,
    )  # fmt: skip
    (file,) = out.glob("predictions-*.jsonl")
    rows = {row["problem_id"]: row for row in read_rows(folder / "data/test.json")}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found: dict[str, Any] = {}
    for source in ("look/colour", "look/shape"):
        asked = [r for r in records if rows[r["problem_id"]]["data_source"] == source]
        scores = {
            order: [r["score"] for r in asked if r["order"] == order] for order in ("ordered", "elsewhere")
        }
        own = [r for r in asked if r["order"] == "ordered"]
        stretches = [
            (float(start) <= rows[r["problem_id"]]["event"] < float(end), r["score"])
            for r in own
            for start, end in _LOOK.findall(r.get("transcript", ""))
        ]
        hits = [score for hit, score in stretches if hit]
        found[source] = {
            "accuracy": fmean(scores["ordered"]),
            "calls": fmean(r.get("calls", 0) for r in own),
            "hits": len(hits) / len(stretches) if stretches else None,
            "right at a hit": fmean(hits) if hits else None,
            "look gap": fmean(scores["ordered"]) - fmean(scores["elsewhere"]) if tools else None,
        }
    replace_json(path, found)
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the means over seeds as a Markdown table, with the smallest and largest."""
    figures = ("accuracy", "calls", "hits", "right at a hit", "look gap")
    lines = [f"| | asked | {' | '.join(figures)} |", "|---|---|" + "---|" * len(figures)]
    for name in dict.fromkeys(result["name"] for result in results):
        for source in ("look/colour", "look/shape"):
            runs = [result[source] for result in results if result["name"] == name]
            cells = []
            for figure in figures:
                values = [run[figure] for run in runs if run[figure] is not None]
                shown = f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"
                cells.append(shown)
            lines.append(f"| {name} | {source.removeprefix('look/')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="processes that write clips")
    parser.add_argument("--sft_steps", type=int, default=SFT_STEPS)
    parser.add_argument("--rl_steps", type=int, default=RL_STEPS)
    given = parser.parse_args()
    make_base(given.out / "base")
    results: list[dict[str, Any]] = []
    for seed in map(int, given.seeds.split(",")):
        folder = given.out / str(seed)
        make_data(folder / "data", seed, given.workers)
        for arm in given.arms.split(","):
            kind, settings = ARMS[arm]
            for name, model in ((f"{kind} after SFT", kind), (f"{arm} after RL", arm)):
                if model == kind:
                    begin(seed, folder, given.out / "base", kind, given.sft_steps)
                else:
                    train(seed, folder, arm, given.rl_steps)
                found = {"name": name, "seed": seed, **test(folder, name, model, settings)}
                if found not in results:
                    results.append(found)
                print(found, flush=True)
    replace_json(given.out / "results.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
