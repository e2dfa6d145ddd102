"""Settings of SFT, GRPO and T-GRPO."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.decoding import SCHEMES, addresses
from video_r1.settings.frames import Contrast, ContrastUnit

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip
"""Schedules of `transformers.SchedulerType`."""

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
AdvantageScale = Literal["group", "batch", "task", "none"]
SampledRule = Literal["margin", "threshold"]
"""Temporal rules that sample completions with the contrast clip (rewards/temporal.py defines all rules)."""
TemporalRule = Literal[SampledRule, "likelihood_gate", "off"]

SELF_REFLECTION_PHRASES = (
    "wait", "hold on", "let me check", "let me re-check", "let me think again", "let me look again",
    "on second thought", "re-examine", "reconsider", "double-check", "verify", "actually,",
)  # fmt: skip
"""Texts whose share of completions is logged."""


@dataclass(kw_only=True)
class TrainingSettings(Settings):
    """Training"""

    output_dir: str | None = setting(None, "run folder: checkpoints, metrics, recorded rollouts")
    seed: int = setting(42, "seed of everything random")
    learning_rate: float = setting(1e-6, "peak learning rate of AdamW", at_least=0)
    lr_scheduler_type: Schedule = setting("cosine", "learning-rate schedule")
    warmup_steps: float = setting(0, "steps, or a share of all below 1, in which the rate rises", at_least=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = setting(5.0, "gradients are scaled down to this norm", at_least=0)
    per_device_train_batch_size: int = setting(1, "questions per device and forward pass", above=0)
    gradient_accumulation_steps: int = setting(1, "forward passes per optimizer step", above=0)
    num_train_epochs: float = setting(1.0, "passes over the training manifest")
    max_steps: int = setting(-1, "optimizer steps; overrides num_train_epochs when above 0")
    bf16: bool | None = setting(None, "bfloat16 mixed precision (default: where the device has it)")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    logging_steps: float = setting(1, "optimizer steps between two lines of metrics.jsonl")
    save_steps: float = setting(100, "optimizer steps between two checkpoints")
    report_to: str | list[str] = setting("none", "trackers: tensorboard, trackio, wandb, ...")
    media_threads: int = setting(2, "threads that decode the next questions' media during a step", above=0)
    media_cache_mb: int = setting(512, "MB for decoded media that are kept for later epochs", at_least=0)
    early_stopping_patience: int | None = setting(None, "stop after N validations without progress", above=0)
    max_skipped_updates: int = setting(5, "updates in a row without a finite loss before it stops", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        metric = getattr(self, "metric_for_best_model", "not known yet")  # of TrainingArguments
        if self.early_stopping_patience and (not metric or getattr(self, "eval_strategy", "") == "no"):
            needed = "metric_for_best_model (eval_accuracy, for example) and eval_strategy steps or epoch"
            yield "early_stopping_patience", f"needs {needed}"
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            said = f"is {self.num_train_epochs} and max_steps is {self.max_steps}"
            yield "num_train_epochs", f"{said}; one must be above 0"


@dataclass(kw_only=True)
class SFTSettings(TrainingSettings):
    """SFT"""

    gradient_accumulation_steps: int = setting(2, "forward passes per optimizer step", above=0)
    target: Literal["rationale", "answer"] = setting(
        "rationale", "what to learn: the rationale and the answer, or the answer alone, asked for directly"
    )
    max_response_length: int = setting(2048, "longest response in tokens; longer ones are skipped", above=0)


@dataclass(kw_only=True)
class JudgeSettings(Settings):
    """Judge"""

    endpoint: str | None = setting(
        None, "OpenAI-compatible endpoint(s) whose model judges free-form answers (http://host:8000/v1)"
    )
    use: Literal["reward", "accuracy"] = setting(
        "reward", "reward: a reward of its own; accuracy: the accuracy of free-form answers, instead of ROUGE"
    )
    model: str | None = setting(None, "the judge's model name (default: the only one at the endpoint)")
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    template: str | None = setting(
        None, "file with the judge's prompt: {question}, {truth}, {answer}; it must reply a number, 0 to 1"
    )
    fields: dict[str, Any] = setting({}, "more fields of a request, as JSON; null removes one")
    down: Literal["wait", "stop", "skip"] = setting(
        "wait", "if the judge does not answer: wait; stop, with a checkpoint; skip its term for those groups"
    )
    wait: float = setting(60.0, "seconds to wait for it at the start and before stop or skip", at_least=0)
    timeout: float = setting(120.0, "seconds for a request; raise it for a judge that reasons", above=0)
    concurrency: int = setting(64, "simultaneous requests to it, in each process", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.endpoint is None:
            if self.use == "accuracy":
                yield "use", "is accuracy while judge_endpoint is not set; give the judge's address"
            return
        named = addresses(self.endpoint)
        if not named or not all(address.startswith(SCHEMES) for address in named):
            yield "endpoint", f"is {self.endpoint!r}; give an address with http:// or https://"


@dataclass(kw_only=True)
class SapoSettings(Settings):
    """Soft gates of SAPO"""

    temperature_pos: float = setting(1.0, "temperature of the gate for advantages above 0", above=0)
    temperature_neg: float = setting(1.05, "the same for the others", above=0)


@dataclass(kw_only=True)
class DistillationSettings(Settings):
    """Distillation"""

    model_name_or_path: str | None = setting(
        None,
        "distillation: a checkpoint of the same tokenizer, self (the policy with the teacher's frames), or "
        "addresses of `video-r1 serve`",
    )
    frames: int | None = setting(None, "most frames that the teacher sees (default: max_frames)", at_least=2)
    pixels: int | None = setting(None, "area of its frames (default: frame_pixels)", above=0)
    weight: float = setting(1.0, "lambda: weight of log π_teacher − log π in each token's advantage", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for name in ("frames", "pixels"):
            if self.model_name_or_path is None and getattr(self, name) is not None:
                yield name, "is set while teacher_model_name_or_path is not; name a teacher"


@dataclass(kw_only=True)
class TGRPOSettings(TrainingSettings):
    """GRPO and T-GRPO"""

    reward_funcs: list[str] | Literal["none"] | None = setting(
        None,
        "rewards: accuracy, format, length, temporal, judge (default: those that the settings need); none: "
        "a teacher alone",
    )
    num_generations: int = setting(8, "G: completions per question with its frames in order")
    num_contrast_generations: int | None = setting(None, "completions of the contrast clip (default: G/2)")
    num_generations_eval: int | None = setting(
        None, "sampled answers per validation question (default: 1)", above=0
    )
    max_completion_length: int = setting(768, "longest completion in tokens", above=0)
    temperature: float = setting(1.0, "sampling temperature; it scales the trained log-probs too", above=0)
    beta: float = setting(0.04, "weight of the KL term; 0 needs no reference model", at_least=0)
    epsilon: float = setting(0.2, "clip range of the policy ratio", above=0)
    epsilon_high: float | None = setting(
        None, "upper clip range (default: epsilon); largest ratio of cispo", above=0
    )
    delta: float | None = setting(None, "upper bound of an unclipped ratio (two-sided clipping)", above=0)
    loss_type: str = setting("grpo", "grpo, bnpo, dapo, dr_grpo, cispo, sapo, or your own as module:function")
    sapo: SapoSettings = setting(SapoSettings, "gates of loss_type sapo")
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "policy ratio per token, or (GSPO) sequence"
    )
    mask_truncated_completions: bool = setting(False, "exclude completions cut at max_completion_length")
    top_entropy_quantile: float = setting(
        1.0, "share of tokens (highest entropy) with a policy term", above=0, at_most=1
    )
    entropy_coef: float = setting(0.0, "weight of the mean token entropy, which the loss then raises")
    scale_rewards: AdvantageScale = setting(
        "group", "standard deviation that divides advantages; task: a running one per problem type"
    )
    dynamic_sampling: int = setting(0, "rounds that replace groups of equal rewards (DAPO)", at_least=0)
    num_iterations: int = setting(1, "updates on each batch of rollouts", above=0)
    temporal_rule: TemporalRule = setting(
        "margin",
        "pays for the frame order: the paper's margin alpha·(p − p_contrast), or threshold alpha when p ≥ "
        "mu·p_contrast; likelihood_gate multiplies accuracy and length by 1 − alpha·exp(−Δ), Δ the log-prob "
        "contrast of each response with the contrast clip; off",
    )
    temporal_contrast: Contrast | None = setting(
        None,
        "clip to compare with: frames shuffled, reversed, one repeated, one alone, half dropped, none "
        "(default: shuffled; for likelihood_gate frozen, one repeated)",
    )
    contrast_unit: ContrastUnit = setting(
        "frame", "unit that is permuted; patch: pairs of frames, encoded once"
    )
    temporal_alpha: float | None = setting(
        None,
        "size of the temporal reward; 0: off (default: 0.3; for likelihood_gate 0.9, at most 1)",
        at_least=0,
    )
    temporal_threshold_mu: float = setting(1.0, "mu of the rule 'threshold'", at_least=0)
    correct_threshold: float = setting(0.5, "accuracy above this counts as correct", at_least=0, below=1)
    length_reward: float = setting(0.2, "added to a correct response of a length in length_range", at_least=0)
    look_cost: float = setting(0.0, "subtracted from a response's reward for each call of a tool", at_least=0)
    length_range: list[int] | None = setting(
        None, "lengths in tokens that earn it (default: 320,512; less if max_completion_length is below 768)"
    )
    reward_weights: dict[str, float] | list[float] = setting(
        {"accuracy": 1.0, "format": 1.0, "temporal": 1.0, "length": 1.0},
        "weight of each reward, by name (default: 1) or in the order of reward_funcs",
    )
    judge: JudgeSettings = setting(
        JudgeSettings, "a language model behind an endpoint that scores free-form answers (docs/t-grpo.md)"
    )
    shuffle_options: bool = setting(
        False, "draw the order of a question's options each time it is asked, with the solution's letter"
    )
    teacher: DistillationSettings = setting(DistillationSettings, "a model whose log-probs the policy learns")
    log_rollouts: int = setting(2, "groups recorded in rollouts.jsonl at each logging step", at_least=0)
    preflight_questions: int = setting(4, "questions tried first: stops if no reward is in reach", at_least=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.num_generations < 2:
            yield "num_generations", f"is {self.num_generations}; a group needs at least 2 completions"
        if self.paid_rule in get_args(SampledRule) and self.contrast_generations < 1:
            said = f"is {self.num_contrast_generations} while temporal_rule is {self.temporal_rule}"
            yield "num_contrast_generations", f"{said}; use at least 1, or temporal_rule off"
        if self.temporal_rule == "likelihood_gate" and self.alpha > 1:
            said = f"is {self.alpha:g}, which would make a right answer cost something"
            yield "temporal_alpha", f"{said}; a gate takes 0 to 1"
        if self.contrast_unit == "patch" and self.contrast not in ("shuffled", "reversed"):
            said = f"is patch while temporal_contrast is {self.contrast}, which permutes nothing"
            yield "contrast_unit", f"{said}; leave it at frame"
        yield from self.loss_problems()
        iterations = max(1, self.num_iterations)
        steps = {"save_steps": self.save_steps if getattr(self, "save_strategy", "steps") == "steps" else 0}
        if getattr(self, "load_best_model_at_end", False):  # each best step is saved
            steps["eval_steps"] = getattr(self, "eval_steps", None) or 0
        for name, every in steps.items():
            if every >= 1 and every % iterations:
                said = f"is {every:g}, no multiple of num_iterations ({self.num_iterations})"
                yield name, f"{said}; a checkpoint between two updates on the same rollouts cannot be resumed"
        lengths = self.length_bounds
        if len(lengths) != 2 or not 0 <= lengths[0] <= lengths[1]:
            yield "length_range", f"is {lengths}; it must be two token counts, smaller one first"
        elif self.length_reward > 0 and lengths[0] > self.max_completion_length:
            said = (
                f"starts at {lengths[0]} tokens, above max_completion_length ({self.max_completion_length})"
            )
            yield "length_range", f"{said}, so nothing can earn it; lower it or set length_reward 0"
        yield from self.teacher_problems()
        if "judge" in (self.reward_funcs or ()) and not self.judge.endpoint:
            yield "judge_endpoint", "is missing while reward_funcs names judge; give the judge's address"

    def teacher_problems(self) -> Iterator[Problem]:
        teacher, frames = self.teacher.model_name_or_path, getattr(self, "max_frames", 0)
        more = self.teacher.pixels or getattr(self, "overview_frames", None)
        if teacher is None:
            if self.reward_funcs == "none":
                yield "reward_funcs", "is none, so nothing is learnt; set teacher_model_name_or_path"
        elif teacher == "self" and not more and (self.teacher.frames or 0) <= frames:
            said = "is self, which sees no more than the policy; raise teacher_frames or teacher_pixels"
            yield "teacher_model_name_or_path", said
        elif set(addresses(teacher)) & {getattr(self, "server", None)}:
            said = "samples for the policy, whose weights it gets; start another server for the teacher"
            yield "teacher_model_name_or_path", said
        elif teacher.startswith(SCHEMES) and self.temperature != 1:
            said = f"is {self.temperature}; a server as teacher has log-probs of temperature 1"
            yield "temperature", f"{said}: set 1, or load the teacher here"
        if self.reward_funcs == "none" and self.dynamic_sampling:
            yield "dynamic_sampling", f"is {self.dynamic_sampling} while reward_funcs is none; set 0"

    def loss_problems(self) -> Iterator[Problem]:
        if self.loss_type not in LOSS_TYPES and ":" not in self.loss_type:
            near = difflib.get_close_matches(self.loss_type, LOSS_TYPES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield "loss_type", f"is {self.loss_type!r}, none of {', '.join(LOSS_TYPES)}{hint}"
        if self.loss_type == "cispo" and self.epsilon_high is None:
            yield "epsilon_high", "is missing; loss_type cispo bounds the ratio by it: give one, such as 5"
        elif self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            yield "epsilon_high", f"is {self.epsilon_high}, below epsilon ({self.epsilon}); raise it"
        if self.delta is not None and self.delta <= 1 + (self.epsilon_high or self.epsilon):
            yield "delta", f"is {self.delta}, not above 1 + epsilon_high, where the ratio is clipped already"

    @property
    def paid_rule(self) -> TemporalRule:
        """The temporal rule that is paid: `off` if its size is 0 or the list of rewards does not name it."""
        is_paid = self.alpha > 0 and (self.reward_funcs is None or "temporal" in self.reward_funcs)
        return self.temporal_rule if is_paid else "off"

    @property
    def contrast(self) -> Contrast:
        """The contrast clip of the temporal rule. A frozen clip keeps a shortcut that one frame shows."""
        frozen = self.temporal_rule == "likelihood_gate" and self.contrast_unit == "frame"
        return self.temporal_contrast or ("frozen" if frozen else "shuffled")

    @property
    def alpha(self) -> float:
        """Size of the temporal reward. A gate of 0.9 can outbid a shortcut that is always right."""
        default = 0.9 if self.temporal_rule == "likelihood_gate" else 0.3
        return default if self.temporal_alpha is None else self.temporal_alpha

    @property
    def length_bounds(self) -> list[int]:
        """Shortest and longest completion that earn the length reward, in tokens."""
        if self.length_range is not None:
            return self.length_range
        longest = min(self.max_completion_length, 768)
        return [320 * longest // 768, 512 * longest // 768]

    @property
    def contrast_generations(self) -> int:
        """Completions per video question with the contrast clip; 0 if the rule samples none."""
        if self.paid_rule not in get_args(SampledRule):
            return 0
        if self.num_contrast_generations is not None:
            return self.num_contrast_generations
        return max(1, self.num_generations // 2)
