"""From a trained network and a budget to a small network: plan, convert, recalibrate, fine-tune, deploy, export."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from decef.compression.budgets import AnyBudget, Memory, Milliseconds, Size, words
from decef.compression.finetune import (
    Loader,
    batches,
    check_labels,
    check_trainable,
    count_batches,
    finetune,
    head_size,
    step_seconds,
)
from decef.compression.finetune import top1 as measure_top1
from decef.compression.loaders import TestBatches
from decef.compression.reach import Planner, memory_bytes, seconds_beside, time_share
from decef.compression.report import write_report
from decef.compression.state import CHECKPOINT, FILES, FORMS, PLAN, REPORT, State, digest
from decef.conversion import convert, recalibrate
from decef.copies import copied
from decef.costs import input_shapes, module_flops, total_cost
from decef.inference.deploy import Deployed, Deployer, deploy
from decef.inference.engines import available, check_engine
from decef.inference.export import export
from decef.inference.memory import stored_bytes
from decef.inputs import forked_generator, takes_channels_last
from decef.machine import device_name, environment
from decef.models.released import NETWORK, Card, save
from decef.plans import AUTO, Plan, layer_type
from decef.ranks import Budget, Latency
from decef.sites import check_patterns, find_sites, listed
from decef.training.checkpoint import load_checkpoint, save_checkpoint
from decef.training.config import MAX_SEED, TrainConfig
from decef.training.config.checks import is_whole

log = logging.getLogger(__name__)

CHANCE = 5.0  # points of accuracy: a network that is no better than this over chance is warned of


@dataclass
class Compressed:
    """What a compression gave.

    Attributes:
        network: the small network, fine-tuned, in evaluation mode; its factors can be trained on.
        plan: which layers it has.
        deployed: the same network as it runs fastest here.
        numbers: what was measured, as in `report.json`; without a folder its "files" are empty.
        folder: what was written, or None.
    """

    network: nn.Module
    plan: Plan
    deployed: Deployed
    numbers: dict[str, Any]
    folder: Path | None


def compress(model: nn.Module, data: Loader, **arguments: Any) -> Compressed:
    """Shrink a trained classifier to a budget, and fine-tune it; `progress=True` shows how far it is.

    The arguments, among them `budget`, `layer`, `finetune`, `test` and `out`, are those of `Compression`.
    """
    return Compression(model, data, **arguments).run()


class Compression:
    """The steps from a trained network to a small one. What is done is kept in a folder, and not done again.

    Args:
        model: a trained network that gives logits `(B, classes)`, on the device to work on; it does not change.
        data: training images, normalised as the network expects, in batches (images, labels). It is iterated several
            times, so it must end; one without a length is iterated once more, to count its batches.
        budget: what the small network may cost: `decef.ranks.Budget` (FLOPs or parameters), `decef.ranks.Latency` (a
            share of the dense network's time), or one of `decef.compression`: `Milliseconds`, `Memory`, `Size`.
        layer: a layer type, or "auto": the best for every convolution.
        finetune: epochs of fine-tuning; 0 for none.
        lr: the learning rate of its first step, from which it falls to 0 as half a cosine.
        test: images that accuracy is measured on, in batches like `data`; None: it isn't measured. Costs, time and
            files are for inputs of their size, which may be another than in training; without them, of that of `data`.
        images: how many training images the decomposition is fitted to.
        batch_size: number of images in a call that should be fast.
        include, exclude: names of convolutions, see `decef.plan`.
        engine: that the network should be fast in, of `decef.inference.engines.ENGINES`; None is onnxruntime where that
            is installed and runs the network, else eager.
        seed: of the order in which a loader that shuffles yields images: to the decomposition, to batch norm and to the
            fine-tuning.
        out: folder for everything that is made; None: nothing is kept.
        card: the network's name and normalisation, for its file.
        progress: show progress bars.

    Raises:
        ValueError: an argument is wrong, the data don't fit the network, or `out` holds another compression.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Loader,
        *,
        budget: AnyBudget,
        layer: str = AUTO,
        finetune: int = 3,
        lr: float = 0.01,
        test: Loader | None = None,
        images: int = 512,
        batch_size: int = 1,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        engine: str | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        card: Card | None = None,
        progress: bool = False,
    ) -> None:
        _check_budget_and_layer(budget, layer)
        _check_numbers(finetune=finetune, images=images, batch_size=batch_size, seed=seed)
        _check_network(model)
        for given in (data, test):
            if isinstance(given, Iterator):
                raise ValueError("the data can be iterated once only: give a list or a DataLoader")
        self._model, self._data, self._test = copied(model).eval(), data, test
        self._budget, self._layer, self._images, self._seed, self._progress = budget, layer, images, seed, progress
        self._include, self._exclude = listed(include), listed(exclude)
        check_patterns(find_sites(self._model, None)[0], [*(self._include or ()), *(self._exclude or ())])
        try:
            self._train = TrainConfig("finetune", max(1, finetune), 1, lr, schedule="cosine", warmup=0.0)
        except ValueError as error:
            raise ValueError(str(error).replace("train.", "")) from error
        self._epochs = finetune
        self._first = next(batches(data))[0]
        self._classes, self._batches = head_size(self._model, self._first), count_batches(data)
        if finetune:
            check_trainable(self._model, self._first)
        used = [next(batches(given, self._classes))[0] for given in (data, test) if given is not None]
        x = used[-1][:1].to(next(model.parameters()).device)
        self._x = x.expand(batch_size, *x.shape[1:]).contiguous()
        channels, height, width = x.shape[1:]
        self._input_size = (channels, height, width)
        input_shapes(self._model, self._input_size)  # every budget will need them
        self._dense = self._deployed_dense(engine)
        self._engine = self._dense.engine
        self._card = card or Card(NETWORK, "", self._input_size, self._classes)
        asked = {
            "network": _fingerprint(self._model),
            "layer": layer,
            "budget": words(budget),
            "finetune": finetune,
            "lr": lr,
            "images": images,
            "batch_size": batch_size,
            "include": self._include,
            "exclude": self._exclude,
            "engine": self._engine,
            "seed": seed,
            "data": self._data_words(),
            "input_size": list(self._input_size),
            "test": None if test is None else self._test_words(test),
        }
        if isinstance(budget, (Latency, Milliseconds)):
            asked |= {"threads": torch.get_num_threads(), "device": str(self._x.device)}
        self._kept = None if out is None else Path(out)
        self._folder = Path(tempfile.mkdtemp()) if self._kept is None else self._kept
        if self._kept is None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._lock = FileLock(self._folder / ".lock", timeout=0)
        self._state = State(self._folder, asked)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others out of the folder while this lasts, and see what is done in it; it may be nested."""
        self._folder.mkdir(parents=True, exist_ok=True)
        nested = self._lock.is_locked
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"another process is at this compression: {self._folder}") from None
        try:
            if not nested:
                self._state.begin()
            yield
        finally:
            self._lock.release()

    def plan(self) -> Plan:
        """The plan that meets the budget, by measurement where the budget is one of time or memory.

        Raises:
            ValueError: the budget can't be met, and the message says what can; or another process is at it.
        """
        path = self._folder / PLAN
        with self._alone():
            if "reached" not in self._state:
                if self._test is not None and "dense" not in self._accuracies():
                    self._note_top1("dense", self._model)
                    self._warn_of_chance()
                with forked_generator(self._x.device):
                    reached, deployed = self._planner().reach(self._budget)
                if deployed is not None:
                    deployed.save(self._folder / FORMS)
                reached.plan.save(path)
                self._state["planned"] = digest(reached.plan)
                self._state["reached"] = {"asked": reached.asked, "value": reached.value}
            return Plan.load(path)

    def _planner(self) -> Planner:
        where: dict[str, Any] = {"include": self._include, "exclude": self._exclude, "progress": self._progress}
        return Planner(self._model, self._x, self._layer, self._dense, **where)

    def estimate(self) -> float:
        """Seconds that fine-tuning would take here, from three of its steps on a copy."""
        if not self._epochs:
            return 0.0
        small = convert(self._model, self.plan(), from_scratch=True)
        return self._epochs * self._batches * step_seconds(small, self._data, self._training(small))

    def run(self) -> Compressed:
        """Do what is not done yet.

        Raises:
            ValueError: the budget can't be met, the data don't fit the network, or another process is at it.
            FloatingPointError: fine-tuning diverged. If that was in the first epoch, the same with a smaller `lr` goes
                on from the converted network.
            OSError: the folder can't be written to; what was done before is still there.
        """
        with self._alone(), forked_generator(self._x.device):
            return self._run(self.plan())

    def _run(self, made: Plan) -> Compressed:
        if not made.ranks:
            raise ValueError(f"{PLAN} converts nothing: there is nothing to do")
        network, saved = self._converted(made)
        if self._epochs:
            self._finetune(network, saved)
        network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        made = Plan.load(self._folder / PLAN)
        if self._epochs and self._test is not None:
            self._note_top1("finetuned", network)
        deployed = self._deployed(network)
        if self._kept is not None:
            self._write_files(network, made, deployed)
        numbers = self._numbers(network, made, deployed)
        if self._kept is not None:
            write_report(self._folder / REPORT, numbers, own=not self._card.model)
        return Compressed(network, made, deployed, numbers, self._kept)

    # What is asked

    def _data_words(self) -> str:
        known = " ".join(map(str, filter(None, (self._card.dataset, self._card.mean, self._card.std))))
        return f"{known} {self._batches} batches of {tuple(self._first.shape)}".strip()

    def _test_words(self, test: Loader) -> str:
        """How many test images there are of which class, in brief: what tells test sets apart in whatever order."""
        known = [test.labels] if isinstance(test, TestBatches) else (labels for _, labels in batches(test))
        counts = torch.zeros(self._classes, dtype=torch.int64)
        for labels in known:
            check_labels(labels, self._classes)
            counts += labels.cpu().bincount(minlength=self._classes)
        digest = hashlib.md5(counts.numpy().tobytes(), usedforsecurity=False).hexdigest()[:8]
        return f"{int(counts.sum())} images of classes {digest}"

    def _some_images(self) -> list[Tensor]:
        """The first so many images, in batches."""
        device, found, left = self._x.device, [], self._images
        with self._seeded():
            for images, _ in batches(self._data, self._classes):
                found.append(images[:left].to(device))
                left -= len(found[-1])
                if left <= 0:
                    break
        return found

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Let a loader that draws by torch's generator draw the same every time, and leave the generator as it was."""
        with forked_generator(self._x.device):
            torch.manual_seed(self._seed)
            yield

    # The network

    def _converted(self, made: Plan) -> tuple[nn.Module, dict[str, Any] | None]:
        """The network as the checkpoint has it, or newly converted and recalibrated."""
        saved = load_checkpoint(self._folder / CHECKPOINT) if (self._folder / CHECKPOINT).is_file() else None
        if saved is not None:
            network = convert(self._model, made, from_scratch=True)
            try:
                network.load_state_dict(saved["network"])
            except RuntimeError as error:
                raise ValueError(
                    f"{PLAN} was changed after the network was converted by it: put back what it was, or remove "
                    f"{self._folder / CHECKPOINT} to convert anew"
                ) from error
            return network, saved["training"]
        # What was measured of a network that was converted before doesn't hold for this one.
        self._state["top1"] = {step: top1 for step, top1 in self._accuracies().items() if step == "dense"}
        network = convert(self._model, made, data=self._some_images(), progress=self._progress)
        made.save(self._folder / PLAN)  # with the errors of the layers
        if self._test is not None:
            self._note_top1("converted", network)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            with self._seeded():
                recalibrate(network, (images.to(self._x.device) for images, _ in batches(self._data, self._classes)))
            if self._test is not None:
                self._note_top1("recalibrated", network)
        self._save(network.eval(), None)
        return network, None

    def _finetune(self, network: nn.Module, saved: dict[str, Any] | None) -> None:
        try:
            finetune(
                network,
                self._data,
                self._training(network),
                classes=self._classes,
                steps=self._batches,
                seed=self._seed,
                saved=saved,
                save=lambda training: self._save(network, training),
                progress=self._progress,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}: try a learning rate (lr) below {self._train.lr:g}") from error

    def _training(self, network: nn.Module) -> TrainConfig:
        """How to fine-tune: in channels-last layout, where the network runs in that."""
        images = self._first[:2].to(self._x.device)
        return replace(self._train, channels_last=takes_channels_last(network.train(), images))

    def _save(self, network: nn.Module, training: dict[str, Any] | None) -> None:
        save_checkpoint(self._folder / CHECKPOINT, {"network": network.state_dict(), "training": training})

    def _deployed(self, network: nn.Module) -> Deployed:
        """The network in its fastest forms: those that met the budget, if none is measured to be faster now.

        There are none, if the budget is not one of time, and none that fit, if the plan was edited since.

        Where the budget is one of memory or bytes, in chains: the fastest form may be dense, as large as before.
        """
        if isinstance(self._budget, (Memory, Size)):
            return Deployer(network, self._x).as_chains(self._engine)
        anew = deploy(network, self._x, engines=[self._engine], progress=self._progress)
        try:
            before = Deployed.load(self._folder / FORMS, network, self._x)
        except (FileNotFoundError, ValueError):
            return anew
        return before if time_share(anew, before, self._x) < 1 else anew

    def _write_files(self, network: nn.Module, made: Plan, deployed: Deployed) -> None:
        final = [*self._accuracies().values()]
        card = replace(self._card, plan=made.to_dict(), top1=final[-1] if final else None)
        save(network, replace(card, name=NETWORK), self._folder, half=False)
        ending = ".onnx" if self._engine == "onnxruntime" else ".pt2"
        path = self._folder / f"{NETWORK}{ending}"
        try:
            log.info("%s", "\n".join(export(copied(network).cpu(), path, tuple(self._x.shape), form=deployed.forms)))
        except ValueError as error:
            log.warning("%s is not written: %s", path, error)

    # What is measured

    def _deployed_dense(self, engine: str | None) -> Deployed:
        """The dense network, which says before any work whether the engine can run it."""
        if engine is None and "onnxruntime" in available(self._x.device):
            try:
                return deploy(self._model, self._x, engines=["onnxruntime"])
            except ValueError:
                log.warning("it should be fast in torch, as ONNX Runtime can't run the network")
        engine = check_engine(engine or "eager", self._x)
        try:
            return deploy(self._model, self._x, engines=[engine])
        except ValueError as error:
            raise ValueError(
                f"the network doesn't run in {engine}, or not with the same output every time, as with dropout in "
                "evaluation mode"
            ) from error

    def _accuracies(self) -> dict[str, float]:
        return self._state.get("top1", {})

    def _note_top1(self, step: str, network: nn.Module) -> None:
        assert self._test is not None
        if step not in self._accuracies():
            self._state["top1"] = {**self._accuracies(), step: measure_top1(network, self._test)}
        log.info("%s: top-1 %.2f %%", step, self._accuracies()[step])

    def _warn_of_chance(self) -> None:
        top1, chance = self._accuracies()["dense"], 100 / self._classes
        if top1 < chance + CHANCE:
            log.warning(
                "the dense network is right on %.2f %% of the test images, and chance on %.2f: are its weights "
                "trained, and the images normalised as in its training?", top1, chance,
            )  # fmt: skip

    def _numbers(self, network: nn.Module, made: Plan, deployed: Deployed) -> dict[str, Any]:
        seconds = seconds_beside(self._dense, deployed, self._x)
        sides = {"dense": self._model, "small": network}
        return {
            "asked": {**self._state.asked, "reached": self._state["reached"]},
            "edited": self._state.edited(made),
            "timed": isinstance(self._budget, (Latency, Milliseconds)),
            "even": isinstance(self._budget, Budget) and self._budget.uniform,
            "top1": self._accuracies(),
            "seconds": seconds,
            "costs": {side: total_cost(model, self._input_size) for side, model in sides.items()},
            "bytes": {side: stored_bytes(model) for side, model in sides.items()},
            "memory": {side: memory_bytes(model, self._x) for side, model in sides.items()},
            "layers": [
                {**row, "layer": row.get("layer") or made.layer, "form": deployed.forms.get(row["name"], "")}
                for row in self._rows(network, made)
            ],
            "input": list(self._x.shape),
            "files": {
                name: path.stat().st_size for name in FILES if self._kept and (path := self._kept / name).is_file()
            },
            "made": environment(device_name(self._x.device)),
        }

    def _rows(self, network: nn.Module, made: Plan) -> Iterator[dict[str, Any]]:
        """The rows of the plan with what the layers cost: another thing than planned, if it was edited."""
        flops = module_flops(network, self._input_size)
        counted: set[int] = set()
        for row in made.to_dict()["rows"]:
            layer = network.get_submodule(row["name"])
            new = {id(p): p.numel() for name, p in layer.named_parameters() if name != "bias" and id(p) not in counted}
            counted.update(new)
            if row["action"] == "keep":
                yield {**row, "params_after": row["params_before"], "macs_after": row["macs_before"]}
            else:
                macs = None if row["macs_before"] is None else flops[row["name"]] // 2
                yield {**row, "params_after": sum(new.values()), "macs_after": macs}


def _check_budget_and_layer(budget: object, layer: str) -> None:
    """Raise ValueError for a budget or a layer type that a compression can't have."""
    if not isinstance(budget, AnyBudget):
        raise ValueError(f"budget={budget!r} is no budget: say Budget(flops=0.5) or Latency(0.6) of decef.ranks")
    if isinstance(budget, Latency) and budget.times is not None:
        raise ValueError("a compression measures the times itself: say Latency(share) without times")
    if layer == AUTO:
        if isinstance(budget, Budget) and budget.uniform:
            raise ValueError("layer 'auto' weighs energy against cost, which uniform=True doesn't: leave that out")
        return
    if layer == "conv2d":
        raise ValueError("layer=conv2d would change nothing: say auto or a low-rank layer type")
    layer_type(layer)  # refuses what there is not


def _check_numbers(**given: Any) -> None:
    """Raise ValueError for what is no whole number, or too small or large a one."""
    for key, value in given.items():
        least = 0 if key in ("finetune", "seed") else 1
        if not is_whole(value) or value < least:
            raise ValueError(f"{key}={value!r} must be a whole number, at least {least}")
        if key == "seed" and value > MAX_SEED:
            raise ValueError(f"seed={value} must be at most {MAX_SEED}")


def _check_network(model: nn.Module) -> None:
    """Raise ValueError for a network without parameters or in another precision than fp32."""
    if next(model.parameters(), None) is None:
        raise ValueError("the network has no parameters: there is nothing to compress")
    if wrong := {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}:
        raise ValueError(f"the network is in {', '.join(wrong)}: give it as model.float(); deploy makes it smaller")


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
