"""What the processes of test_distributed.py do: short runs whose figures and weights are compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from group_batches import TEXT, make_prompt
from scripted_engine import Forced
from tgrpo_trainers import make_trainer
from tiny_questions import training_arguments
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import load_model
from video_r1.rollout.episodes import Episode
from video_r1.rollout.vllm.weight_sync import checkpoint_weights
from video_r1.training.sft import SFTConfig, SFTTrainer


class Watch(TrainerCallback):
    """Writes down each step's gradients, whole, and which kinds of media this process has seen."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})


def whole(tensor: Any) -> torch.Tensor:
    """A copy with all shards (a collective operation) of a parameter's gradient."""
    if tensor is None:
        return torch.zeros(())
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def let_accelerate_shard_on_cpu() -> None:
    """accelerate turns FSDP on where the processes have GPUs. Nothing else of it depends on them."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    start = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def common(processes: int, steps: int = 2, bf16: bool = False) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bf16": bf16,
        "optim": "sgd",
        "max_steps": steps,
        "learning_rate": 0.01,
        "save_steps": 1,
        "max_grad_norm": 1.0,
    }
    if processes > 1:
        settings["ddp_backend"] = "gloo"
    return settings


def rl(folder: Path, processes: int, name: str) -> None:
    """T-GRPO: four questions a step, images and videos mixed, with a reference model and validation."""
    let_accelerate_shard_on_cpu()
    watch = Watch()
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / name, callbacks=[watch],
        per_device_train_batch_size=4 // processes, scale_rewards="batch", beta=0.1,
        evaluated=str(folder / "manifest.json"), eval_strategy="steps", eval_steps=2,
        **common(processes),
    )  # fmt: skip
    trainer.train()
    kinds = [group.sample.data_type for batch in trainer.step.batches for group in batch.groups]
    save(trainer, watch, folder / name, kinds)


class ForcedOnVideos(Forced):
    """Answers about images have one turn, so that a process may have nothing to sample in later rounds."""

    def _calls(self, episode: Episode) -> bool:
        return super()._calls(episode) and episode.prompt.files[0].data_type == "video"


def looks(folder: Path, processes: int, name: str, watch: Any = None, **settings: Any) -> None:
    """T-GRPO of episodes, a question a process: some call tools in two turns, others in none."""
    let_accelerate_shard_on_cpu()
    watch = watch or Watch()
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / name, callbacks=[watch],
        per_device_train_batch_size=2 // processes, scale_rewards="batch", beta=0.1, tools="look",
        look_frames=4, temporal_rule="likelihood_gate", **(settings or common(processes, steps=3)),
    )  # fmt: skip
    trainer.engine.__class__ = ForcedOnVideos
    trainer.train()
    turns = [len(rollout.turns) for b in trainer.step.batches for g in b.groups for rollout in g.ordered]
    save(trainer, watch, folder / name, sorted(map(str, turns)))


def adapters(folder: Path, processes: int, name: str) -> None:
    """T-GRPO of adapters that add something from the start, so that the reference has adapters too."""
    let_accelerate_shard_on_cpu()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    changes: dict[str, Any] = common(processes, steps=3) | {"save_strategy": "no"}
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / name, peft=lora, callbacks=None, beta=0.1,
        per_device_train_batch_size=4 // processes, **changes,
    )  # fmt: skip
    trainer.train()


def sft(
    folder: Path, processes: int, name: str, bf16: bool = False, changes: dict[str, Any] | None = None
) -> None:
    """SFT on the same questions, with validation."""
    let_accelerate_shard_on_cpu()
    watch = Watch()
    args = SFTConfig(
        **training_arguments(
            folder / name,
            **common(processes, bf16=bf16)
            | {"per_device_train_batch_size": 4 // processes}
            | (changes or {}),
            eval_strategy="steps",
            eval_steps=2,
        )
    )
    manifest = str(folder / "manifest.json")
    trainer = SFTTrainer(str(folder / "model"), args, manifest, manifest, callbacks=[watch])
    trainer.train()
    save(trainer, watch, folder / name, [])


def text(folder: Path, processes: int, name: str, watch: Any = None, **settings: Any) -> None:
    """T-GRPO with a teacher, then SFT, a question a process: one about a clip, one of text alone."""
    let_accelerate_shard_on_cpu()
    watch, manifest = watch or Watch(), str(folder / "text.json")
    settings = {**(settings or common(processes, steps=2)), "per_device_train_batch_size": 2 // processes}
    trainer: Any = make_trainer(
        folder / "model", manifest, folder / name, callbacks=[watch], evaluated=manifest, beta=0.1,
        scale_rewards="batch", teacher_model_name_or_path=str(folder / "teacher"), teacher_frames=8,
        max_frames=4, fps=4.0, **settings,
    )  # fmt: skip
    trainer.train()
    if "fsdp" in settings:  # sharded as the policy is
        assert all(isinstance(weight, DTensor) for weight in trainer.teacher.model.parameters())
    save(trainer, watch, folder / name, [g.sample.data_type for b in trainer.step.batches for g in b.groups])
    args = SFTConfig(**training_arguments(folder / f"{name}-sft", **settings))
    SFTTrainer(str(folder / "model"), args, manifest, manifest, callbacks=[]).train()


def mixed(folder: Path, processes: int, name: str) -> None:
    """One T-GRPO step under bf16 mixed precision; its log-probs against a plain float32 model's."""
    let_accelerate_shard_on_cpu()
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / name, beta=0.1,
        per_device_train_batch_size=4 // processes, **common(processes, steps=1, bf16=True),
    )  # fmt: skip
    trainer.train()
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)  # transformers would leave weights out here
    plain = load_model(folder / "model", "float32")
    (batch,) = trainer.step.batches
    completions = [[rollout.token_ids for rollout in group.ordered] for group in batch.trained]
    with torch.no_grad():
        exact = group_logprobs(plain, [group.prompt for group in batch.trained], completions).logprobs
    kept = trainer.references[batch.number]
    found = {"exact": exact, "policy": kept.old_logprobs, "reference": kept.ref_logprobs}
    torch.save(found, folder / name / f"logprobs-{os.environ.get('RANK', '0')}.pt")


class Seen(TrainerCallback):
    """Which questions this process has trained on, step by step."""

    def __init__(self) -> None:
        self.guard: Any = None
        self.steps: list[list[Any]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(list(self.guard.step_ids))


def uneven(folder: Path, processes: int, name: str) -> None:
    """One epoch of the questions, four of them a step, after a validation on all of them."""
    let_accelerate_shard_on_cpu()
    manifest = str(folder / "manifest.json")
    seen = Seen()
    settings = {
        **common(processes, steps=-1),
        **{"num_train_epochs": 1, "save_strategy": "no"},
        **{"eval_strategy": "epoch", "eval_on_start": True},
        **{"per_device_train_batch_size": 4 // processes},
    }
    trainer = make_trainer(folder / "model", manifest, folder / name, evaluated=manifest, **settings)
    seen.guard = trainer.guard
    trainer.callback_handler.callbacks.insert(0, seen)  # before the guard, which forgets them
    trainer.train()
    (folder / name / f"seen-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen.steps))


def part_of_a_run(folder: Path, processes: int, name: str, steps: int, accumulation: int) -> None:
    """T-GRPO up to this step, one question a pass; a run in the folder is continued."""
    let_accelerate_shard_on_cpu()
    seen = Seen()
    settings = {
        **common(processes, steps=steps),
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation},
        # A large epsilon: AdamW follows the gradients, whose last bits depend on the order in which
        # ranks are added up. With a small one a gradient near 0 makes a whole step by its sign.
        **{"lr_scheduler_type": "constant", "optim": "adamw_torch", "adam_epsilon": 1.0},
    }
    trainer = make_trainer(folder / "model", str(folder / "manifest.json"), folder / name, **settings)
    seen.guard = trainer.guard
    trainer.callback_handler.callbacks.insert(0, seen)
    trainer.train()
    (folder / name / f"seen-{os.environ.get('RANK', '0')}-{steps}.json").write_text(json.dumps(seen.steps))
    trainer.publish_model()


def as_on_a_gpu(folder: Path) -> None:
    """DistributedDataParallel with `device_ids`, as accelerate makes it for GPUs; the device is the CPU."""
    store = FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = load_model(folder / "model")
    plain = load_model(folder / "model")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped.device_ids, wrapped.device_type = [0], "cpu"
    torch.manual_seed(0)
    prompts = [make_prompt("qwen2_5_vl", 4, ("video", (2, 4, 4)), 3), make_prompt("qwen2_5_vl", 5)]
    completions = [[torch.randint(0, TEXT, (length,)) for length in lengths] for lengths in ((3, 5), (4,))]
    for wanted in (plain, wrapped):
        group_logprobs(wanted, prompts, completions).logprobs.sum().backward()
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=name)


def handed_over(folder: Path) -> None:
    """Whole weights of an FSDP2 model as vLLM is given them, with nothing gathered on the way."""
    let_accelerate_shard_on_cpu()
    manifest = str(folder / "manifest.json")
    trainer = make_trainer(folder / "model", manifest, folder / "handed-over", **common(2, steps=1))
    trainer.train()
    expected: Any = trainer.accelerator.get_state_dict(trainer.model)
    gathered: list[Any] = []
    plain, DTensor.full_tensor = DTensor.full_tensor, lambda self: gathered.append(self)  # type: ignore[method-assign]
    with trainer.whole_policy() as model:
        found = {name: tensor.clone() for name, tensor in checkpoint_weights(model)}
    DTensor.full_tensor = plain  # type: ignore[method-assign]
    assert not gathered and len(found) > 20
    for name, tensor in expected.items() if trainer.is_world_process_zero() else ():
        torch.testing.assert_close(found[name], tensor, msg=name)


def save(trainer: Any, watch: Watch, run: Path, kinds: list[str]) -> None:
    trainer.publish_model()
    rank = int(os.environ.get("RANK", "0"))
    (run / f"kinds-{rank}.json").write_text(json.dumps(kinds))
    if trainer.is_world_process_zero():
        torch.save(watch.gradients, run / "gradients.pt")
