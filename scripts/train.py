"""Train one network: python scripts/train.py layer=decef layer.rank=4 (see configs/, or --help)."""

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    import logging
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from decef.run import run
    run(OmegaConf.to_container(cfg, resolve=True))


if __name__ == "__main__":
    main()
