"""Checks that need a GPU; `make gpu-check` runs them and collects their figures (gpu_check.py).

Without a GPU all are skipped. test_gpu_check.py runs some of them on the CPU, to show that the checks work.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from group_batches import build, expanded_logprobs, make_prompt, tokens_of
from tiny_models import tiny_model, tiny_processor
from torch import Tensor
from vllm_prompts import clip_prompts, differences

from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.models import vision
from video_r1.models.group_forward import encode_vision, group_logprobs
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout import shared_prefix
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.settings.commands import LabSettings
from video_r1.settings.vllm import VLLMSettings

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))
GPUS = torch.cuda.device_count()
ON_GPU = DEVICE.type == "cuda"
Figures = dict[str, Any]
several_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
FORMATS = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""Relative distance of norms. TF32 is off; bf16 has 8 bits."""


LIMIT = 230  # seconds of a run or a benchmark; gpu_check.py ends a check after 240


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    """Return a dict that gpu_check.py writes to its report."""
    found: Figures = {}
    record_property("figures", found)
    return found


def off_by(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """Return the shortest time of several calls, after a first one to warm up."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def test_the_machine(figures: Figures) -> None:
    """Record versions and the GPU; multiply two matrices."""
    import accelerate
    import transformers

    figures |= {"torch": torch.__version__, "transformers": transformers.__version__}
    figures |= {"accelerate": accelerate.__version__, "cuda": torch.version.cuda, "gpus": GPUS}
    if ON_GPU:
        card = torch.cuda.get_device_properties(0)
        figures |= {"gpu": card.name, "memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        product = torch.ones(64, 64, device=DEVICE) @ torch.ones(64, 64, device=DEVICE)
        assert float(product[0, 0]) == 64.0


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_row_of_groups_equals_separate_rows(family: str, dtype: torch.dtype, figures: Figures) -> None:
    """Compare FlexAttention's block mask with a plain forward of each completion, with gradients."""
    torch.manual_seed(0)
    model = build(family).to(DEVICE)
    plain = copy.deepcopy(model).cpu()
    model.to(dtype)
    prompt = make_prompt(family, 20, ("video", (2, 8, 12)), 30)
    completions = tokens_of(40, 7, 150)
    found = group_logprobs(model, [prompt], [completions]).logprobs
    expected, _ = expanded_logprobs(plain, prompt, completions, 1.0)
    weights = torch.randn_like(expected)
    (found * weights.to(found)).sum().backward()
    (expected * weights).sum().backward()
    figures |= {"values": off_by(found, expected), "gradients": off_by(gradients(model), gradients(plain))}
    assert figures["values"] < TOLERANCES[dtype] / 2 and figures["gradients"] < 2 * TOLERANCES[dtype]


def test_rows_of_any_length_compile_twice_at_most(figures: Figures) -> None:
    from torch._dynamo.utils import counters

    model = build("qwen2_5_vl").to(DEVICE)
    torch._dynamo.reset()  # kernels of earlier checks in this process
    counters.clear()
    for prompt, lengths in ((20, (30, 40)), (150, (7, 200)), (333, (129, 5, 64)), (77, (256, 255))):
        group_logprobs(
            model, [make_prompt("qwen2_5_vl", prompt)], [tokens_of(*lengths)]
        ).logprobs.sum().backward()
    figures["graphs"] = int(counters["stats"]["unique_graphs"])
    assert figures["graphs"] <= 2


@pytest.mark.parametrize("dtype", [*FORMATS, "mixed"], ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_vision_tower_in_few_calls(family: str, dtype: Any, figures: Figures) -> None:
    """Compare variable-length attention and patches by a matrix product with transformers' own tower; also
    with float32 weights that train under bf16 autocast."""
    torch.manual_seed(0)
    plain = build(family)
    mixed = dtype == "mixed"
    model = copy.deepcopy(plain).to(DEVICE, torch.float32 if mixed else dtype)
    prompt = make_prompt(family, ("video", (4, 12, 20)), 3)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
        (part,) = encode_vision(model, [prompt])
    assert part is not None
    features = prompt.features["pixel_values_videos"], prompt.features["video_grid_thw"]
    expected = torch.cat(plain.model.get_image_features(*features, return_dict=True).pooler_output)
    weights = torch.randn_like(expected)
    (part.embeddings * weights.to(part.embeddings)).sum().backward()
    (expected * weights).sum().backward()
    figures |= {
        "values": off_by(part.embeddings, expected),
        "gradients": off_by(gradients(model), gradients(plain)),
        "variable_length_attention": vision.packed_attention.agrees,
        "patches_by_product": vision.patch_projection.agrees,
        "agreeing_gradients": [
            path.gradients_agree for path in (vision.packed_attention, vision.patch_projection)
        ],
    }
    if not mixed:
        figures["seconds"] = seconds_of(lambda: encode_vision(model, [prompt]))
    bound = TOLERANCES[torch.bfloat16 if mixed else dtype]
    assert figures["values"] < bound and figures["gradients"] < 2 * bound
    if ON_GPU:
        assert figures["patches_by_product"] is True
        assert figures["variable_length_attention"] is (None if dtype == torch.float32 else True)
        assert not mixed or figures["agreeing_gradients"] == [True, True]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_recorded_decoding_gives_the_same_tokens(
    dtype: torch.dtype, figures: Figures, monkeypatch: Any
) -> None:
    """Compare decoding by a CUDA graph with the same steps one by one; completions end at different steps."""
    model = load_model(base_folder(), str(dtype).removeprefix("torch."), device=DEVICE)
    engine = TransformersEngine(model, load_processor(base_folder()))
    prompts = [make_prompt("qwen2_5_vl", 40), make_prompt("qwen2_5_vl", 25)]
    settings = SamplingSettings(n=8, max_tokens=80, seed=1)

    def sample() -> list[Any]:
        return [rollout for group in engine.sample(prompts, settings) for rollout in group]

    recorded = sample()
    figures |= {"recorded": shared_prefix.replayed_step.agrees, "seconds": seconds_of(sample)}
    monkeypatch.setattr(shared_prefix, "RECORDED_ON", ())
    plain = sample()
    figures["seconds_one_by_one"] = seconds_of(sample)
    same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(recorded, plain, strict=True)]
    figures["same"] = sum(same) / len(same)
    assert figures["same"] == 1.0
    if ON_GPU:
        assert figures["recorded"] is True


# ---- Whole runs by the command line


def run(folder: Path, *words: str, device: str | None = None, processes: int = 1, kind: str = "ddp") -> Path:
    """Run `video-r1 WORDS --output_dir FOLDER` in a subprocess, or in several by accelerate."""
    launcher = ["-m"]
    if processes > 1:
        root = Path(__file__).parents[1] / "src/video_r1/recipes/accelerate"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(root / f"{kind}.yaml")]
        launcher += ["--num_processes", str(processes), "-m"]
    environment = {**os.environ}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [
        sys.executable,
        *launcher,
        "video_r1",
        *words,
        "--output_dir",
        str(folder),
        "--report_to",
        "none",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def series(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write_lab(LabSettings(folder=str(folder / "data"), train=96, test=1, workers=2))
    return folder


def sft_words(lab: Path, steps: int = 12) -> list[str]:
    manifest = str(lab / "data" / "sft.json")
    return ["sft", "lab-sft", "--train_manifest", manifest, "--max_steps", str(steps), "--logging_steps", "1"]


def rl_words(lab: Path, model: Path, steps: int = 3) -> list[str]:
    manifest = str(lab / "data" / "rl.json")
    words = ["rl", "lab-tgrpo", "--train_manifest", manifest, "--model_name_or_path", str(model)]
    return [*words, "--max_steps", str(steps), "--preflight_questions", "0"]


def test_sft_learns_as_on_a_cpu(lab: Path, tmp_path: Path, figures: Figures) -> None:
    """Twelve steps in float32 have the same losses within 1 %."""
    here = series(run(tmp_path / "here", *sft_words(lab)), "loss")
    there = series(run(tmp_path / "cpu", *sft_words(lab), device="cpu"), "loss")
    figures |= {"loss": here, "loss_cpu": there}
    assert here[-1] < here[0] and here == pytest.approx(there, rel=0.01)


def test_rl_learns_as_on_a_cpu(lab: Path, tmp_path: Path, figures: Figures) -> None:
    """Three steps of T-GRPO in float32 from the same cold start have similar mean rewards.

    They are not equal, because the last bits of the log-probs decide which tokens are sampled.
    """
    start = run(tmp_path / "start", *sft_words(lab, 60))
    here, there = (run(tmp_path / d, *rl_words(lab, start), device=d) for d in ("here", "cpu"))
    for name in ("reward/accuracy", "reward/format", "completion/length"):
        figures[name], figures[f"{name}_cpu"] = series(here, name), series(there, name)
        means = [sum(values) / len(values) for values in (figures[name], figures[f"{name}_cpu"])]
        assert means[0] == pytest.approx(means[1], rel=0.15, abs=0.1), name
    figures["kl"] = series(here, "policy/kl")
    assert abs(figures["kl"][0]) < 1e-4  # the first policy is the reference


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_train(kind: str, lab: Path, tmp_path: Path, figures: Figures) -> None:
    words = [*sft_words(lab), "--use_peft", "true", "--learning_rate", "2e-3"]
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        words += ["--load_in_4bit", "true", "--dtype", "bfloat16"]
    figures["loss"] = series(run(tmp_path / kind, *words), "loss")
    assert figures["loss"][-1] < 0.95 * figures["loss"][0]


@pytest.mark.vllm
def test_vllm_in_the_process_sleeps(lab: Path, tmp_path: Path, figures: Figures) -> None:
    """Three steps with vLLM, which frees its memory during updates."""
    words = [*rl_words(lab, base_folder()), "--engine", "vllm", "--vllm_enable_sleep_mode", "true"]
    folder = run(tmp_path / "vllm", *words)
    figures["logprob_difference"] = series(folder, "sampler/logprob_difference")
    assert len(figures["logprob_difference"]) == 3 and max(figures["logprob_difference"]) < 0.05


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_vllm_in_the_process_samples_videos(family: str, figures: Figures) -> None:
    """vLLM's bfloat16 kernels for GPUs give the log-probs of the trainer."""
    processor = tiny_processor(family)
    model: Any = tiny_model(family, processor.tokenizer, for_vllm=True).bfloat16()
    model, prompts = model.to(DEVICE), clip_prompts(processor)
    settings = VLLMSettings(gpu_memory_utilization=0.2)
    engine = VLLMEngine(model, processor, max_model_len=1024, settings=settings)
    engine.update_weights(model)
    groups = engine.sample(prompts, SamplingSettings(n=4, max_tokens=16, seed=0))
    figures["logprob_difference"] = float(differences(model, prompts, groups).mean())
    engine.close()
    assert figures["logprob_difference"] < 0.05


@pytest.mark.vllm
@several_gpus
def test_vllm_on_a_server_by_nccl(lab: Path, tmp_path: Path, figures: Figures) -> None:
    """A server on the second GPU receives the weights from the first one."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    words = ["serve", "--model", str(base_folder()), "--hand_over", "nccl", "--port", "8011"]
    with subprocess.Popen([sys.executable, "-m", "video_r1", *words], env=environment) as server:
        try:
            words = [*rl_words(lab, base_folder()), "--use_vllm", "true", "--vllm_mode", "server"]
            words += ["--vllm_server_base_url", "http://127.0.0.1:8011"]
            figures["logprob_difference"] = series(
                run(tmp_path / "run", *words), "sampler/logprob_difference"
            )
        finally:
            server.terminate()
    assert max(figures["logprob_difference"]) < 0.05


@several_gpus
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_gpus_learn_as_one(kind: str, lab: Path, tmp_path: Path, figures: Figures) -> None:
    words = [*sft_words(lab), "--per_device_train_batch_size"]
    alone = series(run(tmp_path / "one", *words, "24"), "loss")
    together = series(run(tmp_path / kind, *words, str(24 // GPUS), processes=GPUS, kind=kind), "loss")
    figures |= {"loss": together, "loss_of_one": alone}
    assert together == pytest.approx(alone, rel=0.02)


# ---- Benchmarks


def benchmark(name: str, *words: str) -> Figures:
    """Return the figures of a benchmark of this repository; skip if the GPU has too little memory."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--device", str(DEVICE), *words]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=LIMIT)
    if "out of memory" in done.stderr.lower():
        pytest.skip(f"benchmarks.{name} {' '.join(words)}: not enough memory")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plan_agrees_with_measured_peaks(figures: Figures) -> None:
    figures |= benchmark("memory", "--cases", "full-checkpointing,lora-checkpointing")
    assert figures["equal"]


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_speed_of_the_update(size: str, figures: Figures) -> None:
    """Time a group's update with random weights against the expanded batch.

    Both with gradient checkpointing: the expanded batch of 7B then needs about 64 GiB instead of 216.
    """
    words = ["--size", size, "--dtype", "bfloat16", "--completion", "256", "--rounds", "2"]
    figures |= benchmark("update", *words, "--gradient-checkpointing")
    assert figures["equal"]


def test_speed_of_rollouts(figures: Figures) -> None:
    figures |= benchmark(
        "rollout", "--size", "3b", "--dtype", "bfloat16", "--completion", "128", "--rounds", "2"
    )
