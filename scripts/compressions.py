"""Put several compressions of one network side by side in a table.

for layer in auto decef basisconv cpac rank1; do python scripts/compress.py layer=$layer out=small/$layer ...; done
python scripts/compressions.py small/* --about "ResNet-56 on CIFAR-10" --out results/compress/resnet56
"""

import argparse
from pathlib import Path

from cli import fail, output_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what scripts/compress.py wrote (its out=)")
    parser.add_argument("--about", required=True, help="network and data, in words")
    parser.add_argument("--out", type=output_file, required=True, help="writes <out>.csv and <out>.md")
    arguments = parser.parse_args()

    from decef.results.compressions import write_compressions

    try:
        write_compressions(arguments.folders, arguments.out, arguments.about)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    print(f"wrote {arguments.out}.csv and .md")


if __name__ == "__main__":
    main()
