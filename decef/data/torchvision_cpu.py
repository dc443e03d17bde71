"""Import torchvision even if its compiled operators cannot be loaded.

A CUDA build of torchvision can be installed with a CPU build of torch, but its library of compiled operators then does
not load. `import torchvision` fails, because it describes two operators that nobody has declared. Declaring them is
enough for datasets, transforms, models and feature extraction. The operators themselves (`nms`, `roi_align`, the image
codecs) stay unavailable and are not used here. Ordinary installations are not affected.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from decef.extras import need

_declared: list[object] = []  # kept, because a torch.library.Library undoes its declarations when it is collected


def import_torchvision() -> ModuleType:
    """Import torchvision; if only the missing operators stop that, declare them first.

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
