"""A run on `transformers.Trainer`: its folder, checkpoints, resume and the saved model."""

import inspect
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import transformers
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput, rotate_checkpoints

from video_r1.data.prompts import PromptBuilder
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.files import follow_umask, is_finished
from video_r1.models.checked import NEWEST_TESTED
from video_r1.models.group_forward import attending_in_rows, in_one_row, vision_language_model
from video_r1.models.loading import load_model
from video_r1.models.lora import load_adapters, record_four_bits
from video_r1.processes import (
    claimed_by_first,
    decided_by_first,
    naming_lost_processes,
    wait_for_everyone,
)
from video_r1.recipe import Recipe, resolved
from video_r1.settings.base import Settings
from video_r1.training import checkpoints, sharded
from video_r1.training.guard import UpdateGuard
from video_r1.training.metrics import Meter
from video_r1.training.progress import StepProgress, StepSeconds
from video_r1.training.questions import QUARANTINE
from video_r1.training.run_folder import RunFolder, keep_until
from video_r1.training.runs import (
    contents_of,
    earlier_run,
    record_training,
)
from video_r1.training.stopping import StopWhenAsked
from video_r1.training.trackers import check_trackers, let_trackers_fail

logger = logging.getLogger(__name__)
Kind = TypeVar("Kind", bound=TrainerCallback)


def check_replaced(kind: type[Trainer]) -> None:
    """Raise ConfigError if transformers calls a method of its Trainer otherwise than its replacement here.

    Private methods of trainers in this package all replace the Trainer's.
    """
    own = [owner for owner in kind.__mro__ if owner.__module__.startswith("video_r1.")]
    for name, method in ((n, m) for owner in own for n, m in vars(owner).items() if inspect.isfunction(m)):
        theirs, takes = getattr(Trainer, name, None), inspect.signature(method).parameters
        if name.startswith("__") or (theirs is None and not name.startswith("_")):
            continue
        expected = "nothing (it is gone)" if theirs is None else [*inspect.signature(theirs).parameters]
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        if theirs is None or (expected != [*takes] and not takes_any):
            raise ConfigError(
                f"transformers {transformers.__version__} is not supported: Trainer.{name} takes {expected}, "
                f"its replacement here {[*takes]}. Install transformers {NEWEST_TESTED['transformers']}"
            )


class RunTrainer(Trainer):
    """A trainer whose output folder is a run: it resumes by itself, and becomes a checkpoint at the end."""

    progress_title = "training"
    progress_series: Mapping[str, str]
    """Displayed name to series, for the progress bar."""
    updates_per_step = 1
    """Updates on the same questions, in a row."""
    builder: PromptBuilder

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        described_by: Recipe | Settings,
        named: Mapping[str, str],
        callbacks: Sequence[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        """described_by: the source of config.yaml. named: settings that were given as arguments, to compare a
        resumed run. options: of `transformers.Trainer`.
        """
        check_replaced(type(self))
        check_trackers(args.report_to)
        args.run_name = args.run_name or Path(args.output_dir).name
        self.settings, self.described_by, self.named = args, described_by, named
        self.folder = Path(args.output_dir)
        self.unfinished = self.folder / checkpoints.UNFINISHED
        self.checkpoints_go_to = self.folder
        self.contents: dict[str, str] = {}  # see contents_of
        self.listed: Sequence[str | int] = ()  # questions in quarantine since before the run was resumed
        self.meter = Meter()
        self.guard = UpdateGuard(self.folder, args.max_skipped_updates)
        run_folder = RunFolder(self.folder, described_by)
        callbacks = [*(callbacks or []), self.guard, run_folder, StepSeconds(self.meter)]
        super().__init__(model=model, args=args, callbacks=callbacks, **options)
        sharded.check_sharding_of(model, self.accelerator)
        sharded.keep_figures_exact(self.accelerator)
        # The loss is normalised over the optimizer step, so the Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
            args.restore_callback_states_from_checkpoint = True  # its patience counter
        let_trackers_fail(self.callback_handler.callbacks, args.report_to)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StepProgress(self.progress_title, self.progress_series))
        self.stop = StopWhenAsked(self.folder, self.updates_per_step)
        self.add_callback(self.stop)  # last, since its on_save ends the run

    def callback_of(self, kind: type[Kind]) -> Kind | None:
        """Return the callback of this type. (The Trainer replaces callbacks when it resumes.)"""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, kind)), None)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Give this rank all weights of a sharded model inside (see `sharded.whole_weights`)."""
        return sharded.whole_weights(cast(nn.Module, self.model_wrapped), self.accelerator)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does; with `save_strategy` the run folder becomes a checkpoint.

        Without `resume_from_checkpoint` a run in the folder resumes from its last complete checkpoint; a
        finished run only loads its model. Raises ConfigError for other settings, RequestError when another
        command writes the folder, and VideoR1Error for what else ends a run.
        """
        settings = {**resolved(self.described_by), **self.named}
        quarantine = self.folder / QUARANTINE

        def begin() -> tuple[Path | None, bool, dict[str, str], list[str | int]]:
            known = contents_of(settings, self.train_dataset, self.eval_dataset, self.settings)
            checkpoint, finished = (
                (None, False) if resume_from_checkpoint else earlier_run(self.folder, settings, known)
            )
            if checkpoint is None and not resume_from_checkpoint:
                quarantine.unlink(missing_ok=True)  # of an earlier start
            return checkpoint, finished, known, [line["problem_id"] for line in keep_until(quarantine, 0)]

        model: Any = self.model
        rows = attending_in_rows(model) if in_one_row(vision_language_model(model)) else nullcontext()
        with naming_lost_processes(self.folder), claimed_by_first(self.folder), rows:
            checkpoint, finished, self.contents, self.listed = decided_by_first(begin)
            if checkpoint is not None:
                state = checkpoints.read_state(checkpoint)
                steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
                if finished or checkpoints.stopped_early(state) or state["global_step"] >= steps:
                    return self.load_finished(checkpoint)
                logger.warning("%s: resuming from %s", self.folder, checkpoint.name)
                resume_from_checkpoint = str(checkpoint)
            output = self.train_on(resume_from_checkpoint, *args, **kwargs)
            if self.args.save_strategy != SaveStrategy.NO:
                self.publish_model()
            return output

    def load_finished(self, checkpoint: Path) -> TrainOutput:
        """Load a finished run; save its model if it was killed before that."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end:
            checkpoint = checkpoints.best_checkpoint(self.folder, self.state.best_global_step) or checkpoint
        if self.is_world_process_zero() and not is_finished(self.folder):
            checkpoints.publish_copy(checkpoint, self.folder)
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(checkpoint))
        return TrainOutput(self.state.global_step, math.nan, {})

    def train_on(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        if self.is_world_process_zero():
            shutil.rmtree(self.unfinished, ignore_errors=True)  # by a run that was killed
        if resume_from_checkpoint:
            found = checkpoints.last_whole_checkpoint(self.folder) if resume_from_checkpoint is True else None
            checkpoint = found or Path(str(resume_from_checkpoint))
            deepspeed = self.is_deepspeed_enabled
            sharded.check_kind(checkpoint, "FSDP" * self.is_fsdp_enabled or "DeepSpeed" * deepspeed)
            if deepspeed:
                sharded.check_training_state(checkpoint)
        on_train_end = self.callback_handler.on_train_end
        try:
            with self.stop.listening(lambda: on_train_end(self.args, self.state, self.control)):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except OSError as error:
            raise VideoR1Error(
                f"training stopped: {error}. When the cause is fixed, start the same command again to resume "
                f"from the last checkpoint in {self.folder}"
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints_go_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the Trainer's checkpoint elsewhere, then rename it (checkpoints.py). Raises VideoR1Error."""
        name, state = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.state
        final, unfinished = self.folder / name, self.unfinished / name
        with checkpoints.writing(name, self.folder):
            if self.args.should_save:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            wait_for_everyone()
            self.checkpoints_go_to = self.unfinished
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.checkpoints_go_to = self.folder
            best = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best == final or best.exists()):
                state.best_model_checkpoint = str(best)
            wait_for_everyone()
            if self.args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                checkpoints.publish_folder(unfinished, final)
                rotate_checkpoints(
                    str(self.folder), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True
                )
            wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `_save_checkpoint` pushes the checkpoint once it is complete."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the Trainer does, without training_args.bin, a pickle of what config.yaml says."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.folder)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        record_four_bits(self.model, folder)
        if self.args.should_save:
            record_training(folder, self.settings, self.builder, self.model, self.contents)
            follow_umask(folder)

    def publish_model(self) -> None:
        """Save model and processor into the run folder. Raises VideoR1Error."""
        unfinished = self.unfinished / "model"
        with naming_lost_processes(self.folder), checkpoints.writing("the model", self.folder):
            self.save_model(str(unfinished), _internal_call=True)
            if self.args.should_save:
                checkpoints.publish_files(unfinished, self.folder)
        if self.args.push_to_hub:
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.restore_weights(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.restore_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def restore_weights(self, folder: str | None, model: nn.Module | None = None) -> bool:
        """Read a whole model's weights or adapters; return False if the Trainer has to do it. (It silently
        skips weights whose names differ.) Raises ConfigError for adapters that do not fit.
        """
        model = self.model if model is None else model
        if folder is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        if list(getattr(model, "peft_config", ())) == ["default"]:
            load_adapters(model, folder)
        elif isinstance(model, PreTrainedModel):
            model.load_state_dict(load_model(folder).state_dict())
        else:
            return False
        return True

    def watched(self, loss: Tensor, problem_ids: Sequence[str | int]) -> Tensor:
        self.guard.watch(loss.detach(), problem_ids)
        # DeepSpeed skips an update whose gradients are all nan, not one where a single term is.
        is_bad = self.is_deepspeed_enabled and not bool(loss.detach().isfinite())
        return loss * math.nan if is_bad else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's count does not know packed rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.meter.drain()}
            logs["updates/skipped"] = self.guard.skipped
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Extend the Trainer's: save the best model so far as a checkpoint, also between save_steps."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def report_early_stop(self) -> None:
        """Log that the last validation ends the run, if it does."""
        stop, state = self.callback_of(EarlyStoppingCallback), self.state
        count = 0 if stop is None else stop.early_stopping_patience_counter
        if stop is not None and count >= stop.early_stopping_patience:
            step = state.best_global_step
            best = math.nan if state.best_metric is None else state.best_metric
            logger.warning(
                "%s: stopped early, after step %d of %d: %d validations in a row were not better than %s "
                "%.4g of step %d",
                self.folder, state.global_step, state.max_steps, count, self.args.metric_for_best_model, best,
                step,
            )  # fmt: skip
            self.log({"stopped_early": float(count)})

    def save_before_the_step(self) -> str:
        """Save the run as it was before this step; return what a message says of it. Every rank calls it."""
        step = self.state.global_step
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step > 0 and not decided_by_first(checkpoint.exists):
            self._save_checkpoint(cast(nn.Module, self.model_wrapped), None)
        return f" and is saved ({checkpoint.name})" if step > 0 else ""
