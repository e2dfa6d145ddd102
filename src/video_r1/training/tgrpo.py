"""T-GRPO (arXiv 2503.21776): group-relative policy optimisation with a reward for using the frames' order.

    manifest ─► QuestionSource ─► Question ─► engine ─► G ordered + G/2 shuffled completions
                 (background)      2 prompts               │
                                                           ▼
    optimizer ◄─ policy_loss ◄─ group_logprobs ◄─ advantages ◄─ rewards, p, p̃      (RolloutGroup)

`transformers.Trainer` calls `get_batch_samples` once a step (read, sample, compare, score, credit, batch) and
`compute_loss` once a micro-batch (loss). Checkpoints, resume, schedules, mixed precision, ranks and trackers
are the Trainer's; trainer.py has what this project overrides.

With the rule `likelihood_gate` nothing is sampled from the contrast clip: ordered completions are scored
behind it.

Deviations from the paper and its code:
 1. The default temporal reward is the paper's first formula, α·(p − p̃) (`margin`); its v4 has α wherever
    p ≥ μ·p̃ (`threshold`). Both cancel in groups whose rewards have two values (docs/t-grpo.md). The rule
    `likelihood_gate` is not the paper's: it multiplies accuracy and length by 1 − α·exp(−Δ).
 2. p and p̃ belong to one question. The reference code computes them over the batch (one prompt a device).
 3. Ordered and shuffled completions are sampled alike, without top-p: the sampled distribution is scored.
 4. The shuffled order is never the identity, and the sampling rate of the frames reaches the model.
 5. Equal numbers are equal however they are written (see rewards/scoring.py).
 6. The loss is normalised over the optimizer step: a question counts the same in any micro-batch and rank.
 7. Groups of equal rewards are excluded from an update in which they change nothing (`flat_groups_count`).
 8. Another question replaces one whose media cannot be used; a question is never shown other media.
 9. With vLLM, a token's policy loss is weighted by π_old ÷ π_vLLM (capped), which differ by rounding, and
    with async_rollouts by one update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from video_r1.console import tell
from video_r1.data.manifests.records import Sample
from video_r1.data.manifests.trl_rows import ANSWERS, NO_ANSWER
from video_r1.data.prompts import Prompt
from video_r1.data.reading import Clips, Question, build_question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.data.tools import overview
from video_r1.errors import ConfigError, ManifestError
from video_r1.evaluation.validation import temporal_accuracy
from video_r1.files import append_line, tolerated, warn_once
from video_r1.models.families import vision_parameters
from video_r1.models.group_forward import (
    GroupLogprobs,
    Pieces,
    VisualFeatures,
    encode_groups,
    group_logprobs,
    in_one_row,
    vision_language_model,
)
from video_r1.processes import gather, gather_lists, process_count
from video_r1.recipe import Recipe, plain
from video_r1.rewards.custom import named_rewards
from video_r1.rewards.judge import Judge
from video_r1.rewards.scoring import BUILT_IN_TERMS, reward_terms, score_groups
from video_r1.rewards.temporal import rule_of, warn_of_cancelled_bonus
from video_r1.rollout.engine import RolloutEngine, SamplingSettings, sample_rollouts
from video_r1.rollout.engine_factory import training_engine
from video_r1.rollout.episodes import ToolEngine, largest_frames, tool_tokens
from video_r1.settings.base import settings_docs
from video_r1.settings.tools import TrainingToolSettings
from video_r1.settings.training import SELF_REFLECTION_PHRASES, TGRPOSettings
from video_r1.settings.trl import DEFAULTS
from video_r1.settings.vllm import EngineSettings, VLLMSettings
from video_r1.training.advantages import TaskMoments, group_advantages, without_variance
from video_r1.training.ledger import Ledger
from video_r1.training.logprob_contrast import logprob_drops, samples_as_it_scores
from video_r1.training.metrics import SKIPPED_GROUPS, Meter, describe_groups, describe_update
from video_r1.training.objective import (
    ClipRange,
    entropy_sum,
    high_entropy,
    importance_weights,
    loss_normaliser,
    objective_of,
    policy_loss,
)
from video_r1.training.preflight import (
    CHECKED_QUESTIONS,
    StartChecks,
    check_rewards,
    sampler_difference,
    warn_of_difference,
)
from video_r1.training.questions import (
    Asked,
    Ready,
    Selection,
    Slot,
    select_groups,
    with_shuffled_options,
)
from video_r1.training.recording import record_group
from video_r1.training.reference import Reference
from video_r1.training.runs import Questions, RunArguments, questions_per_step, run_recipe
from video_r1.training.teacher import Teacher, note_teacher, teacher_credits
from video_r1.training.trainer import QuestionTrainer

RewardFunctions = str | Callable[..., Any] | Sequence[str | Callable[..., Any]]


@settings_docs
@dataclass
class TGRPOConfig(TGRPOSettings, EngineSettings, TrainingToolSettings, RunArguments):
    """All settings of a run: this project's own, TRL's by TRL's names, every field of `TrainingArguments`.

    `per_device_train_batch_size` counts questions. Fields of TRL's `GRPOConfig` that are none here are
    translated or refused (settings/trl.py). Raises ConfigError, naming every problem found.
    """

    command = "rl"

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_of(self.loss_type)  # functions of the user's are imported before weights are loaded
        if isinstance(self.reward_funcs, list):
            named_rewards(self.reward_funcs, BUILT_IN_TERMS)


class Sampled(NamedTuple):
    """Completions of questions, ordered [Q][G] and shuffled [Q][H or 0]; seconds that the engine took."""

    ordered: list[list[Rollout]]
    shuffled: list[list[Rollout]]
    seconds: float


@dataclass(slots=True)
class PolicyBatch:
    """A micro-batch of groups, and the values that all updates on the same rollouts share. The model sees
    only `trained`: Q questions with N completion tokens in all.
    """

    groups: list[RolloutGroup]
    trained: list[RolloutGroup]
    old_logprobs: Tensor | None = None  # [N], of the policy that sampled
    ref_logprobs: Tensor | None = None  # [N]
    sampler_weights: Tensor | None = None  # [N], if vLLM sampled
    teacher_credits: Tensor | None = None  # [N], if there is a teacher
    # of each question's prompt and tool turns, if the vision tower is frozen
    vision: list[list[VisualFeatures | None]] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.trained]

    @property
    def completions(self) -> list[list[Tensor]]:
        return [[rollout.token_ids for rollout in group.ordered] for group in self.trained]

    @property
    def pieces(self) -> list[list[Pieces]]:
        """Completions with what tools returned."""
        return [[rollout.pieces() for rollout in group.ordered] for group in self.trained]

    @property
    def advantages(self) -> Tensor:
        """[completions]"""
        return torch.cat([group.advantages for group in self.trained])

    @property
    def finished(self) -> Tensor:
        """[completions] bool: False for those that were cut at the longest length."""
        rollouts = [rollout for group in self.trained for rollout in group.ordered]
        return torch.tensor([rollout.finish_reason != "length" for rollout in rollouts])

    def token_weights(self, kept: Tensor | None) -> Tensor | None:
        """[N], factors of each token's policy term: the sampler's weight, and 0 for tokens that are not kept
        ([N] bool; None: all are). None: all 1.
        """
        weights = self.sampler_weights
        if kept is None:
            return weights
        return kept.float() if weights is None else kept * weights.to(kept.device)

    @property
    def problem_ids(self) -> list[str | int]:
        return [group.sample.problem_id for group in self.trained]


@dataclass(slots=True)
class Step:
    """Micro-batches of one optimizer step, which all updates on their rollouts share; divisors of the loss
    and of the sum of entropies, over all ranks ÷ their number, since gradients are averaged over ranks.
    """

    batches: list[PolicyBatch]
    normaliser: float
    entropy_tokens: float
    is_recorded: bool = False  # in rollouts.jsonl


class TGRPOTrainer(QuestionTrainer):
    """Trains a video-language model with GRPO or T-GRPO on questions about videos and images.

    model: checkpoint folder, hub id or model (docs/models.md lists them). reward_funcs: None for the paper's
    rewards, or names of built-in ones ("accuracy", "format", "length", "judge") and functions with TRL's
    signature, `function(prompts, completions, completion_ids, **columns) -> list[float | None]`.
    train_dataset, eval_dataset: a manifest's path or hub id, a list of Sample or of dicts, or a
    `datasets.Dataset` of the record fields, or of TRL's `prompt` and `image`. processing_class: the model's
    processor (default: the checkpoint's). peft_config: trains adapters only. engine: the rollout engine
    (default: by the settings). recipe: the source of config.yaml (default: `args`). The positional order is
    TRL's; arguments that only reward models and quantised loading need are refused. tools: functions with
    type hints and docstrings that the policy may call, besides the settings' own (docs/look.md).

    A function of `reward_funcs` is called once a step (and once before the first) with lists of one entry
    per ordered completion of the rank: texts without chat markup, ids, and every field of the rows by its
    name. It returns a finite number for each, or None if it does not apply (docs/t-grpo.md).

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
        tools: Sequence[Callable[..., Any]] | None = None,
        rollout_func: None = None,
        environment_factory: None = None,
    ) -> None:
        if reward_processing_classes is not None:
            raise ConfigError("reward_processing_classes: pass a reward function that calls your model")
        if quantization_config is not None:
            raise ConfigError("quantization_config: pass a model loaded with it, or a recipe: load_in_4bit")
        if rollout_func is not None:
            raise ConfigError("rollout_func: pass an engine (video_r1.rollout.engine.RolloutEngine)")
        if environment_factory is not None:
            raise ConfigError("environment_factory: pass tools, functions that the policy calls")
        args = TGRPOConfig(output_dir="runs/tgrpo") if args is None else args
        self.terms = terms = reward_terms(reward_funcs, args)
        if "temporal" not in terms.names:  # a list of rewards is all that is paid
            args = copy(args)
            args.temporal_rule = "off"
        self.rule = rule_of(args)
        self.ledger = Ledger()
        warn_of_cancelled_bonus(terms.names, terms.weights, args)
        judged = ["judge"] if "judge" in terms.names else []
        total = {"reward": "reward/total"} if terms.names else {}  # without rewards it is always 0
        taught = {"KL to the teacher": "teacher/kl"} if args.teacher.model_name_or_path else {}
        self.progress_series = {
            **total, **taught, "format": "reward/format", "gap": "temporal/gap",
            **{name: f"reward/{name}" for name in (*terms.custom, *judged, "accuracy")},
            "loss": "loss",
        }  # fmt: skip
        soft = args.sapo.temperature_pos, args.sapo.temperature_neg
        self.clip = ClipRange(args.epsilon, args.epsilon_high or args.epsilon, args.delta, soft)
        self.step = Step([], 1.0, 1.0, is_recorded=True)  # nothing sampled yet
        callbacks = list(callbacks or [])
        if args.scale_rewards == "task":
            callbacks.append(TaskMoments())
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, recipe,
            optimizers, tools,
        )  # fmt: skip
        self.add_callback(StartChecks(self.check_start))
        asked = cast(list[Sample], self.train_dataset or [])
        if "accuracy" in terms.built_in and (bare := [one for one in asked if one.solution == NO_ANSWER]):
            raise ManifestError(
                f"{len(bare)} of {len(asked)} rows have no text or number in {', '.join(ANSWERS)} for the "
                f"reward accuracy (the first: {bare[0].problem_id!r}); add it, or name other reward_funcs"
            )
        policy = cast(PreTrainedModel, self.model)
        self.reference = Reference(policy, self.accelerator) if args.beta != 0 else None
        self.teacher: Teacher | None = None
        if args.teacher.model_name_or_path is not None:
            self.teacher = Teacher(args, self.builder, self.reader, policy, self.accelerator)
        self.vision_is_frozen = not any(
            weight.requires_grad for weight in vision_parameters(vision_language_model(policy))
        )
        self.engine: RolloutEngine = engine or training_engine(
            policy,
            self.processing_class,
            args,
            longest=args.max_prompt_length + args.max_completion_length + tool_tokens(args, bool(tools)),
            sequences=args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * (args.num_generations + args.shuffled_generations),
            frames=largest_frames(self.reader.budget, args),
            dtype="bfloat16" if args.bf16 else "auto",
            folder=str(args.output_dir),
        )
        if self.builder.toolbox is not None:
            scored = args.contrast if self.rule.contrast == "scored" else None
            self.engine = ToolEngine(self.engine, self.builder, scored, args.contrast_unit)
        self.judge: Judge | None = None
        if args.judge.endpoint is not None:
            self.judge = Judge(args.judge, self.folder, self.meter, lambda: self.stop.number is not None)
        self.ahead: Future[Sampled] | None = None  # rollouts of the next step
        self.thread = ThreadPoolExecutor(1, "rollouts-ahead") if args.async_rollouts else None
        self.steps_read_ahead = 2 if args.async_rollouts else 1

    # ---- One optimizer step: read, sample, compare, score, credit, batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step, and their loss's normaliser."""
        read, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not read:
            return [], None
        if read[0]["iteration"] == 0 or not self.step.batches:
            with self.stopping_before_the_step():
                self.step = self.roll_out([batch["pending"] for batch in read])
        self.begin_next_rollouts()
        step = self.step
        return [{"batch": batch, "step": step} for batch in step.batches], step.normaliser

    def roll_out(self, pending: Sequence[Sequence[Any]]) -> Step:
        """Turn the questions of a step's micro-batches, which are being read, into the step."""
        args = self.settings
        first = self.ask(self.ready(list(chain(*pending))))

        # Replace questions whose R_i are all equal (DAPO)
        selected = select_groups(
            first, lambda slots: self.ask(self.ready(self.submit(slots))), args.dynamic_sampling
        )
        groups = selected.groups

        # A_i = (R_i − mean(R)) ÷ std(R), the mean over the question's ordered completions
        entries = credit(groups, args, self.callback_of(TaskMoments), self.ledger)
        self.record_selection(selected)
        tools = isinstance(self.engine, ToolEngine)
        describe_groups(self.meter, groups, SELF_REFLECTION_PHRASES, tools)
        for name, value in entries.items():
            self.meter.add(name, value)

        # Micro-batches, and the normaliser of the whole step
        return step_of(groups, [len(batch) for batch in pending], selected.vision, args)

    def ask(self, ready: Sequence[Ready[Question]]) -> Asked:
        """Sample, compare and score some of a step's questions. Their advantages are still 0."""
        questions = [entry.content for entry in ready]

        # G completions o_i with the frames in order, H completions õ_j with the frames shuffled
        ordered, shuffled = self.step_rollouts(questions)

        # d_i,t = log π(o_i,t | V) − log π(o_i,t | Ṽ), if the temporal rule needs it
        drops, vision = self.compare(questions, ordered)

        # R_i = weighted sum of accuracy, format, length and r_t; only correct o_i of a video have r_t
        groups = self.score(questions, ordered, shuffled, drops)
        return Asked([entry.slot for entry in ready], groups, vision)

    def step_rollouts(self, questions: Sequence[Question]) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """Return ordered completions [Q][G] and shuffled ones [Q][H or 0], sampled ahead or now."""
        ahead, self.ahead = self.ahead, None
        with self.meter.seconds("rollout"):
            sampled = self.sample(questions) if ahead is None else ahead.result()
        self.meter.speeds([*sampled.ordered, *sampled.shuffled], sampled.seconds)
        if self.settings.use_vllm:
            self.meter.add("sampler/staleness", ahead is not None)
        return sampled.ordered, sampled.shuffled

    def sample(self, questions: Sequence[Question]) -> Sampled:
        with self.synced_engine():
            return self.generate(questions)

    @contextmanager
    def synced_engine(self) -> Iterator[None]:
        """Give the engine the policy's weights. A model gathered for it is freed before vLLM samples."""
        with ExitStack() as gathered:
            self.engine.update_weights(gathered.enter_context(self.whole_policy()))
            if self.engine.has_own_weights:
                gathered.close()
            yield
        self.engine.rest()

    def generate(self, questions: Sequence[Question]) -> Sampled:
        args, started = self.settings, time.perf_counter()
        sampling = SamplingSettings(
            n=args.num_generations, temperature=args.temperature, max_tokens=args.max_completion_length
        )
        rollouts = sample_rollouts(self.engine, questions, sampling, args.shuffled_generations)
        return Sampled(*rollouts, time.perf_counter() - started)

    def begin_next_rollouts(self) -> None:
        """With `async_rollouts`, sample the next step on a server while this step is updated:

            step t:   collect the rollouts of t ─► sync θ_t ─► start sampling t+1 ─► update to θ_t+1

        The rollouts of step t+1 come from θ_t, one update old. The first step of an epoch or of a resumed run
        has nothing to collect: the current weights sample it.
        """
        following = self.upcoming[0] if self.upcoming else []
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if self.thread is None or not following or following[0]["iteration"] > 0 or is_last:
            return
        pending = list(chain(*(batch["pending"] for batch in following)))
        with self.whole_policy() as model:
            self.engine.update_weights(model)
        self.ahead = self.thread.submit(lambda: self.generate([each.result().content for each in pending]))

    def compare(
        self, questions: Sequence[Question], ordered: list[list[Rollout]]
    ) -> tuple[list[list[Tensor] | None] | None, list[list[VisualFeatures | None]] | None]:
        """Score the ordered completions behind the contrast clips, if the temporal rule needs it: return
        their drops, and the visual features of the ordered prompts if the updates can reuse them.
        """
        args, size = self.settings, self.settings.per_device_train_batch_size
        if self.rule.contrast != "scored":
            return None, None
        known = in_one_row(vision_language_model(cast(nn.Module, self.model)))
        with self.meter.seconds("contrast"), self.whole_policy() as model, torch.no_grad():
            as_sampled, vision = self.engine.scores_as_trained and samples_as_it_scores(model), None
            if known and self.vision_is_frozen and (args.contrast_unit == "patch" or not as_sampled):
                vision = []
                for n in range(0, len(questions), size):
                    pieces = [[rollout.pieces() for rollout in group] for group in ordered[n : n + size]]
                    vision += encode_groups(model, [q.ordered for q in questions[n : n + size]], pieces)
            drops = logprob_drops(model, questions, ordered, args.temperature, size, vision, as_sampled)
            return drops, vision

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

    # ---- One optimizer step: loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the clipped policy loss of one micro-batch, divided by the normaliser of its step."""
        args, batch, step = self.settings, cast(PolicyBatch, inputs["batch"]), cast(Step, inputs["step"])

        # log π(o_i,t) of the ordered completions only
        policy = self.logprobs(model, batch, with_entropy=True)

        # log π_old, log π_ref, log π_teacher and min(π_old ÷ π_vLLM, cap), which all updates on these share
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
            token_credits=batch.teacher_credits,
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
        """Compute log π [N] at the sampling temperature. A frozen tower runs once."""
        with self.accelerator.autocast():
            if self.vision_is_frozen and batch.vision is None:
                with torch.no_grad():
                    batch.vision = encode_groups(model, batch.prompts, batch.pieces)
            return group_logprobs(
                model,
                batch.prompts,
                batch.completions,
                temperature=self.settings.temperature,
                with_entropy=with_entropy,
                vision_features=None if batch.vision is None else list(chain(*batch.vision)),
                entropy_gradient=with_entropy and self.settings.entropy_coef != 0,
                pieces=batch.pieces,
            )

    def set_references(self, batch: PolicyBatch, model: nn.Module, logprobs: Tensor) -> None:
        """Set what all updates on the batch share. logprobs: [N], of the policy before the first update."""
        batch.old_logprobs = logprobs
        if self.settings.use_vllm:
            batch.sampler_weights = sampler_weights(logprobs, batch.trained, self.settings.vllm, self.meter)
        if self.reference is not None:
            with self.reference.in_place_of(model, self.accelerator) as reference:
                batch.ref_logprobs = self.logprobs(reference, batch).logprobs
        if self.teacher is not None:
            with self.meter.seconds("teacher"):
                scores = self.teacher.scores(model, batch.trained)
            batch.teacher_credits = teacher_credits(scores, logprobs, self.settings.teacher.weight)
            note_teacher(self.meter, batch.trained, scores, logprobs)

    # ---- Questions

    def load(self, sample: Sample) -> Clips:
        return self.reader.media(sample)

    def build(self, sample: Sample, loaded: Clips, generator: torch.Generator) -> Question:
        """Build a sample's ordered prompt, and those of its contrast clip and the teacher, if any."""
        args = self.settings
        contrast = args.contrast if self.rule.contrast else None
        sample = with_shuffled_options(sample, generator) if args.shuffle_options else sample
        if args.overview_frames:
            loaded = tuple(overview(clip, args.overview_frames, generator) for clip in loaded)
        question = build_question(sample, loaded, self.builder, generator, contrast, args.contrast_unit)
        return question if self.teacher is None else replace(question, teacher=self.teacher.prompt(sample))

    def begin_reading(self, slots: list[Slot]) -> dict[str, Any]:
        """Start reading a batch; later updates on the same rollouts (`iteration` above 0) read nothing."""
        iteration = slots[0].iteration
        if iteration > 0 and self.step.batches:
            return {"pending": [], "iteration": iteration}
        return {**super().begin_reading(slots), "iteration": iteration}

    def record_selection(self, selected: Selection) -> None:
        """Record the groups of all ranks that teach nothing."""
        if self.settings.dynamic_sampling > 0:
            replaced = sum(line["reason"] == "replaced" for _, line in selected.skipped)
            self.meter.add("groups/replaced", replaced, len(selected.groups))
        if self.settings.log_rollouts > 0:
            everyone, _ = gather_lists(selected.skipped)
            if self.is_world_process_zero():
                with tolerated(SKIPPED_GROUPS):
                    for _, line in sorted(everyone, key=lambda skipped: skipped[0]):
                        line = {"step": self.state.global_step + 1, **line}
                        append_line(self.folder / SKIPPED_GROUPS, line)

    # ---- Checks before the first step, validation, records

    @contextmanager
    def whole_policy(self) -> Iterator[Any]:
        """Give every rank the whole model inside, to sample with it or to sync its weights."""
        with self.whole_weights(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    def check_start(self) -> None:
        """Check before the first step that the judge answers, that a reward is in reach, and that vLLM's
        log-probs of the first questions are the trainer's.
        """
        args = self.settings
        if self.is_world_process_zero():
            tell(what_counts(args, self.terms.names))
        if self.judge is not None:
            self.judge.open()
        if self.state.global_step == 0 and args.preflight_questions > 0 and self.terms.names:
            questions = self.first_questions(args.preflight_questions)
            sampled = self.sample(questions)
            with self.stopping_before_the_step():
                check_rewards(self.score(questions, sampled.ordered, sampled.shuffled))
        if args.use_vllm:
            questions = self.first_questions(CHECKED_QUESTIONS)
            prompts = [p for q in questions for p in (q.ordered, q.shuffled) if p is not None]
            with self.whole_policy() as model:
                warn_of_difference(sampler_difference(self.engine, model, prompts, args.temperature))

    def first_questions(self, count: int) -> list[Question]:
        count = min(count, len(cast(list[Sample], self.train_dataset)))
        return [each.result().content for each in self.submit([Slot(0, index) for index in range(count)])]

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Measure accuracy in order and with the contrast clip (see `temporal_accuracy`)."""
        if self.ahead is not None:
            self.ahead.exception()  # waits: the engine samples; `step_rollouts` raises its error
        with self.synced_engine():
            return temporal_accuracy(self.engine, samples, self.reader, self.builder, self.settings)

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
        if self.settings.use_vllm and not self.settings.async_rollouts:  # which samples with older weights
            warn_of_difference(self.state.log_history[-1].get("sampler/logprob_difference", 0.0))


def credit(
    groups: Sequence[RolloutGroup],
    settings: TGRPOSettings,
    moments: TaskMoments | None = None,
    ledger: Ledger | None = None,
) -> dict[str, float]:
    """Set the groups' advantages, and those without each reward term; return the ledger's series. Every rank
    calls it with its own groups of a step. moments: for `scale_rewards` task.
    """
    scale, rule = settings.scale_rewards, rule_of(settings)
    rows = [
        (g.total_reward, g.rewards_without, g.sample.problem_type, g.gate_deviation, g.correct)
        for g in groups
    ]
    everyone, mine = gather_lists(rows)
    totals, parts, types, gated, correct = zip(*everyone, strict=True)
    rewards = torch.stack(totals)  # [Q, G], of all ranks
    names = dict.fromkeys(chain(*parts))
    without = {
        name: torch.stack([part.get(name, total) for part, total in zip(parts, totals, strict=True)])
        for name in names
    }

    # A_i = (R_i − mean(R)) ÷ (std(R) + floor); a task's std is that of the rewards with all terms
    std = None if moments is None else moments.deviations(rewards, types)
    own = rewards.std(dim=1) if rewards.shape[1] > 1 else torch.zeros(len(rewards))
    share = (torch.tensor(gated) / own.clamp(min=1e-12)).clamp(max=1.0)  # of the deviation, by the gate alone
    floor = rule.floor * share[:, None]
    advantages = group_advantages(rewards, scale, floor, std)
    others = {
        name: group_advantages(values, scale, None if name == "temporal" else floor, std)
        for name, values in without.items()
    }

    for place, group in zip(range(len(everyone))[mine], groups, strict=True):
        group.advantages = advantages[place]
        group.advantages_without = {name: values[place] for name, values in others.items()}
    if ledger is None:
        return {}
    varies = {name: not bool(without_variance(rewards - values).all()) for name, values in without.items()}
    return ledger.add(advantages, others, torch.stack(correct), varies, rule.gate is not None)


def step_of(
    groups: Sequence[RolloutGroup],
    sizes: Sequence[int],
    vision: Sequence[list[VisualFeatures | None]] | None,
    settings: TGRPOSettings,
) -> Step:
    """Split scored groups into micro-batches of these sizes; every rank calls it with its own groups. vision:
    features of their prompts. At least one group of each is trained on, so that every rank has a loss.
    """
    remaining, batches, all_count = iter(range(len(groups))), [], flat_groups_count(settings)
    for size in sizes:
        part = [next(remaining) for _ in range(size)]
        trained = [n for n in part if all_count or bool(groups[n].advantages.any())] or part[:1]
        batch = PolicyBatch([groups[n] for n in part], [groups[n] for n in trained])
        batch.vision = None if vision is None else [vision[n] for n in trained]
        batches.append(batch)

    rollouts = [rollout for group in groups for rollout in group.ordered]
    masked = settings.mask_truncated_completions
    counted = [rollout for rollout in rollouts if not (masked and rollout.finish_reason == "length")]
    counts = gather((len(rollouts), sum(len(rollout.token_ids) for rollout in counted)))
    responses, tokens = (sum(column) for column in zip(*counts, strict=True))
    if masked and tokens == 0:
        warn_once(
            "mask_truncated_completions: all completions of a step were cut off at max_completion_length "
            f"({settings.max_completion_length} tokens), so it learns nothing; raise it if this is frequent"
        )
    normaliser = loss_normaliser(settings.loss_type, responses, tokens, settings.max_completion_length)
    entropy_tokens = max(1.0, tokens * settings.top_entropy_quantile)
    return Step(batches, normaliser / process_count(), entropy_tokens / process_count())


def flat_groups_count(settings: TGRPOSettings) -> bool:
    """Whether groups of equal rewards matter although their advantages are 0: for a KL or entropy term, a
    teacher, the mean over a micro-batch (bnpo), or where entropies are ranked.
    """
    own_terms = settings.beta != 0 or settings.entropy_coef != 0 or settings.teacher.model_name_or_path
    averaged = objective_of(settings.loss_type).average == "micro_batch"
    return bool(own_terms) or averaged or settings.top_entropy_quantile < 1


def kept_tokens(batch: PolicyBatch, policy: GroupLogprobs, settings: TGRPOSettings) -> Tensor | None:
    """[N] bool: the share `top_entropy_quantile` of highest entropy among the tokens that count in this
    micro-batch of all ranks; None: all.
    """
    if settings.top_entropy_quantile == 1.0:
        return None
    assert policy.entropy is not None
    entropy = policy.entropy.detach()
    counted = batch.finished if settings.mask_truncated_completions else torch.ones(len(policy.lengths))
    among = entropy.cpu()[torch.repeat_interleave(counted.bool(), policy.lengths.cpu())]
    everywhere = torch.cat(gather(among))
    return high_entropy(entropy, everywhere.to(entropy), settings.top_entropy_quantile)


def sampler_weights(
    trainer_logprobs: Tensor, groups: Sequence[RolloutGroup], settings: VLLMSettings, meter: Meter
) -> Tensor | None:
    """Return importance weights [N] of the groups' ordered completion tokens (`importance_weights`); None if
    the settings want no correction. trainer_logprobs: [N] before the update. Adds to the series `sampler/…`.
    """
    rollouts = [rollout for group in groups for rollout in group.ordered]
    sampled = torch.cat([rollout.logprobs for rollout in rollouts]).to(trainer_logprobs)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], device=sampled.device)
    difference = trainer_logprobs - sampled  # [N]
    mode, bounds = settings.importance_sampling_mode, settings.importance_bounds
    weights, tokens = importance_weights(difference, lengths, mode, bounds), len(sampled)
    meter.add("sampler/logprob_difference", float(difference.abs().sum()), tokens)
    meter.peak("sampler/logprob_difference_max", float(difference.abs().max()))
    unbounded = importance_weights(difference, lengths, mode, (0.0, math.inf))
    meter.add("sampler/share_capped", float((weights != unbounded).sum()), tokens)
    return weights if settings.importance_sampling_correction else None


def what_counts(args: TGRPOConfig, rewards: Sequence[str]) -> str:
    """Return the line of a run's start: its batch, rule and rewards, and what differs from TRL's defaults."""
    rule = "no temporal rule" if args.paid_rule == "off" else f"{args.paid_rule} ({args.contrast} contrast)"
    values = plain({name: getattr(args, name) for name in DEFAULTS})
    others = [
        f"{name} {value} ({DEFAULTS[name]})" for name, value in values.items() if value != DEFAULTS[name]
    ]
    batch = f"{questions_per_step(vars(args))} questions × {args.num_generations} answers"
    return (
        f"a step: {batch}; {rule}; rewards: {', '.join(rewards) or 'none'}; settings that differ from TRL's "
        f"defaults (in brackets): {', '.join(others) or 'none'}"
    )


def run_rl(recipe: Recipe) -> Path:
    """Run T-GRPO from a resolved recipe: see `run_recipe`."""
    return run_recipe(recipe, TGRPOTrainer, TGRPOConfig)
