"""What the scripts share: above all, checking Hydra arguments before anything slow is imported or run."""

from __future__ import annotations

import difflib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from decef.training.config import RunConfig

sys.path.append(str(Path.cwd()))  # for networks of one's own, <module>:<function>
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LIBRARIES = ("timm", "torchvision")  # whose models are named <library>/<name>


def fail(message: str) -> NoReturn:
    """Say what is wrong in one sentence and exit with status 2."""
    print("error:", *message.split(), file=sys.stderr)  # what torch and Hydra say has several lines
    sys.exit(2)


def weights_file(name: str) -> Path:
    """For argparse: the file that `find_weights` finds, else exit with status 2."""
    from decef.models.weights import find_weights

    try:
        return find_weights(name)
    except FileNotFoundError as error:
        fail(str(error))


def output_file(name: str) -> Path:
    """For argparse: the path of a file, or the beginning of one, that can be written, else exit with status 2."""
    path = Path(name)
    output_folder(str(path.absolute().parent))
    return path


def output_folder(name: str) -> Path:
    """For argparse: a folder that can be written to or made, else exit with status 2. Nothing is made yet."""
    path = Path(name)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        fail(f"nothing can be written to {path}: {there}: {error.strerror}")


def expand(arguments: list[str]) -> list[str]:
    """Rewrite arguments that Hydra doesn't understand.

    `model=timm/<name>` becomes `model=timm model.name=timm/<name>`; torchvision likewise. `model=<module>:<function>`
    becomes `model=own model.name=<module>:<function>`. Each may be several, with commas between. `layer.name=<name>`,
    which W&B sweeps use, becomes `layer=<name>`, so that the layer type comes with its own options.
    """
    expanded = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        library, slash, _ = value.partition("/")
        if key == "layer.name":
            expanded.append(f"layer={value}")
        elif key == "model" and ":" in value:
            if not all(":" in name for name in value.split(",")):
                fail(f"{argument} mixes networks of your own with others: run one sweep for each")
            names = ",".join(f'"{name}"' for name in value.split(","))
            expanded += ["model=own", f"model.name={names}"]
        elif key != "model" or not slash or library not in LIBRARIES:
            expanded.append(argument)
        elif all(name.startswith(f"{library}/") for name in value.split(",")):
            expanded += [f"model={library}", f"model.name={value}"]
        else:
            fail(f"{argument} mixes models of {library} with others: run one sweep for each")
    return expanded


def check_arguments(arguments: list[str], config: str = "train") -> None:
    """Exit with status 2 if an override of a config names a key, or a choice of a group, that doesn't exist.

    Every choice of a sweep is checked, so that a typo in the last one shows before the first one runs.
    """
    given = [a for a in arguments if "=" in a and not a.startswith(("-", "hydra"))]
    for before, word in pairwise(["", *arguments]):
        if not re.search("=|^[-~]", word) and not before.startswith("-"):  # after an option: its value, as --cfg job
            fail(f"{word} is no setting: those are given as key=value, such as layer=decef; --help lists them")
    try:
        overrides = OverridesParser.create(_loader()).parse_overrides(given)
    except HydraException as error:
        fail(f"cannot read the arguments: {error}")
    groups = _groups(config)
    first, others = [], []
    for position, override in enumerate(overrides):
        key, text = override.get_key_element(), str(override.input_line)
        try:
            values = [*override.sweep_string_iterator()] if override.is_sweep_override() else [text.partition("=")[2]]
        except HydraException as error:
            fail(f"{text} can't be swept here: {error}")
        if not values:
            fail(f"{text} gives no value")
        if override.key_or_group == "results" and override.is_sweep_override():
            fail(f"{text} may give several folders: say one")
        if len(values) > 1 and not {"-m", "--multirun"} & set(arguments):
            fail(f"{text} gives several values: {'add -m to run them all' if config == 'train' else 'say one'}")
        if key in groups:
            _check_choices(key, values)
        first.append(f"{key}={values[0]}")
        if key in groups:  # which keys there are depends on the choice, but on no other value
            others += [(position, f"{key}={value}") for value in values[1:]]
    _check_keys(first, config, groups)
    for position, text in others:
        _check_keys([*first[:position], text, *first[position + 1 :]], config, groups)


def given_value(key: str, arguments: Sequence[str]) -> str | None:
    """The value that Hydra reads in the last `key=value`, quoted or not; None if there is none."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith(f"{key}=")]
    return str(OverridesParser.create().parse_override(given[-1]).value()) if given else None


@contextmanager
def configs() -> Iterator[None]:
    """In which Hydra composes from `CONFIGS`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def _loader() -> ConfigLoader:
    """What finds the choices that `layer=glob(*)` stands for."""
    with configs():
        return GlobalHydra.instance().config_loader()


def _groups(config: str) -> list[str]:
    """The config groups that a config chooses from, by its defaults."""
    defaults = OmegaConf.load(CONFIGS / f"{config}.yaml").defaults
    return [str(key) for entry in defaults if OmegaConf.is_dict(entry) for key in entry if " " not in str(key)]


def _check_choices(group: str, values: list[str]) -> None:
    choices = sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))
    for value in values:
        if value not in choices and (group, value) != ("experiment", "null"):
            fail(f"there is no {group} '{value}'{_near(value, choices)}; there are {', '.join(choices)}")


def run_config(overrides: Sequence[str]) -> RunConfig:
    """The config that scripts/train.py makes from overrides.

    Raises:
        ValueError: an override is wrong.
        InputError: see `RunConfig.from_dict`.
    """
    from decef.training.config import RunConfig

    with configs():
        try:
            composed = compose("train", overrides=expand(list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        return RunConfig.from_dict({**plain, "experiment": None})


def _check_keys(overrides: list[str], config: str, groups: Sequence[str]) -> None:
    with configs():
        try:
            compose(config, overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            unknown = re.search(r"Could not override '([^']+)'", str(error))
            if unknown is None:
                fail(str(error))
            known = [o for o in overrides if o.lstrip("+").partition("=")[0] in groups]
            keys = _keys(compose(config, overrides=known))
            fail(f"there is no key '{unknown[1]}'{_near(unknown[1], keys)}")


def _keys(cfg: DictConfig) -> list[str]:
    keys = []
    for key in map(str, cfg):
        nested = _keys(cfg[key]) if OmegaConf.is_dict(cfg[key]) else []
        keys += [key, *(f"{key}.{k}" for k in nested)]
    return keys


def _near(word: str, known: list[str]) -> str:
    inner = [key for key in known if key.rpartition(".")[2] == word]  # rank=4 for layer.rank=4
    close = inner or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
