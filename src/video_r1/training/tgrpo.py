"""T-GRPO on `transformers.Trainer`: the settings, the constructor, and hooks that call training/step.py.

`get_batch_samples` (trainer.py) makes one step of questions, `compute_loss` the loss of one micro-batch.
Checkpoints, resume, schedules, mixed precision, ranks and trackers are the Trainer's.
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
from video_r1.data.reading import Clips, Question, build_question
from video_r1.data.rollouts import Group, Rollout, Rollouts
from video_r1.data.tools import overview
from video_r1.errors import ConfigError, ManifestError, VideoR1Error
from video_r1.evaluation.validation import ShortcutWatch, temporal_accuracy
from video_r1.files import append_line, tolerated
from video_r1.models.families import vision_parameters
from video_r1.models.group_forward import GroupLogprobs, VisualFeatures, encode_groups, vision_language_model
from video_r1.processes import gather, gather_lists
from video_r1.recipe import Recipe, plain
from video_r1.rewards.custom import named_rewards
from video_r1.rewards.judge import Judge, JudgeAway
from video_r1.rewards.scoring import BUILT_IN_TERMS, reward_terms
from video_r1.rewards.temporal import rule_of, warn_of_cancelled_bonus
from video_r1.rollout.engine import RolloutEngine
from video_r1.rollout.engine_factory import training_engine
from video_r1.rollout.episodes import ToolEngine, largest_frames, tool_tokens
from video_r1.settings.base import settings_docs
from video_r1.settings.tools import TrainingToolSettings
from video_r1.settings.training import SELF_REFLECTION_PHRASES, TGRPOSettings
from video_r1.settings.trl import DEFAULTS
from video_r1.settings.vllm import EngineSettings, VLLMSettings
from video_r1.training.advantages import TaskMoments
from video_r1.training.ledger import Ledger
from video_r1.training.logprob_contrast import samples_as_it_scores
from video_r1.training.metrics import SKIPPED_GROUPS, Meter, describe_groups, describe_update
from video_r1.training.objective import importance_weights, objective_of
from video_r1.training.preflight import (
    CHECKED_QUESTIONS,
    StartChecks,
    check_rewards,
    sampler_difference,
    warn_of_difference,
)
from video_r1.training.questions import Reading, Ready, Slot, with_shuffled_options
from video_r1.training.recording import record_group
from video_r1.training.reference import Reference
from video_r1.training.runs import Questions, RunArguments, questions_per_step, run_recipe
from video_r1.training.selection import Answered, Selection, select
from video_r1.training.step import (
    MicroBatch,
    References,
    Step,
    advantages,
    compare,
    logprobs_of,
    micro_batches,
    policy_loss,
    sample,
    score,
)
from video_r1.training.teacher import Teacher, by_group, describe_teacher, teacher_credits
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
        self.ledger, self.watch = Ledger(), ShortcutWatch()
        warn_of_cancelled_bonus(terms.names, terms.weights, args)
        judged = ["judge"] if "judge" in terms.names else []
        total = {"reward": "reward/total"} if terms.names else {}  # without rewards it is always 0
        taught = {"KL to the teacher": "teacher/kl"} if args.teacher.model_name_or_path else {}
        self.progress_series = {
            **total, **taught, "format": "reward/format", "gap": "temporal/gap",
            **{name: f"reward/{name}" for name in (*terms.custom, *judged, "accuracy")},
            "loss": "loss",
        }  # fmt: skip
        self.step = Step()  # nothing sampled yet
        self.unrecorded: Sequence[MicroBatch] = ()  # of a step that is not in rollouts.jsonl
        self.references: dict[int, References] = {}  # of the step's micro-batches, by number
        self.vision: dict[int, Sequence[Sequence[VisualFeatures | None]]] = {}
        self.updates_per_step = args.num_iterations
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
            * (args.num_generations + args.contrast_generations),
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
        self.updates_read_ahead = 2 if args.async_rollouts else 1

    # ---- One optimizer step

    def step_inputs(self, reading: list[list[Reading]]) -> tuple[list[Any], float]:
        """Return the micro-batches of the next update: on new rollouts, or on those of the last step."""
        if any(reading):
            with self.stopping_before_the_step():
                self.step = self.new_step(reading)
            self.unrecorded = self.step.batches
            self.references, self.vision = {}, {}
        self.begin_next_rollouts()
        return [{"batch": batch} for batch in self.step.batches], self.step.normaliser

    def new_step(self, reading: Sequence[Sequence[Reading]]) -> Step:
        """Sample, compare and score a step's questions; return its groups in micro-batches."""
        args = self.settings
        first = self.answer(self.ready(list(chain(*reading))))
        selected = select(
            first, lambda slots: self.answer(self.ready(self.submit(slots))), args.dynamic_sampling
        )
        _, rollouts, rewards = zip(*selected.answered, strict=True)
        groups = advantages(rollouts, rewards, args, self.callback_of(TaskMoments))
        self.describe(groups, selected)
        return micro_batches(groups, [len(batch) for batch in reading], args)

    def answer(self, ready: Sequence[Ready[Question]]) -> list[Answered]:
        """Sample, compare and score questions; [] too, since other ranks may have some."""
        args, slots = self.settings, [entry.slot for entry in ready]
        ahead, self.ahead = self.ahead, None
        with self.meter.seconds("rollout"):
            sampled = ahead.result() if ahead else self.sample([entry.content for entry in ready])
        self.meter.speeds(
            [o for one in sampled.rollouts for o in (*one.ordered, *one.contrast)], sampled.seconds
        )
        if args.use_vllm:
            self.meter.add("sampler/staleness", ahead is not None)
        rollouts = sampled.rollouts
        if self.rule.contrast == "scored":
            with self.meter.seconds("contrast"), self.whole_policy() as policy:
                exact = self.engine.scores_as_trained and samples_as_it_scores(policy)
                size = args.per_device_train_batch_size
                rollouts = compare(policy, rollouts, args, size, exact, self.vision_is_frozen)
        with self.meter.seconds("reward"):
            rewards = score(rollouts, self.terms, args, self.builder.question, self.judge)
        return [Answered(*one) for one in zip(slots, rollouts, rewards, strict=True)]

    def sample(self, questions: Sequence[Question]) -> Sampled:
        """Sample with the policy's weights."""
        with self.synced_engine():
            return self.timed_sample(questions)

    def timed_sample(self, questions: Sequence[Question]) -> Sampled:
        started = time.perf_counter()
        return Sampled(sample(self.engine, questions, self.settings), time.perf_counter() - started)

    def begin_next_rollouts(self) -> None:
        """With `async_rollouts`, sample the next step on a server while this step is updated:

            step t:   collect the rollouts of t ─► sync θ_t ─► start sampling t+1 ─► update to θ_t+1

        The rollouts of step t+1 come from θ_t, one update old. The first step of an epoch or of a resumed run
        has nothing to collect: the current weights sample it.
        """
        pending = list(chain(*(self.upcoming[0] if self.upcoming else ())))
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if self.thread is None or not pending or is_last:
            return
        with self.whole_policy() as policy:
            self.engine.update_weights(policy)
        self.ahead = self.thread.submit(lambda: self.timed_sample([one.result().content for one in pending]))

    @contextmanager
    def synced_engine(self) -> Iterator[None]:
        """Give the engine the policy's weights. A model gathered for it is freed before vLLM samples."""
        with ExitStack() as gathered:
            self.engine.update_weights(gathered.enter_context(self.whole_policy()))
            if self.engine.has_own_weights:
                gathered.close()
            yield
        self.engine.rest()

    @contextmanager
    def whole_policy(self) -> Iterator[Any]:
        """Give every rank the whole model inside, to sample with it or to sync its weights."""
        with self.whole_weights(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.model)

    @contextmanager
    def stopping_before_the_step(self) -> Iterator[None]:
        """Save the run as it was before this step if the judge does not answer inside; raise VideoR1Error, or
        Interrupted if the run was told to stop. No record has changed yet: the run can be resumed exactly.
        """
        try:
            yield
        except JudgeAway as away:
            saved = self.save_before_the_step()
            if any(gather(self.stop.number is not None)):
                self.stop.saved = True
                raise self.stop.interrupted() from away
            raise VideoR1Error(
                f"{away}. The run stopped before step {self.state.global_step + 1}{saved}: when the judge is "
                "back, start the same command again to resume it (judge_down: wait waits for the judge)"
            ) from away

    # ---- The loss of one micro-batch

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the policy loss of one micro-batch, divided by the normaliser of its step."""
        batch = cast(MicroBatch, inputs["batch"])
        logprobs = self.logprobs(model, batch, with_entropy=True)
        if batch.number not in self.references:
            self.references[batch.number] = self.reference_logprobs(model, batch, logprobs.logprobs.detach())
        references = self.references[batch.number]
        result = policy_loss(logprobs, batch, references, self.step, self.settings)
        describe_update(self.meter, logprobs, result)
        loss = self.watched(result.loss, batch.problem_ids)
        return (loss, {"policy": logprobs}) if return_outputs else loss

    def logprobs(self, model: nn.Module, batch: MicroBatch, with_entropy: bool = False) -> GroupLogprobs:
        """Compute log π [N] at the sampling temperature. A frozen tower runs once a step."""
        with self.accelerator.autocast():
            if self.vision_is_frozen and batch.number not in self.vision:
                features = [group.rollouts.vision for group in batch.trained]
                known = [one for one in features if one is not None]
                with torch.no_grad():
                    self.vision[batch.number] = known or encode_groups(model, batch.prompts, batch.pieces)
            vision = self.vision.get(batch.number)
            return logprobs_of(model, batch, self.settings, vision, with_entropy)

    def reference_logprobs(self, model: nn.Module, batch: MicroBatch, logprobs: Tensor) -> References:
        """Return what all updates on a micro-batch share. logprobs: [N], before the first update."""
        args, reference, taught, credits, weights = self.settings, None, None, None, None
        if args.use_vllm:
            weights = sampler_weights(logprobs, batch.rollouts, args.vllm, self.meter)
        if self.reference is not None:
            with self.reference.in_place_of(model, self.accelerator) as frozen:
                reference = self.logprobs(frozen, batch).logprobs
        if self.teacher is not None:
            with self.meter.seconds("teacher"):
                scores = self.teacher.scores(model, batch.trained)
            credits = teacher_credits(scores, logprobs, args.teacher.weight)
            describe_teacher(self.meter, scores, logprobs)
            taught = scores.logprobs
        return References(logprobs, reference, weights, credits, taught)

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

    def describe(self, groups: Sequence[Group], selected: Selection) -> None:
        """Add a step's series; record the questions of all ranks that teach nothing."""
        args, tools = self.settings, self.builder.toolbox is not None
        if args.dynamic_sampling > 0:
            replaced = sum(line["reason"] == "replaced" for _, line in selected.skipped)
            self.meter.add("groups/replaced", replaced, len(groups))
        describe_groups(self.meter, groups, SELF_REFLECTION_PHRASES, tools)
        for name, value in self.ledger.add(groups, self.rule.gate is not None).items():
            self.meter.add(name, value)
        if args.log_rollouts > 0:
            everyone, _ = gather_lists(selected.skipped)
            if self.is_world_process_zero():
                with tolerated(SKIPPED_GROUPS):
                    for _, line in sorted(everyone, key=lambda skipped: skipped[0]):
                        line = {"step": self.state.global_step + 1, **line}
                        append_line(self.folder / SKIPPED_GROUPS, line)

    # ---- Checks before the first step, validation, records

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
            rollouts = self.sample(questions).rollouts
            with self.stopping_before_the_step():
                check_rewards(rollouts, score(rollouts, self.terms, args, self.builder.question, self.judge))
        if args.use_vllm:
            questions = self.first_questions(CHECKED_QUESTIONS)
            prompts = [p for q in questions for p in (q.ordered, q.contrast) if p is not None]
            with self.whole_policy() as model:
                warn_of_difference(sampler_difference(self.engine, model, prompts, args.temperature))

    def first_questions(self, count: int) -> list[Question]:
        count = min(count, len(cast(list[Sample], self.train_dataset)))
        return [each.result().content for each in self.submit([Slot(0, index) for index in range(count)])]

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Measure accuracy in order and with the contrast clip (see `temporal_accuracy`)."""
        if self.ahead is not None:
            self.ahead.exception()  # waits: the engine samples; `answer` raises its error
        with self.synced_engine():
            return temporal_accuracy(
                self.engine, samples, self.reader, self.builder, self.settings, self.watch
            )

    def record_groups(self) -> None:
        """Record some groups of the last step, once for all updates on them."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        recorded: list[tuple[Group, list[Tensor] | None]] = []
        for batch in self.unrecorded:
            references = self.references.get(batch.number)
            taught = None if references is None else references.teacher_logprobs
            by = [None] * len(batch.groups) if taught is None else by_group(taught, batch.trained)
            recorded += zip(batch.groups, by, strict=True)
        self.unrecorded = ()
        with tolerated("rollouts.jsonl"):
            for group, taught in recorded[: self.settings.log_rollouts]:
                record_group(self.folder, self.state.global_step, group, tokenizer, taught)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and record some of this step's groups once for all updates on them."""
        if "loss" in logs and self.is_world_process_zero():
            self.record_groups()
        super().log(logs, start_time)
        if self.settings.use_vllm and not self.settings.async_rollouts:  # which samples with older weights
            warn_of_difference(self.state.log_history[-1].get("sampler/logprob_difference", 0.0))


class Sampled(NamedTuple):
    """A step's rollouts, and the seconds that the engine needed."""

    rollouts: list[Rollouts]
    seconds: float


def sampler_weights(
    logprobs: Tensor, rollouts: Sequence[Rollout], settings: VLLMSettings, meter: Meter
) -> Tensor | None:
    """Return importance weights [N] of completion tokens; None if the settings want no correction.

    logprobs: [N], the trainer's before the update. Adds to the series `sampler/…`.
    """
    sampled = torch.cat([rollout.logprobs for rollout in rollouts]).to(logprobs)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], device=sampled.device)
    difference = logprobs - sampled  # [N]
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
