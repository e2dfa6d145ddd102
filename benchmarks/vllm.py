"""Rollouts through this project's vLLM engine against a bare `LLM.generate` with the same requests.

    python -m benchmarks.vllm --json [--model FOLDER] [--questions 16] [--group 8] [--completion 64]

Both use the same vLLM in turns, with its caches emptied before each call: what is measured is what the engine
adds (requests made of prompts, checks, Rollouts) and what it saves (its requests are tokenised and processed
already). `equal` says that the engine's tokens are those of the bare
call, `tokens_per_second_transformers` is the rate of the engine without vLLM on the same prompts. Where vLLM
is not installed it says so and succeeds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._command import benchmark_parser
from benchmarks._timing import in_turns, machine, seconds, spread
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import Prompt, PromptBuilder, video_metadata
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor, size_multiple
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.rollout.vllm.requests import prompt_requests
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import FrameBudget


def lab_prompts(processor: Any, count: int, frame_pixels: int) -> list[Prompt]:
    """Lab questions about clips, frames scaled to `frame_pixels`."""
    budget = FrameBudget(
        frame_pixels=frame_pixels, image_pixels=frame_pixels, size_multiple=size_multiple(processor)
    )
    builder = PromptBuilder(processor)
    with tempfile.TemporaryDirectory() as folder:
        write_lab(LabSettings(folder=str(folder), train=0, test=count, image_share=0.0, workers=1))
        samples = load_manifest(Path(folder) / "test.json")
        return [builder.build(sample, read_media(sample, budget)) for sample in samples]


def plain_request(prompt: Prompt, processor: Any) -> dict[str, Any]:
    """The question as one gives it to `LLM.generate`: text and frames, which vLLM tokenises and processes."""
    text = processor.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    frames = prompt.media[0].frames.permute(0, 2, 3, 1).contiguous().numpy()  # [T, H, W, 3]
    metadata = {**video_metadata(prompt.media[0]), "do_sample_frames": False}
    return {"prompt": text, "multi_modal_data": {"video": (frames, metadata)}}


def run(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(arguments.model)
    model = load_model(arguments.model, arguments.dtype, device=device)
    prompts = lab_prompts(processor, arguments.questions, arguments.frame_pixels)
    sampling = SamplingSettings(n=arguments.group, max_tokens=arguments.completion, seed=0)
    longest = max(len(prompt.input_ids) for prompt in prompts) + arguments.completion
    engine = VLLMEngine(model, processor, max_model_len=longest, max_sequences=arguments.sequences)

    requests = [plain_request(prompt, processor) for prompt in prompts]
    vllm = importlib.import_module("vllm")
    asked = prompt_requests(prompts, sampling, None, longest, engine.stop_ids)
    parameters = [vllm.SamplingParams(**request.parameters) for request in asked]

    def ours() -> list[list[int]]:
        return [r.token_ids.tolist() for group in engine.sample(prompts, sampling) for r in group]

    def bare() -> list[list[int]]:
        outputs = engine.llm.generate(requests, parameters, use_tqdm=False)
        return [list(completion.token_ids) for output in outputs for completion in output.outputs]

    def timed(work: Any) -> float:
        engine.reset_caches()
        return seconds(work, device)

    tokens = ours()
    equal = tokens == bare()
    pairs = in_turns(lambda: timed(ours), lambda: timed(bare), arguments.rounds)
    count = sum(len(row) for row in tokens)
    hand_over = statistics.median(
        seconds(lambda: engine.update_weights(model), device) for _ in range(arguments.rounds)
    )
    engine.close()
    in_process = TransformersEngine(model, processor, max_sequences=arguments.sequences)
    theirs = in_process.sample(prompts, sampling)
    others = sum(len(rollout.token_ids) for group in theirs for rollout in group)
    transformers = statistics.median(
        seconds(lambda: in_process.sample(prompts, sampling), device) for _ in range(arguments.rounds)
    )
    return {
        **spread(b / a for a, b in pairs),
        "rounds": arguments.rounds,
        "equal": equal,
        "tokens_per_second": round(count / statistics.median(a for a, _ in pairs)),
        "tokens_per_second_bare": round(count / statistics.median(b for _, b in pairs)),
        "tokens_per_second_transformers": round(others / transformers),
        "hand_over_seconds": round(hand_over, 4),
        "sizes": {
            "weights": sum(p.numel() for p in model.parameters()),
            "prompt": longest - arguments.completion,
            "completion": arguments.completion,
            "group": arguments.group,
            "questions": arguments.questions,
            "dtype": arguments.dtype,
        },
    } | machine(device)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", default=str(base_folder()), help="checkpoint folder")
    parser.add_argument("--dtype", default="float32")
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
