"""Rollouts of the general path: a model's own `generate`, one question after another.

    prompt ─► towers once ─► n rows with the prompt ─► `generate`, each token drawn here ─► Rollouts

Every completion has its own prompt pass. Tokens are drawn as in `rollout/transformers.py`, so completions do
not depend on the other questions of the call, nor on whether a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.models.general_forward import (
    EncodedVisuals,
    encode_prompts,
    prompt_inputs,
    without_placeholders,
)
from video_r1.models.group_forward import vision_language_model
from video_r1.models.lora import merged_adapters
from video_r1.rollout.engine import (
    RolloutEngine,
    SamplingSettings,
    draw_tokens,
    sampling_logprobs,
    uniform_numbers,
    wanted_counts,
)
from video_r1.rollout.transformers import MAX_SEQUENCES, OnToken, as_rollouts, eval_mode, stop_token_ids


class GeneralEngine(RolloutEngine):
    """Samples with any decoder-only vision-language model of transformers.

    model: for conditional generation, also within PEFT or DistributedDataParallel. It is in eval mode while
        sampling. Under mixed precision call `generate` within the trainer's autocast.
    max_sequences: completions decoded at once.
    """

    def __init__(self, model: Any, processor: Any, max_sequences: int = MAX_SEQUENCES) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_sequences = max_sequences
        self.update_weights(model)

    def update_weights(self, model: Any) -> None:
        """Use `model`. It is the trained model itself, so its weights need no copy."""
        self.model = vision_language_model(model)
        self._stop_ids = stop_token_ids(self.model.generation_config, self.processor)
        self._chosen_from = without_placeholders(self.model)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        counts: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Rollout]]:
        """Sample as `TransformersEngine.generate` does."""
        counts = wanted_counts(prompts, sampling, counts)
        numbers = uniform_numbers(counts, sampling)
        results: list[list[Rollout]] = [[] for _ in prompts]
        with eval_mode(self.model), merged_adapters(self.model), self._plain_settings(sampling):
            for index, (prompt, uniform) in enumerate(zip(prompts, numbers, strict=True)):
                if counts[index] == 0:
                    continue
                (visuals,) = encode_prompts(self.model, [prompt])
                for start in range(0, counts[index], self.max_sequences):
                    rows = uniform[start : start + self.max_sequences]
                    heard = on_token and partial(_on_row_token, on_token, index, start)
                    results[index] += self._completions(prompt, visuals, rows, sampling, heard)
        return results

    @contextmanager
    def _plain_settings(self, sampling: SamplingSettings) -> Iterator[None]:
        """Replace the checkpoint's generation settings, which may change probabilities (a penalty, say)."""
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, use_cache=True,
            eos_token_id=self._stop_ids, pad_token_id=self._stop_ids[0],
        )  # fmt: skip
        try:
            yield
        finally:
            self.model.generation_config = own

    def _completions(
        self,
        prompt: Prompt,
        visuals: EncodedVisuals | None,
        uniform: Tensor,
        sampling: SamplingSettings,
        on_token: Callable[[int, int], None] | None,
    ) -> list[Rollout]:
        """Sample one completion for each row of `uniform` [rows, max_tokens]."""
        ids = prompt.input_ids.to(self.model.device).expand(len(uniform), -1)
        draw = _Draw(self._chosen_from, uniform.to(ids.device), sampling, self._stop_ids, on_token)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([draw]),
            **prompt_inputs(self.model, prompt, visuals, len(ids)),
        )
        token_ids, logprobs = torch.stack(draw.tokens, 1), torch.stack(draw.logprobs, 1)
        return as_rollouts(
            self.tokenizer, token_ids.cpu(), logprobs.cpu(), draw.lengths.tolist(), draw.stopped.tolist()
        )


def _on_row_token(on_token: OnToken, prompt: int, start: int, row: int, token: int) -> None:
    on_token(prompt, start + row, token)


class _Draw(LogitsProcessor):
    """Draws each row's next token and masks all others for `generate`. Keeps tokens and log-probs [rows]."""

    def __init__(
        self,
        chosen_from: Callable[[Tensor], Tensor],
        uniform: Tensor,
        sampling: SamplingSettings,
        stop_ids: Sequence[int],
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self.chosen_from, self.uniform = chosen_from, uniform
        self.sampling, self.on_token = sampling, on_token
        self.ends = torch.tensor(stop_ids, device=uniform.device)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.stopped = torch.zeros(len(uniform), dtype=torch.bool, device=uniform.device)
        self.lengths = torch.zeros(len(uniform), dtype=torch.long, device=uniform.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Draw from `scores`, logits [rows, V]."""
        how, step = self.sampling, len(self.tokens)
        distribution = sampling_logprobs(self.chosen_from(scores), how.temperature, how.top_p, how.top_k)
        if how.temperature == 0:
            tokens = distribution.argmax(-1)
        else:
            tokens = draw_tokens(distribution, self.uniform[:, step])
        self.tokens.append(tokens)
        self.logprobs.append(distribution.gather(-1, tokens[:, None])[:, 0])
        if self.on_token is not None:
            for row in (~self.stopped).nonzero()[:, 0].tolist():
                self.on_token(row, int(tokens[row]))
        self.lengths += ~self.stopped
        self.stopped |= torch.isin(tokens, self.ends)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)
