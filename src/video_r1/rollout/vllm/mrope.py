"""Rotary positions (mRoPE) in vLLM as transformers counts them.

After a video, transformers lets the text start max(rows, columns) past the video's start. vLLM lets it start
past the video's last time position, as Qwen's first release did. For a clip of more time steps than rows the
two differ, and a policy trained with one rule is another policy with the other (Qwen2-VL and Qwen2.5-VL;
later models have text between frames, where both agree).

Each rule has its library's name, also in a checkpoint's training record. The libraries have not settled it:
transformers 5.2 had vLLM's rule, 5.3 to 5.24 have the other; vLLM 0.32 still has its own.

`use_transformers_positions` makes vLLM in this process follow the trainer. In the processes of a server that
is started with VIDEO_R1_POSITIONS=transformers, `serve.plugin` calls it (entry point `vllm.general_plugins`).
"""

from typing import Any

import torch
from torch import Tensor

from video_r1.models.families import find_family

POSITIONS_VARIABLE = "VIDEO_R1_POSITIONS"


def rule_of_training(config: Any) -> str | None:
    """Return the rule that a model is trained with here, by its config; None where all rules agree."""
    family = find_family(config)
    return None if family is None or family.timestamp_tokens else "transformers"


def use_transformers_positions() -> None:
    """Replace the rule of vLLM's Qwen2-VL and Qwen2.5-VL classes. A second call changes nothing."""
    from vllm.model_executor.models import qwen2_5_vl, qwen2_vl  # pyright: ignore[reportMissingImports]

    kinds: Any = (qwen2_vl.Qwen2VLForConditionalGeneration, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)
    for kind in kinds:
        kind.get_mrope_input_positions = prompt_positions


def prompt_positions(model: Any, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
    """Return a prompt's positions [3, P] int64 (time, row, column), and the shift of later tokens' indices.

    Time steps are rounded down after a product in float32, as in transformers.
    """
    parts: list[Tensor] = []
    done, position = 0, 0
    for offset, times, rows, columns, seconds in model.iter_mm_grid_thw(mm_features):
        parts.append(torch.arange(position, position + offset - done).expand(3, -1))
        position += offset - done
        time = (torch.arange(times) * torch.tensor(seconds, dtype=torch.float32)).long()
        grid = torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(torch.stack(grid).view(3, -1) + position)
        position += max(rows, columns)
        done = offset + times * rows * columns
    rest = len(input_tokens) - done
    parts.append(torch.arange(position, position + rest).expand(3, -1))
    return torch.cat(parts, 1), position + rest - len(input_tokens)
