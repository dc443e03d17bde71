"""The house: imports point down, the library needs torch and numpy alone, a new layer type is one class."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from support import ROOT, config
from torch import Tensor
from torch.nn import functional as F

import decef
from decef.inference.export import export
from decef.layers import LAYERS
from decef.layers.factorized import FactorizedConv2d
from decef.layers.parts import conv2d_of
from decef.models import CifarResNet
from decef.results.tables import summarize
from decef.training.record import load_records
from decef.training.run import run


def test_imports_point_down_and_in_no_circle():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


# Whatever the library's own imports need, but for what torch itself is made of.
TORCH_AND_NUMPY_ALONE = """
import sys, importlib.abc, importlib.util
ABSENT = {"pandas", "yaml", "tqdm", "torchvision", "timm", "sklearn", "scipy", "PIL", "hydra", "omegaconf", "wandb",
          "onnx", "onnxscript", "onnxruntime", "matplotlib", "jinja2", "statsmodels", "tabulate"}
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in ABSENT else found(name, package)
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def without_extras(code):
    done = subprocess.run(
        [sys.executable, "-c", TORCH_AND_NUMPY_ALONE + code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_needs_torch_and_numpy_alone():
    said = without_extras("""
import torch, decef
from decef.costs import total_cost
from decef.models import CifarResNet
from decef.ranks import Budget
import decef.inference.timing as timing
timing.ROUND_SECONDS, timing.SETTLE = 0.001, 0  # as in tests/conftest.py
model = CifarResNet(8)
images = torch.rand(4, 3, 8, 8)
for layer in decef.LAYERS:
    data = [images] if layer == "decef" else None
    plan = decef.plan(model, layer, rank=Budget(flops=0.6), exclude="conv1", input_size=(3, 8, 8), data=data)
    small = decef.convert(model, plan, data=data)
    assert decef.fold(small)(images).shape == (4, 10)
    assert total_cost(small, (3, 8, 8))["macs"] <= 0.6 * total_cost(model, (3, 8, 8))["macs"] or layer == "conv2d"
atcd = decef.ATCD(decef.convert(model, "decef", rank=2))
atcd.after_step()
print(decef.effective_rank(model.conv1.weight).shape[0], decef.deploy(small, images, engines=["eager"]).engine)
""")
    assert said.split() == ["3", "eager"]


def test_what_is_missing_is_one_sentence_with_the_command():
    missing = {
        "decef.cost(torch.nn.Conv2d(3, 4, 3), (3, 8, 8))": "pandas is not installed: pip install 'decef[results]'",
        "str(decef.plan(torch.nn.Conv2d(3, 4, 3), 'decef', rank=2))": "pandas is not installed",
        "import decef.training": "yaml, tqdm, torchvision, sklearn, PIL are not installed: pip install 'decef[train]'",
        "decef.compress(torch.nn.Conv2d(3, 4, 3), [], budget=None)": "pip install 'decef[results]'",
        "import decef.results": "are not installed: pip install 'decef[results]'",
        "decef.data.DATASETS['digits'].load()": "sklearn is not installed: pip install 'decef[train]'",
        "decef.models.create_model('timm/resnet18', num_classes=10)": "torchvision is not installed",
        "from decef.inference.export import export; export(torch.nn.Conv2d(3, 4, 3), 'a/n.onnx', (1, 3, 8, 8))": (
            "onnx, onnxscript are not installed: pip install 'decef[deploy]'"
        ),
    }
    said = without_extras(f"""
import torch, decef, decef.data, decef.models
for code in {list(missing)}:
    try: exec(code)
    except ImportError as error: print(error)
""")
    for line, message in zip(said.splitlines(), missing.values(), strict=True):
        assert message in line


class SeparableConv2d(FactorizedConv2d):
    """A type that the package has not: vertical filters, then horizontal ones (Jaderberg, Vedaldi, Zisserman 2014)."""

    rank_meaning = "channels between the two convolutions"
    scale_factor = "horizontal"

    @classmethod
    def max_rank_for(cls, out_channels, in_per_group, kh, kw, *, groups=1):
        if groups > 1:
            raise ValueError("separable filters are for convolutions of one group")
        return min(out_channels * kw, in_per_group * kh)

    def factor_shapes(self):
        out, c, kh, kw = self.weight_shape
        return {"vertical": (self.rank, c, kh), "horizontal": (out, self.rank, kw)}

    def compose(self):
        return torch.einsum("rcy,orx->ocyx", self.vertical, self.horizontal)

    def forward_factorized(self, x: Tensor, padding):
        y = F.conv2d(x, self.vertical[..., None], None, (self.stride[0], 1), (padding[0], 0), (self.dilation[0], 1))
        stride, dilation = (1, self.stride[1]), (1, self.dilation[1])
        return F.conv2d(y, self.horizontal[:, :, None], self.bias, stride, (0, padding[1]), dilation)

    def as_convolutions(self):
        vertical = conv2d_of(self.vertical[..., None], **self._spatial(horizontal=False))
        horizontal = conv2d_of(self.horizontal[:, :, None], self.bias, **self._spatial(vertical=False))
        return {"factorized": [torch.nn.Sequential(vertical, horizontal)]}

    @staticmethod
    def matrix(weight):
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (in kh, out kw)

    @classmethod
    def spectrum(cls, weight, *, groups=1, moments=None):
        return torch.linalg.svdvals(cls.matrix(weight.double())).square()

    def _factorize(self, weight, warm_start=False):
        out, c, kh, kw = weight.shape
        u, s, vh = torch.linalg.svd(self.matrix(weight), full_matrices=False)
        horizontal = (s[:, None] * vh)[: self.rank].reshape(self.rank, out, kw)
        return {"vertical": u[:, : self.rank].T.reshape(self.rank, c, kh), "horizontal": horizontal.transpose(0, 1)}

    def _init_factors(self):
        for factor in self.factors().values():
            factor.normal_()


def test_a_new_layer_type_is_one_class(tmp_path, monkeypatch):
    """Registered, it has conversion, cost, folding, training, a table's row and an export; no other file knows it."""
    monkeypatch.setitem(LAYERS, "separable", SeparableConv2d)
    model = CifarResNet(8, in_channels=1).eval()
    x = torch.randn(2, 1, 8, 8)
    whole = decef.convert(model, "separable", rank=decef.ranks.Share(1.0), exclude="conv1")
    torch.testing.assert_close(whole(x), model(x), rtol=1e-3, atol=1e-4)
    half = decef.ranks.Budget(flops=0.5)
    small = decef.convert(model, "separable", rank=half, exclude="conv1", input_size=(1, 8, 8)).eval()
    cost, dense = (decef.cost(network, (1, 8, 8)).attrs for network in (small, model))
    assert 0.4 < cost["macs"] / dense["macs"] <= 0.5
    torch.testing.assert_close(decef.fold(small)(x), small(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"layer 'layer1\.0\.conv1': SeparableConv2d can't be fitted to data"):
        decef.convert(model, "separable", rank=1, exclude="conv1", data=[x])
    assert any(
        "equal to the original" in line for line in export(small, tmp_path / "small.pt2", x.shape, form="factorized")
    )

    plain = {"name": "plain", "width": 0.1, "relu": True, "dense_stem": True}
    summary = run(config(tmp_path, model=plain, layer={"name": "separable", "flops": 0.5}))
    assert summary["flops"] <= 0.5 * summary["dense"]["flops"]
    (row,) = summarize(load_records(tmp_path)).to_dict("records")
    assert (row["layer"], row["setting"]) == ("separable", "0.5 of FLOPs, train_size 256")
    assert not pd.isna(row["top1"])
