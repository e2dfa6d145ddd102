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
"""Relative distance of float32 results; other number formats may round three times."""


class Checked:
    """`fast`, as long as it agrees with `plain` on the first arguments that it sees; else `plain`.

    Both take and return the same tensors; arguments that are no tensors are passed on. Gradients are compared
    too where an argument asks for them. what: the name of the fast path in the warning.
    """

    def __init__(self, what: str, fast: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.what, self.fast, self.plain = what, fast, plain
        self.agrees: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.agrees is None:
            self.agrees = self.check(args, kwargs)
        return (self.fast if self.agrees else self.plain)(*args, **kwargs)

    def check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether both give the same. True as well where the plain path itself cannot run."""
        try:
            expected = values_and_gradients(self.plain, args, kwargs)
        except RuntimeError as error:  # some GPUs have no engine for the plain one, so there is no other way
            logger.warning("%s is taken unchecked: the plain path fails here (%s)", self.what, error)
            return True
        try:
            found = values_and_gradients(self.fast, args, kwargs)
        except Exception as error:  # whatever it is, there is another way
            self.warn(f"fails with {type(error).__name__}: {error}")
            return False
        distances = [distance(one, two) for one, two in zip(found, expected, strict=True)]
        within = all(far <= tolerance(two.dtype) for far, two in zip(distances, expected, strict=True))
        if not within:
            self.warn(f"is off by {max(distances):.2g} of the result's norm")
        return within

    def warn(self, reason: str) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        logger.warning(
            "%s %s: the plain path is taken from here on (correct, but slower). Please report this line: "
            "%s, torch %s", self.what, reason, device, torch.__version__,
        )  # fmt: skip


def values_and_gradients(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[Tensor]:
    """A function's results, then the gradients of their squares' sum in the arguments that ask for one."""
    inputs = [
        argument.detach().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor) else argument
        for argument in args
    ]
    wanted = [argument for argument in inputs if isinstance(argument, Tensor) and argument.requires_grad]
    identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(bool(wanted)), identity:  # activation checkpointing may count what is saved
        results = function(*inputs, **kwargs)
        results = [results] if isinstance(results, Tensor) else list(results)
        gradients = []
        if wanted:
            gradients = torch.autograd.grad([result.float().square().sum() for result in results], wanted)
    return [result.detach() for result in results] + list(gradients)


def distance(one: Tensor, two: Tensor) -> float:
    """‖one − two‖ ÷ ‖two‖; infinite where a value is not finite."""
    difference = float((one.float() - two.float()).norm() / two.float().norm().clamp_min(1e-20))
    return difference if difference == difference else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    return max(TOLERANCE, 3 * torch.finfo(dtype).eps)
