"""LoRA in vLLM: merged weights, as the engine hands them over, against adapters that vLLM adds itself.

    python -m benchmarks.compare_adapters [--model FOLDER] [--questions 16] [--group 8] [--completion 64]

Two vLLMs in one process, in turns: seconds of a hand-over (adapters go through a folder, which is vLLM's only
way), completion tokens for each second of this process's CPU time (of wall time on a GPU), and the mean
difference of the log-probs from the trainer's. Prints one JSON object. Where vLLM is not installed it says so
and succeeds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._command import benchmark_parser
from benchmarks._timing import in_turns, machine, seconds
from benchmarks.vllm import lab_prompts
from video_r1.data.rollouts import Rollout
from video_r1.lab.model import base_folder
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import add_lora, load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.vllm import engine as vllm_engine
from video_r1.rollout.vllm.engine import VLLMEngine

Rollouts = list[list[Rollout]]


class AdapterEngine(VLLMEngine):
    """Keeps the base's weights, and asks for its completions with the adapters handed over last."""

    def __init__(self, model: str, processor: Any, rank: int, **settings: Any) -> None:
        start = vllm_engine._start
        vllm_engine._start = lambda given: start({**given, "enable_lora": True, "max_lora_rank": rank})
        try:
            super().__init__(model, processor, **settings)
        finally:
            vllm_engine._start = start
        self.count, self.folder = 0, tempfile.TemporaryDirectory()
        self.request = importlib.import_module("vllm.lora.request").LoRARequest
        core = self.llm.llm_engine
        add = core.add_request
        core.add_request = lambda *given: add(*given, lora_request=self.adapters)

    def update_weights(self, model: Any) -> None:
        self.count += 1
        folder = f"{self.folder.name}/{self.count}"
        model.save_pretrained(folder)
        self.adapters = self.request(folder, self.count, folder)
        self.llm.llm_engine.add_lora(self.adapters)
        self.reset_caches()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(arguments.model)
    model: Any = add_lora(load_model(arguments.model, arguments.dtype, device=device), rank=arguments.rank)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    prompts = lab_prompts(processor, arguments.questions, arguments.frame_pixels)
    sampling = SamplingSettings(n=arguments.group, max_tokens=arguments.completion, seed=0)
    longest = max(len(prompt.input_ids) for prompt in prompts) + arguments.completion
    settings: Any = {"dtype": arguments.dtype, "max_model_len": longest, "max_sequences": arguments.sequences}
    merged = VLLMEngine(arguments.model, processor, **settings)
    adapters = AdapterEngine(arguments.model, processor, arguments.rank, **settings)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def handed(engine: VLLMEngine) -> Callable[[], float]:
        return lambda: seconds(lambda: engine.update_weights(model), device)

    def rate(engine: VLLMEngine) -> Callable[[], float]:
        def measured() -> float:
            engine.reset_caches()
            start = clock()
            rollouts = engine.sample(prompts, sampling)
            return sum(len(one.token_ids) for group in rollouts for one in group) / (clock() - start)

        return measured

    def difference(engine: VLLMEngine) -> float:
        groups: Rollouts = engine.sample(prompts, sampling)
        with torch.no_grad():
            ids = [[rollout.token_ids for rollout in group] for group in groups]
            scored = group_logprobs(model, prompts, ids).logprobs.cpu()
        return float((scored - torch.cat([one.logprobs for group in groups for one in group])).abs().mean())

    both = (merged, adapters)
    for engine in both:
        handed(engine)()
        rate(engine)()
    times = in_turns(handed(merged), handed(adapters), arguments.rounds)
    rates = in_turns(rate(merged), rate(adapters), arguments.rounds)
    figures = {
        "hand_over_seconds": [round(statistics.median(each), 4) for each in zip(*times, strict=True)],
        "tokens_per_second": [round(statistics.median(each)) for each in zip(*rates, strict=True)],
        "difference": [difference(engine) for engine in both],
        "order": ["merged", "adapters"],
        "rounds": arguments.rounds,
        "weights": sum(p.numel() for p in model.parameters()),
        "adapter_weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    for engine in both:
        engine.close()
    return figures | machine(device)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default=str(base_folder()), help="checkpoint folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64, help="most tokens of a completion")
    parser.add_argument("--sequences", type=int, default=128, help="completions decoded at once")
    parser.add_argument("--frame_pixels", type=int, default=56 * 56)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print(json.dumps({"skipped": "vLLM is not installed"}))
    else:
        print(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
