"""A decoding step as a CUDA graph: recorded once for each set of shapes, replayed for every token.

A step of a 7B model is some 3,000 launches of small kernels, which take the CPU longer than the GPU needs for
the work. Replayed, they are one launch. On other devices a step runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from video_r1.models.checked import Checked
from video_r1.rollout.shared_prefix import SharedPrefixCache

RECORDED_ON = ("cuda",)


class DecodingStep:
    """`step(tokens [B], position [B], cache)` as the device runs it best. It gives logits [B, V] and puts the
    tokens into the cache, the same ones when it is called again with the same arguments.

    The logits of a call may be overwritten by the next one.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, SharedPrefixCache], Tensor], cache: SharedPrefixCache
    ) -> None:
        self.step, self.cache = step, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after `tokens` [B] at `position` [B], for which the cache has room."""
        recorded = tokens.device.type in RECORDED_ON
        self.cache.remember(recorded and replayed_step.agrees is not False and self.outdated)
        return (replayed_step if recorded else plain_step)(tokens, position, self)

    @property
    def outdated(self) -> bool:
        """Whether there is no recording of these shapes."""
        return self.graph is None or self.buffers is not self.cache.keys

    def record(self, tokens: Tensor, position: Tensor) -> None:
        """Records the step for these shapes and the cache's present buffers."""
        self.graph = None  # before the next one is made: its memory can serve again
        plain_step(tokens, position, self)  # sets up what kernels keep
        self.tokens, self.position = tokens.clone(), position.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step(self.tokens, self.position, self.cache)
        self.graph, self.buffers = graph, self.cache.keys


def plain_step(tokens: Tensor, position: Tensor, decoding: DecodingStep) -> Tensor:
    decoding.cache.rewind()
    return decoding.step(tokens, position, decoding.cache)


def _replayed(tokens: Tensor, position: Tensor, decoding: DecodingStep) -> Tensor:
    if decoding.outdated:
        decoding.record(tokens, position)
    assert decoding.graph is not None
    decoding.tokens.copy_(tokens)
    decoding.position.copy_(position)
    decoding.cache.rewind()
    decoding.graph.replay()
    return decoding.logits


replayed_step = Checked("decoding by a CUDA graph", _replayed, plain_step)
