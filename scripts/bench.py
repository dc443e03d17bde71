"""Time every layer type on the shapes of well-known networks, against the dense convolution in the same run.

python scripts/bench.py --out results/bench/layers-cpu
"""

import argparse
from pathlib import Path

from cli import fail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="writes <out>.json and <out>.md")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 2], help="shares of the dense layer's FLOPs")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images")
    parser.add_argument("--layers", nargs="+", default=["decef", "basisconv", "cpac", "rank1"])
    arguments = parser.parse_args()

    import torch

    from decef.bench import bench_layers, write_bench
    from decef.convert import layer_type

    try:
        for layer in arguments.layers:
            layer_type(layer)
        device = torch.device(arguments.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU: say --device cpu")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    rows = []
    for row in bench_layers(arguments.layers, arguments.shares, arguments.batches, device):
        rows.append(row)
        ratios = {name: row[name] / row["dense"] for name in ("factorized", "reconstructed")}
        print(
            f"{row['shape']:38} {row['layer']:10} batch {row['batch']:3} {row['pass']:9}",
            f"FLOPs x{row['flops_ratio']:.2f}",
            *(f"{name} x{ratio:.2f}" for name, ratio in ratios.items()),
            f"auto: {row['auto']}",
            flush=True,
        )
        write_bench(rows, arguments.out, arguments.device)  # after every row: nothing measured is lost
    print(f"wrote {arguments.out}.json and .md")


if __name__ == "__main__":
    main()
