"""Estimated seconds of a T-GRPO step on GPUs, not a measurement: `video-r1 plan RECIPE --gpu h100`.

    seconds of a part = max(FLOPs ÷ rate, bytes ÷ bandwidth, launches × time of a launch)

FLOPs are 2 a weight and token forward (Kaplan et al. 2020, arXiv 2001.08361), twice that backward, plus
attention. Bytes are what decoding reads: all weights, keys and values at every token. Launches are counted by
`python -m benchmarks.launches`. Not included: waiting for the longest completion of other ranks, decoding of
clips (which runs in parallel), validation and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from video_r1.models.general_forward import micro_batches
from video_r1.plan.fake_trace import Row, Traced
from video_r1.plan.memory import Sharding
from video_r1.plan.trace import tower_depth
from video_r1.recipe import Recipe
from video_r1.settings.commands import GPUS
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import TGRPOSettings

MATRIX_SHARE = 0.5  # share of the peak rate that large matrix products reach in practice
BANDWIDTH_SHARE = 0.8
LENGTH_SHARE = 0.5  # average length of completions, as a share of max_completion_length
LAUNCH_SECONDS = 5e-6
REPLAY_SECONDS = 50e-6  # of a decoding step in a CUDA graph or in vLLM


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernel launches, counted by `benchmarks/launches.py`."""

    token: float = 52  # a decoded token in a text layer
    block: float = 150  # a vision block in an update: forward, recomputation, backward
    layer: float = 285  # a text layer in an update
    replayed: bool = True  # decoding is a CUDA graph


@dataclass(frozen=True, slots=True)
class Part:
    """Work of one GPU in a part of a step, and the estimated seconds."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate of a step: its parts on one GPU by name, and its questions over all GPUs.

    MFU = FLOPs of the update's forward and backward, without recomputation ÷ (seconds of a step × peak rate).
    """

    gpu: str
    parts: dict[str, Part]
    questions: int
    useful_flops: float

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def mfu(self) -> float:
        return self.useful_flops / (self.seconds * 1e12 * GPUS[self.gpu].tflops)


def estimate(
    config: Any,
    recipe: Recipe,
    traced: Traced,
    row: Row,
    sharding: Sharding,
    gpu: str,
    launches: Launches = Launches(),
) -> Estimate:
    """Estimate a step of a recipe for `rl` on this kind of GPU (a name in GPUS)."""
    training, values = recipe.section(TGRPOSettings), recipe.values()
    lora = recipe.section(ModelSettings).use_peft
    card, text = GPUS[gpu], config.get_text_config()
    layers, blocks = text.num_hidden_layers, tower_depth(config)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head = text.vocab_size * text.hidden_size
    body = sum(traced.text_linear) - head
    groups = training.per_device_train_batch_size * training.gradient_accumulation_steps
    length = LENGTH_SHARE * row.completion
    orders = 2 if training.shuffled_generations else 1
    sequences = groups * (training.num_generations + training.shuffled_generations)
    patches = row.patches or row.visual * config.vision_config.spatial_merge_size**2
    tower = 2 * patches * traced.vision_linear

    def forward(
        tokens: float, seen: float, predicting: float
    ) -> float:  # tokens that attend to `seen` others
        attention = 4 * seen * text.num_attention_heads * size * layers
        return tokens * (2 * body + attention) + 2 * predicting * head

    def part(flops: float = 0.0, moved: float = 0.0, count: float = 0.0, fixed: float = 0.0) -> Part:
        arithmetic = flops / (MATRIX_SHARE * 1e12 * card.tflops)
        memory = moved / (BANDWIDTH_SHARE * 1e12 * card.terabytes)
        return Part(flops, moved, count, max(arithmetic, memory, count * LAUNCH_SECONDS) + fixed)

    answers = training.num_generations * length
    # The general path repeats the prompt for each completion and samples one question at a time.
    copies = training.num_generations if row.repeated else 1
    batches, turns = 1, 1
    prefilled = groups * orders
    if row.repeated:
        batches = len(list(micro_batches(row.prompt, [row.completion] * training.num_generations)))
        turns, prefilled = groups * orders, sequences
    row_flops = copies * forward(row.prompt, row.prompt / 2, 0)
    row_flops += forward(answers, row.prompt + length / 2, answers) + tower
    useful = row_flops * (2 if lora else 3)  # LoRA: no gradients of frozen weights
    again = row_flops * bool(values.get("gradient_checkpointing"))
    passes = batches * layers * launches.layer + blocks * launches.block

    judged = bool(training.beta)
    cached = 4 * layers * text.num_key_value_heads * size  # bytes of a token's keys and values in bf16
    replayed = not row.repeated and (launches.replayed or bool(values.get("use_vllm")))
    read = 2 * turns * (body + head) + cached * (prefilled * row.prompt + sequences * length / 2)
    parts = {
        "prefill": part(prefilled * forward(row.prompt, row.prompt / 2, 1) + groups * orders * tower),
        "decoding": part(
            length * forward(sequences, row.prompt + length / 2, sequences),
            length * read,
            0.0 if replayed else turns * length * layers * launches.token,
            length * REPLAY_SECONDS * replayed,
        ),
        "reference": part(groups * judged * row_flops, count=groups * judged * passes / 4),
        "update": part(groups * (useful + again), count=groups * passes),
        "optimizer": part(moved=16.0 * traced.trainable * sharding.share(sharding.optimizer)),
    }
    if sharding.weights and sharding.processes > 1:
        # bf16 weights for rollouts, reference, forward and backward; float32 gradients once
        times = 1 + judged + 2 * training.gradient_accumulation_steps
        moved = float((2 * times + 4) * traced.parameters)
        parts["exchange"] = Part(bytes=moved, seconds=moved / (1e9 * card.link))
    return Estimate(gpu, parts, groups * sharding.processes, groups * useful)


def described(found: Estimate) -> list[str]:
    """Return the estimate and its assumptions as lines of text."""
    card = GPUS[found.gpu]
    return [
        f"a step of {found.questions} questions on {found.gpu}, estimated, not measured",
        *(
            f"  {name:<12}{part.seconds:8.2f} s{part.flops / 1e12:9,.0f} TFLOP{part.launches:9,.0f} launches"
            for name, part in found.parts.items()
        ),
        f"  {'total':<12}{found.seconds:8.2f} s   MFU {found.mfu:.0%} (update's FLOPs ÷ step × peak)",
        f"  assumed: {MATRIX_SHARE:.0%} of {card.tflops:,.0f} TFLOP/s in bf16, {BANDWIDTH_SHARE:.0%} of "
        f"{card.terabytes:g} TB/s, {LAUNCH_SECONDS * 1e6:g} µs a launch, completions of",
        f"  {LENGTH_SHARE:.0%} of max_completion_length, longest prompts, clips decoded in parallel",
    ]
