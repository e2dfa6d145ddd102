"""Fast paths that check themselves: compared with the plain path at their first use in a process.

What only a GPU runs cannot be tested everywhere. A kernel that fails there, or gives other values, is left
alone from then on, with one warning that says what to report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Least relative distance that is taken for rounding; see `tolerance` for number formats that round more."""
TF32_EPS = 2**-10  # what a GPU may round the factors of float32 products and convolutions to


class Checked:
    """`fast`, as long as it agrees with `plain` on the first arguments that it sees; else `plain`.

    Both take and return the same tensors; arguments that are no tensors are passed on. Gradients are compared
    at the first call that asks for them. what: the name of the fast path in the warning.
    """

    def __init__(self, what: str, fast: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.what, self.fast, self.plain = what, fast, plain
        self.agrees: bool | None = None
        self.gradients_agree: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        learns = torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in args
        )
        if self.agrees is None or (self.agrees and learns and self.gradients_agree is None):
            self.agrees = self.check(args, kwargs, learns)
            self.gradients_agree = self.agrees if learns else None
        return (self.fast if self.agrees else self.plain)(*args, **kwargs)

    def check(self, args: Sequence[Any], kwargs: dict[str, Any], learns: bool) -> bool:
        """Whether both give the same, with gradients where the call `learns`. True as well where the plain
        path itself cannot run.
        """
        try:
            expected = results_of(self.plain, args, kwargs, learns)
        except RuntimeError as error:  # some GPUs have no engine for the plain one, so there is no other way
            logger.warning("%s is taken unchecked: the plain path fails here (%s)", self.what, error)
            return True
        try:
            found = results_of(self.fast, args, kwargs, learns)
        except Exception as error:  # whatever it is, there is another way
            self.warn(f"fails with {type(error).__name__}: {error}")
            return False
        far = max(distance(one, two) for one, two in zip(found, expected, strict=True))
        if within := far <= tolerance(expected):
            return within
        self.warn(f"is off by {far:.2g} of the result's norm")
        return within

    def warn(self, reason: str) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        logger.warning(
            "%s %s: the plain path is taken from here on (correct, but slower). Please report this line: "
            "%s, torch %s", self.what, reason, device, torch.__version__,
        )  # fmt: skip


def results_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], learns: bool
) -> list[Tensor]:
    """A function's results; if it learns, then the gradients of their squares' sum in the arguments that ask
    for one.
    """
    inputs = [
        argument.detach().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor) else argument
        for argument in args
    ]
    wanted = [argument for argument in inputs if isinstance(argument, Tensor) and argument.requires_grad]
    identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(learns), identity:  # activation checkpointing may count what is saved
        results = function(*inputs, **kwargs)
        results = [results] if isinstance(results, Tensor) else list(results)
        gradients = []
        if learns:
            gradients = torch.autograd.grad([result.float().square().sum() for result in results], wanted)
    return [result.detach() for result in results] + list(gradients)


def distance(one: Tensor, two: Tensor) -> float:
    """‖one − two‖ ÷ ‖two‖; infinite where a value is not finite."""
    difference = float((one.float() - two.float()).norm() / two.float().norm().clamp_min(1e-20))
    return difference if difference == difference else float("inf")


def tolerance(results: Sequence[Tensor]) -> float:
    """Three roundings in the coarsest format on the way to these results: theirs, autocast's (a gradient of a
    float32 weight is float32, and has gone through bf16), on a GPU TF32.
    """
    device = results[0].device.type
    steps = [torch.finfo(result.dtype).eps for result in results]
    if torch.is_autocast_enabled(device):
        steps.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
    if device == "cuda":
        steps.append(TF32_EPS)
    return max(TOLERANCE, 3 * max(steps))
