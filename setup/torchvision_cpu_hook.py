"""Lets a torchvision that was built for CUDA import beside a CPU-only torch.

Such a torchvision carries a compiled library that cannot load there; its Python code then registers fake
kernels for operators that nobody has defined, and the import fails with "operator torchvision::nms does not
exist". This hook defines the two operators' schemas just before torchvision is first imported. Their kernels
stay absent: the package uses torchvision's resizing alone. `setup/install.sh` puts this file into the virtual
environment, with a `.pth` line that loads it, only where the import fails without it.
"""

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class OperatorsBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds no module: it is here to be asked when torchvision is about to be imported."""

    library = None  # the registration lasts as long as this object

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                type(self).library = torch.library.Library("torchvision", "DEF")
                for schema in SCHEMAS:
                    type(self).library.define(schema)
        return None


sys.meta_path.insert(0, OperatorsBeforeTorchvision())
