"""From a config to a record: build a network, train it, write down what came out."""
