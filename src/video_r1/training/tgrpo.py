"""T-GRPO (arXiv 2503.21776): group-relative policy optimisation with a reward for using the frames' order.

    manifest ─► QuestionSource ─► Question ─► engine ─► G ordered + G/2 shuffled completions
                 (background)      2 prompts               │
                                                           ▼
    optimizer ◄─ policy_loss ◄─ group_logprobs ◄─ advantages ◄─ rewards, p, p̃      (RolloutGroup)

`transformers.Trainer` calls `get_batch_samples` once a step (read, sample, compare, score, credit, batch) and
`compute_loss` once a micro-batch (loss). Checkpoints, resume, schedules, mixed precision, ranks and trackers
are the Trainer's; trainer.py has what this project overrides.

Deviations from the paper and its code:
 1. The temporal reward is α·(p − p̃) if p > p̃. The paper's α wherever p ≥ μ·p̃ is
    `temporal_rule="threshold"`. Both cancel in groups of right and wrong completions; `weight`, `likelihood`
    and `tokens` do not.
 2. p and p̃ belong to one question. The reference code computes them over the batch (one prompt a device).
 3. Ordered and shuffled completions are sampled alike, without top-p: the sampled distribution is scored.
 4. The shuffled order is never the identity, and the sampling rate of the frames reaches the model.
 5. Equal numbers are equal however they are written (see rewards/scoring.py).
 6. A group's completions share one row with their prompt: the values are those of separate rows, while the
    pixels are encoded once.
 7. The loss is normalised over the optimizer step: a question counts the same in any micro-batch and on any
    device.
 8. The log-probs of the first update on a batch of rollouts serve as those of the old policy.
 9. Groups of equal rewards are excluded from the update if they change nothing in it, which requires that
    there is no KL term (see `flat_groups_count`).
10. Another question replaces one whose media cannot be used; a question is never shown other media.
11. With vLLM, a token's policy loss is weighted by π_old ÷ π_vLLM (capped), which differ by rounding.
12. With async_rollouts, π_vLLM is one update older than π_old.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Clips, Question, build_question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation.validation import temporal_accuracy
from video_r1.files import append_line
from video_r1.models.families import find_family, vision_parameters
from video_r1.models.group_forward import GroupLogprobs, encode_vision, group_logprobs, vision_language_model
from video_r1.processes import decided_by_first, gather, gather_lists
from video_r1.recipe import Recipe
from video_r1.rewards.judge import Judge, JudgeAway
from video_r1.rewards.scoring import reward_terms, score_groups
from video_r1.rewards.temporal import rule_of, warn_of_cancelled_bonus
from video_r1.rollout.engine import RolloutEngine
from video_r1.rollout.engine_factory import training_engine
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.base import settings_docs
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.batches import PolicyBatch, Step, StepRollouts, kept_tokens, sampler_weights, step_of
from video_r1.training.callbacks import (
    CHECKED_QUESTIONS,
    Preflight,
    SamplerCheck,
    TaskMoments,
    sampler_difference,
)
from video_r1.training.logprob_contrast import Comparison, compare, samples_as_it_scores
from video_r1.training.metrics import SKIPPED_GROUPS, describe_groups, describe_update, tolerated
from video_r1.training.objective import ClipRange, entropy_sum, group_advantages, policy_loss
from video_r1.training.questions import (
    Asked,
    Difficulty,
    QuestionSource,
    Ready,
    Selection,
    Slot,
    select_groups,
)
from video_r1.training.recording import record_group
from video_r1.training.reference import Reference, ReferenceSync
from video_r1.training.runs import Questions, RunArguments, run_recipe
from video_r1.training.trainer import QuestionTrainer

RewardFunctions = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]


@settings_docs
@dataclass
class TGRPOConfig(TGRPOSettings, VLLMSettings, RunArguments):
    """All settings of a run: this project's own, TRL's by TRL's names, every field of `TrainingArguments`.

    `per_device_train_batch_size` counts questions. Raises ConfigError, naming every problem found.
    """

    rewards_are_known = False


class TGRPOTrainer(QuestionTrainer):
    """Trains a video-language model with GRPO or T-GRPO on questions about videos and images.

    model: checkpoint folder, hub id or model (docs/models.md lists them). reward_funcs: None for the paper's
    rewards, or names of built-in ones ("accuracy", "format", "length", "judge") and functions with TRL's
    signature, `function(prompts, completions, completion_ids, **columns) -> list[float | None]`.
    train_dataset, eval_dataset: a manifest's path or hub id, a list of Sample or of dicts, or a
    `datasets.Dataset` of the record fields, or of TRL's `prompt` and `image`. processing_class: the model's
    processor (default: the checkpoint's). optimizers: an optimizer and its schedule instead of those of the
    settings. peft_config: trains adapters only. engine: the rollout engine (default: by the settings).
    recipe: the source of config.yaml (default: `args`). The positional order is TRL's; arguments that only
    reward models and quantised loading need are refused.

    A function of `reward_funcs` is called once a step with the rank's ordered completions (and once in the
    check before the first step). Each argument is a list with one entry per completion: `prompts` and
    `completions` are texts without chat markup, `completion_ids` lists of ints, and every field of the rows
    comes by its name (`solution`, `problem_type`, `path`, … and your own; None if a row lacks it). It returns
    a finite number for each completion, or None if it does not apply. Its name is used in the series
    `reward/<name>` and in `reward_weights`.

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
                "reward_processing_classes: reward models are not supported; pass a function that calls yours"
            )
        if quantization_config is not None:
            raise ConfigError(
                "quantization_config: pass a model that is loaded with it, or a recipe with load_in_4bit"
            )
        args = TGRPOConfig(output_dir="runs/tgrpo") if args is None else args
        self.terms = terms = reward_terms(reward_funcs, args)
        self.rule = rule_of(args)
        warn_of_cancelled_bonus(terms.names, terms.weights, args)
        judged = ["judge"] if "judge" in terms.names else []
        self.progress_series = {
            "reward": "reward/total", "format": "reward/format", "gap": "temporal/gap",
            **{name: f"reward/{name}" for name in (*terms.custom, *judged, "accuracy")},
            "loss": "loss",
        }  # fmt: skip
        soft = args.sapo_temperature_pos, args.sapo_temperature_neg
        self.clip = ClipRange(args.epsilon, args.epsilon_high or args.epsilon, args.delta, soft)
        self.step = Step([], 1.0, 1.0, is_recorded=True)  # nothing sampled yet
        callbacks = list(callbacks or [])
        if args.scale_rewards == "task":
            callbacks.append(TaskMoments())
        if args.difficulty_range is not None:
            callbacks.append(Difficulty(*args.difficulty_range))
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, recipe,
            optimizers,
        )  # fmt: skip
        if args.preflight_questions > 0:
            self.add_callback(Preflight(lambda: self.preflight_groups(args.preflight_questions)))
        if args.use_vllm:
            self.add_callback(SamplerCheck(self.sampler_difference, not args.async_rollouts))
        policy = cast(PreTrainedModel, self.model)
        follows = args.sync_ref_model
        self.reference = Reference(policy, self.accelerator, follows) if args.beta != 0 else None
        if follows and self.reference is not None:
            every, alpha = args.ref_model_sync_steps, args.ref_model_mixup_alpha
            sync = ReferenceSync(self.reference, self.accelerator, every, alpha)
            self.add_callback(sync)
            self.checkpoint_parts.append(sync)
        self.vision_is_frozen = not any(
            weight.requires_grad for weight in vision_parameters(vision_language_model(policy))
        )
        self.engine = engine or training_engine(
            policy,
            self.processing_class,
            args,
            longest=args.max_prompt_length + args.max_completion_length,
            frames=self.reader.budget,
            dtype="bfloat16" if args.bf16 else "auto",
            folder=str(args.output_dir),
        )
        self.judge: Judge | None = None
        if args.judge_endpoint is not None:
            self.judge = Judge(args, self.folder, self.meter, lambda: self.stop.number is not None)
        self.rollouts = StepRollouts(self.engine, args, self.meter, self.whole_policy)
        self.steps_read_ahead = 2 if args.async_rollouts else 1

    # ---- One optimizer step: read, sample, compare, score, credit, batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step, and their loss's normaliser.

        The policy before the step samples all rollouts: no question's loss depends on its micro-batch.
        """
        read, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not read:
            return [], None
        if read[0]["iteration"] == 0 or not self.step.batches:
            with self.stopping_before_the_step():
                self.step = self.roll_out([batch["pending"] for batch in read])
        self.rollouts.begin_next(self.pending_rollouts())
        step = self.step
        return [{"batch": batch, "step": step} for batch in step.batches], step.normaliser

    def roll_out(self, pending: Sequence[Sequence[Any]]) -> Step:
        """Read, sample, compare and score the questions of a step's micro-batches; return the step."""
        args = self.settings

        # Replace questions whose R_i are all equal (DAPO)
        first = self.ask(self.ready(list(chain(*pending))))
        submit = cast(QuestionSource, self.source).submit
        selected = select_groups(
            first, lambda slots: self.ask(self.ready([submit(s) for s in slots])), args.dynamic_sampling
        )
        groups = selected.groups

        # A_i = w·(R_i − mean(R)) ÷ std(R), the mean over the question's ordered completions
        credit(groups, args, self.callback_of(TaskMoments))
        self.record_selection(selected)
        describe_groups(self.meter, groups, args.self_reflection_phrases)

        # Micro-batches, and the normaliser of the whole step
        return step_of(groups, [len(batch) for batch in pending], selected.vision, args)

    def ask(self, ready: Sequence[Ready[Question]]) -> Asked:
        """Sample, compare and score some of a step's questions. Their advantages are still 0."""
        questions = [entry.content for entry in ready]

        # G completions o_i with the frames in order, H completions õ_j with the frames shuffled
        ordered, shuffled = self.rollouts.of_step(questions)

        # d_i,t = log π(o_i,t | V) − log π(o_i,t | Ṽ), if the temporal rule needs it
        drops, vision = self.compare(questions, ordered)

        # R_i = weighted sum of accuracy, format, length and r_t; only correct o_i of a video have r_t
        groups = self.score(questions, ordered, shuffled, drops)
        return Asked([entry.slot for entry in ready], groups, vision)

    def compare(self, questions: Sequence[Question], ordered: list[list[Rollout]]) -> Comparison:
        """Score the ordered completions behind the contrast clips, if the temporal rule needs it.

        The updates reuse the features of ordered prompts if the vision tower, of a known family, is frozen,
        and the contrast permutes temporal patches or the drops need these features themselves.
        """
        args = self.settings
        if self.rule.contrast != "scored":
            return Comparison()
        known = find_family(vision_language_model(cast(nn.Module, self.model))) is not None
        here = not args.use_vllm and isinstance(self.rollouts.engine, TransformersEngine | GeneralEngine)
        with self.meter.seconds("contrast"), self.whole_policy() as model:
            as_sampled = here and samples_as_it_scores(model)
            shared = known and self.vision_is_frozen and (args.contrast_unit == "patch" or not as_sampled)
            size = args.per_device_train_batch_size
            return compare(model, questions, ordered, args.temperature, size, shared, as_sampled)

    def score(
        self,
        questions: Sequence[Question],
        ordered: list[list[Rollout]],
        shuffled: list[list[Rollout]],
        drops: list[list[Tensor] | None] | None = None,
    ) -> list[RolloutGroup]:
        """Compute every reward term of every completion, and their weighted sum R_i."""
        with self.meter.seconds("reward"):
            return score_groups(
                questions, ordered, shuffled, self.terms, self.settings, self.builder.question, drops,
                self.judge,
            )  # fmt: skip

    # ---- One optimizer step: loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the clipped policy loss of one micro-batch, divided by the normaliser of its step."""
        args, batch, step = self.settings, cast(PolicyBatch, inputs["batch"]), cast(Step, inputs["step"])

        # log π(o_i,t) of the ordered completions only
        policy = self.logprobs(model, batch, with_entropy=True)

        # log π_old, log π_ref and min(π_old ÷ π_vLLM, cap), which all updates on these rollouts share
        if batch.old_logprobs is None:
            self.set_references(batch, model, policy.logprobs.detach())

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
            token_weights=batch.token_weights(kept),
            counted=counted,
        )
        describe_update(self.meter, policy, result)

        # −entropy_coef · mean entropy of the step's tokens
        loss = result.loss
        if args.entropy_coef and policy.entropy is not None:
            entropies = entropy_sum(policy.entropy, policy.lengths, counted, kept)
            loss = loss - args.entropy_coef * entropies / step.entropy_tokens
        loss = self.watched(loss, batch.problem_ids)
        return (loss, {"policy": policy}) if return_outputs else loss

    def logprobs(self, model: nn.Module, batch: PolicyBatch, with_entropy: bool = False) -> GroupLogprobs:
        """[N], of the batch's ordered completions at the sampling temperature. A frozen tower runs once."""
        with self.accelerator.autocast():
            if self.vision_is_frozen and batch.vision is None:
                with torch.no_grad():
                    batch.vision = encode_vision(model, batch.prompts)
            return group_logprobs(
                model,
                batch.prompts,
                batch.completions,
                temperature=self.settings.temperature,
                with_entropy=with_entropy,
                vision_features=batch.vision,
                entropy_gradient=with_entropy and self.settings.entropy_coef != 0,
            )

    def set_references(self, batch: PolicyBatch, model: nn.Module, logprobs: Tensor) -> None:
        """Set the values that all updates on the batch share. The policy has not been updated since it
        sampled: its log-probs [N] are those of π_old.
        """
        batch.old_logprobs = logprobs
        if self.settings.use_vllm:
            batch.sampler_weights = sampler_weights(logprobs, batch.trained, self.settings, self.meter)
        if self.reference is not None:
            with self.reference.in_place_of(model, self.accelerator) as reference:
                batch.ref_logprobs = self.logprobs(reference, batch).logprobs

    # ---- Questions

    def load(self, sample: Sample) -> Clips:
        return self.reader.media(sample)

    def build(self, sample: Sample, loaded: Clips, generator: torch.Generator) -> Question:
        """Build a sample's ordered prompt, and that of its contrast clip if the temporal rule has one."""
        args = self.settings
        contrast = args.temporal_contrast if self.rule.contrast else None
        return build_question(sample, loaded, self.builder, generator, contrast, args.contrast_unit)

    def begin_reading(self, slots: list[Slot]) -> dict[str, Any]:
        """Start reading a batch; later updates on the same rollouts (`iteration` above 0) read nothing."""
        iteration = slots[0].iteration
        if iteration > 0 and self.step.batches:
            return {"pending": [], "iteration": iteration}
        return {**super().begin_reading(slots), "iteration": iteration}

    def pending_rollouts(self) -> list[Any]:
        """Futures of the next step's questions; [] if it needs no rollouts or there is no next step."""
        following = self.upcoming[0] if self.upcoming else []
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if not following or following[0]["iteration"] > 0 or is_last:
            return []
        return list(chain(*(batch["pending"] for batch in following)))

    def get_train_dataloader(self) -> DataLoader:
        """Return QuestionTrainer's loader, restricted to the questions inside `difficulty_range`."""
        loader = super().get_train_dataloader()
        if self.source is not None and self.callback_of(Difficulty):
            # looked up at each call: the Trainer replaces callbacks when it reads a checkpoint
            self.source.choices = lambda samples, epoch: cast(
                Difficulty, self.callback_of(Difficulty)
            ).choices(samples, epoch)
        return loader

    def record_selection(self, selected: Selection) -> None:
        """Record how often each question was right, and the groups of all ranks that teach nothing."""
        if (difficulty := self.callback_of(Difficulty)) and self.source:
            samples = self.source.samples
            for asked in selected.rounds:
                difficulty.add(asked.groups, [slot.epoch for slot in asked.slots])
                for slot in asked.slots[:1]:
                    kept = difficulty.choices(samples, slot.epoch)
                    self.meter.add("questions/kept", len(kept), len(samples))
        if self.settings.dynamic_sampling > 0:
            replaced = sum(group.reason == "replaced" for group in selected.skipped)
            self.meter.add("groups/replaced", replaced, len(selected.groups))
        if self.settings.log_rollouts > 0:
            everyone, _ = gather_lists(selected.skipped)
            if self.is_world_process_zero():
                with tolerated(SKIPPED_GROUPS):
                    for group in sorted(everyone, key=lambda group: group.slot):
                        append_line(self.folder / SKIPPED_GROUPS, group.line(self.state.global_step + 1))

    # ---- Checks before the first step, validation, records

    def train_on(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """Train as QuestionTrainer does, after a test question to the judge."""
        if self.judge is not None:
            self.judge.open()
        return super().train_on(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def whole_policy(self) -> Iterator[Any]:
        """Give every rank the whole model inside, to sample with it or to sync its weights."""
        with self.whole_weights(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    @contextmanager
    def stopping_before_the_step(self) -> Iterator[None]:
        """Save the run as it was before this step if the judge does not answer inside; raise VideoR1Error, or
        Interrupted if the run was told to stop. Completions have seeds of their own and no record changes
        before all are judged, so the run can be resumed exactly.
        """
        try:
            yield
        except JudgeAway as away:
            step = self.state.global_step
            checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if step > 0 and not decided_by_first(checkpoint.exists):
                self._save_checkpoint(cast(nn.Module, self.model_wrapped), None)
            if any(gather(self.stop.number is not None)):
                self.stop.saved = True
                raise self.stop.interrupted() from away
            saved = f" and is saved ({checkpoint.name})" if step > 0 else ""
            raise VideoR1Error(
                f"{away}. The run stopped before step {step + 1}{saved}: when the judge is back, start the "
                "same command again to resume it (judge_down: wait waits for the judge)"
            ) from away

    def first_questions(self, count: int) -> list[Question]:
        """Read the first `count` questions of the first epoch."""
        assert self.source is not None
        slots = [Slot(0, index) for index in range(min(count, len(self.source.samples)))]
        return [future.result().content for future in [self.source.submit(slot) for slot in slots]]

    def preflight_groups(self, count: int) -> list[RolloutGroup]:
        """Sample and score the first questions as a step does."""
        questions = self.first_questions(count)
        sampled = self.rollouts.sample(questions)
        with self.stopping_before_the_step():
            return self.score(questions, sampled.ordered, sampled.shuffled)

    def sampler_difference(self) -> tuple[float, int]:
        """Compare the engine's log-probs with the trainer's on the first questions, in both orders."""
        questions = self.first_questions(CHECKED_QUESTIONS)
        prompts = [p for q in questions for p in (q.ordered, q.shuffled) if p is not None]
        with self.whole_policy() as model:
            return sampler_difference(self.engine, model, prompts, self.settings.temperature)

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Measure accuracy in order and with the contrast clip (see `temporal_accuracy`)."""
        self.rollouts.wait()
        with self.whole_policy() as model:
            self.engine.update_weights(model)
            figures = temporal_accuracy(self.engine, samples, self.reader, self.builder, self.settings)
        self.engine.rest()
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and record some of this step's groups once for all updates on them."""
        step = self.step
        if "loss" in logs and self.is_world_process_zero() and not step.is_recorded:
            step.is_recorded = True
            groups = [group for batch in step.batches for group in batch.groups]
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            with tolerated("rollouts.jsonl"):
                for group in groups[: self.settings.log_rollouts]:
                    record_group(self.folder, self.state.global_step, group, tokenizer)
        super().log(logs, start_time)


def credit(
    groups: Sequence[RolloutGroup], settings: TGRPOSettings, moments: TaskMoments | None = None
) -> None:
    """Set the groups' advantages, those without the temporal term, and the weights of their tokens.

    Every rank calls it with its own groups of a step. moments: for `scale_rewards` task.
    """
    rule, scale, kappa = rule_of(settings), settings.scale_rewards, settings.temporal_weight_kappa
    rows = [(g.total_reward, g.base_reward, g.sample.problem_type, g.margin) for g in groups]
    everyone, mine = gather_lists(rows)
    rewards, without, types, margins = zip(*everyone, strict=True)
    rewards, without = torch.stack(rewards), torch.stack(without)  # [Q, G], of all ranks

    # A_i = (R_i − mean(R)) ÷ std(R); a task's std is that of the rewards with r_t for both
    std = None if moments is None else moments.deviations(rewards, types)
    base = group_advantages(without, scale, task_deviations=std)
    if rule.credit is not None:
        advantages = rule.credit(base, rewards - without, margins, kappa)
    else:
        advantages = group_advantages(rewards, scale, task_deviations=std)

    for group, own, plain in zip(groups, advantages[mine], base[mine], strict=True):
        group.advantages, group.base_advantages = own, plain
        if rule.token_weights is not None and group.token_drops is not None:
            group.token_weights = [rule.token_weights(drops, kappa) for drops in group.token_drops]


def run_rl(recipe: Recipe) -> Path:
    """Run T-GRPO from a resolved recipe: see `run_recipe`."""
    return run_recipe(recipe, TGRPOTrainer, TGRPOConfig)
