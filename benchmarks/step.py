"""A whole T-GRPO step: decoding, both rollouts, rewards and update, against the reference's algorithm.

    python -m benchmarks.step --json [--size small|lab] [--completion 64] [--group 8] [--frozen] [--gate]

Both have the same clip files, model, rewards, loss and optimizer. The reference's way: G completions by
`model.generate(num_return_sequences=G)` and G/2 more with shuffled frames, then the pixels and the prompt
repeated G times for policy and frozen copy, with logits at every position. Clips are decoded once for both
frame orders on both sides. Neither side stops a completion early. `equal`: log-probabilities of the same
completions by both ways, within 1e-5. `--gate`: seconds and FLOPs of our step by the rule likelihood_gate,
which samples nothing from the contrast clip, over those by margin, for each `contrast_unit`.
`--frozen`: the vision tower is, so that our updates and KL share its output, and with patches the drops too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks._command import benchmark_parser
from benchmarks._sizes import SIZES, build_model
from benchmarks._timing import compare, flops, in_turns, machine, seconds, spread
from benchmarks.decode import write_clip
from benchmarks.update import TOLERANCES, expanded_logprobs
from video_r1.data.decoding.media import decode_media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.reading import Question, build_question
from video_r1.data.rollouts import Group, Rollout, Rollouts
from video_r1.lab.model import base_folder
from video_r1.models.group_forward import VisionFeatures, encode_vision, group_logprobs
from video_r1.models.loading import freeze_vision, load_processor
from video_r1.rewards.scoring import RewardTerms, reward_terms
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.frames import ContrastUnit, FrameBudget
from video_r1.settings.training import TGRPOSettings
from video_r1.training import step
from video_r1.training.logprob_contrast import samples_as_it_scores
from video_r1.training.objective import surrogate_loss
from video_r1.training.reference import frozen_copy
from video_r1.training.step import advantages, sample, score

Vision = list[VisionFeatures | None] | None
SIDES = {"lab": 56, "small": 224}  # pixels of a frame as the model sees it


class Step:
    """What both sides share: questions, model, frozen copy, optimizer and settings."""

    def __init__(self, arguments: argparse.Namespace, clips: list[Path], device: torch.device) -> None:
        processor = load_processor(base_folder())
        tokenizer: Any = getattr(processor, "tokenizer")  # noqa: B009  (mixins declare no attributes)
        vocabulary = -(-len(tokenizer) // 64) * 64
        model: Any = build_model(replace(SIZES[arguments.size], vocabulary=vocabulary), device, torch.float32)
        names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
        names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
        for name, token in names.items():
            setattr(model.config, name, tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
        self.visual = torch.tensor([model.config.image_token_id, model.config.video_token_id])
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = None
        self.frozen: bool = arguments.frozen
        if self.frozen:
            freeze_vision(model)
        self.model, self.reference = model.eval(), frozen_copy(model, Accelerator())
        self.builder = PromptBuilder(processor)
        side = SIDES[arguments.size]
        self.budget = FrameBudget(max_frames=SIZES[arguments.size].frames, frame_pixels=side * side)
        self.samples = [
            Sample(number, "Which way does the box move?", "video", "multiple choice", "<answer>A</answer>",
                   str(clip), ("A. left", "B. right"))
            for number, clip in enumerate(clips)
        ]  # fmt: skip
        self.settings = TGRPOSettings(
            num_generations=arguments.group, max_completion_length=arguments.completion, length_reward=0.0,
            temporal_rule="margin",
        )  # fmt: skip
        self.gate = {
            unit: replace(self.settings, temporal_rule="likelihood_gate", contrast_unit=unit)
            for unit in get_args(ContrastUnit)
        }
        self.terms: RewardTerms = reward_terms(None, self.settings)
        self.engine = TransformersEngine(model, _Tokenizer(tokenizer))
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
        self.generator = torch.Generator().manual_seed(1)

    def questions(self, settings: TGRPOSettings | None = None) -> list[Question]:
        settings = settings or self.settings
        return [
            build_question(
                sample, decode_media(sample, self.budget), self.builder, self.generator, settings.contrast,
                settings.contrast_unit,
            )
            for sample in self.samples
        ]  # fmt: skip

    def scored(self, rollouts: list[Rollouts], settings: TGRPOSettings) -> list[Group]:
        rewards = score(rollouts, self.terms, settings, self.builder.question)
        groups = advantages(rollouts, rewards, settings)
        # random answers earn nothing
        return [replace(g, advantages=g.advantages + torch.linspace(-1, 1, len(g.ordered))) for g in groups]

    def learn(self, groups: list[Group], logprobs: Tensor, judged: Tensor, lengths: Tensor) -> None:
        settings = self.settings
        advantages = torch.cat([group.advantages for group in groups]).to(logprobs.device)
        loss = surrogate_loss(
            logprobs, logprobs.detach(), advantages, lengths, normaliser=float(len(lengths)),
            loss_type=settings.loss_type, beta=settings.beta, ref_logprobs=judged,
        ).loss  # fmt: skip
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def ours(self) -> list[Group]:
        settings = self.settings
        questions = self.questions()
        groups = self.scored(sample(self.engine, questions, settings), settings)
        return self.updated(groups, self.vision([group.prompt for group in groups]))

    def vision(self, prompts: list[Prompt]) -> Vision:
        """Of a frozen tower, to be shared."""
        with torch.no_grad():
            return encode_vision(self.model, prompts) if self.frozen else None

    def updated(self, groups: list[Group], vision: Vision) -> list[Group]:
        prompts = [group.prompt for group in groups]
        completions = [[rollout.token_ids for rollout in group.ordered] for group in groups]
        policy = group_logprobs(self.model, prompts, completions, with_entropy=True, vision_features=vision)
        with torch.no_grad():
            judged = group_logprobs(self.reference, prompts, completions, vision_features=vision).logprobs
        self.learn(groups, policy.logprobs, judged, policy.lengths)
        return groups

    def gated(self, unit: ContrastUnit) -> list[Group]:
        """As `ours`, by the gate: completions are scored with the contrast clip; none are sampled from it."""
        settings = self.gate[unit]
        questions = self.questions(settings)
        rollouts = sample(self.engine, questions, settings)
        exact = samples_as_it_scores(self.model)
        rollouts = step.compare(self.model, rollouts, settings, len(questions), exact, self.frozen)
        vision = [one.vision[0] for one in rollouts if one.vision is not None]
        shared = vision or self.vision([question.ordered for question in questions])
        return self.updated(self.scored(rollouts, settings), shared)

    def generate(self, prompt: Prompt, count: int) -> list[Rollout]:
        inputs = {name: value.to(self.model.device) for name, value in prompt.features.items()}
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].view(1, -1)
        inputs["input_ids"] = prompt.input_ids[None].to(self.model.device)
        with torch.no_grad():
            rows = self.model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=count,
                max_new_tokens=self.settings.max_completion_length,
                pad_token_id=0,
                suppress_tokens=self.visual.tolist(),
            )[:, len(prompt.input_ids) :].cpu()
        texts = self.builder.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        none = torch.zeros(rows.shape[1])
        return [Rollout(row, none, text, "length") for row, text in zip(rows, texts, strict=True)]

    def expanded(self) -> None:
        settings = self.settings
        questions = self.questions()
        rollouts = [
            Rollouts(
                question,
                self.generate(question.ordered, settings.num_generations),
                self.generate(question.contrast, settings.contrast_generations) if question.contrast else [],
            )
            for question in questions
        ]
        groups = self.scored(rollouts, settings)
        prompts = [group.prompt for group in groups]
        completions = [[rollout.token_ids for rollout in group.ordered] for group in groups]
        policy = expanded_logprobs(self.model, prompts, completions)
        with torch.no_grad():
            judged = expanded_logprobs(self.reference, prompts, completions)
        lengths = torch.tensor([len(tokens) for group in completions for tokens in group])
        self.learn(groups, policy, judged, lengths.to(policy.device))

    def largest_difference(self) -> float:
        """Of log-probabilities, over one step's completions that hold no visual placeholder."""
        largest = 0.0
        for group in self.ours():
            completions = [
                r.token_ids for r in group.ordered if not torch.isin(r.token_ids, self.visual).any()
            ]
            if completions:
                with torch.no_grad():
                    packed = group_logprobs(self.model, [group.prompt], [completions]).logprobs
                    apart = expanded_logprobs(self.model, [group.prompt], [completions])
                largest = max(largest, float((packed - apart).abs().max()))
        return largest


class _Tokenizer:
    """The tokenizer as the engine uses it, without an end token."""

    eos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self.batch_decode = tokenizer.batch_decode

    def get_vocab(self) -> dict[str, int]:
        return {}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        clips = [
            write_clip(Path(folder) / f"{number}.mp4", 360, 640, 25 * 8, number)
            for number in range(arguments.questions)
        ]
        step = Step(arguments, clips, device)
        result = (gate_to_margin if arguments.gate else against_reference)(step, arguments.rounds, device)
        sizes = {
            "model": arguments.size,
            "weights": sum(p.numel() for p in step.model.parameters()),
            "prompt": len(step.questions()[0].ordered.input_ids),
            "completion": arguments.completion,
            "group": arguments.group,
            "shuffled": step.settings.contrast_generations,
            "questions": arguments.questions,
            "frozen": arguments.frozen,
        }
    return {**result, "sizes": sizes, **machine(device)}


def against_reference(step: Step, rounds: int, device: torch.device) -> dict[str, Any]:
    difference = step.largest_difference()
    counted, counted_expanded = flops(step.ours), flops(step.expanded)
    return {
        **compare(step.ours, step.expanded, rounds, device),
        "flop_ratio": round(counted_expanded / counted, 3),
        "equal": difference <= TOLERANCES[torch.float32][0],
        "largest_logprob_difference": difference,
    }


def gate_to_margin(step: Step, rounds: int, device: torch.device) -> dict[str, Any]:
    counted = flops(step.ours)
    units: dict[str, dict[str, float]] = {}
    for unit in get_args(ContrastUnit):
        gated = partial(step.gated, unit)
        pairs = in_turns(lambda work=gated: seconds(work, device), lambda: seconds(step.ours, device), rounds)
        units[unit] = spread(a / b for a, b in pairs)
        units[unit]["flops"] = round(flops(gated) / counted, 3)
    return {"gate_to_margin": units, "rounds": rounds}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", choices=SIDES, default="small")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--frozen", action="store_true", help="the vision tower does not train")
    parser.add_argument("--gate", action="store_true", help="the rule likelihood_gate against margin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
