"""Count parameters and MACs of every architecture, dense and with each layer type at a share of its FLOPs.

python scripts/costs.py --out results/costs --page docs/layers.md
"""

import argparse
from pathlib import Path

from cli import fail, output_file, run_config

CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg16_bn", "mobilenetv1", "mobilenetv2")
IMAGENET = ("resnet18", "resnet34", "resnet50", "vgg16_imagenet", "vgg16_bn_imagenet", "mobilenetv1_imagenet",
            "mobilenetv2_imagenet")  # fmt: skip
#: Networks that are also counted with dense_pairs: dense convolutions, which the layer types can then make cheaper.
PAIRS = ("mobilenetv1", "mobilenetv2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=0.667, help="share of the dense network's FLOPs (default 0.667)")
    parser.add_argument("--out", type=output_file, required=True, help="writes <out>.csv and <out>.md")
    parser.add_argument("--page", type=Path, help="also put the table between this file's <!-- costs --> lines")
    arguments = parser.parse_args()

    from decef.data import dataset
    from decef.layers import LAYERS
    from decef.results.costs import cost_table, write_costs
    from decef.results.pages import replace_between

    if not 0 < arguments.flops <= 1:
        fail(f"--flops {arguments.flops:g} is not a share: it must be above 0 and at most 1")
    if arguments.page and not arguments.page.is_file():
        fail(f"there is no page {arguments.page}")
    imagenet = dataset("imagenet", size=224, num_classes=1000)
    networks = []
    for names, data in ((CIFAR, dataset("cifar10")), (IMAGENET, imagenet)):
        for name in names:
            networks.append((name, run_config([f"model={name}"]).model, data))
            if name in PAIRS:
                pairs_dense = run_config([f"model={name}", "model.dense_pairs=true"]).model
                networks.append((f"{name}, pairs dense", pairs_dense, data))
    rows = []
    for row in cost_table(networks, list(LAYERS), arguments.flops):
        rows.append(row)
        print(*row.values(), flush=True)
    table = write_costs(rows, arguments.out, arguments.flops)
    if arguments.page:
        try:
            replace_between(arguments.page, "costs", table)
        except (ValueError, OSError) as error:
            fail(str(error))
    print(f"wrote {arguments.out}.csv and .md")


if __name__ == "__main__":
    main()
