"""What large trainings need: several processes, and what a device can't do."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import ROOT, TRAIN, train

from decef.models import PlainNet
from decef.training.distributed import Processes
from decef.training.loop import Training, check_possible, seed_epoch


def plain(seed=0):
    torch.manual_seed(seed)
    return PlainNet(width=0.05, relu=True).double()


def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match=r"train\.precision=fp16 needs a GPU"):
        train(plain(), dataclasses.replace(TRAIN, precision="fp16"))


def test_fewer_images_than_a_batch():
    metrics = train(plain(), dataclasses.replace(TRAIN, epochs=1, batch_size=128), size=50)
    assert metrics[0]["train_top1"] * 50 / 100 == pytest.approx(round(metrics[0]["train_top1"] / 2))  # of 50 images


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(ValueError, match=r"train\.batch_size=64 can't be shared equally by 3 processes"):
        check_possible(TRAIN, torch.device("cpu"), Processes(0, 3))


def test_every_process_drops_other_units_and_all_draw_the_same_images():
    units, images = [], []
    for rank in range(3):
        generator = seed_epoch(0, 3, rank)
        units.append(F.dropout(torch.ones(64)))
        images.append(torch.randperm(64, generator=generator))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(units, 2))
    assert torch.equal(images[0], images[1])


def test_training_diverged_when_the_first_process_did(monkeypatch):
    """Of three, of which the others diverged in steps 5 and 7."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, op: value.clamp_(max=min(5, 7)))
    training = Training(plain(), TRAIN, torch.device("cpu"))
    training.processes = Processes(0, 3)
    training.start_epoch()
    with pytest.raises(FloatingPointError, match="not finite any more from step 5 on"):
        training._check(0.1)


SMALL = ["dataset=digits", "dataset.train_size=512", "model=plain", "model.width=0.1", "layer=decef", "layer.rank=4"]
SMALL += ["train=smoke", "train.batch_size=64", "train.precision=fp32", "device=cpu", "threads=1"]
SMALL += ["wandb.mode=disabled", "progress=false"]


def read(results):
    (run,) = (results / "runs").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((run / "summary.json").read_text())


def test_two_processes_do_what_one_does(call, tmp_path):
    done = call("train.py", *SMALL, f"results={tmp_path / 'one'}")
    assert done.returncode == 0, done.stdout + done.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = [*launcher, str(ROOT / "scripts" / "train.py"), *SMALL, f"results={tmp_path / 'two'}"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one, _ = read(tmp_path / "one")
    two, summary = read(tmp_path / "two")
    assert summary["processes"] == 2
    assert summary["status"] == "finished"
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "test_loss", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert b["test_top1"] == pytest.approx(a["test_top1"], abs=0.6)  # 2 of 360 images on the edge
