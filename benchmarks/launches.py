"""What a GPU has to launch: kernels and views dispatched by decoding, by the vision tower, by an update.

    python -m benchmarks.launches --json [--tokens 8]

Counted on a CPU, in models with the layers of Qwen2.5-VL-7B (28, and 32 in the tower) and narrow ones, since
the width changes nothing. `decode`: one token of a group of completions, of full weights and with LoRA
adapters on all linear layers. `vision`: a clip of 16 frames of 224 × 448 pixels, forward, recomputation and
backward; `vision_transformers` is the same by transformers alone. `update`: forward, recomputation and
backward of a group in one row. `calls` are those of attention. On a GPU attention of a row takes fewer:
variable-length attention and FlexAttention take one call a layer where the CPU takes several. What follows
for a step is estimated as in `video-r1 plan --gpu h100`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._command import benchmark_parser
from benchmarks._sizes import SIZES, build_model, question
from benchmarks.rollout import TOKENIZER
from video_r1.data.prompts import Prompt
from video_r1.models.group_forward import encode_vision, group_logprobs
from video_r1.models.loading import add_lora
from video_r1.plan.estimate import step_seconds
from video_r1.plan.memory import Sharding, memory_plan
from video_r1.recipe import load_recipe
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine

NARROW = replace(
    SIZES["7b"], vocabulary=1024, hidden=112, heads=7, kv_heads=1, feed_forward=64,
    vision_hidden=64, vision_heads=4, vision_feed_forward=64,
)  # fmt: skip


@dataclass
class Dispatches(TorchDispatchMode):
    """Counts what is dispatched while it is in force; `names` by operator."""

    kernels: int = 0
    views: int = 0
    names: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function._schema.returns
        view = bool(returned) and all(r.alias_info and not r.alias_info.is_write for r in returned)
        self.views += view
        self.kernels += not view
        self.names[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))

    def figures(self) -> dict[str, int]:
        calls = sum(count for name, count in self.names.items() if "attention" in name)
        return {"kernels": self.kernels, "views": self.views, "calls": calls}


def counted(work: Callable[[], Any]) -> Dispatches:
    """What the second call of some work dispatches; the first one sets up what is kept."""
    work()
    with Dispatches() as dispatches:
        work()
    return dispatches


def of_a_token(model: Any, prompt: Prompt, tokens: int) -> dict[str, int]:
    """Dispatches for one more token of eight completions, on average over `tokens`."""
    model.generation_config.eos_token_id = None
    engine = TransformersEngine(model, TOKENIZER)

    def sample(count: int) -> Dispatches:
        return counted(lambda: engine.sample([prompt], SamplingSettings(n=8, max_tokens=count, seed=0)))

    short, long = sample(2), sample(2 + tokens)
    return {
        "kernels": round((long.kernels - short.kernels) / tokens),
        "views": round((long.views - short.views) / tokens),
    }


def tower(model: Any, prompt: Prompt, own: bool) -> Callable[[], None]:
    """Forward, recomputation and backward of the vision tower; `own`: as transformers alone does it."""

    def work() -> None:
        if own:
            features = prompt.features["pixel_values_videos"], prompt.features["video_grid_thw"]
            found = torch.cat(model.model.get_image_features(*features, return_dict=True).pooler_output)
        else:
            (encoded,) = encode_vision(model, [prompt])
            assert encoded is not None
            found = encoded.embeddings
        found.sum().backward()

    return work


def update(model: Any, prompt: Prompt) -> Callable[[], None]:
    completions: list[Tensor] = [torch.full((20 + 10 * number,), 7) for number in range(8)]
    return lambda: group_logprobs(model, [prompt], [completions]).logprobs.sum().backward()


EIGHT = Sharding("FSDP2", 8, True, True, True)
ASLEEP = {"vllm_tensor_parallel_size": 1, "vllm_enable_sleep_mode": True}
FOUR = {"gradient_accumulation_steps": 4}
CASES: dict[str, tuple[str, str, Sharding, dict[str, Any]]] = {
    "7b on 8 H100": ("video-r1-7b-tgrpo", "7b", EIGHT, {}),
    "7b on 8 H100, a vLLM on each GPU": ("video-r1-7b-tgrpo", "7b", EIGHT, {"vllm_tensor_parallel_size": 1}),
    "7b on 8 H100, a vLLM on each GPU that sleeps": ("video-r1-7b-tgrpo", "7b", EIGHT, ASLEEP),
    "7b on 8 H100, four questions a GPU and step": ("video-r1-7b-tgrpo", "7b", EIGHT, FOUR),
    "7b LoRA on 1 H100": ("video-r1-7b-tgrpo-lora", "7b", Sharding(), {}),
    "3b on 1 H100": ("video-r1-3b-tgrpo", "3b", Sharding(), {}),
}


def estimated() -> dict[str, dict[str, Any]]:
    """Estimate the seconds of a step of each case (plan/estimate.py)."""
    found: dict[str, dict[str, Any]] = {}
    for name, (recipe, size, sharding, changes) in CASES.items():
        with torch.device("meta"):
            config = build_model(SIZES[size], torch.device("meta"), torch.float32).config
        read = load_recipe("rl", recipe, changes)
        plan = memory_plan(config, read, gpu_memory=80 * 10**9, sharding=sharding)
        parts = {part: round(value, 2) for part, value in step_seconds(config, plan, "h100").items()}
        found[name] = {
            "questions": read.values()["gradient_accumulation_steps"] * sharding.processes,
            "seconds": round(sum(parts.values()), 2), "parts": parts,
            "peak_gib": round(plan.peak / 2**30, 1),
        }  # fmt: skip
    return found


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8, help="tokens over which decoding is averaged")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    prompt = question(NARROW, torch.Generator().manual_seed(1))
    report: dict[str, Any] = {"layers": NARROW.layers, "vision_layers": NARROW.vision_layers}
    device, dtype = torch.device("cpu"), torch.float32
    for name, own in (("vision_transformers", True), ("vision", False)):
        model = build_model(NARROW, device, dtype).train()
        model.gradient_checkpointing_enable()
        report[name] = counted(tower(model, prompt, own)).figures()
    report["update"] = counted(update(model, prompt)).figures()
    report["decode"] = of_a_token(build_model(NARROW, device, dtype), prompt, arguments.tokens)
    adapted = add_lora(build_model(NARROW, device, dtype), vision_tower=True)
    report["decode_lora"] = of_a_token(adapted, prompt, arguments.tokens)
    report["vision_ratio"] = round(report["vision_transformers"]["kernels"] / report["vision"]["kernels"], 2)
    report["estimated, not measured"] = estimated()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
