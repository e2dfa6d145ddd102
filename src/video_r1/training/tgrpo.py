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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

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
from video_r1.processes import decided_by_first, gather, gather_lists, process_count
from video_r1.recipe import Recipe
from video_r1.rewards.group import reward_terms, score_groups
from video_r1.rewards.judge import Judge, JudgeAway
from video_r1.rollout.engine import RolloutEngine
from video_r1.rollout.engine_factory import training_engine
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.base import settings_docs
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.batches import (
    PolicyBatch,
    StepRollouts,
    flat_groups_count,
    kept_tokens,
    policy_batches,
    sampler_weights,
    step_scale,
)
from video_r1.training.callbacks import (
    CHECKED_QUESTIONS,
    Preflight,
    SamplerCheck,
    sampler_difference,
    warn_of_cancelled_bonus,
)
from video_r1.training.credit import TaskMoments, give_advantages
from video_r1.training.logprob_contrast import Comparison, compare, samples_as_it_scores
from video_r1.training.metrics import SKIPPED_GROUPS, describe_groups, describe_update, tolerated
from video_r1.training.objective import Clip, entropy_sum, policy_loss
from video_r1.training.questions import Asked, Difficulty, Ready, SkippedGroup, Slot, fill_places
from video_r1.training.recording import record_group
from video_r1.training.reference import Reference, ReferenceSync
from video_r1.training.runs import Questions, RunArguments, run_recipe
from video_r1.training.trainer import QuestionTrainer

Kind = TypeVar("Kind", bound=TrainerCallback)
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
        self.terms = terms
        self.step_batches: list[PolicyBatch] = []
        self.recorded = True  # whether groups of theirs are written down
        self.newly_asked: list[tuple[Sequence[Ready[Question]], Sequence[RolloutGroup]]] = []
        callbacks = list(callbacks or [])
        if args.scale_rewards == "task":
            callbacks.append(TaskMoments())
        if args.difficulty_range is not None:
            callbacks.append(Difficulty(*args.difficulty_range))
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            callbacks,
            recipe,
            optimizers,
        )
        if args.preflight_questions > 0:
            self.add_callback(Preflight(lambda: self.preflight_groups(args.preflight_questions)))
        if args.use_vllm:
            self.add_callback(SamplerCheck(self.sampler_difference, not args.async_rollouts))
        policy = cast(PreTrainedModel, self.model)
        follows = args.sync_ref_model
        self.reference = Reference(policy, self.accelerator, follows) if args.beta != 0 else None
        self.reference_sync: ReferenceSync | None = None
        if follows and self.reference is not None:
            every, alpha = args.ref_model_sync_steps, args.ref_model_mixup_alpha
            self.reference_sync = ReferenceSync(self.reference, self.accelerator, every, alpha)
            self.add_callback(self.reference_sync)
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

    # ---- What a step is made of

    def selected(self, ready: Sequence[Ready[Question]], asked: Asked) -> Asked:
        """The step's groups, those of equal rewards replaced as `dynamic_sampling` says."""
        rounds, slots = self.settings.dynamic_sampling, [entry.slot for entry in ready]

        def ask(slots: list[Slot]) -> Asked:
            assert self.source is not None
            return self.ask(self.ready([self.source.submit(slot) for slot in slots]))

        asked, skipped = fill_places(slots, asked, ask, rounds)
        if rounds > 0:
            replaced = sum(group.reason == "replaced" for group in skipped)
            self.meter.add("groups/replaced", replaced, len(slots))
        if self.settings.log_rollouts > 0:
            self.record_skipped(skipped)
        return asked

    def record_skipped(self, own: Sequence[SkippedGroup]) -> None:
        """Writes down the step's groups without variance, those of all processes, by their places."""
        everyone, _ = gather_lists(own)
        if self.is_world_process_zero():
            with tolerated(SKIPPED_GROUPS):
                for group in sorted(everyone, key=lambda group: group.slot):
                    append_line(self.folder / SKIPPED_GROUPS, group.line(self.state.global_step + 1))

    def answered(self, ready: Sequence[Ready[Question]], groups: Sequence[RolloutGroup]) -> None:
        """Takes the groups into the record of `difficulty_range`, where there is one."""
        if (difficulty := self.callback_of(Difficulty)) and self.source:
            epochs, samples = [entry.slot.epoch for entry in ready], self.source.samples
            difficulty.add(groups, epochs)
            for epoch in epochs[:1]:
                self.meter.add("questions/kept", len(self.source.choices(samples, epoch)), len(samples))

    def get_train_dataloader(self) -> DataLoader:
        """As in QuestionTrainer, with the questions that `difficulty_range` leaves."""
        loader = super().get_train_dataloader()
        if self.callback_of(Difficulty):
            assert self.source is not None
            self.source.choices = self.kept_questions
        return loader

    def kept_questions(self, samples: Sequence[Sample], epoch: int) -> Sequence[int]:
        """The questions that `difficulty_range` leaves of an epoch, by number."""
        difficulty = self.callback_of(Difficulty)
        assert difficulty is not None
        return difficulty.choices(samples, epoch)

    def pending_rollouts(self) -> list[Any]:
        """The next step's questions, which are being read; [] where it needs no rollouts or there is none."""
        following = self.upcoming[0] if self.upcoming else []
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if not following or following[0]["iteration"] > 0 or is_last:
            return []
        return list(chain(*(batch["pending"] for batch in following)))

    @contextmanager
    def whole_policy(self) -> Iterator[Any]:
        """Inside, every process has the whole model, to sample with it or to hand it over."""
        with self.whole_weights(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    def callback_of(self, kind: type[Kind]) -> Kind | None:
        """The one of this kind, which the Trainer may have put in place of another when it read a state."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, kind)), None)

    def compared(self, questions: Sequence[Question], ordered: list[list[Rollout]]) -> Comparison:
        """What the contrast clips take from the completions' log-probs, where the temporal rule needs it.

        The features of ordered prompts are shared with the updates where the vision tower, of a known family,
        is frozen, and a contrast of temporal patches permutes them or drops need them themselves.
        """
        args = self.settings
        if not args.needs_drops:
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
        with self.meter.seconds("reward"):
            return score_groups(
                questions, ordered, shuffled, self.terms, self.settings, self.builder.question, drops,
                self.judge,
            )  # fmt: skip

    @contextmanager
    def stopping_before_the_step(self) -> Iterator[None]:
        """Inside, rewards of a step are found. Where the judge stays away, the run is saved as it was before
        this step (completions have seeds of their own, and no record is changed before all are judged), and
        the error says so, or that the run was told to stop.
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
                "same command again, and it goes on from there (judge_down: wait waits for it)"
            ) from away

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

    def complete(self, batch: PolicyBatch, model: nn.Module, logprobs: Tensor) -> None:
        """Before the first update on a batch's rollouts, whose policy is that of the rollouts: its log-probs
        [N], those of the reference, and the weights of an engine with a model of its own.
        """
        if batch.old_logprobs is not None:
            return
        batch.old_logprobs = logprobs
        if self.settings.use_vllm:
            batch.sampler_weights = sampler_weights(logprobs, batch.trained, self.settings, self.meter)
        if self.reference is not None:
            with self.reference.in_place_of(model, self.accelerator) as reference:
                batch.ref_logprobs = self.logprobs(reference, batch).logprobs

    # ---- What is read, validated and recorded

    def train_on(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """As in QuestionTrainer, after one question to the judge where there is one."""
        if self.judge is not None:
            self.judge.open()
        return super().train_on(resume_from_checkpoint, *args, **kwargs)

    def load(self, sample: Sample) -> Clips:
        return self.reader.media(sample)

    def build(self, sample: Sample, loaded: Clips, generator: torch.Generator) -> Question:
        """A sample with both its prompts; with `temporal_rule` off there is none of a contrast clip."""
        args = self.settings
        contrast = args.temporal_contrast if args.temporal_rule != "off" else None
        return build_question(sample, loaded, self.builder, generator, contrast, args.contrast_unit)

    def begin_reading(self, slots: list[Slot]) -> dict[str, Any]:
        """As in QuestionTrainer. Later updates on the same rollouts (`iteration` above 0) read nothing."""
        iteration = slots[0].iteration
        if iteration > 0 and self.step_batches:
            return {"pending": [], "iteration": iteration}
        return {**super().begin_reading(slots), "iteration": iteration}

    def first_questions(self, count: int) -> list[Question]:
        """The first `count` questions of the first epoch."""
        assert self.source is not None
        slots = [Slot(0, index) for index in range(min(count, len(self.source.samples)))]
        return [future.result().content for future in [self.source.submit(slot) for slot in slots]]

    def preflight_groups(self, count: int) -> list[RolloutGroup]:
        """The first questions, sampled and scored as a step's questions are."""
        questions = self.first_questions(count)
        sampled = self.rollouts.sample(questions)
        with self.stopping_before_the_step():
            return self.score(questions, sampled.ordered, sampled.shuffled)

    def sampler_difference(self) -> tuple[float, int]:
        """How far the engine's log-probs are from the trainer's on the first questions, in both orders."""
        questions = self.first_questions(CHECKED_QUESTIONS)
        prompts = [p for q in questions for p in (q.ordered, q.shuffled) if p is not None]
        with self.whole_policy() as model:
            return sampler_difference(self.engine, model, prompts, self.settings.temperature)

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Accuracy in order and with the contrast clip, as `temporal_accuracy` names it."""
        self.rollouts.wait()
        with self.whole_policy() as model:
            self.engine.update_weights(model)
            figures = temporal_accuracy(self.engine, samples, self.reader, self.builder, self.settings)
        self.engine.rest()
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in QuestionTrainer, and in a checkpoint the reference, where it follows the policy."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.folder)
        if self.reference_sync and self.args.should_save and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.reference_sync.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reference_sync:
            self.reference_sync.load(Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in QuestionTrainer, and records some of this step's groups, once for all updates on them."""
        if "loss" in logs and self.is_world_process_zero() and not self.recorded:
            self.recorded = True
            groups = [group for batch in self.step_batches for group in batch.groups]
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            with tolerated("rollouts.jsonl"):
                for group in groups[: self.settings.log_rollouts]:
                    step = self.state.global_step
                    record_group(self.folder, step, group, group.p, group.p_shuffled, tokenizer)
        super().log(logs, start_time)


def run_rl(recipe: Recipe) -> Path:
    """T-GRPO from a resolved recipe: see `run_recipe`."""
    return run_recipe(recipe, TGRPOTrainer, TGRPOConfig)
