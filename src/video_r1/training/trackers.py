"""Trackers of `report_to`, which may fail without ending the run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.files import warn_once


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError when a tracker of `report_to` is unknown or not installed."""
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from error
    for name in names:
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or set it to none")


def let_trackers_fail(callbacks: Sequence[TrainerCallback], names: Sequence[str]) -> None:
    """Make trackers that fail during the run warn once; one that cannot start ends it with VideoR1Error."""
    kinds = tuple(get_reporting_integration_callbacks(names))
    for tracker in callbacks:
        if isinstance(tracker, kinds):
            for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
                setattr(tracker, event, partial(_may_fail, getattr(tracker, event), event))


def _may_fail(method: Callable[..., Any], event: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except Exception as error:  # a tracker's client raises any error of its network and disk
        name = type(getattr(method, "__self__", method)).__name__
        reason = f"{name}: {type(error).__name__}: {error}"
        if event == "on_train_begin":
            raise VideoR1Error(f"report_to: {reason}; set up the tracker or set it to none") from error
        warn_once(f"{reason}; training continues without it")
        return None
