"""Rollouts by vLLM in the training process.

    Prompt: its tokens, its processed pixels ─► vLLM: one prefill a prompt, n completions ─► Rollouts
    trained model ─► checkpoint_weights ─► vLLM's own copy of the model, its caches emptied

vLLM decides while it is imported to run in this process, so it is imported when an engine is built.
"""

import copy
import gc
import itertools
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig, GenerationConfig

from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.models.group_forward import vision_language_model
from video_r1.processes import gather_lists, process_count, process_index
from video_r1.rollout.engine import (
    MAX_SEQUENCES,
    Asking,
    ContinuingEngine,
    Counts,
    Groups,
    OnToken,
    Prompts,
    SamplingSettings,
    Then,
    follow_in_rounds,
    stop_token_ids,
)
from video_r1.rollout.vllm.mrope import use_transformers_positions
from video_r1.rollout.vllm.requests import PromptRequest, engine_input, prompt_requests, rollout_of
from video_r1.rollout.vllm.serve import CPU_VARIABLES, OPTIONS, cpu_options
from video_r1.rollout.vllm.weight_sync import checkpoint_weights
from video_r1.settings.frames import FrameBudget
from video_r1.settings.vllm import MAX_BATCHED_TOKENS, VLLMSettings

# vLLM reads these when it is imported; values that the user has set stay.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights pass from model to model within this process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    **CPU_VARIABLES,
}


@contextmanager
def without_autocast() -> Iterator[None]:
    """Let vLLM compute in its own number format, also within the trainer's autocast."""
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
        yield


class VLLMEngine(ContinuingEngine):
    """Samples with vLLM, which has its own copy of the weights (`update_weights` replaces it).

    model: checkpoint folder or hub id, whose weights are loaded; or a transformers model (also within PEFT,
        DDP or FSDP2), whose weights come with the first `update_weights`: here they may be sharded.
    processor: builds the prompts.
    dtype: "auto" is that of the model or the checkpoint.
    max_model_len: most tokens of prompt and completion together, if the model allows as many.
    max_sequences: completions decoded at once; vLLM records CUDA graphs for as many.
    settings: share of the GPU's memory; whether `rest` frees it (GPU only); number of neighbouring ranks that
        share one vLLM: all of them have to make the same calls (their prompts may differ).
    frames: the largest visuals to reserve memory for (default: the largest that the model takes).

    Raises ConfigError when vLLM is not installed or refuses the model.
    """

    has_own_weights = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_sequences: int = MAX_SEQUENCES,
        settings: VLLMSettings | None = None,
        frames: FrameBudget | None = None,
    ) -> None:
        settings = settings or VLLMSettings()
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._sleep = settings.enable_sleep_mode and torch.cuda.is_available()
        self._asleep = False
        self._neighbours = neighbours(settings.tensor_parallel_size)
        in_memory = not isinstance(model, (str, Path))
        source = self._describe(model) if in_memory else str(model)
        if in_memory and dtype == "auto":
            dtype = str(vision_language_model(model).dtype).removeprefix("torch.")
        config = AutoConfig.from_pretrained(source)
        longest = config.get_text_config().max_position_embeddings
        arguments: dict[str, Any] = {
            "model": source,
            "load_format": "dummy" if in_memory else "auto",
            "dtype": dtype,
            "max_num_seqs": max_sequences,
            "limit_mm_per_prompt": {"image": 1, "video": 1} if frames is None else largest_visuals(frames),
            "mm_processor_kwargs": {"do_sample_frames": False, "do_resize": False},
            "max_model_len": min(longest, max_model_len or longest),
            "tensor_parallel_size": settings.tensor_parallel_size,
            # One worker in each process that the launcher has started.
            **({"distributed_executor_backend": "external_launcher"} if process_count() > 1 else {}),
            **OPTIONS,
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
            arguments["enable_sleep_mode"] = self._sleep
            arguments["max_num_batched_tokens"] = MAX_BATCHED_TOKENS
        else:
            arguments |= cpu_options(config, dtype)
        if process_index() == 0:
            print("vLLM starts, which takes one to three minutes on a GPU", file=sys.stderr, flush=True)
        self.llm = _start(arguments)
        self.max_model_len: int = self.llm.model_config.max_model_len
        self._dtype: torch.dtype = self.llm.model_config.dtype
        self.stop_ids = stop_token_ids(generation_config(source), self.tokenizer)

    def _describe(self, model: Any) -> str:
        """Write the model's checkpoint without its weights; return the folder."""
        self._folder = tempfile.TemporaryDirectory(prefix="video-r1-vllm-")
        inner = vision_language_model(model)
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]  # a model made in code has none
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # vLLM gets 4-bit weights in full precision
        config.save_pretrained(self._folder.name)
        inner.generation_config.save_pretrained(self._folder.name)
        self.processor.save_pretrained(self._folder.name)
        return self._folder.name

    @without_autocast()
    def update_weights(self, model: Any) -> None:
        """Copy the weights to vLLM in memory, adapters merged, and empty the caches of old ones."""
        if self._asleep:
            self.llm.wake_up(["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(model)})
        if self._asleep:  # only now: the copies of the weights need memory as well
            self.llm.wake_up(["kv_cache"])
            self._asleep = False
        self.reset_caches()
        self.stop_ids = stop_token_ids(vision_language_model(model).generation_config, self.tokenizer)

    def reset_caches(self) -> None:
        """Empty all caches of engine and worker: one emptied on one side alone breaks the next request."""
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_mm_cache()
        self.llm.collective_rpc("reset_mm_cache")
        if not self.llm.reset_prefix_cache():
            raise VideoR1Error("vLLM could not empty its prefix cache; requests are still running")

    @without_autocast()
    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        """Sample as `RolloutEngine.sample` says. A prompt is prefilled once.

        Raises RequestError for a prompt that leaves no room for `sampling.max_tokens`. An engine of a model
        in memory, or one that has rested, needs `update_weights` first.
        """
        asked = prompt_requests(prompts, sampling, counts, self.max_model_len, self.stop_ids)
        requests = [(engine_input(prompts[each.index], self._dtype), each.parameters) for each in asked]
        own = slice(None)
        if self._neighbours is not None:
            requests, own = gather_lists(requests, self._neighbours)
        results: Groups = [[] for _ in prompts]
        for each, output in zip(asked, self._outputs(requests)[own], strict=True):
            results[each.index] = each.filled([self._rollout(completion) for completion in output.outputs])
        return results

    @without_autocast()
    def follow(self, asked: Asking, then: Then) -> None:
        """Sample as `ContinuingEngine.follow` says; in rounds where ranks share this vLLM."""
        if self._neighbours is not None:
            return follow_in_rounds(self, asked, then, anyone=self._any_neighbour)
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        engine, running, names = self.llm.llm_engine, dict[str, PromptRequest](), itertools.count()
        waiting: set[Future[tuple[PromptRequest, Any] | None]] = set()

        def add(request: PromptRequest, given: Any) -> None:
            # Outputs are cumulative: each completion comes when it ends, not with the others of its prompt.
            interval, name = request.parameters["max_tokens"], str(next(names))
            engine.add_request(name, given, SamplingParams(**request.parameters, stream_interval=interval))
            running[name] = request

        def go_on(index: int, number: int, completion: Any) -> tuple[PromptRequest, Any] | None:
            if turn := then(index, number, self._rollout(completion)):
                (request,) = prompt_requests([turn[0]], turn[1], None, self.max_model_len, self.stop_ids)
                return request._replace(index=index, first=number), engine_input(turn[0], self._dtype)

        pool = ThreadPoolExecutor(thread_name_prefix="turns")
        try:
            for request in prompt_requests(*asked, self.max_model_len, self.stop_ids):
                add(request, engine_input(asked[0][request.index], self._dtype))
            while running or waiting:
                for output in engine.step() if running else ():
                    request = running[output.request_id]
                    for completion in filter(lambda each: each.finished(), output.outputs):
                        for number in request.numbers(completion.index):
                            waiting.add(pool.submit(go_on, request.index, number, completion))
                    if output.finished:
                        del running[output.request_id]
                done, waiting = wait(waiting, 0 if running else None, FIRST_COMPLETED)
                for request in filter(None, (future.result() for future in done)):
                    add(*request)
        except BaseException:  # an interrupt, too: no request must stay for the next call
            engine.abort_request(list(running))
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _any_neighbour(self, wanted: bool) -> bool:
        return any(gather_lists([wanted], self._neighbours)[0])

    def _outputs(self, requests: Sequence[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """Return vLLM's RequestOutputs, without `LLM.generate`, which would tokenise and process again."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        engine, added = self.llm.llm_engine, []
        try:
            for number, (given, fields) in enumerate(requests):
                parameters = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
                added.append(engine.add_request(str(number), given, parameters))
        except Exception:  # whatever vLLM refuses: the other requests must not stay for the next call
            engine.abort_request(added, internal=True)
            raise
        return self.llm.wait_for_completion(use_tqdm=False) if requests else []

    def _rollout(self, completion: Any) -> Rollout:
        ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        return rollout_of(ids, logprobs, completion.finish_reason, self.tokenizer)

    def rest(self) -> None:
        """Free the memory of weights and caches, if the settings say so. The weights are not kept."""
        if self._sleep and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def neighbours(size: int) -> Any:
    """Return the torch group of the `size` ranks that share a vLLM with this one; None for a size of 1.

    Each gathers the others' requests, generates for all, and keeps its own completions. Every rank of the run
    has to call this. Raises ConfigError when `size` does not divide their number.
    """
    processes = process_count()
    if processes % size:
        raise ConfigError(
            f"vllm_tensor_parallel_size is {size}; it must divide the number of processes ({processes})"
        )
    if size == 1:
        return None
    groups = [torch.distributed.new_group(list(range(at, at + size))) for at in range(0, processes, size)]
    return groups[process_index() // size]


def largest_visuals(frames: FrameBudget) -> dict[str, dict[str, int]]:
    """Return the largest image and video for vLLM's `limit_mm_per_prompt`; it measures its memory on them."""

    def side(pixels: int) -> int:  # rounding to whole squares may make a frame a little larger
        return math.ceil(math.sqrt(1.05 * pixels) / frames.size_multiple) * frames.size_multiple

    image, frame = side(frames.image_pixels), side(frames.frame_pixels)
    return {
        "image": {"count": 1, "width": image, "height": image},
        "video": {"count": 1, "num_frames": frames.max_frames, "width": frame, "height": frame},
    }


def generation_config(source: str | Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # a checkpoint need not have one
        return GenerationConfig()


def _start(arguments: dict[str, Any]) -> Any:
    """Return vLLM's LLM, and restore what its worker sets for the whole process, which trains as well."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    threads, precision = torch.set_num_threads, torch.backends.cuda.matmul.fp32_precision
    drawn = random.getstate(), numpy.random.get_state()
    try:
        from vllm import LLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); install it, or sample without it") from error
    use_transformers_positions()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return LLM(**arguments)
    except ValueError as error:
        raise ConfigError(f"vLLM refuses {arguments['model']}: {error}") from error
    finally:
        torch.set_num_threads = threads  # its CPU worker replaces it with a function that does nothing
        torch.backends.cuda.matmul.fp32_precision = precision  # TF32 or not is the run's setting
        random.setstate(drawn[0])
        numpy.random.set_state(drawn[1])
