"""What large trainings need: accumulation, averages, clipping, mixing, several processes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import CONFIG, DIGITS, Memory, train
from torch.testing import assert_close

from decef.models import PlainNet
from decef.train import Training, evaluate, make_optimizer

ROOT = Path(__file__).resolve().parents[1]


def plain(seed=0):
    torch.manual_seed(seed)
    return PlainNet(width=0.05, relu=True).double()


def trained(**changes):
    model = plain()
    metrics = train(model, dataclasses.replace(CONFIG, epochs=2, **changes), size=128)
    return model, metrics


def test_a_batch_in_parts_is_the_batch():
    whole, metrics = trained()
    parts, in_parts = trained(accumulate=4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_close(one, other)
    assert in_parts[-1]["train_loss"] == pytest.approx(metrics[-1]["train_loss"], rel=1e-6)
    assert in_parts[-1]["train_top1"] == metrics[-1]["train_top1"]


def test_clipping_bounds_the_step():
    config = dataclasses.replace(CONFIG, clip=0.01, momentum=0.0, nesterov=False, weight_decay=0.0)
    model = plain()
    training = Training(model, config, torch.device("cpu"))
    training.start_epoch()
    before = [p.detach().clone() for p in model.parameters()]
    training.step(100 * torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8), 2.0, 0)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(2.0 * 0.01, rel=1e-3)


def test_the_moving_average_is_measured_saved_and_taken_up_again():
    config = dataclasses.replace(CONFIG, epochs=3, ema=0.9)
    state = Memory(stop_after=1)
    whole, whole_state = plain(), Memory()
    expected = train(whole, config, size=256, state=whole_state)
    with pytest.raises(KeyboardInterrupt):
        train(plain(), config, state=state, size=256)
    state.stop_after = None
    resumed = plain(seed=9)
    metrics = train(resumed, config, state=state, size=256)
    assert metrics[-1]["test_loss"] == expected[-1]["test_loss"]
    for key, value in whole_state.saved["ema"].items():
        assert torch.equal(value, state.saved["ema"][key])
    averaged = plain()
    averaged.load_state_dict(state.saved["ema"])
    _, test = DIGITS.load(None)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (DIGITS.mean, DIGITS.std))
    assert evaluate(averaged, test, mean=mean, std=std)[0] == pytest.approx(expected[-1]["test_loss"], rel=1e-6)
    assert evaluate(whole, test, mean=mean, std=std)[0] != pytest.approx(expected[-1]["test_loss"], rel=1e-3)


def test_the_moving_average_by_hand():
    config = dataclasses.replace(CONFIG, ema=0.9)
    model = plain()
    training = Training(model, config, torch.device("cpu"))
    training.start_epoch()
    average = None
    for step in range(4):
        training.step(torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8), 0.1, step)
        now = model.linear.weight.detach().clone()
        average = now if average is None else 0.9 * average + 0.1 * now
    assert_close(training.measured.linear.weight, average)


@pytest.mark.parametrize("change", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixed_images_are_learnt_from_and_a_seed_repeats(change):
    first, metrics = trained(label_smoothing=0.1, **change)
    second, again = trained(label_smoothing=0.1, **change)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert metrics[-1]["train_loss"] == again[-1]["train_loss"]
    assert metrics[-1]["train_loss"] != trained(label_smoothing=0.1)[1][-1]["train_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 3}, r"train\.batch_size=64 can't be shared equally: it must be a multiple of 3 "),
        ({"batch_size": 3, "mixup": 0.1}, "must be a multiple of 2 .*pairs for mixup"),
        ({"precision": "fp16"}, "train.precision=fp16 needs a GPU"),
        ({"sync_bn": True}, "train.sync_bn=true needs GPUs"),
        ({"ema": 0.9, "atcd": 1}, "train.ema and train.atcd can't be combined"),
        ({"accumulate": 0}, "train.accumulate=0 must be"),
    ],
)
def test_what_cannot_be_done(change, message):
    with pytest.raises(ValueError, match=message):
        train(plain(), dataclasses.replace(CONFIG, **change))


def test_fewer_images_than_a_batch():
    metrics = train(plain(), dataclasses.replace(CONFIG, epochs=1, batch_size=128, accumulate=4), size=50)
    assert metrics[0]["train_top1"] >= 0
    assert make_optimizer(plain(), CONFIG).param_groups


def script(tmp_path, processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), f"results={tmp_path / str(processes)}",
         "dataset=digits", "dataset.train_size=512", "model=plain", "model.width=0.1", "layer=decef", "layer.rank=4",
         "train=smoke", "train.batch_size=64", "device=cpu", "threads=1", "wandb.mode=disabled", "progress=false",
         *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / str(processes) / "runs").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((run / "summary.json").read_text())


def test_two_processes_do_what_one_does(tmp_path):
    one, _ = script(tmp_path, 1)
    two, summary = script(tmp_path, 2)
    assert summary["processes"] == 2
    assert summary["status"] == "finished"
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "test_loss", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert b["test_top1"] == pytest.approx(a["test_top1"], abs=0.6)  # 2 of 360 images on the edge
