"""Gated DeltaNet layers (arXiv 2412.06464) in a row of groups: the prompt runs once and its state is forked.

                                                                           ┌─► completion 1
    prompt ─► state [H, Dk, Dv] and the last K - 1 inputs of a convolution ┼─► …
                                                                           └─► completion G

transformers' layers look up a convolution and a rule in their module by name. Inside `forking_states` both
follow a row's layout. Calls without a layout go to the original function: the kernel that transformers has
picked (`causal_conv1d`, `fla`), or torch's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from video_r1.models.attention import ForkLayout, RowLayout, replaced

CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"


@contextmanager
def forking_states(name: str) -> Iterator[None]:
    """Replace the two functions in transformers' module of this name inside."""
    module = import_module(name)
    convolution, rule = getattr(module, CONVOLUTION), getattr(module, RULE)
    with (
        replaced(module, CONVOLUTION, forked_convolution(convolution)),
        replaced(module, RULE, forked_rule(rule)),
    ):
        yield


def forked_convolution(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a causal convolution of a row [1, C, N]: completions see the last tokens of their prompts."""

    @wraps(convolve)
    def forked(*args: Any, group_layout: RowLayout | None = None, **kwargs: Any) -> Tensor:
        if group_layout is None or group_layout.forks is None:
            return convolve(*args, **kwargs)
        layout = group_layout.forks
        padded = functional.pad(args[0], (0, 1)).index_select(2, layout.inputs)
        return convolve(padded, *args[1:], **kwargs).index_select(2, layout.outputs)

    return forked


def forked_rule(rule: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Any]:
    """Wrap a chunked rule of a row: query, key [1, N, H, Dk], value [1, N, H, Dv], g, beta [1, N, H].

    Padding of a prompt does not change the state: it decays nothing (g 0) and writes nothing (beta 0).
    """

    @wraps(rule)
    def forked(*args: Any, group_layout: RowLayout | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        if group_layout is None or group_layout.forks is None:
            return rule(*args, **kwargs)
        return of_row(*args, layout=group_layout.forks, **kwargs)

    def of_row(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        layout: ForkLayout,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        kwargs |= {"initial_state": None, "output_final_state": False, "cu_seqlens": None}
        outputs, states = [], []
        for rows, mask in zip(layout.prompts, layout.in_prompts, strict=True):
            parts = [x[0][rows] for x in (query, key, value)]
            gates = {"g": g[0][rows] * mask[..., None], "beta": beta[0][rows] * mask[..., None]}
            output, state = rule(*parts, **gates, **kwargs | {"output_final_state": True})
            outputs.append(output.flatten(0, 1))
            states.append(state)
        ends = torch.cat(states)[layout.states]  # [groups, H, Dk, Dv]
        for rows, groups in zip(layout.completions, layout.forks, strict=True):
            parts = [x[0][rows] for x in (query, key, value)]
            gates = {"g": g[0][rows], "beta": beta[0][rows], "initial_state": ends[groups]}
            outputs.append(rule(*parts, **kwargs | gates)[0].flatten(0, 1))
        return torch.cat(outputs).index_select(0, layout.back)[None], None

    return forked
