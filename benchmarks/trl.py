"""The same image questions through TRL's `GRPOTrainer` and through this project's trainer.

    python -m benchmarks.trl --json [--completion 64] [--group 8] [--questions 2] [--steps 3] [--rounds 2]

Both load the same checkpoint (random weights, the lab's tokenizer) and train it for some steps with the same
questions, images, reward function, G, lengths, sampling, AdamW, learning rate, KL weight and loss. TRL counts
completions in its batch size, this project questions. Compared are the seconds from one step's end to the
next's, in turns; the first step of a run is left out. TRL (extra `bench`) keeps its defaults otherwise.
`equal`: both had prompts of the same length, and completions of the same mean length within a tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)

from benchmarks._command import benchmark_parser
from benchmarks._sizes import SIZES, build_model
from benchmarks._timing import in_turns, machine, spread
from video_r1.data.decoding.media import decode_media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import PromptBuilder
from video_r1.lab.model import CHAT_TEMPLATE, base_folder
from video_r1.models.loading import load_processor
from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer

SIDE = 336  # pixels: 12 × 12 visual tokens
QUESTION = "How many boxes are in the picture?"


class StepEnds(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def distinct_letters(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward that differs between random texts; TRL gives messages, this project text."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text)) / 100 for text in texts]


def write_checkpoint(folder: Path) -> Path:
    tokenizer: Any = getattr(load_processor(base_folder()), "tokenizer")  # noqa: B009
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels), tokenizer, Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    vocabulary = -(-len(tokenizer) // 64) * 64
    model = build_model(replace(SIZES["small"], vocabulary=vocabulary), torch.device("cpu"), torch.float32)
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    for name, token in names.items():
        setattr(model.config, name, tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)
    return paths


def common(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": not torch.cuda.is_available(), "bf16": False, "seed": 1,
        "max_steps": arguments.steps + 1, "learning_rate": 1e-6, "lr_scheduler_type": "constant",
        "weight_decay": 0.01, "max_grad_norm": 5.0, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "gradient_checkpointing": False, "num_generations": arguments.group, "temperature": 1.0, "beta": 0.04,
        "max_completion_length": arguments.completion, "epsilon": 0.2, "loss_type": "grpo",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def train_ours(
    arguments: argparse.Namespace, checkpoint: Path, images: list[Path]
) -> tuple[list[float], float, int]:
    samples = [
        Sample(number, QUESTION, "image", "numerical", "<answer>3</answer>", str(path))
        for number, path in enumerate(images)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ends = StepEnds()
        trainer = TGRPOTrainer(
            str(checkpoint),
            distinct_letters,
            TGRPOConfig(
                **common(arguments, Path(folder)), per_device_train_batch_size=arguments.questions,
                temporal_rule="off", length_reward=0.0, image_pixels=SIDE * SIDE, preflight_questions=0,
                log_rollouts=0,
            ),
            samples,
            callbacks=[ends],
        )  # fmt: skip
        trainer.train()
        lengths = [
            line["completion/length"] for line in trainer.state.log_history if "completion/length" in line
        ]
        prompt = trainer.builder.build(samples[0], decode_media(samples[0], trainer.reader.budget))
    return ends.seconds, statistics.mean(lengths), len(prompt.input_ids)


def train_trl(
    arguments: argparse.Namespace, checkpoint: Path, images: list[Path]
) -> tuple[list[float], float, int]:
    from datasets import Dataset
    from datasets import Image as ImageColumn

    trl = import_module("trl")
    processor: Any = load_processor(checkpoint)
    sample = Sample(0, QUESTION, "image", "numerical", "<answer>3</answer>", str(images[0]))
    text = PromptBuilder(processor).question(sample)
    rows = {"prompt": [[{"role": "user", "content": text}]] * len(images), "image": [str(p) for p in images]}
    with tempfile.TemporaryDirectory() as folder:
        ends = StepEnds()
        settings = trl.GRPOConfig(
            **common(arguments, Path(folder)),
            per_device_train_batch_size=arguments.questions * arguments.group,
            generation_kwargs={"suppress_tokens": processor.tokenizer.convert_tokens_to_ids(
                ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])},
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=str(checkpoint),
            reward_funcs=distinct_letters,
            args=settings,
            train_dataset=Dataset.from_dict(rows).cast_column("image", ImageColumn()),
            processing_class=processor,
            callbacks=[ends],
        )
        trainer.train()
        lengths = [line["completions/mean_length"] for line in trainer.state.log_history
                   if "completions/mean_length" in line]  # fmt: skip
        first = next(line for line in trainer.state.log_history if "num_tokens" in line)
        tokens = first["num_tokens"] / (arguments.questions * arguments.group)
    return ends.seconds, statistics.mean(lengths), round(tokens - first["completions/mean_length"])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "model")
        images = write_images(folder, 4 * arguments.questions)
        lengths: dict[str, float] = {}
        prompts: dict[str, int] = {}

        def trained(side: str, train: Callable[..., tuple[list[float], float, int]]) -> float:
            with contextlib.redirect_stdout(sys.stderr):  # the trainers print their series
                seconds, lengths[side], prompts[side] = train(arguments, checkpoint, images)
            gc.collect()
            return statistics.median(seconds)

        pairs = in_turns(
            lambda: trained("ours", train_ours), lambda: trained("trl", train_trl), arguments.rounds
        )
    return {
        **spread(b / a for a, b in pairs),
        "seconds": round(statistics.median(a for a, _ in pairs), 3),
        "seconds_other": round(statistics.median(b for _, b in pairs), 3),
        "rounds": arguments.rounds,
        "equal": prompts["ours"] == prompts["trl"]
        and abs(lengths["ours"] - lengths["trl"]) <= 0.1 * lengths["trl"],
        "mean_lengths": {side: round(length, 1) for side, length in lengths.items()},
        "sizes": {
            "model": "small",
            "image": SIDE,
            "prompt": prompts["ours"],
            "prompt_other": prompts["trl"],
            "completion": arguments.completion,
            "group": arguments.group,
            "questions": arguments.questions,
            "steps": arguments.steps,
        },
        "trl": metadata.version("trl"),
    } | machine(torch.device("cpu"))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--questions", type=int, default=2, help="in one step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=2)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
