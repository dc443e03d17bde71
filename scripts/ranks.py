"""Measure the effective ranks of any network by depth.

python scripts/ranks.py results/runs/<run id>                       # a run: its last checkpoint, or all it kept
                                                                    # (train with keep_checkpoints=6)
python scripts/ranks.py resnet20 --weights resnet20.th --out results/ranks/resnet20
python scripts/ranks.py timm/mobilenetv2_100 | torchvision/resnet18 [--pretrained]
"""

import argparse
from pathlib import Path

from cli import fail, output_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a run's folder, one of decef.models.MODELS, timm/<name> or torchvision/<name>")
    parser.add_argument("--weights", type=weights_file, help="trained weights; default: random initialisation")
    parser.add_argument("--pretrained", action="store_true", help="download timm's or torchvision's trained weights")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="a singular value counts from this share of the largest"
    )
    parser.add_argument(
        "--out",
        type=output_file,
        help="also write <out>.csv, .json, .png, .svg; for a run to count in claims, use its id",
    )
    arguments = parser.parse_args()

    import pandas as pd

    from decef.files import write_csv, write_json
    from decef.machine import environment
    from decef.models.weights import describe_file
    from decef.results.effective_ranks import rank_table
    from decef.results.plots import plot_ranks, save
    from decef.training.networks import check_finished, load_networks
    from decef.training.record import CONFIG

    try:
        if arguments.out and Path(arguments.network, CONFIG).is_file():
            check_finished(Path(arguments.network))
        networks = load_networks(arguments.network, weights=arguments.weights, pretrained=arguments.pretrained)
        tables = {label: rank_table(model, arguments.threshold) for label, model in networks}
    except (ValueError, FileNotFoundError, ImportError) as error:
        fail(str(error))
    for label, table in tables.items():
        print(f"{label}: effective rank, mean over input channels; *_init: random kernels of the same shape")
        print(table.round(2).to_string(index=False))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        whole = [table.assign(network=label) for label, table in tables.items()]
        save(plot_ranks(tables, arguments.threshold), arguments.out)
        source = (
            describe_file(arguments.weights) if arguments.weights else "downloaded" if arguments.pretrained else None
        )
        network = Path(arguments.network).name if Path(arguments.network).is_dir() else arguments.network
        made = {"network": network, "weights": source, "threshold": arguments.threshold}
        made |= environment("cpu")
        write_json(Path(f"{arguments.out}.json"), made)
        write_csv(Path(f"{arguments.out}.csv"), pd.concat(whole))  # last: where it is, all is
        print(f"wrote {arguments.out}.csv, .json (what it was made from), .png and .svg")


if __name__ == "__main__":
    main()
