"""Estimated seconds of a training step on GPUs, not a measurement: `video-r1 plan RECIPE`.

    seconds of a part = max(FLOPs ÷ rate, bytes ÷ bandwidth, launches × time of a launch)

FLOPs are 2 a weight and token forward (Kaplan et al. 2020, arXiv 2001.08361), twice that backward, plus
attention. Decoding lasts as long as the longest completion, which is assumed to reach its limit; at every
token it reads all weights, keys and values. Launches are counted by `python -m benchmarks.launches`. Not
included: decoding of clips (which runs in parallel), validation and checkpoints.
"""

from typing import Any

from video_r1.models.general_forward import micro_batches
from video_r1.plan.memory import MemoryPlan, head_size
from video_r1.plan.trace import tower_depth
from video_r1.rewards.temporal import rule_of
from video_r1.settings.commands import GPUS
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings
from video_r1.settings.vllm import EngineSettings

MATRIX_SHARE = 0.5  # share of the peak rate that large matrix products reach in practice
BANDWIDTH_SHARE = 0.8
LENGTH_SHARE = 0.5  # average length of completions, as a share of their limit
LAUNCH_SECONDS = 10e-6  # of a kernel, with the Python around it
TOKEN_SECONDS = 1e-3  # beside the model: scheduling, sampling and Python at each decoded token
REDUCE_SECONDS = 15e-6  # adding a layer's results in the processes of one vLLM
SYNC_SECONDS = 0.3  # handing the weights to vLLM, tensor by tensor
SLEEP_SECONDS = 1.0  # vLLM frees its memory and takes it again
ERROR = 0.75, 1.2  # shortest and longest step, as shares of the estimate
LAUNCHES_OF_BLOCK, LAUNCHES_OF_LAYER = 150, 285  # in an update: forward, recomputation, backward
LAUNCHES_OF_TOKEN = 52  # in a text layer, where decoding is not a CUDA graph


def row_flops(config: Any, plan: MemoryPlan, length: float) -> float:
    """Return the FLOPs of a forward pass of one question: tower, prompt and completions of this length."""
    row, traced = plan.row, plan.traced
    copies = row.completions if row.repeated else 1  # the general path repeats the prompt
    answers, head = row.completions * length, _head(config)
    flops = copies * _text_flops(config, plan, row.prompt, row.prompt / 2)
    read, seen = answers + row.completions * row.returned, row.prompt + (length + row.returned) / 2
    flops += _text_flops(config, plan, read, seen) + 2 * answers * head
    return flops + 2 * (row.patches + row.looked) * traced.vision_linear


def _text_flops(config: Any, plan: MemoryPlan, tokens: float, seen: float) -> float:
    """Return the forward FLOPs, without head, of tokens that attend to `seen` others."""
    text = config.get_text_config()
    attention = 4 * seen * text.num_attention_heads * head_size(text) * text.num_hidden_layers
    return tokens * (2 * (plan.traced.text_linear - _head(config)) + attention)


def _head(config: Any) -> int:
    return config.get_text_config().vocab_size * config.get_text_config().hidden_size


def step_seconds(config: Any, plan: MemoryPlan, gpu: str) -> dict[str, float]:
    """Estimate the seconds of a step's parts on this kind of GPU (a name in GPUS)."""
    recipe, row, traced, sharding = plan.recipe, plan.row, plan.traced, plan.sharding
    training: Any = recipe.section(TGRPOSettings if recipe.command == "rl" else SFTSettings)
    card, text = GPUS[gpu], config.get_text_config()
    groups = training.per_device_train_batch_size * training.gradient_accumulation_steps
    length, bandwidth = LENGTH_SHARE * row.completion, BANDWIDTH_SHARE * 1e12 * card.terabytes

    def part(flops: float = 0.0, moved: float = 0.0, launches: float = 0.0) -> float:
        return max(flops / (MATRIX_SHARE * 1e12 * card.tflops), moved / bandwidth, launches * LAUNCH_SECONDS)

    forward = row_flops(config, plan, length)
    passes = 2 if recipe.section(ModelSettings).use_peft else 3  # LoRA: no gradients of frozen weights
    again = bool(recipe.values().get("gradient_checkpointing"))
    batches = len(list(micro_batches(row.prompt, [row.completion] * row.completions))) if row.repeated else 1
    launches = batches * text.num_hidden_layers * LAUNCHES_OF_LAYER + tower_depth(config) * LAUNCHES_OF_BLOCK
    parts = {
        "update": part(groups * (passes + again) * forward, launches=groups * launches),
        "optimizer": part(moved=16.0 * traced.trainable * sharding.share(sharding.optimizer)),
    }
    judged = recipe.command == "rl" and training.beta != 0
    scored = recipe.command == "rl" and rule_of(training).contrast == "scored"
    if recipe.command == "rl":
        parts = _rollout_seconds(config, plan, part, groups, length) | parts
        parts["reference"] = judged * part(groups * forward, launches=groups * launches / 4)
        if scored:  # the clip and its contrast: decoding in bf16 rounds
            parts["contrast"] = part(2 * groups * forward, launches=2 * groups * launches / 4)
        if plan.teacher is not None:  # two operations a weight and token; its attention is left out
            flops = 2 * plan.teacher.parameters * plan.teacher.row.tokens / plan.teacher.row.questions
            parts["teacher"] = part(groups * flops, launches=groups * launches / 4)
    if sharding.weights and sharding.processes > 1:
        # bf16 weights for rollouts, reference, forward and backward; float32 gradients once
        times = (recipe.command == "rl") + judged + 2 * scored + 2 * training.gradient_accumulation_steps
        parts["exchange"] = (2 * times + 4) * traced.parameters / (1e9 * card.link)
    return parts


def _rollout_seconds(
    config: Any, plan: MemoryPlan, part: Any, groups: int, length: float
) -> dict[str, float]:
    training, ours = plan.recipe.section(TGRPOSettings), plan.recipe.section(EngineSettings)
    row, text = plan.row, config.get_text_config()
    shared = ours.vllm.tensor_parallel_size if plan.vllm is not None else 1
    orders = 2 if training.contrast_generations else 1
    prompts = groups * orders
    sequences = groups * (training.num_generations + training.contrast_generations)
    # the general path samples one question at a time and repeats its prompt
    turns, prefilled = (prompts, sequences) if row.repeated else (1, prompts)
    weights = 2 * turns * plan.traced.text_linear / shared
    cached = 4 * text.num_hidden_layers * text.num_key_value_heads * head_size(text)  # bytes of a token
    read = weights + cached * (prefilled * row.prompt + sequences * length / 2)
    flops = _text_flops(config, plan, sequences, row.prompt + length / 2) + 2 * sequences * _head(config)
    launches = turns * text.num_hidden_layers * LAUNCHES_OF_TOKEN * row.repeated
    reduced = 2 * text.num_hidden_layers * REDUCE_SECONDS * (shared > 1)
    token = part(flops, read, launches) + turns * TOKEN_SECONDS + reduced
    prompt = _text_flops(config, plan, row.prompt, row.prompt / 2) + 2 * _head(config)
    tower = 2 * row.patches * plan.traced.vision_linear
    returned = sequences * row.returned  # what tools return is read once, with its visuals
    more = _text_flops(config, plan, returned, row.prompt + row.returned / 2)
    more += 2 * plan.traced.vision_linear * row.looked * sequences / row.completions
    prefill = prefilled * prompt + prompts * tower + more
    parts = {"prefill": part(prefill), "decoding": row.completion * token}
    if ours.use_vllm:
        parts["weight sync"] = SYNC_SECONDS
    if plan.vllm is not None and ours.vllm.enable_sleep_mode:
        parts["sleeping"] = SLEEP_SECONDS
    return parts


def describe_time(config: Any, plan: MemoryPlan, gpu: str) -> list[str]:
    training, card = plan.recipe.values(), GPUS[gpu]
    questions = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    questions *= plan.sharding.processes
    parts = step_seconds(config, plan, gpu)
    seconds = sum(parts.values())
    least, most = (share * seconds for share in ERROR)
    steps = training["max_steps"]
    count, run = (steps, f"{steps:,} steps") if steps > 0 else (10000 / questions, "10,000 questions")
    return [
        f"time on {plan.sharding.processes} × {gpu}, estimated, not measured:",
        *(f"  {name:<15}{value:9.2f} s" for name, value in parts.items()),
        f"  a step of {questions} questions: {seconds:.1f} s ({least:.1f} to {most:.1f}); "
        f"{run}: {count * seconds / 3600:.1f} hours",
        f"  assumed: {MATRIX_SHARE:.0%} of {card.tflops:,.0f} TFLOP/s in bf16, {BANDWIDTH_SHARE:.0%} of "
        f"{card.terabytes:g} TB/s, the longest prompts, completions of",
        f"  {LENGTH_SHARE:.0%} of their limit, the longest one at the limit, clips decoded in parallel",
    ]
