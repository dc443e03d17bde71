"""Time layers, whole networks and training, each beside its dense counterpart in the same run.

python scripts/bench.py layers networks operators training --out results/bench      (all four: make bench)
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cli import fail, output_folder

WHAT = ("layers", "networks", "operators", "training")
SHARE = 0.5  # of the FLOPs; the pages of another one have it in their names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"any of {', '.join(WHAT)}; default: all")
    parser.add_argument(
        "--out",
        type=output_folder,
        default=Path("results/bench"),
        help="folder for <what>-<device>[-<share>].json, .md",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="for the layers benchmark")
    parser.add_argument("--share", type=float, default=SHARE, help=f"share of the dense FLOPs (default {SHARE:g})")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes for the layers benchmark (default 1 8)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wrong = set(arguments.what) - set(WHAT)
    if wrong:
        fail(f"there is no benchmark {', '.join(sorted(wrong))}; there are {', '.join(WHAT)}")
    if arguments.dtype != "float32" and arguments.what != ["layers"]:
        fail(f"--dtype {arguments.dtype} is for the benchmark layers alone")
    if arguments.batches and arguments.what and "layers" not in arguments.what:
        fail("--batches is for the benchmark layers")
    if not 0 < arguments.share <= 1:
        fail(f"--share {arguments.share:g} must be above 0 and at most 1")

    import torch

    from decef.inference.engines import available, check_engine
    from decef.machine import device_name, environment
    from decef.plans import AUTO_TYPES
    from decef.results import bench_inference, bench_layers, bench_operators, bench_training
    from decef.results.pages import collect
    from decef.training.precision import resolve_precision
    from decef.training.run import find_device

    try:
        device = find_device(arguments.device)
        if "operators" in arguments.what:
            check_engine("onnxruntime", torch.empty(0, device=device))
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    machine = environment(device_name(device)) | {"share": arguments.share}
    precisions = {"layers": arguments.dtype, "training": resolve_precision(device, "auto")}
    suffix = str(device) + ("" if arguments.dtype == "float32" else f"-{arguments.dtype}")
    suffix += "" if arguments.share == SHARE else f"-{arguments.share:g}"
    share, dtype = arguments.share, getattr(torch, arguments.dtype)
    measure: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "layers": lambda: bench_layers.bench_layers(AUTO_TYPES, share, arguments.batches or [1, 8], device, dtype),
        "networks": lambda: bench_inference.bench_inference(bench_inference.INFERENCE, share, device),
        "operators": lambda: bench_operators.bench_operators(bench_operators.OPERATORS, share),
        "training": lambda: bench_training.bench_steps(bench_training.TRAINING, share, device),
    }
    write: dict[str, Callable[..., None]] = {
        "layers": bench_layers.write_layers,
        "networks": bench_inference.write_inference,
        "operators": bench_operators.write_operators,
        "training": lambda rows, *to: bench_training.write_training(rows, bench_training.bench_loops(device), *to),
    }
    can_profile = "onnxruntime" in available(device)
    for what in arguments.what or [what for what in WHAT if what != "operators" or can_profile]:
        out = arguments.out / f"{what}-{suffix}"
        try:
            rows = collect(measure[what](), out, lambda row: print(_words(row), flush=True))
        except ValueError as error:
            fail(f"{what}: {error}")
        write[what](rows, out, machine | {"dtype": precisions.get(what, "several precisions")})
        print(f"wrote {out}.json and .md")


def _words(row: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if key != "candidates")


if __name__ == "__main__":
    main()
