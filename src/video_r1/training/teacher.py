"""The teacher of on-policy distillation: log-probs of the student's own tokens, behind clips of its own.

    c_t = λ · clamp(log π_T(o_t | V_T) − log π_S(o_t | V), −5, 5),   A_t = A + c_t

V_T may have more or larger frames than V. Without rewards the gradient is that of the reverse KL from student
to teacher (arXiv 2306.13649, with samples of the student): −E Σ_t c_t ∇ log π_S(o_t). The bound keeps a
token that the teacher rules out from outweighing its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.reading import Reader
from video_r1.data.rollouts import Group
from video_r1.errors import ConfigError
from video_r1.models.group_forward import group_logprobs, vision_language_model
from video_r1.models.loading import load_model, load_processor, size_multiple
from video_r1.rollout.engine import eval_mode
from video_r1.rollout.episodes import joined, tool_tokens
from video_r1.rollout.vllm.server import ServerEngine
from video_r1.settings.decoding import SCHEMES, addresses
from video_r1.training.metrics import Meter
from video_r1.training.reference import prepare_reference

BOUND = 5.0  # nats
ANY_LENGTH = 1 << 30
OTHER_TOKENS = (
    "{}: its tokens are not those of the policy, so it cannot score them; use a model of the same "
    "tokenizer, or annotate with it for SFT"
)


class TeacherScores(NamedTuple):
    """Scores of N tokens: log π_T [N] float32, nats; whether each is the teacher's likeliest [N] bool."""

    logprobs: Tensor
    likeliest: Tensor


class Teacher:
    """A frozen model, the policy itself (`self`) or a vLLM server that scores the policy's tokens.

    builder, reader, policy: the student's; the teacher's clips differ by `teacher_frames` and
    `teacher_pixels`. Raises ConfigError for a teacher with another tokenizer, and what loading raises.
    """

    def __init__(
        self, settings: Any, builder: PromptBuilder, reader: Reader, policy: Any, accelerator: Accelerator
    ) -> None:
        name, processor = settings.teacher.model_name_or_path, builder.processor
        self.settings, self.accelerator = settings, accelerator
        # max_prompt_length is the policy's; what a teacher here reads is bounded by its frames
        longest = ANY_LENGTH
        self.server: ServerEngine | None = None
        self.model: nn.Module | None = None  # None: the policy
        if name.startswith(SCHEMES):
            urls, wait = addresses(name), settings.vllm.server_timeout
            self.server = ServerEngine(urls, processor, policy.generation_config, wait=wait)
            self._check_server(self.server, type(vision_language_model(policy)).__name__, builder.tokenizer)
            answer = settings.max_completion_length + tool_tokens(settings, builder.toolbox is not None)
            longest = self.server.max_model_len - answer - 1
        elif name != "self":
            processor = load_processor(name, settings.trust_remote_code)
            if processor.tokenizer.get_vocab() != builder.tokenizer.get_vocab():
                raise ConfigError(OTHER_TOKENS.format(f"teacher_model_name_or_path {name}"))
            dtype = "bfloat16" if settings.bf16 else "float32"
            model: Any = load_model(name, dtype, settings.attn_implementation, settings.trust_remote_code)
            self.model = prepare_reference(model.eval().requires_grad_(False), accelerator)
        self.builder = PromptBuilder(
            processor, settings.prompt_template, longest, settings.subtitles, builder.toolbox
        )
        budget = replace(
            reader.budget,
            max_frames=settings.teacher.frames or reader.budget.max_frames,
            frame_pixels=settings.teacher.pixels or reader.budget.frame_pixels,
            size_multiple=size_multiple(processor),
        )
        self.reader = Reader(budget, reader.frame_cache)

    def _check_server(self, server: ServerEngine, own: str, tokenizer: Any) -> None:
        """Raise ConfigError for a model of another family, or one that splits a text into other tokens."""
        served = server.served["architecture"]
        if served.replace("Moe", "") != own.replace("Moe", ""):
            said = f"{server.url} serves a {served}, the policy is a {own}"
            raise ConfigError(f"{said}; serve one of its family")
        words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        text = tokenizer.convert_tokens_to_string(words[:: max(1, len(words) // 500)])
        if server.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ConfigError(OTHER_TOKENS.format(server.url))

    def prompt(self, sample: Sample) -> Prompt:
        """Build a question's prompt with the teacher's clips. Raises MediaError and PromptError."""
        return self.builder.build(sample, self.reader.media(sample))

    @torch.no_grad()
    def scores(self, policy: nn.Module, groups: Sequence[Group]) -> TeacherScores:
        """Score the groups' ordered completions, each group in one row. policy: as prepared for training."""
        prompts = [cast(Prompt, group.rollouts.question.teacher) for group in groups]
        if self.server is not None:
            return self._served(self.server, prompts, groups)
        model = policy if self.model is None else self.model
        with self.accelerator.autocast(), eval_mode(model):
            found = group_logprobs(
                model,
                prompts,
                [[rollout.token_ids for rollout in group.ordered] for group in groups],
                self.settings.temperature,
                with_likeliest=True,
                pieces=[[rollout.pieces() for rollout in group.ordered] for group in groups],
            )
        return TeacherScores(found.logprobs, cast(Tensor, found.likeliest))

    def _served(
        self, server: ServerEngine, prompts: Sequence[Prompt], groups: Sequence[Group]
    ) -> TeacherScores:
        answers = []
        for prompt, group in zip(prompts, groups, strict=True):
            for rollout in group.ordered:
                whole = joined(prompt, rollout)
                own = torch.ones(len(whole.input_ids), dtype=torch.bool)
                for first, part in whole.parts:
                    own[first : first + len(part.input_ids)] = False
                answers.append((whole, own.nonzero().view(-1)))
        found = [entry for entries in server.score(answers) for entry in entries]
        logprobs, ranks = torch.tensor(found).view(-1, 2).unbind(1)
        return TeacherScores(logprobs, ranks == 1)


def teacher_credits(scores: TeacherScores, logprobs: Tensor, weight: float) -> Tensor:
    """Return λ · clamp(log π_T − log π_S, −5, 5), [N]. logprobs: log π_S [N] before the update."""
    return weight * (scores.logprobs.to(logprobs) - logprobs).clamp(-BOUND, BOUND)


def by_group(logprobs: Tensor, groups: Sequence[Group]) -> list[list[Tensor]]:
    """Split values [N] of the groups' completion tokens: one tensor [L] a completion."""
    parts = iter(logprobs.float().cpu().split([len(o.token_ids) for group in groups for o in group.ordered]))
    return [[next(parts) for _ in group.ordered] for group in groups]


def describe_teacher(meter: Meter, scores: TeacherScores, logprobs: Tensor) -> None:
    """Add the series `teacher/…`. logprobs: log π_S [N]."""
    gaps, tokens = scores.logprobs.to(logprobs) - logprobs, len(logprobs)
    meter.add("teacher/kl", -float(gaps.sum()), tokens)
    meter.add("teacher/agreement", float(scores.likeliest.sum()), tokens)
    meter.add("teacher/clipped", float((gaps.abs() > BOUND).sum()), tokens)
