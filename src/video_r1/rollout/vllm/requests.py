"""Prompts and sampling settings in vLLM's format, for the engine in this process and for a server.

Both get exactly what the trainer has: a prompt's token ids, and its processed pixels with their positions.
vLLM selects no frames, resizes and tokenises nothing, for any family.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import RequestError, VideoR1Error
from video_r1.rollout.engine import (
    Counts,
    Prompts,
    SamplingSettings,
    prompt_seed,
    prompt_seeds,
    wanted_counts,
)

PIXELS = ("pixel_values", "pixel_values_videos")  # vLLM's names are those of Prompt.features


class PromptRequest(NamedTuple):
    """A request for `count` completions of prompt `index`.

    At temperature 0 the parameter `n` is 1, since vLLM refuses to give the greedy completion twice.
    """

    index: int
    count: int
    parameters: dict[str, Any]  # fields of vLLM's SamplingParams
    first: int = 0  # number of the first completion

    def numbers(self, index: int) -> range:
        """Return which completions vLLM's completion `index` is: all of them if it is the greedy one."""
        first = self.first + index
        return range(first, first + (self.count if self.parameters["n"] == 1 else 1))

    def filled(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return `count` rollouts, by repeating the greedy one. Raises VideoR1Error for a wrong number."""
        sampled = self.parameters["n"]
        if len(rollouts) != sampled:
            raise VideoR1Error(f"prompt {self.index}: vLLM gave {len(rollouts)} completions of {sampled}")
        return rollouts if sampled == self.count else rollouts * self.count


def prompt_requests(
    prompts: Prompts, sampling: SamplingSettings, counts: Counts, limit: int, stop_ids: list[int]
) -> list[PromptRequest]:
    """Return a request for each prompt of which completions are wanted: `sampling.n`, or `counts[q]`.

    Raises ValueError when prompts and counts differ in number, and RequestError for a prompt that leaves no
    room for `sampling.max_tokens` within `limit` tokens.
    """
    counts, seeds = wanted_counts(prompts, sampling, counts), prompt_seeds(sampling.seed, len(prompts))
    requests = []
    for index, (prompt, count, seed) in enumerate(zip(prompts, counts, seeds, strict=True)):
        if not count:
            continue
        if len(prompt.input_ids) + sampling.max_tokens > limit:
            raise RequestError(
                f"a prompt of {len(prompt.input_ids)} tokens and a completion of up to {sampling.max_tokens} "
                f"do not fit vLLM's limit of {limit} tokens; raise its max_model_len or lower the completion "
                "length"
            )
        parameters = {
            "n": count if sampling.temperature > 0 else 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": prompt_seed(
                seed, 0
            ),  # far from those of other prompts: vLLM adds the completion's number
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": stop_ids,
            "ignore_eos": True,  # `stop_token_ids` has all end tokens
            "detokenize": False,
        }
        requests.append(PromptRequest(index, count, parameters))
    return requests


def rollout_of(ids: list[int], logprobs: list[float], finish_reason: str, tokenizer: Any) -> Rollout:
    """Build a Rollout from vLLM's completion, whose ids include the end token."""
    return Rollout(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(logprobs, dtype=torch.float32),
        tokenizer.decode(ids, skip_special_tokens=True),
        "stop" if finish_reason == "stop" else "length",
    )


class Visual(NamedTuple):
    """A block of placeholders and its visual."""

    kind: str  # image or video
    first: int  # index of the first placeholder among the prompt's tokens
    length: int  # placeholders
    tensors: dict[str, Tensor]  # by vLLM's names: pixels [patches, dim], all else without a batch dimension
    digest: str  # of the tensors, for vLLM's caches


def visuals_of(prompt: Prompt, dtype: torch.dtype) -> list[Visual]:
    """Return a prompt's visuals in the order of its tokens; [] for a blind question.

    A video with text between its time steps (since Qwen3-VL: a time in words, a block of placeholders) goes
    as one image a time step. Tower and positions treat the two alike, and a server's request format has no
    video in several blocks. vLLM caches the features of each image, so that frames in another order cost the
    tower nothing where pairs stay together. dtype: of vLLM's model, which would round the pixels to it.
    """
    if prompt.parts:
        found = [(first, visual) for first, part in prompt.parts for visual in visuals_of(part, dtype)]
        return [visual._replace(first=first + visual.first) for first, visual in found]
    blocks = visual_blocks(prompt)
    if not blocks:
        return []
    kind = "image" if "image_grid_thw" in prompt.features else "video"
    name, given = f"{kind}_grid_thw", prompt.features["pixel_values" + "_videos" * (kind == "video")]
    grids, seconds = prompt.features[name], prompt.features.get("second_per_grid_ts")
    pixels = given.to(dtype).split(grids.prod(-1).tolist())
    if len(blocks) == len(grids) and int(grids[:, 0].max()) > 1:  # Qwen2-VL and Qwen2.5-VL
        tensors = [
            {"pixel_values_videos": patches, name: grid}
            | ({} if seconds is None else {"second_per_grid_ts": seconds[number]})
            for number, (patches, grid) in enumerate(zip(pixels, grids, strict=True))
        ]
    else:
        kind = "image"
        tensors = [
            {"pixel_values": patches, "image_grid_thw": torch.cat([torch.ones_like(grid[:1]), grid[1:]])}
            for visual, grid in zip(pixels, grids, strict=True)
            for patches in visual.chunk(int(grid[0]))
        ]
    return [Visual(kind, *block, found, _digest(found)) for block, found in zip(blocks, tensors, strict=True)]


def visual_blocks(prompt: Prompt) -> list[tuple[int, int]]:
    """Return the index and length of each run of visual placeholders."""
    if prompt.frames == 0:  # a blind question
        return []
    visual = prompt.features["mm_token_type_ids"].view(-1) != 0
    values, counts = visual.unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    return list(zip(first[values].tolist(), counts[values].tolist(), strict=True))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _item(visual: Visual) -> Any:
    from vllm.multimodal import inputs  # pyright: ignore[reportMissingImports]

    whole = inputs.MultiModalFlatField(slices=[slice(None)])
    one = inputs.MultiModalBatchedField(keep_on_cpu=True)
    return inputs.MultiModalKwargsItem(
        {
            name: inputs.MultiModalFieldElem(data=tensor, field=whole if name in PIXELS else one)
            for name, tensor in visual.tensors.items()
        }
    )


def engine_input(prompt: Prompt, dtype: torch.dtype) -> Any:
    """Return the prompt as vLLM's EngineInput, which it neither tokenises nor processes."""
    ids = prompt.input_ids.tolist()
    visuals = visuals_of(prompt, dtype)
    if not visuals:
        return {"type": "token", "prompt_token_ids": ids}
    from vllm.inputs import mm_input  # pyright: ignore[reportMissingImports]
    from vllm.multimodal import inputs  # pyright: ignore[reportMissingImports]

    ranges = by_kind(visuals, lambda v: inputs.PlaceholderRange(offset=v.first, length=v.length))
    return mm_input(
        prompt_token_ids=ids,
        mm_kwargs=inputs.MultiModalKwargsItems(by_kind(visuals, _item)),
        mm_hashes=by_kind(visuals, lambda visual: visual.digest),
        mm_placeholders=ranges,
    )


def by_kind(visuals: Sequence[Visual], value: Callable[[Visual], Any]) -> dict[str, Any]:
    """Return a value of each visual, as lists by kind."""
    kinds = dict.fromkeys(visual.kind for visual in visuals)
    return {kind: [value(visual) for visual in visuals if visual.kind == kind] for kind in kinds}


def server_request(prompt: Prompt, parameters: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the prompt as the body of a request to `/inference/v1/generate`."""
    body = {"token_ids": prompt.input_ids.tolist(), "sampling_params": parameters}
    visuals = visuals_of(prompt, dtype)
    if not visuals:
        return body
    # vLLM's own encoding of tensors; importing it starts no engine.
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (  # pyright: ignore[reportMissingImports]
        encode_mm_kwargs_item,
    )

    return body | {
        "features": {
            "mm_hashes": by_kind(visuals, lambda visual: visual.digest),
            "mm_placeholders": by_kind(visuals, lambda v: {"offset": v.first, "length": v.length}),
            "kwargs_data": by_kind(visuals, lambda visual: encode_mm_kwargs_item(_item(visual))),
        },
    }
