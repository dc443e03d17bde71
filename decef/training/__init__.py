"""From a config to a record: build a network, train it, write down the results."""

from decef.extras import need

need("train", "yaml", "tqdm", "torchvision", "sklearn", "PIL")
