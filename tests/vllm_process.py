"""One of the processes of test_vllm_processes.py: samples its own prompts, before and after a hand-over."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed
from vllm_prompts import change, clip_prompts, differences

from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.settings.vllm import VLLMSettings

torch.set_num_threads(1)


def main(folder: Path, size: int) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, processor = load_model(base_folder(), "float32"), load_processor(base_folder())
    settings = VLLMSettings(tensor_parallel_size=size)
    engine = VLLMEngine(model, processor, max_model_len=512, max_sequences=16, settings=settings)
    engine.update_weights(model)
    prompts = clip_prompts(processor)[rank:]  # the ranks ask for different things, and for different amounts
    settings = SamplingSettings(n=2 + rank, max_tokens=8, seed=rank)
    found = []
    for _ in range(2):
        groups = engine.sample(prompts, settings)
        found.append(float(differences(model, prompts, groups).mean()))
        change(model)
        found.append(float(differences(model, prompts, engine.sample(prompts, settings)).mean()))
        engine.update_weights(model)
    if rank:
        assert engine.sample([], settings) == []
    else:
        engine.sample(prompts[:1], settings)
    counts = [len(group) for group in groups]
    torch.save({"differences": found, "counts": counts}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
