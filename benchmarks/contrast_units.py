"""What single frames and temporal patches as the unit of a contrast say of the same responses.

    python -m benchmarks.contrast_units --json [--model FOLDER] [--manifest lab/test.json] [--questions 64]

Samples G responses to each video of the lab (made here where no manifest is named), and takes their drops in
log-probability (logprob_contrast.py) with frames permuted and with patches. `units`: frames against patches,
the correlation of the responses' drops Δ and of their ranks, that of the tokens' drops, and the share of key
tokens (rule `tokens`) that are the same. `two_orders`: the same between two draws of shuffled frames, beyond
which two units cannot agree.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._command import benchmark_parser
from benchmarks._timing import machine
from video_r1.data.decoding.media import decode_media
from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import PromptBuilder
from video_r1.data.reading import Question, build_question, derived_generator
from video_r1.data.rollouts import Rollouts
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import Contrast, ContrastUnit, FrameBudget
from video_r1.training.logprob_contrast import token_contrasts

SIDE, BATCH = 56, 16
KEY_SHARE = 5  # one token in five of a response is a key token


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    model = load_model(arguments.model, "float32").eval()
    processor = load_processor(arguments.model)
    builder, engine = PromptBuilder(processor), TransformersEngine(model, processor)
    budget = FrameBudget(max_frames=8, frame_pixels=SIDE * SIDE)
    with tempfile.TemporaryDirectory() as folder:
        manifest = arguments.manifest
        if manifest is None:
            write_lab(LabSettings(folder=folder, train=0, test=arguments.questions, image_share=0.0, seed=7))
            manifest = Path(folder) / "test.json"
        samples = [sample for sample in load_manifest(manifest) if sample.data_type == "video"]
        samples = samples[: arguments.questions]
        media = [decode_media(sample, budget) for sample in samples]

    def questions(contrast: Contrast, unit: ContrastUnit, seed: int = 0) -> list[Question]:
        return [
            build_question(sample, clip, builder, derived_generator(seed, sample.problem_id), contrast, unit)
            for sample, clip in zip(samples, media, strict=True)
        ]

    sampling = SamplingSettings(n=arguments.group, max_tokens=arguments.completion, seed=0)
    ordered = engine.sample([question.ordered for question in questions("reversed", "frame")], sampling)

    def drops(contrast: Contrast, unit: ContrastUnit, seed: int = 0) -> list[Tensor]:
        pairs = zip(questions(contrast, unit, seed), ordered, strict=True)
        found = token_contrasts(model, [Rollouts(*pair) for pair in pairs], 1.0, BATCH)
        return [each for group in found for each in group or []]

    patches = {contrast: drops(contrast, "patch") for contrast in ("shuffled", "reversed")}
    frames = {contrast: drops(contrast, "frame") for contrast in ("shuffled", "reversed")}
    again = drops("shuffled", "frame", seed=1)
    return {
        "units": {
            contrast: agreement(frames[contrast], patches[contrast]) for contrast in ("shuffled", "reversed")
        },
        "two_orders": agreement(frames["shuffled"], again),
        "mean_drop": {
            f"{contrast} {unit}": round(float(means(part[contrast]).mean()), 4)
            for unit, part in (("frame", frames), ("patch", patches))
            for contrast in ("shuffled", "reversed")
        },
        "questions": len(samples),
        "responses": sum(map(len, ordered)),
    } | machine(torch.device("cpu"))


def agreement(first: list[Tensor], second: list[Tensor]) -> dict[str, float]:
    """Of two contrasts' drops of the same responses, [L] each."""
    a, b = means(first), means(second)
    same = total = 0
    for one, other in zip(first, second, strict=True):
        keys = [key_tokens(each) for each in (one, other)]
        same, total = same + int((keys[0] & keys[1]).sum()), total + int(keys[0].sum())
    return {
        "correlation": round(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), 3),
        "rank_correlation": round(float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]), 3),
        "tokens": round(float(torch.corrcoef(torch.stack([torch.cat(first), torch.cat(second)]))[0, 1]), 3),
        "same_key_tokens": round(same / max(1, total), 3),
    }


def key_tokens(drops: Tensor) -> Tensor:
    """Whether |d_t| is among the largest fifth of a completion, [L] bool."""
    change = drops.abs()
    return change >= change.sort(descending=True).values[: -(-len(drops) // KEY_SHARE)][-1:]


def means(drops: list[Tensor]) -> Tensor:
    return torch.stack([each.mean() for each in drops])


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().float()


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default=str(base_folder()))
    parser.add_argument("--manifest", default=None)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--completion", type=int, default=48)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
