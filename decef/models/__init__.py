"""Networks by name."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from decef.data.torchvision_cpu import import_torchvision
from decef.extras import need
from decef.models.mobilenet import MobileNetV1, MobileNetV2
from decef.models.plain import PlainNet
from decef.models.published import CPACNet, Rank1Net
from decef.models.resnet_cifar import CifarResNet
from decef.models.vgg import CifarVGG16

#: Every network of this package by name. Configs and records leave out options that are off, so every option must be
#: off by default.
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16_bn": CifarVGG16,
    "mobilenetv1": MobileNetV1,
    "mobilenetv2": MobileNetV2,
    "plain": PlainNet,
    "cpacnet": CPACNet,
    "rank1net": Rank1Net,
}


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """A dense network by name, freshly initialised unless `pretrained`.

    Args:
        name: a key of `MODELS`, `timm/<name>`, `torchvision/<name>`, or `<module>:<function>` for a function that gives
            a network and takes no arguments but `options`.
        num_classes: number of outputs.
        in_channels: channels of the image.
        image_size: height and width in pixels, for networks whose fully connected layers depend on them.
        pretrained: let timm or torchvision download trained weights.
        **options: options of this network.

    Raises:
        ValueError: there is no such network, or it doesn't take these arguments.
        ImportError: timm or torchvision is needed and not installed.
    """
    if ":" in name:
        if pretrained:
            raise ValueError(f"there are no trained weights of '{name}' to download: load them in the function")
        return _own(name, options)
    library, _, rest = name.partition("/")
    if rest and library in ("timm", "torchvision"):
        if options:
            raise ValueError(f"{name} has no option {', '.join(options)}")
        make = _timm if library == "timm" else _torchvision
        return make(rest, num_classes, in_channels, pretrained)
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1)
        hint = f"did you mean '{near[0]}'? There are" if near else "there are"
        raise ValueError(f"unknown model '{name}': {hint} {', '.join(MODELS)}, timm/<name> and torchvision/<name>")
    if pretrained:
        raise ValueError(f"there are no trained weights of '{name}' to download: give a file")
    known = inspect.signature(MODELS[name]).parameters
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"model '{name}' has no option {', '.join(unknown)}")
    width = options.get("width")
    if width is not None and not 0 < width < math.inf:
        raise ValueError(f"model '{name}': width={width} must be a number above 0")
    if image_size is not None and "image_size" in known:
        options["image_size"] = image_size
    return MODELS[name](num_classes=num_classes, in_channels=in_channels, **options)


def stem_name(model: nn.Module) -> str:
    """Name of a network's first convolution.

    Raises:
        ValueError: it has none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name
    raise ValueError("the network has no convolution")


def source_file(name: str) -> Path | None:
    """The file that a network's own code is in, of one that is named `<module>:<function>`; else None.

    Raises:
        ValueError: there is no such function, or the file was changed after this process had imported it.
    """
    if ":" not in name:
        return None
    _own_function(name)
    module = sys.modules[name.partition(":")[0]]
    if not module.__file__:
        return None
    path = Path(module.__file__)
    if _imported.setdefault(module, path.read_bytes()) != path.read_bytes():
        raise ValueError(f"{path} was changed after it was imported: start again, with what it is now")
    return path


#: What was in the files of imported modules, as far as `source_file` was asked for them.
_imported: dict[ModuleType, bytes] = {}


def _own_function(name: str) -> Callable[..., object]:
    module_name, _, function = name.partition(":")
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: of a module as ./file
        raise ValueError(f"model '{name}' must be <module>:<function>, importable from here: {error}") from error
    return found


def _own(name: str, options: dict[str, Any]) -> nn.Module:
    function = _own_function(name)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{name} can't be called with the options of the model: {error}") from error
    network = function(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, not a {type(network).__name__}")
    return network


def _timm(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    import_torchvision()
    need("train", "timm")
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(f"timm has no model '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)


def _torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        near = get_close_matches(name, names, n=1)
        raise ValueError(f"torchvision has no classifier '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    if in_channels != 3:
        raise ValueError(f"torchvision/{name} takes images of 3 channels, not {in_channels}: timm's take any number")
    if pretrained:
        trained = len(models.get_model_weights(name).DEFAULT.meta["categories"])
        if num_classes != trained:
            raise ValueError(
                f"the trained weights of torchvision/{name} are for {trained} classes, not {num_classes}: take a "
                "network of timm instead, whose classifier is then replaced"
            )
        return models.get_model(name, weights="DEFAULT")
    # Two have further classifiers in training, whose output nobody here takes; trained ones come without.
    heads = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=num_classes, **heads)


__all__ = ["MODELS", "CifarResNet", "PlainNet", "create_model", "stem_name"]
