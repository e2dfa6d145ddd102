"""The trained weights under vLLM's names, and their way to a server.

    model (PEFT, DDP, FSDP2) ─► checkpoint_weights, LoRA merged ─► a folder that both see, or from GPU to GPU

The trainer keeps the present weights, so that a server that comes back can get them again.
"""

from __future__ import annotations

import shutil
import socket
import threading
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from video_r1.chat_client import ServerFailure, ServerRefusal
from video_r1.files import follow_umask
from video_r1.models.families import find_family
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import EXPERTS
from video_r1.models.lora import adapted_name, dense_weight, is_four_bit, merged_weight, whole

HEAD = "lm_head.weight"

Call = Callable[..., Any]
"""Posts to the server: `call(path, body=None)` returns its answer."""


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the model inside DDP, FSDP2 and PEFT under its name in a published checkpoint.

    Tensors are whole and detached, 4-bit ones in full precision. The head is always among them: a model that
    ties it to the embedding saves no head, and vLLM would keep the old one without an error. Adapters are
    added to copies of their weights, W + s·B·A, layer by layer; merging in place would round the model's.
    """
    inner = vision_language_model(model)
    layers = dict(inner.named_modules())
    merged = {
        f"{_without_wrappers(name)}.{adapted_name(layer)}": layer
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }
    small = {
        f"{_without_wrappers(name)}.weight": layer for name, layer in layers.items() if is_four_bit(layer)
    }
    family = find_family(inner)
    transposed = EXPERTS if family is not None and family.transposed_experts else ()
    names = set()
    # state_dict() would shard again what FSDP2 has gathered
    for name, parameter in inner.named_parameters():
        if ".lora_" in name or ".original_module." in name:  # tensors that only PEFT has
            continue
        before, _, after = name.partition(".modules_to_save.")
        plain = f"{before}.{after.split('.', 1)[1]}" if after else _without_wrappers(name)
        names.add(plain)
        if plain in merged:
            tensor = merged_weight(merged[plain])
        elif plain in small:
            tensor = dense_weight(small[plain])
        else:
            tensor = whole(parameter)
        yield plain, tensor.transpose(1, 2) if plain.endswith(transposed) else tensor
    if HEAD not in names:
        yield HEAD, whole(inner.get_output_embeddings().weight)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "base_layer")  # experts may have several


# ---- To a server


class Copies:
    """Copies of weights in one block of main memory, which later copies reuse; pinned where a GPU fills it.

    torch pins memory by powers of two, up to twice what is needed: the block is registered with CUDA instead.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def take(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copy the weights, contiguous and as `dtype`, over those of the call before."""
        if not self.copies:
            first = {name: tensor.to("cpu", dtype) for name, tensor in weights}
            sizes = [tensor.numel() for tensor in first.values()]
            block = torch.empty(sum(sizes), dtype=dtype)
            if torch.cuda.is_available():
                cuda: Any = torch.cuda.cudart()
                address = block.data_ptr()
                torch.cuda.check_error(cuda.cudaHostRegister(address, block.nbytes, 0))
                weakref.finalize(self, cuda.cudaHostUnregister, address)
            parts = zip(first.items(), block.split(sizes), strict=True)
            self.copies = {name: part.view(tensor.shape) for (name, tensor), part in parts}
            weights = first.items()
        for name, tensor in weights:
            self.copies[name].copy_(tensor.to(dtype), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self.copies)


class FolderSync:
    """Writes a checkpoint's weights into `folder`, which the server sees under the same path."""

    def __init__(self, folder: Path) -> None:
        self.copies = Copies()
        self.folder = self.current = folder
        self.close = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        """Replace the present weights, no two of which share memory; None on ranks that write none."""
        before, self.current = self.current, self.folder / version
        if weights is None:
            return
        self.current.mkdir(parents=True)
        save_file(dict(weights), self.current / "model.safetensors")
        follow_umask(self.current)
        if before != self.folder:
            shutil.rmtree(before, ignore_errors=True)

    def send(self, call: Call, served: str) -> None:
        """Send the weights to the paused server, which has version `served` until then.

        Raises ServerFailure and ServerRefusal.
        """
        call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.current)}})


class NCCLSync:
    """Sends the weights from GPU to GPU, through vLLM's weight transfer.

    url: the server's address; workers: its processes with a GPU; device: this process's GPU; limit: seconds
    for connecting, and for one transfer. The weights wait in main memory. Each `send` after a failure,
    or to a server that has come back, makes a new connection.
    """

    def __init__(self, url: str, workers: int, device: str, limit: float) -> None:
        self.copies = Copies()
        self.url, self.workers, self.device, self.limit = url, workers, torch.device(device), limit
        self.weights: Mapping[str, Tensor] = {}
        self.version = self.sent = ""  # of these weights, and of those that the connected server took last
        self.engine: Any = None

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        self.weights, self.version = {} if weights is None else weights, version

    def send(self, call: Call, served: str) -> None:
        """Send the weights as `FolderSync.send` does."""
        if served != self.sent:  # the connection is to processes that have ended
            self.close()
        try:
            if self.engine is None:
                client = SyncClient(call)
                self.engine = self._bounded(client.transfer, lambda: self._connect(client))
            self.engine.client.transfer = transfer = Future()
            self._bounded(transfer, self.engine.send_weights)
        except BaseException as error:  # whatever it was, Ctrl-C too: half-used connections are of no use
            self.close()
            if isinstance(error, (OSError, RuntimeError)):  # NCCL raises the latter when one side is gone
                raise ServerFailure(f"the transfer of weights broke off: {error}") from error
            raise
        self.sent = self.version

    def _bounded(self, transfer: Future[Any], work: Callable[[], Any]) -> Any:
        """Return the result of `work`; raise what ends `transfer` first: its error, a route.s, or time.

        `work` runs in its own thread: NCCL waits forever for a server that has died, until `close` aborts it.
        """

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                settle(transfer, work())
            except BaseException as error:
                settle(transfer, error)

        threading.Thread(target=run, name="weights", daemon=True).start()
        try:
            return transfer.result(self.limit)
        except BaseException as error:
            if not transfer.done():
                settle(transfer, error)  # the server gets no more requests
                if isinstance(error, TimeoutError):
                    raise ServerFailure(f"it had not taken the weights after {self.limit:g} s") from error
            raise

    def _connect(self, client: SyncClient) -> Any:
        """Return vLLM's trainer-side engine, connected with all workers."""
        from vllm.distributed.weight_transfer import base  # pyright: ignore[reportMissingImports]
        from vllm.distributed.weight_transfer import nccl_engine as nccl  # pyright: ignore[reportMissingImports]

        sync = self

        def described(source: Any) -> list[Any]:
            return [base.ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in sync.weights.items()]

        class Present(base.WeightSource):
            # A property since vLLM 0.33, and `iter_full` in place of `__iter__`
            newer = hasattr(base.WeightSource, "iter_full")
            metadata: Any = cached_property(described) if newer else described  # pyright: ignore

            def iter_full(self) -> Iterator[tuple[str, Tensor]]:
                return ((name, tensor.to(sync.device)) for name, tensor in sync.weights.items())

            __iter__ = iter_full

        parts = urllib.parse.urlsplit(self.url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((parts.hostname, parts.port or 80))
            own_address = probe.getsockname()[0]  # as the server sees it
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        info = nccl.NCCLTrainerInitInfo(own_address, port, 1 + self.workers, rank=0)
        return nccl.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=Present())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


WeightSync = FolderSync | NCCLSync


class SyncClient:
    """Controls vLLM's weight transfer over the server's routes.

    transfer: the present operation; the first route that fails ends it, and then no other route is called.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.transfer: Future[Any] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        try:
            self.call("/start_weight_update")
        except (ServerFailure, ServerRefusal) as failure:
            if "already active" not in str(failure):
                raise
            self._post("/finish_weight_update", {"weight_version": None})  # of an update that broke off
            self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version})

    def _post(self, path: str, body: Any = None) -> None:
        if self.transfer.done():
            raise ServerFailure("the transfer of weights was given up")
        try:
            self.call(path, body)
        except BaseException as error:
            settle(self.transfer, error)
            raise


def settle(future: Future[Any], outcome: Any) -> None:
    """End `future` with a result or an exception, unless it has ended."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
