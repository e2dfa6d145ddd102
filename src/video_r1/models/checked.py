"""Fast paths that are compared with the plain path at their first use in a process.

Kernels that run only on GPUs cannot be tested everywhere, and the next release of a library may change a
private name. If a fast path fails or gives other values, the plain path is used from then on, and one warning
names the path and the versions.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Relative distance that always counts as rounding; see `tolerance` for coarser number formats."""
NEWEST_TESTED = {"transformers": "5.24", "torch": "2.15"}
"""Minor versions in setup/requirements-newest.txt."""
WORKING: dict[tuple[str, str], bool] = {}
"""Results of `works` in this process, by path and model type."""
TF32_EPS = 2**-10  # a GPU may round the factors of float32 products and convolutions to TF32


def works(what: str, model: Any, fast: Callable[[Any], Tensor], plain: Callable[[Any], Tensor]) -> bool:
    """Return whether to use a fast path of transformers models that depends on its private names.

    Tested versions need no comparison. With newer ones both functions get the model, once a model type, and
    have to return the same values.
    """
    key = what, model.config.model_type
    if key not in WORKING:
        newer = any(
            Version(sys.modules[name].__version__).release[:2] > Version(tested).release
            for name, tested in NEWEST_TESTED.items()
        )
        whole = all(weight.numel() for weight in model.parameters())  # not so with ZeRO-3
        WORKING[key] = not (newer and whole) or Checked(what, fast, plain).check((model,), {}, False)
    return WORKING[key]


class Checked:
    """`fast` if it agrees with `plain` on the arguments of the first call; else `plain`.

    Both take and return the same tensors; other arguments are passed on. Gradients are compared at the first
    call that needs them. what: the name of the fast path in the warning.
    """

    def __init__(self, what: str, fast: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.what, self.fast, self.plain = what, fast, plain
        self.agrees: bool | None = None
        self.gradients_agree: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if self.agrees is None or (self.agrees and learns and self.gradients_agree is None):
            self.agrees = self.check(args, kwargs, learns)
            self.gradients_agree = self.agrees if learns else None
        return (self.fast if self.agrees else self.plain)(*args, **kwargs)

    def check(self, args: Sequence[Any], kwargs: dict[str, Any], learns: bool) -> bool:
        """Return whether both agree (in gradients too if the call `learns`), or the plain path fails."""
        try:
            found = results_of(self.fast, args, kwargs, learns)
        except Exception as error:  # any failure: the plain path works
            return self.refuse(f"fails with {type(error).__name__}: {error}")
        try:
            expected = results_of(self.plain, args, kwargs, learns)
        except RuntimeError as error:  # some GPUs have no kernel for the plain path
            logger.warning("%s is used unchecked: the plain path fails here (%s)", self.what, error)
            return True
        far = max(distance(one, two) for one, two in zip(found, expected, strict=True))
        if far > tolerance(expected):
            return self.refuse(f"is off by {far:.2g} of the result's norm")
        return True

    def refuse(self, reason: str) -> bool:
        """Use the plain path from here on, and warn of it."""
        self.agrees = False
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        logger.warning(
            "%s %s: the plain path is used from here on (correct, but slower). Please report this line: "
            "%s, torch %s, transformers %s",
            self.what, reason, device, torch.__version__, transformers.__version__,
        )  # fmt: skip
        return False


def results_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], learns: bool
) -> list[Tensor]:
    """Return a function's results and, if it learns, the gradients of the sum of their squares."""
    inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(learns), identity:  # activation checkpointing may count saved tensors
        results = function(*inputs, **kwargs)
        results = [results] if isinstance(results, Tensor) else list(results)
        gradients = []
        if learns:
            gradients = torch.autograd.grad([result.float().square().sum() for result in results], wanted)
    return [result.detach() for result in results] + list(gradients)


def distance(one: Tensor, two: Tensor) -> float:
    """Return ‖one − two‖ ÷ ‖two‖; infinity if it is not a number."""
    difference = (one.float() - two.float()).norm() / two.float().norm().clamp_min(1e-20)
    return float(difference.nan_to_num(torch.inf))


def tolerance(results: Sequence[Tensor]) -> float:
    """Return three roundings in the coarsest number format behind results: theirs, autocast's or TF32."""
    device = results[0].device.type
    steps = [torch.finfo(result.dtype).eps for result in results]
    if torch.is_autocast_enabled(device):
        steps.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
    if device == "cuda":
        steps.append(TF32_EPS)
    return max(TOLERANCE, 3 * max(steps))
