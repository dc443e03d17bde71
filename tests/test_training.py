"""What large trainings need: several processes, and what a device can't do."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support import ROOT, TRAIN, train

from decef.models import PlainNet
from decef.training.distributed import Processes
from decef.training.loop import Training, check_possible, seed_epoch
from decef.training.precision import resolve_precision
from decef.training.record import read_metrics, read_summary


def plain(seed=0):
    torch.manual_seed(seed)
    return PlainNet(width=0.05, relu=True).double()


def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match=r"train\.precision=fp16 needs a GPU"):
        train(plain(), dataclasses.replace(TRAIN, precision="fp16"))


@pytest.mark.parametrize(("flag", "found"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, flag, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert resolve_precision(torch.device("cpu"), "auto") == found
    assert resolve_precision(torch.device("cpu"), "fp32") == "fp32"


def test_labels_are_smoothed_as_asked():
    x, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    for share in (0.0, 0.2):
        model = plain()
        logs = model.train()(x).float().log_softmax(1)
        wanted = (1 - share) * F.one_hot(labels, 10) + share / 10
        config = dataclasses.replace(TRAIN, label_smoothing=share)
        training = Training(model, config, torch.device("cpu"))
        training.start_epoch()
        training.step(x, labels, config.lr, 0)
        loss, _ = training.finish_epoch()
        assert loss == pytest.approx(-(wanted * logs).sum(1).mean().item(), rel=1e-5)


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

    def all_reduce(value, op):
        assert op == torch.distributed.ReduceOp.MIN
        value.clamp_(max=5)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    training = Training(plain(), TRAIN, torch.device("cpu"))
    training.processes = Processes(0, 3)
    training.start_epoch()
    with pytest.raises(FloatingPointError, match="not finite any more from step 5 on"):
        training._check(0.1)


SMALL = ["dataset=digits", "dataset.train_size=512", "model=plain", "model.width=0.1", "layer=decef", "layer.rank=4"]
SMALL += ["train=smoke", "train.batch_size=64", "train.precision=fp32", "device=cpu", "threads=1"]
SMALL += ["wandb.mode=disabled", "progress=false"]


# Two processes as torchrun starts them, but forked off where all is imported; with "stop" both die in the second epoch.
TWO = f"""
import os, runpy, socket, sys
import decef.training.loop as loop
scripts = {str(ROOT / "scripts")!r}
sys.path.insert(0, scripts)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
if sys.argv[1] == "stop":
    del sys.argv[1]
    whole = loop.train_one_epoch
    loop.train_one_epoch = lambda *args, **named: os._exit(9) if args[2] else whole(*args, **named)
other = os.fork()
os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0" if other else "1")
status = 0
try:
    runpy.run_path(f"{{scripts}}/train.py", run_name="__main__")
except SystemExit as end:
    status = (print(end.code, file=sys.stderr) or 1) if isinstance(end.code, str) else end.code or 0
if other:
    status = status or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
sys.exit(status)
"""


def read(results):
    (run,) = (results / "runs").iterdir()
    return read_metrics(run), read_summary(run)


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = [*launcher, str(ROOT / "scripts" / "train.py"), *arguments]
    return subprocess.run(start, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.grid)])
def test_two_processes_do_what_one_does(call, tmp_path, launcher):
    done = call("train.py", *SMALL, f"results={tmp_path / 'one'}")
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = [*SMALL, f"results={tmp_path / 'two'}"]
    if launcher == "torchrun":
        done = torchrun(*arguments)
    else:
        (tmp_path / "two.py").write_text(TWO)
        assert call(tmp_path / "two.py", "stop", *arguments).returncode == 9
        done = call(tmp_path / "two.py", *arguments)
        assert "goes on after epoch 1" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    one, _ = read(tmp_path / "one")
    two, summary = read(tmp_path / "two")
    assert summary["processes"] == 2
    assert summary["status"] == "finished"
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "test_loss", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert b["test_top1"] == pytest.approx(a["test_top1"], abs=0.6)  # 2 of 360 images on the edge
