"""Accuracy against measured time: a trained CIFAR-10 network, low-rank in every type, in fp32, 16 and 8 bits.

python scripts/frontier.py resnet20 --weights resnet20-12fca82f.th --out results/frontier/resnet20

Released networks (results/networks) of runs that fine-tuned these weights are measured too.
"""

import argparse
import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cli import fail, output_file, weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a name in decef.models.MODELS")
    parser.add_argument("--weights", type=weights_file, required=True, help="file with its trained weights")
    parser.add_argument("--layers", nargs="+", help="layer types; default: all that auto chooses from, and auto")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.667, 0.833], help="of the FLOPs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with these runs and networks")
    parser.add_argument("--schedule", default="recover", help="of the runs to measure (default recover)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--batch", type=int, default=32, help="images in the call that is timed (default 32)")
    parser.add_argument("--images", type=int, default=512, help="training images to fit outputs on (default 512)")
    parser.add_argument("--mean", type=float, nargs=3, help="per channel, as the network expects; default: ImageNet's")
    parser.add_argument("--std", type=float, nargs=3, help="likewise")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; default: $DECEF_DATA, data/")
    parser.add_argument("--out", type=output_file, required=True, help="writes <out>.csv and <out>.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from decef.data import IMAGENET_MEAN, IMAGENET_STD, dataset
    from decef.data.subsets import stratified_subset
    from decef.inference.engines import check_precision
    from decef.machine import environment
    from decef.models import stem_name
    from decef.models.weights import describe_file, md5_of
    from decef.plans import AUTO, AUTO_TYPES
    from decef.results.frontier import decomposed, finetuned, measure, write_frontier
    from decef.results.pages import collect
    from decef.training.networks import load_network

    layers = arguments.layers or [*AUTO_TYPES, AUTO]
    made = environment("cpu")  # now, as the code on disk may change during the run

    def show(row: Mapping[str, Any]) -> None:
        words = " ".join(f"{row[key]:10}" for key in ("layer", "budget", "stage", "precision"))
        print(f"{words} top-1 {row['top1']:.2f}, time {row['time']:.3f}", flush=True)

    try:
        for precision in arguments.precisions:
            check_precision(precision)
        model = load_network(arguments.network, weights=arguments.weights)
        mean, std = arguments.mean or IMAGENET_MEAN, arguments.std or IMAGENET_STD
        train, test = dataset("cifar10", mean=mean, std=std).load(arguments.data, crop_padding=4, flip=True)
        seen = stratified_subset(train, arguments.images)
        points = chain(
            decomposed(model, layers, arguments.shares, exclude=stem_name(model), seen=seen, augmented=train),
            finetuned(arguments.results, arguments.network, md5_of(arguments.weights), arguments.schedule, mean, std),
        )
        measured = measure(
            model, points, test, seen, batch=arguments.batch, precisions=arguments.precisions, progress=True
        )
        rows = collect(measured, arguments.out, show)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    weights = describe_file(arguments.weights)
    about = f"{arguments.network} on CIFAR-10, weights: {weights}, batches of {arguments.batch}"
    write_frontier(rows, arguments.out, about, made)
    print(f"wrote {arguments.out}.csv and .md")


if __name__ == "__main__":
    main()
