"""Export a trained network for another engine, check it there, and time it beside torch.

python scripts/export.py results/runs/ID --out network.onnx          (ONNX; network.pt2: torch.export)
python scripts/export.py resnet20 --weights resnet20-12fca82f.th --plan plan.yaml --out network.onnx
python scripts/export.py mypackage.nets:make_net --weights FILE --size 3 64 64 --out network.onnx
python scripts/export.py small/network.safetensors --form factorized --out network.onnx      (of compress.py; as small)
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

from cli import fail, output_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "network",
        help="a run's folder, a file of compress.py, or a name: of a released network, or as above",
    )
    parser.add_argument("--out", type=output_file, required=True, help="file to write, .onnx or .pt2")
    parser.add_argument("--weights", type=weights_file, help="file with trained weights, for a network given by name")
    parser.add_argument("--pretrained", action="store_true", help="download timm's or torchvision's trained weights")
    parser.add_argument("--plan", type=Path, help="first convert by this plan (from decef.Plan.save)")
    parser.add_argument("--size", type=int, nargs=3, metavar=("C", "H", "W"), help="input size; default: the network's")
    parser.add_argument("--batch", type=int, default=1, help="batch size to optimise for (default 1)")
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="FILE",
        help="compute in 8 bits, calibrated on the normalised images (N, C, H, W) that torch.save wrote to this file",
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="leave the batch size free")
    parser.add_argument(
        "--form", default="fastest", help="of layers: fastest, reconstructed, factorized, branches, wide or aligned"
    )
    arguments = parser.parse_args()
    if arguments.int8 and arguments.out.suffix == ".pt2":
        fail("--int8 is for .onnx files")

    from decef.conversion import convert
    from decef.inference.export import check_export, export
    from decef.plans import Plan
    from decef.training.networks import input_size_of, load_network

    try:
        size = tuple(arguments.size or input_size_of(arguments.network))
        calibration = _images(arguments.int8) if arguments.int8 else None
        check_export(arguments.out, (arguments.batch, *size), arguments.form, calibration)
        model = load_network(
            arguments.network, weights=arguments.weights, pretrained=arguments.pretrained, input_size=size, trained=True
        )
        if arguments.plan:
            model = convert(model, Plan.load(arguments.plan))
        for line in export(
            model,
            arguments.out,
            (arguments.batch, *size),
            form=arguments.form,
            calibration=calibration,
            dynamic_batch=arguments.dynamic_batch,
            progress=True,
        ):
            print(line, flush=True)
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(str(error))


def _images(path: Path) -> Any:
    import torch

    try:
        images = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no file of torch.save, or not of a tensor") from error
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{path} must hold a tensor (N, C, H, W), not {type(images).__name__}")
    return images


if __name__ == "__main__":
    main()
