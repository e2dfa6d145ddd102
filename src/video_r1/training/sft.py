"""The SFT cold start: next-token loss on rationales, images and videos mixed in a batch.

manifest ─► QuestionSource ─► (Prompt, response ids) ─► padded batch ─► −log p of the response's tokens
             (background)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainingArguments

from video_r1.data.media import Media
from video_r1.data.prompts import Prompt, response_text
from video_r1.data.records import Sample
from video_r1.errors import ConfigError, PromptError
from video_r1.models.group_forward import KINDS, encode_together, through_wrapper, vision_language_model
from video_r1.processes import gather
from video_r1.recipe import Recipe
from video_r1.settings.shared import PromptSettings
from video_r1.settings.training import SFTSettings
from video_r1.training.runs import manifests_of, model_of, run_in_folder
from video_r1.training.trainer import Questions, QuestionTrainer
from video_r1.training.validation import held_out

PIXELS = tuple(pixels for pixels, _ in KINDS.values())
IGNORED = -100  # the label of tokens without a loss
Example = tuple[Prompt, Tensor]
"""A prompt and the token ids [L] of its response, the end-of-turn token included."""


@dataclass
class SFTConfig(SFTSettings, PromptSettings, TrainingArguments):
    """All settings of an SFT run, every field of `TrainingArguments` among them. Raises ConfigError."""

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


def pad_examples(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of B examples, padded on the right to its longest row of T tokens.

    Returns input_ids, attention_mask and labels, each [B, T] int64, and the visual features of all examples
    end to end, in the order in which their placeholders stand in the rows. Labels are the response's tokens
    and IGNORED everywhere else.
    """
    rows = [torch.cat([prompt.input_ids, response]) for prompt, response in examples]
    labels = [
        torch.cat([torch.full_like(prompt.input_ids, IGNORED), response]) for prompt, response in examples
    ]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    for name in dict.fromkeys(name for prompt, _ in examples for name in prompt.features):
        parts = [prompt.features[name] for prompt, _ in examples if name in prompt.features]
        if name == "mm_token_type_ids":  # by token, 0 for text: a response is text
            batch[name] = torch.zeros_like(batch["input_ids"])
            for row, part in zip(batch[name], parts, strict=True):
                row[: len(part)] = part
        else:
            batch[name] = torch.cat(parts)
    return batch


class SFTTrainer(QuestionTrainer):
    """Teaches a video-language model the rationales and answers of a manifest (its rows need `process`).

    The arguments are those of `TGRPOTrainer`, without rewards. The loss is the mean over the response tokens
    of the whole optimizer step: prompt and visual tokens have none. Raises ConfigError and ManifestError when
    it is built.
    """

    progress_title = "SFT"
    progress_series = ("loss", "accuracy/token")

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Questions | None = None,
        eval_dataset: Questions | dict[str, Questions] | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        args = SFTConfig(output_dir="runs/sft") if args is None else args
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, callbacks, recipe
        )
        # Rows are padded with a masked token, so any will do where the tokenizer has none of its own.
        self.pad_token_id: int = self.builder.tokenizer.pad_token_id or 0

    def load(self, sample: Sample) -> Example:
        return self.example(sample, self.reader.media(sample))

    def example(self, sample: Sample, media: Media) -> Example:
        """A sample's prompt and response. Raises PromptError."""
        prompt, response = self.builder.build_with_response(sample, media, response_text(sample))
        if len(response) > self.settings.max_response_length:
            raise PromptError(
                f"question {sample.problem_id!r}: its response has {len(response)} tokens; the limit "
                f"(max_response_length) is {self.settings.max_response_length}"
            )
        return prompt, response

    def build(self, sample: Sample, loaded: Example, generator: torch.Generator) -> Example:
        return loaded

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The micro-batches of one optimizer step and their number of response tokens over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        padded = []
        for batch in batches:
            ready = self.ready(batch["pending"])
            tensors = pad_examples([entry.content for entry in ready], self.pad_token_id)
            padded.append({**tensors, "problem_ids": [entry.sample.problem_id for entry in ready]})
        return padded, self._get_num_items_in_batch(padded, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """−Σ log p(response token) of the micro-batch ÷ the response tokens of the optimizer step."""
        total, hits, tokens = response_loss(model, inputs)
        # Gradients are averaged over processes, while the step's tokens are those of all processes.
        loss = total / (tokens if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self.meter.add("accuracy/token", float(hits), tokens)
        self.meter.add("completion/length", tokens, len(inputs["labels"]))
        loss = self.watched(loss, inputs["problem_ids"])
        return (loss, {}) if return_outputs else loss

    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`loss` (nats a response token) and `token_accuracy` on held-out questions; `questions` counts those
        that were used, `skipped` those whose media or text cannot be.
        """
        model = cast(nn.Module, self.model).eval()
        sums = torch.zeros(4, dtype=torch.float64)  # loss, right tokens, tokens, questions
        with torch.no_grad(), self.accelerator.autocast(), self.whole_weights():
            for examples in held_out(samples, self.reader, self.example, self.args.eval_batch_size):
                if examples:
                    batch = self._prepare_inputs(pad_examples(examples, self.pad_token_id))
                    figures = (*response_loss(model, batch), len(examples))
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


def response_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, int]:
    """−Σ log p of a batch's response tokens (with gradient), how many of them are the likeliest, and their
    number.

    batch: what `pad_examples` returns.
    """
    labels = batch["labels"]
    # The head runs only where some row has a response; the token before the first label predicts it.
    first = int((labels != IGNORED).any(0).nonzero()[0])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "problem_ids")}
    inputs |= {"use_cache": False, "logits_to_keep": labels.shape[1] - first + 1}
    inner = vision_language_model(model)

    def forward() -> Tensor:
        # One call of the tower, whatever is in the batch: all processes of a sharded model gather its weights
        # alike.
        outputs = encode_together(inner.model, inputs)
        rest = {name: value for name, value in inputs.items() if name not in PIXELS}
        return inner(**rest, mm_encoder_outputs=outputs).logits

    logits = through_wrapper(model, forward)[:, :-1]
    taught = labels[:, first:] != IGNORED
    logits, targets = logits[taught].float(), labels[:, first:][taught]  # [N, V], [N]
    hits = (logits.detach().argmax(-1) == targets).sum()
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), hits, len(targets)


def run_sft(recipe: Recipe) -> Path:
    """SFT from a resolved recipe. Returns the run folder, which is a checkpoint as well.

    A run folder that holds a whole checkpoint is continued from it (see runs.py). Raises ConfigError,
    ManifestError, and VideoR1Error when media are missing as a whole or the loss stays not finite.
    """
    args = SFTConfig(**recipe.arguments_for(SFTConfig))

    def build() -> SFTTrainer:
        training, validation = manifests_of(recipe)
        model, processor = model_of(recipe)
        return SFTTrainer(
            model,
            args=args,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=processor,
            recipe=recipe,
        )

    return run_in_folder(recipe, str(args.output_dir), build)
