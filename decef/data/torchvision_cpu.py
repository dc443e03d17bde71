"""Import torchvision beside a CPU build of torch for which its compiled operators cannot be loaded.

A torchvision wheel linked to CUDA installs beside a CPU torch, but its library of compiled operators does not load,
and `import torchvision` then fails since it describes two operators that nobody has declared. Declaring them is
enough for datasets, transforms, models and feature extraction; the operators themselves (`nms`, `roi_align`, the
image codecs) stay unavailable and are not used here. Ordinary installs never get to this.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from decef.extras import need

_declared: list[object] = []  # a torch.library.Library undoes its declarations when it is collected


def import_torchvision() -> ModuleType:
    """`import torchvision`, with the missing operators declared when that is what stops it.

    Raises:
        ImportError: it is not installed.
    """
    need("train", "torchvision")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
