"""How trained weights reach a server: through a folder that both see, or from GPU to GPU.

Both keep the present weights, so that a server that comes back can be handed them again.
"""

from __future__ import annotations

import shutil
import socket
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from video_r1.files import follow_umask
from video_r1.rollout.http_client import ServerFailure

Call = Callable[..., Any]
"""Posts to the server: `call(path, body=None)` returns its answer."""


class Copies:
    """Copies of weights by name, in memory that later copies use again: that of the weights' own GPU or the
    host's, which is pinned where a GPU fills it.
    """

    def __init__(self, on_host: bool) -> None:
        self.on_host = on_host
        self.memory: dict[str, Tensor] = {}

    def take(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights, contiguous and in this number format; they replace those of the call before."""
        for name, tensor in weights:
            if name not in self.memory:
                device = "cpu" if self.on_host else tensor.device
                pinned = self.on_host and tensor.is_cuda
                self.memory[name] = torch.empty(tensor.shape, dtype=dtype, device=device, pin_memory=pinned)
            self.memory[name].copy_(tensor.to(dtype), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self.memory)


class FolderHandOver:
    """Writes a checkpoint's weights into `folder`, which the server sees under the same path."""

    def __init__(self, folder: Path) -> None:
        self.copies = Copies(on_host=True)
        self.folder = folder
        self.close = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.current = folder

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        """The weights from now on, no two of which share memory; None where only the version is named."""
        before, self.current = self.current, self.folder / version
        if weights is None:
            return
        self.current.mkdir(parents=True)
        save_file(dict(weights), self.current / "model.safetensors")
        follow_umask(self.current)
        if before != self.folder:
            shutil.rmtree(before, ignore_errors=True)

    def send(self, call: Call) -> None:
        """Gives them to the server, which is paused. Raises ServerFailure and ServerRefusal."""
        kwargs = {"weights_path": str(self.current)}
        call("/collective_rpc", {"method": "take_weights", "kwargs": kwargs})


class NCCLHandOver:
    """Sends the weights from GPU to GPU, through vLLM's weight transfer.

    url: the server's address; workers: its processes with a GPU. The present weights stay on this process's
    GPU, in the server's number format. Each `send` after a failure makes a new connection.
    """

    def __init__(self, url: str, workers: int, device: str = "cuda") -> None:
        self.copies = Copies(on_host=False)
        self.url, self.workers, self.device = url, workers, device
        self.weights: Mapping[str, Tensor] = {}
        self.engine: Any = None

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        self.weights = {} if weights is None else weights

    def send(self, call: Call) -> None:
        try:
            if self.engine is None:
                self.engine = self.connect(call)
            self.engine.send_weights()
        except BaseException as error:  # whatever it was, Ctrl-C too: half-used connections are of no use
            self.close()
            if isinstance(error, (OSError, RuntimeError)):  # NCCL says with the latter that one side is gone
                raise ServerFailure(f"the transfer of weights broke off: {error}") from error
            raise

    def connect(self, call: Call) -> Any:
        """vLLM's engine of the trainer's side, connected with all workers."""
        from vllm.distributed.weight_transfer import base  # pyright: ignore[reportMissingImports]
        from vllm.distributed.weight_transfer import nccl_engine as nccl  # pyright: ignore[reportMissingImports]

        hand_over = self

        class Present(base.WeightSource):
            """The weights of the moment."""

            def metadata(self) -> list[Any]:
                weights = hand_over.weights.items()
                return [base.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for name, tensor in hand_over.weights.items():
                    yield name, tensor.to(hand_over.device)

        info = nccl.NCCLTrainerInitInfo(local_address(self.url), free_port(), 1 + self.workers, rank=0)
        engine = nccl.NCCLTrainerWeightTransferEngine
        return engine.trainer_init(info, client=SyncClient(call), source=Present())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


HandOver = FolderHandOver | NCCLHandOver


class SyncClient:
    """vLLM's control of a weight transfer, over the server's routes."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.call("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("/finish_weight_update", {"weight_version": weight_version})


def local_address(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
