"""From a config to a record: build a network, train it, write down what came out."""

from decef.extras import need

need("train", "yaml", "tqdm", "torchvision", "sklearn", "PIL")
