"""Prompts and sampling settings in vLLM's words: for `LLM.generate`, and for a server's token interface."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from video_r1.data.prompts import Prompt, video_metadata
from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, RequestError, VideoR1Error
from video_r1.rollout.engine import SamplingSettings, wanted_counts
from video_r1.rollout.sampling import prompt_seed, prompt_seeds

# The fields of vLLM's Qwen2-VL and Qwen2.5-VL models, by their names in Prompt.features.
PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def sampling_parameters(
    sampling: SamplingSettings, count: int, seed: int, stop_ids: list[int]
) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for `count` completions of one prompt.

    At temperature 0 it is one completion, since vLLM refuses to give the greedy one twice.
    """
    return {
        "n": count if sampling.temperature > 0 else 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "seed": prompt_seed(seed, 0),  # far from those of other prompts: vLLM counts on from it
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # `stop_token_ids` says it all
        "detokenize": False,
    }


class Ask(NamedTuple):
    """place: of the prompt in its call; count: completions wanted; parameters: as `sampling_parameters`."""

    place: int
    count: int
    parameters: dict[str, Any]

    def answered(self, rollouts: list[Rollout]) -> list[Rollout]:
        """`count` rollouts: the greedy one is sampled once and stands for all.

        Raises VideoR1Error when vLLM gave another number than it was asked for.
        """
        sampled = self.parameters["n"]
        if len(rollouts) != sampled:
            raise VideoR1Error(f"prompt {self.place}: vLLM gave {len(rollouts)} completions of {sampled}")
        return rollouts if sampled == self.count else rollouts * self.count


def asks_of(
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    counts: Sequence[int] | None,
    limit: int,
    stop_ids: list[int],
) -> list[Ask]:
    """The prompts of a call that completions are wanted of: `sampling.n` of each, or `counts[q]` of prompt q.

    Raises ValueError when prompts and counts differ in number, and RequestError for a prompt that leaves no
    room for `sampling.max_tokens` within `limit` tokens.
    """
    counts = wanted_counts(prompts, sampling, counts)
    asks = []
    seeds = prompt_seeds(sampling.seed, len(prompts))
    for place, (prompt, count, seed) in enumerate(zip(prompts, counts, seeds, strict=True)):
        if not count:
            continue
        if len(prompt.input_ids) + sampling.max_tokens > limit:
            raise RequestError(
                f"a prompt of {len(prompt.input_ids)} tokens and a completion of up to {sampling.max_tokens} "
                f"do not fit vLLM's limit of {limit} tokens; raise its max_model_len or lower the completion "
                "length"
            )
        asks.append(Ask(place, count, sampling_parameters(sampling, count, seed, stop_ids)))
    return asks


def rollout_of(ids: list[int], logprobs: list[float], finish_reason: str, tokenizer: Any) -> Rollout:
    """A completion as vLLM gives it, its end token among its tokens."""
    return Rollout(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(logprobs, dtype=torch.float32),
        tokenizer.decode(ids, skip_special_tokens=True),
        "stop" if finish_reason == "stop" else "length",
    )


def vllm_prompt(prompt: Prompt, processor: Any) -> dict[str, Any]:
    """The prompt as `LLM.generate` takes it: its tokens with the visual as one placeholder, its frames in the
    order in which the model sees them, sampled and resized already, and their timestamps.

    Text between the frames (Qwen3-VL) is made by vLLM from the timestamps, so such a prompt goes as text.
    """
    media = prompt.media
    if len(media.frames) == 0:  # a blind question
        return {"prompt_token_ids": prompt.input_ids.tolist()}
    frames = media.frames.permute(0, 2, 3, 1).contiguous().numpy()  # [T, H, W, 3]
    if media.kind == "image":
        data: dict[str, Any] = {"image": Image.fromarray(frames[0])}
    else:
        data = {"video": (frames, {**video_metadata(media), "do_sample_frames": False})}
    visual, one_block = visual_tokens(prompt)
    if one_block:
        first = int(visual.nonzero()[0])
        kept = ~visual
        kept[first] = True
        return {"prompt_token_ids": prompt.input_ids[kept].tolist(), "multi_modal_data": data}
    text = processor.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    return {"prompt": text, "multi_modal_data": data}


def server_request(prompt: Prompt, parameters: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The body of a request to `/inference/v1/generate`: the prompt's own tokens and processed pixels, so
    that the server has nothing left to sample, resize or tokenise.

    dtype: in which the server computes; it would round the pixels to it.

    Raises ConfigError where text stands between the frames (Qwen3-VL), which this interface cannot express.
    """
    if len(prompt.media.frames) == 0:  # a blind question
        return {"token_ids": prompt.input_ids.tolist(), "sampling_params": parameters}
    # vLLM's own encoding of tensors; importing it starts no engine.
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (  # pyright: ignore[reportMissingImports]
        encode_mm_kwargs_item,
    )
    from vllm.multimodal import inputs  # pyright: ignore[reportMissingImports]

    visual, one_block = visual_tokens(prompt)
    if not one_block:
        raise ConfigError(
            "vllm_mode server: a server takes videos of Qwen2-VL and Qwen2.5-VL only; use vllm_mode colocate"
        )
    whole = inputs.MultiModalFlatField(slices=[slice(None)])
    one = inputs.MultiModalBatchedField(keep_on_cpu=True)
    item, digest = {}, hashlib.blake2b(digest_size=16)
    for name in (*PIXELS, *GRIDS):
        if name in prompt.features:
            tensor = prompt.features[name].contiguous()
            digest.update(name.encode() + tensor.numpy().tobytes())
            tensor = tensor.to(dtype) if name in PIXELS else tensor
            data, field = (tensor, whole) if name in PIXELS else (tensor[0], one)
            item[name] = inputs.MultiModalFieldElem(data=data, field=field)
    kind = prompt.media.kind
    place = {"offset": int(visual.nonzero()[0]), "length": int(visual.sum())}
    return {
        "token_ids": prompt.input_ids.tolist(),
        "sampling_params": parameters,
        "features": {
            "mm_hashes": {kind: [digest.hexdigest()]},
            "mm_placeholders": {kind: [place]},
            "kwargs_data": {kind: [encode_mm_kwargs_item(inputs.MultiModalKwargsItem(item))]},
        },
    }


def visual_tokens(prompt: Prompt) -> tuple[Tensor, bool]:
    """[P] bool: the visual placeholders of a prompt; and whether they stand in one block."""
    visual = prompt.features["mm_token_type_ids"].view(-1) != 0
    places = visual.nonzero().view(-1)
    return visual, len(places) > 0 and int(places[-1] - places[0]) + 1 == len(places)
