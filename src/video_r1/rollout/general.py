"""Rollouts of the general path: a model's own `generate`, one question after another.

    prompt ─► towers once ─► n rows with the prompt ─► `generate`, each token drawn here ─► Rollouts

Every completion has its own prompt pass. Tokens are drawn as in `rollout/transformers.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from video_r1.models.attention import replaced
from video_r1.models.general_forward import encode_prompts, prompt_inputs, without_placeholders
from video_r1.models.lora import merged_adapters
from video_r1.rollout.engine import (
    Counts,
    Groups,
    InProcessEngine,
    OnToken,
    Prompts,
    SamplingSettings,
    as_rollouts,
    draw,
    eval_mode,
    uniform_numbers,
    useful_threads,
    wanted_counts,
)


class GeneralEngine(InProcessEngine):
    """Samples with any decoder-only vision-language model of transformers."""

    takes_tool_turns = False

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        """Sample as `TransformersEngine.sample` does."""
        counts = wanted_counts(prompts, sampling, counts)
        numbers = uniform_numbers(counts, sampling)
        results: Groups = [[] for _ in prompts]
        device, chosen_from = self.model.device, without_placeholders(self.model)
        plain = GenerationConfig(  # the checkpoint's own may change probabilities (a penalty, say)
            max_new_tokens=sampling.max_tokens, do_sample=False, use_cache=True,
            eos_token_id=self.stop_ids, pad_token_id=self.stop_ids[0],
        )  # fmt: skip
        settings = replaced(self.model, "generation_config", plain)
        with eval_mode(self.model), merged_adapters(self.model), settings:
            for index, (prompt, uniform) in enumerate(zip(prompts, numbers, strict=True)):
                if counts[index] == 0:
                    continue
                (visuals,) = encode_prompts(self.model, [prompt])
                for start in range(0, counts[index], self.max_sequences):
                    heard = on_token and (lambda row, token, q=index, s=start: on_token(q, s + row, token))
                    rows = uniform[start : start + self.max_sequences].to(device)
                    drawn = _Draw(chosen_from, rows, sampling, self.stop_ids, heard)
                    ids = prompt.input_ids.to(device).expand(len(rows), -1)
                    with useful_threads(self.model):
                        self.model.generate(
                            input_ids=ids,
                            attention_mask=torch.ones_like(ids),
                            logits_processor=LogitsProcessorList([drawn]),
                            **prompt_inputs(self.model, prompt, visuals, len(ids)),
                        )
                    token_ids, logprobs = torch.stack(drawn.tokens, 1), torch.stack(drawn.logprobs, 1)
                    results[index] += as_rollouts(
                        self.tokenizer, token_ids, logprobs, drawn.lengths, drawn.stopped
                    )
        return results


class _Draw(LogitsProcessor):
    """Draws each row's next token and masks all others for `generate`. Keeps tokens and log-probs [rows]."""

    def __init__(
        self,
        chosen_from: Callable[[Tensor], Tensor],
        uniform: Tensor,
        sampling: SamplingSettings,
        stop_ids: Sequence[int],
        on_token: Callable[[int, int], object] | None,
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
        numbers = self.uniform[:, len(self.tokens)]
        tokens, logprobs = draw(self.chosen_from(scores), self.sampling, numbers)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        if self.on_token is not None:
            for row in (~self.stopped).nonzero()[:, 0].tolist():
                self.on_token(row, int(tokens[row]))
        self.lengths += ~self.stopped
        self.stopped |= torch.isin(tokens, self.ends)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)
