"""T-GRPO (arXiv 2503.21776): group-relative policy optimisation with a reward for using the frames' order.

    manifest ─► QuestionSource ─► Question ─► engine ─► G ordered + G/2 shuffled completions
                 (background)      2 prompts               │
                                                           ▼
    optimizer ◄─ policy_loss ◄─ group_logprobs ◄─ advantages ◄─ rewards, p, p̃      (RolloutGroup)

An optimizer step is read in `roll_out` and `ask` (sample, score, compare) and then in `compute_loss` (learn),
by which `transformers.Trainer` is given a step's data and a micro-batch's loss. All else (checkpoints,
resuming, schedules, mixed precision, processes, trackers) is the Trainer's.

Where this differs from the paper and its code:
 1. The temporal reward is α·(p − p̃) where p > p̃. The paper's α wherever p ≥ μ·p̃ is
    `temporal_rule="threshold"`. Both cancel in groups of right and wrong; `weight`, `likelihood` and
    `tokens` do not.
 2. p and p̃ belong to one question. The reference code takes them over the batch, of one prompt a device.
 3. Ordered and shuffled completions are sampled alike, without top-p: what is scored is what was sampled.
 4. The shuffled order is never the identity, and the sampling rate of the frames reaches the model.
 5. Equal numbers are equal however they are written (see rewards/correctness.py).
 6. A group's completions share one row with their prompt: the values are those of separate rows, while the
    pixels are encoded once.
 7. The loss is normalised over the optimizer step: a question counts the same in any micro-batch and on any
    device.
 8. The log-probs of the first update on a batch of rollouts serve as those of the old policy.
 9. Groups of equal rewards are left out of the update where they change nothing in it: above all, there is no
    KL term (see `flat_groups_count`).
10. A question whose media cannot be used gives its place to another one; it is never shown other media.
11. With vLLM, a token's policy loss is weighted by π_old ÷ π_vLLM (capped), which rounding sets apart.
12. With async_rollouts, π_vLLM is one update older than π_old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from video_r1.data.reading import Question
from video_r1.errors import ConfigError
from video_r1.processes import process_count
from video_r1.recipe import Recipe
from video_r1.rewards.group import reward_terms
from video_r1.rollout.engine import RolloutEngine
from video_r1.settings.documented import documented
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.checks import warn_of_cancelled_bonus
from video_r1.training.credit import TaskMoments, give_advantages
from video_r1.training.dynamic_sampling import Asked
from video_r1.training.group_trainer import GroupTrainer
from video_r1.training.metrics import describe_groups, describe_update
from video_r1.training.objective import Clip, entropy_sum, policy_loss
from video_r1.training.questions import Ready
from video_r1.training.rollouts import (
    PolicyBatch,
    flat_groups_count,
    kept_tokens,
    policy_batches,
    step_scale,
)
from video_r1.training.runs import Questions, RunArguments, run_recipe

RewardFunctions = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]


@documented
@dataclass
class TGRPOConfig(TGRPOSettings, VLLMSettings, RunArguments):
    """All settings of a run: this project's own, TRL's by TRL's names, every field of `TrainingArguments`.

    `per_device_train_batch_size` counts questions. Raises ConfigError, naming every problem found.
    """

    rewards_are_known = False


class TGRPOTrainer(GroupTrainer):
    """Trains a video-language model with GRPO or T-GRPO on questions about videos and images.

    model: checkpoint folder, hub id or model (docs/models.md says which). reward_funcs: None for the
    paper's rewards, or names of built-in ones ("accuracy", "format", "length", "judge") and functions
    with TRL's signature, `function(prompts, completions, completion_ids, **columns) -> list[float | None]`.
    train_dataset, eval_dataset: a manifest's path or hub id, a list of Sample or of dicts, or a
    `datasets.Dataset` of the record fields, or of TRL's `prompt` and `image`. processing_class: the model's
    processor (default: the checkpoint's). optimizers: an optimizer and its schedule in place of those of the
    settings. peft_config: trains adapters only. engine: what samples (default: the model itself, in this
    process). recipe: what config.yaml is written from (default: `args`). The positional order is TRL's;
    what only reward models and quantised loading need is refused.

    A function of `reward_funcs` is called once a step with the process's ordered completions (and for the
    trial before the first step). Each argument is a list with an entry for each: `prompts` and `completions`
    are texts without chat markup, `completion_ids` lists of ints, and every field of the rows comes by its
    name (`solution`, `problem_type`, `path`, … and your own; None where a row has it not). It gives a finite
    number for each, or None where it does not apply. Its name is that of its series `reward/<name>` and of
    its weight in `reward_weights`.

    Raises ConfigError and ManifestError when it is built; `train` raises VideoR1Error when no reward is in
    reach, when media are missing as a whole or the loss stays not finite.
    """

    progress_title = "T-GRPO"

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: RewardFunctions | None = None,
        args: TGRPOConfig | None = None,
        train_dataset: Questions | None = None,
        eval_dataset: Questions | dict[str, Questions] | None = None,
        processing_class: ProcessorMixin | None = None,
        reward_processing_classes: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: None = None,
        peft_config: Any = None,
        *,
        engine: RolloutEngine | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        if reward_processing_classes is not None:
            raise ConfigError(
                "reward_processing_classes are of reward models; pass a function that asks yours"
            )
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config: pass a model that is loaded so, or a recipe with load_in_4bit"
            )
        args = TGRPOConfig(output_dir="runs/tgrpo") if args is None else args
        terms = reward_terms(reward_funcs, args)
        warn_of_cancelled_bonus(terms, args)
        shown = {"reward": "reward/total", "format": "reward/format", "gap": "temporal/gap"}
        judged = ["judge"] if "judge" in terms.names else []
        shown |= {name: f"reward/{name}" for name in (*terms.custom, *judged, "accuracy")}
        self.progress_series = {**shown, "loss": "loss"}
        soft = args.sapo_temperature_pos, args.sapo_temperature_neg
        self.clip = Clip(args.epsilon, args.epsilon_high or args.epsilon, args.delta, soft)
        super().__init__(
            terms, engine, model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks,
            recipe, optimizers,
        )  # fmt: skip

    # ---- One optimizer step: sample, score, compare

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and their loss's normaliser. All of the step's rollouts
        come from the policy before it: no question's loss depends on the micro-batch that it is in.
        """
        args = self.settings
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        if batches[0]["iteration"] == 0 or not self.step_batches:
            with self.stopping_before_the_step():
                self.step_batches = self.roll_out([batch["pending"] for batch in batches])
                self.recorded = False
        self.rollouts.begin_next(self.pending_rollouts())
        # Gradients are averaged over processes, hence the division.
        scale, processes = step_scale(self.step_batches, args), process_count()
        self.entropy_tokens = scale.entropy / processes
        return [{"batch": batch} for batch in self.step_batches], scale.loss / processes

    def roll_out(self, pending: Sequence[Sequence[Any]]) -> list[PolicyBatch]:
        """One step's questions with their completions, rewards and advantages, in their micro-batches."""
        args = self.settings
        ready = self.ready(list(chain(*pending)))

        # Where all R_i of a question are equal, others take its place
        self.newly_asked = []
        groups, vision = self.selected(ready, self.ask(ready))
        for entries, asked in self.newly_asked:
            self.answered(entries, asked)

        # A_i = w·(R_i − mean(R)) ÷ std(R), the mean over the question's ordered completions
        give_advantages(groups, args, self.callback_of(TaskMoments))
        describe_groups(self.meter, groups, args.self_reflection_phrases)
        return policy_batches(groups, [len(batch) for batch in pending], flat_groups_count(args), vision)

    def ask(self, ready: Sequence[Ready[Question]]) -> Asked:
        """Some of a step's questions with their completions and rewards."""
        questions = [entry.content for entry in ready]

        # G completions o_i with the frames in order, H completions õ_j with the frames shuffled
        ordered, shuffled = self.rollouts.of_step(questions)

        # d_i,t = log π(o_i,t | V) − log π(o_i,t | Ṽ), where r_t is by likelihood or tokens are weighed by it
        drops, vision = self.compared(questions, ordered)

        # R_i = weighted sum of accuracy, format, length and r_t, which only correct o_i of a video have
        groups = self.score(questions, ordered, shuffled, drops)
        self.newly_asked.append((ready, groups))
        return Asked(groups, vision)

    # ---- One optimizer step: learn

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The clipped policy loss of one micro-batch, with its share of the step's normaliser."""
        args, batch = self.settings, cast(PolicyBatch, inputs["batch"])
        assert num_items_in_batch is not None

        # log π(o_i,t) of the ordered completions only
        policy = self.logprobs(model, batch, with_entropy=True)

        # log π_old, log π_ref and min(π_old ÷ π_vLLM, cap), which all updates on these rollouts share
        self.complete(batch, model, policy.logprobs.detach())

        kept = kept_tokens(batch, policy, args)
        counted = batch.finished if args.mask_truncated_completions else None
        # −w·min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) + β·KL, ρ = π ÷ π_old, w by `tokens`, π_vLLM and entropy
        result = policy_loss(
            policy.logprobs,
            batch.old_logprobs,
            batch.advantages.to(policy.logprobs.device),
            policy.lengths,
            normaliser=num_items_in_batch,
            loss_type=args.loss_type,
            clip=self.clip,
            importance_sampling_level=args.importance_sampling_level,
            beta=args.beta,
            ref_logprobs=batch.ref_logprobs,
            token_weights=batch.weights_of(kept),
            counted=counted,
        )
        describe_update(self.meter, policy, result)

        # −entropy_coef · mean entropy of the step's tokens
        loss = result.loss
        if args.entropy_coef and policy.entropy is not None:
            entropies = entropy_sum(policy.entropy, policy.lengths, counted, kept)
            loss = loss - args.entropy_coef * entropies / self.entropy_tokens
        loss = self.watched(loss, batch.problem_ids)
        return (loss, {"policy": policy}) if return_outputs else loss


def run_rl(recipe: Recipe) -> Path:
    """T-GRPO from a resolved recipe: see `run_recipe`."""
    return run_recipe(recipe, TGRPOTrainer, TGRPOConfig)
