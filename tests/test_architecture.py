"""The house: imports point down, the library needs torch and numpy alone, a new layer type is one class."""

import subprocess
import sys

import pandas as pd
import torch
from support import ROOT, config
from torch import Tensor
from torch.nn import functional as F

import decef
from decef.inference.export import export
from decef.layers import LAYERS
from decef.layers.factorized import FactorizedConv2d, conv2d_of
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
          "onnx", "onnxscript", "onnxruntime", "openvino", "matplotlib", "jinja2", "statsmodels", "tabulate"}
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
model = CifarResNet(8)
images = torch.rand(4, 3, 16, 16)
for layer in decef.LAYERS:
    plan = decef.plan(model, layer, rank=Budget(flops=0.6), exclude="conv1", input_size=(3, 16, 16), data=[images])
    small = decef.convert(model, plan, data=[images])
    assert decef.fold(small)(images).shape == (4, 10)
    assert total_cost(small, (3, 16, 16))["macs"] <= 0.6 * total_cost(model, (3, 16, 16))["macs"] or layer == "conv2d"
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
        "import decef.results": "are not installed: pip install 'decef[results]'",
        "decef.data.DATASETS['digits'].load()": "sklearn is not installed: pip install 'decef[train]'",
        "decef.models.create_model('timm/resnet18', num_classes=10)": "torchvision is not installed",
    }
    said = without_extras(f"""
import torch, decef, decef.data, decef.models
for code in {list(missing)}:
    try: exec(code)
    except ImportError as error: print(error)
""")
    for line, message in zip(said.splitlines(), missing.values(), strict=True):
        assert message in line


class Tucker2Conv2d(FactorizedConv2d):
    """A layer type that the package has not: channels reduced, a small kernel, channels restored (Kim et al. 2016)."""

    rank_meaning = "channels inside"
    scale_factor = "after"

    @classmethod
    def max_rank_for(cls, out_channels, in_per_group, kh, kw, *, groups=1):
        if groups > 1:
            raise ValueError("Tucker-2 is for convolutions of one group")
        return min(out_channels, in_per_group)

    def factor_shapes(self):
        out, c, kh, kw = self.weight_shape
        return {"before": (self.rank, c), "core": (self.rank, self.rank, kh, kw), "after": (out, self.rank)}

    def compose(self):
        return torch.einsum("op,pqhw,qc->ochw", self.after, self.core, self.before)

    def forward_factorized(self, x: Tensor, padding):
        y = F.conv2d(x, self.before[:, :, None, None])
        y = F.conv2d(y, self.core, None, self.stride, padding, self.dilation)
        return F.conv2d(y, self.after[:, :, None, None], self.bias)

    def as_convolutions(self):
        core = conv2d_of(self.core, **self._spatial())
        return {"factorized": [torch.nn.Sequential(conv2d_of(self.before), core, conv2d_of(self.after, self.bias))]}

    @classmethod
    def spectrum(cls, weight, *, groups=1, moments=None):
        return torch.linalg.svdvals(weight.double().flatten(1)).square()[: min(weight.shape[:2])]

    def _factorize(self, weight, warm_start=False):
        after = torch.linalg.svd(weight.flatten(1), full_matrices=False).U[:, : self.rank]
        before = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False).U[:, : self.rank].T
        return {"after": after, "before": before, "core": torch.einsum("op,ochw,qc->pqhw", after, weight, before)}

    def _init_factors(self):
        for factor in self.factors().values():
            factor.normal_()


def test_a_new_layer_type_is_one_class(tmp_path, monkeypatch):
    """Registered, it has conversion, cost, folding, training, a table's row and an export; no other file knows it."""
    monkeypatch.setitem(LAYERS, "tucker2", Tucker2Conv2d)
    model = CifarResNet(8, in_channels=1).eval()
    x = torch.randn(2, 1, 8, 8)
    whole = decef.convert(model, "tucker2", rank=decef.ranks.Share(1.0), include="layer1.*")
    torch.testing.assert_close(whole(x), model(x), rtol=1e-3, atol=1e-4)
    half = decef.ranks.Budget(flops=0.5)
    small = decef.convert(model, "tucker2", rank=half, exclude="conv1", input_size=(1, 8, 8)).eval()
    cost, dense = (decef.cost(network, (1, 8, 8)).attrs for network in (small, model))
    assert 0.4 < cost["macs"] / dense["macs"] <= 0.5
    torch.testing.assert_close(decef.fold(small)(x), small(x), rtol=1e-3, atol=1e-4)
    assert any("equal to the original" in line for line in export(small, tmp_path / "small.onnx", x.shape))

    summary = run(config(tmp_path, layer={"name": "tucker2", "flops": 0.5}))
    assert summary["flops"] <= 0.5 * summary["dense"]["flops"]
    (row,) = summarize(load_records(tmp_path)).to_dict("records")
    assert (row["layer"], row["setting"]) == ("tucker2", "0.5 of FLOPs")
    assert not pd.isna(row["top1"])
