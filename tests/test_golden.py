"""Pinned loss curves: work on the structure must not move the science.

A curve changes when initialisation, decay, augmentation, data order or schedule do. If that was meant, make the curves
anew with `python tests/test_golden.py` and say in the commit why.
"""

import json
import tempfile
from pathlib import Path

import pytest
from support import composed

from decef.training.config import RunConfig
from decef.training.record import read_metrics
from decef.training.run import run

GOLDEN = Path(__file__).with_name("golden.json")
# Without batch norm between the layers rounding stays where it is: instruction sets differ in the sixth digit.
COMMON = (
    *("dataset=digits", "model=plain", "model.width=0.25", "layer.flops=0.667", "train=smoke", "train.epochs=3"),
    *("train.batch_size=64", "train.lr=0.02", "train.weight_decay=0.01", "train.precision=fp32", "threads=1"),
    *("device=cpu", "wandb.mode=disabled", "progress=false"),
)
CASES = {
    "conv2d": ("layer=conv2d",),
    "decef": ("layer=decef",),
    "decef, kernel decay": ("layer=decef", "train.decay=kernel"),
    "decef, orthogonality": ("layer=decef", "layer.orthogonality=0.01"),
    "basisconv": ("layer=basisconv",),
    "basisconv2021": ("layer=basisconv2021",),
    "cpac": ("layer=cpac",),
    "rank1": ("layer=rank1",),
    "rank1, atcd": ("layer=rank1", "train.atcd=1"),
}


def curve(*overrides):
    """Training and test loss of every epoch."""
    with tempfile.TemporaryDirectory() as results:
        summary = run(RunConfig.from_dict({**composed(*COMMON, *overrides), "results": results, "experiment": None}))
        rows = read_metrics(Path(results) / "runs" / summary["id"])
    return [[round(row[key], 7) for key in ("train_loss", "test_loss")] for row in rows]


def equal(one, other, tolerance):
    return all(a == pytest.approx(b, rel=tolerance) for a, b in zip(one, other, strict=True))


def tolerance(case):
    # A batch norm of small batches and an iteration that ends by a tolerance make more of rounding.
    return {"basisconv2021": 2e-2, "rank1, atcd": 2e-3}.get(case, 5e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_the_pinned_one(case):
    assert equal(curve(*CASES[case]), json.loads(GOLDEN.read_text())[case], tolerance(case))


@pytest.mark.parametrize("change", ["train.weight_decay=0.009", "dataset.crop_padding=0"])
def test_a_small_change_shows(change):
    assert not equal(curve("layer=decef", change), json.loads(GOLDEN.read_text())["decef"], 2 * tolerance("decef"))


def test_a_start_at_another_scale_shows(monkeypatch):
    from decef.layers import FactorizedConv2d

    reset = FactorizedConv2d.reset_parameters
    monkeypatch.setattr(FactorizedConv2d, "reset_parameters", lambda self, std=None: reset(self, std and 1.02 * std))
    assert not equal(curve("layer=decef"), json.loads(GOLDEN.read_text())["decef"], 2 * tolerance("decef"))


if __name__ == "__main__":
    curves = {case: curve(*overrides) for case, overrides in CASES.items()}
    lines = [f"  {json.dumps(case)}: {json.dumps(values)}" for case, values in curves.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
