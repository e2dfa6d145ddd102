"""What the processes of test_deepspeed.py do: short runs under DeepSpeed's ZeRO on CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deepspeed  # pyright: ignore[reportMissingImports]  # an extra; the tests are skipped without it
import distributed_work
import peft
import torch
from accelerate.state import PartialState
from deepspeed.runtime.zero.parameter_offload import (  # pyright: ignore[reportMissingImports]
    FWD_MODULE_STACK,
)
from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]
from distributed_work import Watch, save
from tgrpo_trainers import make_trainer
from tiny_questions import training_arguments
from transformers import training_args

from video_r1.lab.model import base_folder
from video_r1.models.families import family_of
from video_r1.models.loading import load_model
from video_r1.rollout.engine import SamplingSettings
from video_r1.training.tgrpo import TGRPOConfig


def on_cpu(zero: str | None) -> dict[str, Any]:
    """What DeepSpeed needs to run on CPUs, and the settings of such a run.

    zero: the file of the setting `deepspeed`; None where the environment is that of `accelerate launch`.
    """
    # A kernel for inference on CPUs, which DeepSpeed would compile first (a minute), under a lock that a
    # killed process leaves behind: the next ones wait for it for ever. Training communicates by gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # transformers has bf16 without `use_cpu` on GPUs only, and accelerate no DeepSpeed with it.
    transformers_settings: Any = training_args
    transformers_settings.is_torch_bf16_gpu_available = lambda: True
    settings = {"use_cpu": False, "bf16": False, "ddp_backend": "gloo"}
    if zero is None:
        return settings
    start = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "backend": "gloo"})  # with `deepspeed`, the Trainer names none

    PartialState.__init__ = init
    return {**settings, "deepspeed": zero}


def common(zero: str | None, **changes: Any) -> dict[str, Any]:
    return {
        **on_cpu(zero),
        "optim": "sgd",
        "max_steps": 2,
        "learning_rate": 0.01,
        "save_steps": 1,
        "max_grad_norm": 1.0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **changes,
    }


class WatchBeforeStep(Watch):
    """As Watch, where the backward pass ends with the step: gradients as they are after clipping. `exact`:
    the share of them, of the last step, that bf16 cannot hold.
    """

    exact = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine_class: Any = deepspeed.DeepSpeedEngine
        watch = self
        step = engine_class.step

        def watched_step(engine: Any, *arguments: Any, **options: Any) -> None:
            whole = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
            found = {name: torch.zeros(()) if g is None else g.float().clone() for name, g in whole.items()}
            flat = torch.cat([gradient.flatten() for gradient in found.values()])
            watch.exact = float((flat != flat.bfloat16().float()).float().mean())
            norm = torch.stack([g.norm() for g in found.values()]).norm()
            scale = torch.clamp(args.max_grad_norm / (norm + 1e-6), max=1.0)
            watch.gradients.append({name: gradient * scale for name, gradient in found.items()})
            step(engine, *arguments, **options)

        engine_class.step = watched_step

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Too late: the gradients are gone."""


def rl(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    """T-GRPO as `distributed_work.rl` has it, here with two micro-batches of a question a process."""
    watch, manifest = WatchBeforeStep(), str(folder / "manifest.json")
    settings: dict[str, Any] = {
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        **{"scale_rewards": "batch", "beta": 0.1},
        **changes,
    }
    trainer: Any = make_trainer(
        folder / "model", manifest, folder / name, callbacks=[watch], evaluated=manifest,
        **common(zero, **settings),
    )  # fmt: skip
    trainer.train()
    sample_at_its_own_pace(trainer)
    assert watch.exact > 0.4  # under bf16 too: passes and processes are added up in float32
    check_sharding(trainer, trainer.deepspeed.zero_optimization_stage())
    if trainer.deepspeed.zero_optimization_stage() == 3:
        check_hooks(trainer)
    kinds = [group.sample.data_type for batch in trainer.step.batches for group in batch.groups]
    save(trainer, watch, folder / name, kinds)


def looks(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    distributed_work.looks(folder, 2, name, WatchBeforeStep(), **common(zero, **changes))


def text(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    distributed_work.text(folder, 2, name, WatchBeforeStep(), **common(zero, **changes))


def sample_at_its_own_pace(trainer: Any) -> None:
    """The second process samples more tokens, for which the first one does not gather weights any more."""
    rank = int(os.environ["RANK"])
    prompts = [group.prompt for batch in trainer.step.batches for group in batch.groups]
    with trainer.whole_weights():
        trainer.engine.update_weights(trainer.accelerator.unwrap_model(trainer.model))
        (one, *_), *_ = trainer.engine.sample(prompts, SamplingSettings(max_tokens=2 + 4 * rank, seed=3))
    assert len(one.token_ids) == 2 + 4 * rank


def check_sharding(trainer: Any, stage: int) -> None:
    """Under ZeRO-3 alone, most weights of policy and reference are shares of half their size."""
    for model in (trainer.model, getattr(trainer.reference, "model", None)):
        if model is None:
            continue
        partial = [p for p in model.parameters() if hasattr(p, "ds_id") and p.numel() == 0]
        assert bool(partial) == (stage == 3)
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // 2) for p in partial)
        if partial:
            assert sum(p.ds_numel for p in partial) > 0.9 * sum(p.ds_numel for p in model.parameters())


def check_hooks(trainer: Any) -> None:
    """Entering once more leaves no more hooks behind, nor names of models that are running."""
    offload = trainer.deepspeed.optimizer.parameter_offload

    def left_behind() -> list[int]:
        return [len(each) for each in (offload.forward_hooks, offload.backward_hooks, FWD_MODULE_STACK)]

    before = left_behind()
    with trainer.whole_weights():
        assert left_behind()[:2] == [0, 0]
    assert left_behind() == before and before[0] > 20


def with_vllm(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    """Two T-GRPO steps with a vLLM in each process, which has no whole weights when it is built."""
    settings = common(zero, save_strategy="no", eval_strategy="no", use_vllm=True, **changes)
    trainer = make_trainer(
        base_folder(), str(folder / "manifest.json"), folder / name, max_prompt_length=900,
        per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    trainer.train()


def bad_numbers(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    """Four steps: in the second one process has a loss of nan, in the third one has infinite gradients."""
    trainer: Any = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / name, per_device_train_batch_size=2,
        **common(zero, **{"max_steps": 4, "optim": "adamw_torch", "eval_strategy": "no", **changes}),
    )  # fmt: skip
    logprobs, rank = trainer.logprobs, int(os.environ["RANK"])

    def spoiled(model: Any, batch: Any, **options: Any) -> Any:
        result = logprobs(model, batch, **options)
        if (trainer.state.global_step, rank) == (1, 1):
            result.logprobs = result.logprobs * torch.nan
            (folder / name / "culprits.json").write_text(json.dumps(batch.problem_ids))
        if (trainer.state.global_step, rank) == (2, 0):
            total = result.logprobs.sum()
            result.logprobs = result.logprobs + (total - total.detach()).sqrt()  # 0, of an infinite slope
        return result

    trainer.logprobs = spoiled
    trainer.train()


def part(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    """Two T-GRPO steps; a run in the folder resumes."""
    manifest = str(folder / "manifest.json")
    make_trainer(folder / "model", manifest, folder / name, **common(zero, **changes)).train()


def adapters(folder: Path, name: str, zero: str | None, changes: dict[str, Any]) -> None:
    """T-GRPO of adapters that add something from the start; also in one process, without ZeRO."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = common(zero, beta=0.1, per_device_train_batch_size=4 // processes, **changes)
    settings["learning_rate"] = 1.0
    if processes == 1:
        settings |= {"use_cpu": True, "ddp_backend": None}
    # The settings come first, as in a recipe's run: under ZeRO-3 the model is loaded in shares.
    TGRPOConfig(**training_arguments(folder / name, **settings))
    model, manifest = load_model(folder / "model"), str(folder / "manifest.json")
    torch.manual_seed(0)  # of the adapters
    lora = peft.LoraConfig(
        r=4, target_modules=family_of(model).text_layers, task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = make_trainer(model, manifest, folder / name, peft=lora, evaluated=manifest, **settings)
    trainer.train()
    trainer.publish_model()
