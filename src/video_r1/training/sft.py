"""The SFT cold start: next-token loss on rationales, images and videos mixed in a batch.

    manifest ─► QuestionSource ─► Example ─► group_logprobs ─► −log p of the assistant's tokens
                 (background)

A question with its response is a group of one completion (see models/group_forward.py). SFT learns the calls
and the answer of rows whose messages call tools; tool results are context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from video_r1.data.decoding.media import Shown, clips_of
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import NO_RATIONALE, Prompt, response_text
from video_r1.data.reading import derived_generator
from video_r1.data.tools import overview, worked_pieces
from video_r1.errors import ConfigError, ManifestError, PromptError
from video_r1.evaluation.validation import held_out
from video_r1.models.group_forward import GroupLogprobs, group_logprobs
from video_r1.processes import gather, process_count
from video_r1.recipe import Recipe
from video_r1.settings.base import settings_docs
from video_r1.settings.tools import TrainingToolSettings
from video_r1.settings.training import SFTSettings
from video_r1.training.questions import Reading, Ready
from video_r1.training.runs import RunArguments, run_recipe
from video_r1.training.trainer import QuestionTrainer


class Example(NamedTuple):
    """A prompt and its response, [L] int64: the assistant's tokens of all turns, each with its end-of-turn
    token. pieces: the response with the answers of tools between its turns.
    """

    prompt: Prompt
    response: Tensor
    pieces: list[Tensor | Prompt]


@settings_docs
@dataclass
class SFTConfig(SFTSettings, TrainingToolSettings, RunArguments):
    """All settings of an SFT run, including every field of `TrainingArguments`. Raises ConfigError."""

    command = "sft"


class SFTTrainer(QuestionTrainer):
    """Trains a video-language model on the rationales (`process`) and answers of a manifest, or with `target`
    answer on the answers to a prompt that asks for no reasoning.

    The arguments are those of `TGRPOTrainer`, without rewards. The loss is the mean over the response tokens
    of the whole optimizer step. Raises ConfigError and ManifestError when it is built.
    """

    progress_title = "SFT"
    progress_series: ClassVar = {"loss": "loss", "token accuracy": "accuracy/token"}
    default_settings = staticmethod(lambda: SFTConfig(output_dir="runs/sft"))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        samples = cast(list[Sample], self.train_dataset or [])
        if self.settings.target == "answer":
            self.builder = self.builder.with_template(self.builder.template.direct())
        elif samples and not any(sample.process for sample in samples):
            raise ManifestError(f"none of the {len(samples):,} questions has a `process`; {NO_RATIONALE}")

    def load(self, sample: Sample) -> Example:
        return self.example(sample, self.reader.media(sample))

    def example(self, sample: Sample, media: Shown) -> Example:
        """Raises PromptError."""
        if bounds := self.settings.overview_frames:
            drawn = derived_generator(self.settings.seed, "overview", sample.problem_id)
            media = tuple(overview(clip, bounds, drawn) for clip in clips_of(media))
        target = sample.solution if self.settings.target == "answer" else response_text(sample)
        prompt, answer = self.builder.build_with_response(sample, media, target)
        pieces = [*worked_pieces(self.builder, sample, prompt), answer]
        response = torch.cat([piece for piece in pieces if isinstance(piece, Tensor)])
        if len(response) > self.settings.max_response_length:
            raise PromptError(
                f"question {sample.problem_id!r}: its response has {len(response)} tokens; the limit "
                f"(max_response_length) is {self.settings.max_response_length}"
            )
        return Example(prompt, response, pieces)

    def build(self, sample: Sample, loaded: Example, generator: torch.Generator) -> Example:
        return loaded

    def step_inputs(self, reading: list[list[Reading]]) -> tuple[list[Any], float]:
        batches = [self.ready(batch) for batch in reading]
        tokens = sum(len(entry.content.response) for batch in batches for entry in batch)
        # Gradients are averaged over ranks, hence the division.
        return [{"batch": batch} for batch in batches], sum(gather(tokens)) / process_count()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return −Σ log p(response token) of the micro-batch ÷ the step's response tokens."""
        batch: list[Ready[Example]] = inputs["batch"]
        result = self.logprobs(model, [entry.content for entry in batch])
        tokens = len(result.logprobs)
        self.meter.add("accuracy/token", float(cast(Tensor, result.likeliest).sum()), tokens)
        self.meter.add("completion/length", tokens, len(batch))
        ids = [entry.sample.problem_id for entry in batch]
        loss = self.watched(-result.logprobs.sum() / num_items_in_batch, ids)
        return (loss, {}) if return_outputs else loss

    def logprobs(self, model: nn.Module, examples: Sequence[Example]) -> GroupLogprobs:
        prompts, responses, pieces = zip(*examples, strict=True)
        with self.accelerator.autocast():
            return group_logprobs(
                model,
                prompts,
                [[one] for one in responses],
                with_likeliest=True,
                pieces=[[p] for p in pieces],
            )

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Measure `loss` (nats per response token) and `token_accuracy`; count `questions` and `skipped`."""
        model = cast(nn.Module, self.model).eval()
        sums = torch.zeros(4, dtype=torch.float64)  # loss, right tokens, tokens, questions
        with torch.no_grad(), self.whole_weights():
            for examples in held_out(samples, self.reader, self.example, self.args.eval_batch_size):
                if examples:
                    result = self.logprobs(model, examples)
                    right = cast(Tensor, result.likeliest).sum()
                    figures = [-result.logprobs.sum(), right, len(result.logprobs), len(examples)]
                    sums += torch.tensor([float(figure) for figure in figures], dtype=torch.float64)
        loss, hits, tokens, questions = torch.stack(gather(sums)).sum(0).tolist()
        if not tokens:
            raise ConfigError("evaluation needs an eval_dataset with at least one usable question")
        return {
            "loss": loss / tokens,
            "token_accuracy": hits / tokens,
            "questions": questions,
            "skipped": len(samples) - questions,
        }


update_wrapper(SFTTrainer.__init__, QuestionTrainer.__init__)  # its signature, for help()


def run_sft(recipe: Recipe) -> Path:
    """Run SFT from a resolved recipe: see `run_recipe`."""
    return run_recipe(recipe, SFTTrainer, SFTConfig)
