"""Base of both trainers: `transformers.Trainer` over questions whose media are prefetched."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)

from video_r1.availability import check_optimizer
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import PromptBuilder
from video_r1.data.reading import Reader
from video_r1.data.tools import Toolbox
from video_r1.errors import ConfigError
from video_r1.models.group_forward import in_one_row, vision_language_model
from video_r1.models.loading import size_multiple
from video_r1.recipe import Recipe, plain
from video_r1.training.questions import (
    QUARANTINE,
    EpochSlots,
    QuestionSource,
    Reading,
    Ready,
    Slot,
    StepBatches,
)
from video_r1.training.run_trainer import RunTrainer
from video_r1.training.runs import (
    Questions,
    adopt,
    as_samples,
    given_model,
)


class QuestionTrainer(RunTrainer, ABC):
    """A trainer on a manifest. A subclass reads a sample (`load`, cached in memory), builds its training
    input (`build`), makes the inputs of a step (`step_inputs`) and validates.
    """

    default_settings: Callable[[], Any]

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: Any = None,
        train_dataset: Questions | None = None,
        eval_dataset: Questions | dict[str, Questions] | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        recipe: Recipe | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        tools: Sequence[Callable[..., Any]] | None = None,
    ) -> None:
        if isinstance(train_dataset, dict):
            raise ConfigError(
                f"train_dataset has the splits {', '.join(map(str, train_dataset))}; pass one of them"
            )
        args = self.default_settings() if args is None else args
        check_optimizer(args.optim.value)
        if recipe is None:
            adopt(args, model)
        else:  # which has adopted them
            args.recipe_values = plain(recipe.values())
        set_seed(args.seed)  # new adapters are drawn at random
        trained, processing_class = given_model(model, processing_class, peft_config, args)
        self.reader = Reader(
            args.frame_budget(size_multiple(processing_class)),
            open_frame_cache(args.frame_cache, args.frame_cache_gb),
            args.media_threads,
        )
        uses_tools = args.tools or tools
        self.builder = PromptBuilder(
            processing_class,
            args.prompt_template,
            args.max_prompt_length,
            args.subtitles,
            Toolbox(args, self.reader.budget, tools or (), self.reader.frame_cache) if uses_tools else None,
        )
        self.source: QuestionSource[Any, Any] | None = None
        self.upcoming: deque[list[list[Reading]]] = deque()  # the next updates' micro-batches
        self.first_update_was_read = False
        self.updates_read_ahead = 1
        super().__init__(
            trained,
            args,
            args if recipe is None else recipe,
            {"model_name_or_path": str(model)} if isinstance(model, str | Path) else {},
            callbacks=callbacks,
            train_dataset=as_samples(train_dataset, args),
            eval_dataset=as_samples(eval_dataset, args),
            processing_class=processing_class,
            optimizers=optimizers,
        )
        if args.ddp_find_unused_parameters is None and not in_one_row(vision_language_model(trained)):
            args.ddp_find_unused_parameters = True  # a rank of text alone leaves the tower without gradient

    @abstractmethod
    def load(self, sample: Sample) -> Any:
        """Read a sample's media, to be cached in memory. Raises MediaError or PromptError."""

    @abstractmethod
    def build(self, sample: Sample, loaded: Any, generator: torch.Generator) -> Any:
        """Build a sample's training input. Raises PromptError."""

    @abstractmethod
    def step_inputs(self, reading: list[list[Reading]]) -> tuple[list[Any], float]:
        """Return the inputs of an update's micro-batches, whose questions are being read, and the normaliser
        of their loss. A later update on the same questions has nothing to read.
        """

    @abstractmethod
    def validate(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Measure on held-out questions: figures by name."""

    def get_train_dataloader(self) -> DataLoader:
        args, samples = self.settings, cast(list[Sample], self.train_dataset)
        if not samples:
            raise ConfigError("training needs a train_dataset with at least one question")
        self.upcoming.clear()
        self.source = QuestionSource(
            samples,
            self.load,
            self.build,
            seed=args.seed if args.data_seed is None else args.data_seed,
            reader=self.reader,
            quarantine=self.folder / QUARANTINE,
            cache_bytes=args.media_cache_mb * 2**20,
            listed=self.listed,
        )
        step_batches = args.gradient_accumulation_steps * args.world_size
        self.first_update_was_read = False
        batches = StepBatches(len(samples), self._train_batch_size, step_batches, self.updates_per_step)
        loader = DataLoader(EpochSlots(len(samples)), batch_sampler=batches, collate_fn=list)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """Return the inputs of one update and their loss's normaliser; read ahead for the next updates."""
        size = self.args.gradient_accumulation_steps  # micro-batches; fewer at the end of an epoch
        while len(self.upcoming) <= self.updates_read_ahead:
            slots, _ = super().get_batch_samples(epoch_iterator, size, device)
            if not slots:
                break
            is_first = slots[0][0].iteration == 0 or not self.first_update_was_read
            self.upcoming.append([self.submit(batch) if is_first else [] for batch in slots])
            self.first_update_was_read = True
        return self.step_inputs(self.upcoming.popleft()) if self.upcoming else ([], None)

    def submit(self, slots: Sequence[Slot]) -> list[Reading]:
        """Begin to read questions."""
        assert self.source is not None
        return [self.source.submit(slot) for slot in slots]

    def ready(self, pending: Sequence[Reading]) -> list[Ready[Any]]:
        """Wait for questions. Raises VideoR1Error when all media are missing."""
        with self.meter.seconds("decode"):
            ready = [question.result() for question in pending]
        self.meter.total("media/skipped", sum(entry.skipped for entry in ready))
        return ready

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the figures of `validate` on held-out questions; several sets make `eval_<name>_…`."""
        questions: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(questions, dict):
            metrics = {}
            for name, part in questions.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        samples = as_samples(questions, self.settings)
        if not samples:
            raise ConfigError("evaluation needs an eval_dataset with at least one question")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(samples).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.report_early_stop()
        return metrics
