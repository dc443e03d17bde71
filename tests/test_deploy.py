"""Every fast path computes what the network does: plain convolutions, folded batch norms, other engines, files."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from test_layers import used
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import decef
from decef.conversion import convert
from decef.inference import engines
from decef.inference.deploy import _fastest
from decef.inference.engines import ENGINES, available, to_onnx
from decef.inference.export import export as write
from decef.inference.folding import _Folded
from decef.inference.forms import FORMS, arranged, forms_of, to_convolutions
from decef.inference.memory import activation_bytes
from decef.layers import LAYERS, DeCEFConv2d, FactorizedConv2d
from decef.models import create_model
from decef.models.released import RELEASED
from decef.ranks import Budget

FACTORIZED = [name for name in LAYERS if name != "conv2d"]
CPU = torch.device("cpu")


class Small(nn.Module):
    """Batch norms after convolutions, a shortcut, and one batch norm that must not be folded."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        x = (self.bn2(y) + y).relu()  # conv2's output has two users
        x = self.bn3(self.conv3(x)).relu()
        return self.head(x.mean((2, 3)))


class WithLabels(Small):
    """Takes arguments that nobody gives who deploys it, and would compute something else with them."""

    def forward(self, x, labels=None, features=False):
        if labels is not None:
            x = self.bn2(self.conv2(torch.cat([x, x, x[:, :2]], 1)))[:, :3]
        return x if features else super().forward(x)


def test_arguments_that_nobody_gives_are_as_by_default():
    model = trained(WithLabels()).eval()
    x = torch.randn(2, 3, 8, 8)
    small = to_convolutions(model)
    assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    assert [type(small.get_submodule(name)) for name in ("bn1", "bn2", "bn3")] == [
        _Folded, nn.BatchNorm2d, _Folded
    ]  # fmt: skip


class Asks(Small):
    """Asks a convolution where its weight is, as timm's EdgeNeXt does."""

    def forward(self, x):
        return super().forward(x.to(self.conv2.weight.device, self.conv2.weight.dtype))


@pytest.mark.parametrize("form", ["factorized", "branches", "wide"])
def test_a_network_may_ask_for_the_device_of_a_weight(form):
    model, x = decef.convert(trained(Asks()), "decef", rank=2).eval(), torch.randn(2, 3, 8, 8)
    assert_close(to_convolutions(model, form)(x), model(x), rtol=1e-4, atol=1e-4)


class Uses(Small):
    """Uses a convolution's numbers and its kernel, too, as timm's DaViT pads by its kernel's size."""

    def forward(self, x):
        conv = self.conv2
        x = self.bn1(self.conv1(x)).relu()
        pad = conv.kernel_size[0] // 2
        y = conv(x) + F.conv2d(x, conv.weight.flip(3), conv.bias, conv.stride, pad)
        return self.head(self.bn3(self.conv3(y)).relu().mean((2, 3)))[:, : conv.out_channels]


@pytest.mark.parametrize("layer", FACTORIZED)
def test_a_network_may_use_more_of_a_convolution_than_its_output(layer):
    model, x = decef.convert(trained(Uses()), layer, rank=2).eval(), torch.randn(2, 3, 8, 8)
    for form in FORMS:
        assert_close(to_convolutions(model, form)(x), model(x), rtol=1e-4, atol=1e-4)
    assert activation_bytes(to_convolutions(model), tuple(x.shape)) > 0
    engine = "onnxruntime" if layer in ("decef", "basisconv2021") else "eager"  # one has a batch norm inside
    deployed = decef.deploy(model, x, engines=[engine])
    assert_close(deployed(x), model(x), rtol=1e-3, atol=1e-4)


class AsksNorms(Small):
    """Asks its batch norms for their numbers, and uses what one of them has measured."""

    def forward(self, x):
        x = x * self.bn1.num_features / self.bn3.num_features + self.bn1.eps
        return super().forward(x - self.bn3.running_mean[:3, None, None])


def test_a_network_may_ask_a_batch_norm_that_is_folded_for_its_numbers():
    model, x = decef.convert(trained(AsksNorms()), "decef", rank=2).eval(), torch.randn(2, 3, 8, 8)
    folded = to_convolutions(model)
    assert [type(m) for m in (folded.bn1, folded.bn3)] == [_Folded, _Folded]
    assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    for engine, precision in (("onnxruntime", "fp32"), ("eager", "bf16")):
        deployed = decef.deploy(model, x, engines=[engine], precision=precision)
        assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-4 if precision == "fp32" else 0.1)
    with pytest.raises(AttributeError, match="no_such"):
        _ = folded.bn1.no_such


class Indexed(nn.Module):
    """Runs its parts by what was noted on them, as YOLO's networks do."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        for i, part in enumerate(self.parts):
            part.before = [i - 1]

    def forward(self, x):
        outputs = {-1: x}
        for i, part in enumerate(self.parts):
            outputs[i] = part(outputs[part.before[0]])
        return outputs[3].mean((2, 3))


def test_what_was_noted_on_a_convolution_goes_with_it():
    model, x = Indexed().eval(), torch.randn(2, 3, 8, 8)
    small = decef.convert(model, "decef", rank=2)
    assert small.parts[3].before == [2]
    assert small.parts[3].before is not model.parts[3].before
    for form in FORMS:
        assert_close(to_convolutions(small, form)(x), small(x), rtol=1e-4, atol=1e-4)
    assert type(to_convolutions(small).parts[1]) is _Folded
    assert decef.fold(decef.convert(decef.fold(small), "cpac", rank=2)).parts[3].before == [2]


class Classes(Small):
    """Gives classes in place of logits, or rules out some."""

    classes = True

    def forward(self, x):
        logits = super().forward(x)
        return logits.argmax(1) if self.classes else logits.masked_fill(torch.arange(len(logits[0])) == 1, -torch.inf)


@pytest.mark.parametrize("classes", [True, False])
def test_whole_numbers_and_infinities_are_outputs_too(classes):
    model, x = decef.convert(trained(Classes()), "decef", rank=2).eval(), torch.randn(2, 3, 8, 8)
    model.classes = classes
    deployed = decef.deploy(model, x, engines=["eager"])
    assert deployed.error < 1e-4
    assert_close(deployed(x), model(x), rtol=1e-3, atol=1e-3)


def test_norms_are_not_folded_into_a_convolution_whose_forward_was_replaced():
    model, x = trained(Small()).eval(), torch.randn(2, 3, 8, 8)
    model.conv1.forward = functools.partial(normalised_kernel, model.conv1)
    assert_close(to_convolutions(model)(x), model(x), rtol=1e-4, atol=1e-4)


def normalised_kernel(conv, x):
    return F.conv2d(x, conv.weight / conv.weight.norm(), conv.bias, conv.stride, conv.padding)


class Video(nn.Module):
    """A convolution over three dimensions, then over two."""

    def __init__(self):
        super().__init__()
        self.over_time, self.conv = nn.Conv3d(3, 4, (2, 3, 3)), nn.Conv2d(4, 8, 3)

    def forward(self, x):
        return self.conv(self.over_time(torch.stack([x, -x], 2)).squeeze(2))


def test_a_network_with_other_convolutions_too_is_deployed():
    model, x = Video().eval(), torch.randn(1, 3, 12, 12)
    assert_close(decef.deploy(model, x, engines=["eager"])(x), model(x), rtol=1e-4, atol=1e-4)


def trained(model, dtype=torch.float32):
    """As if it had been trained: every batch norm does something."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(generator=generator)
    return model.to(dtype)


def small(layer, dtype=torch.float32):
    torch.manual_seed(0)
    model = trained(Small(), dtype)
    if layer == "conv2d":
        return model
    model = decef.convert(model, layer, rank=3)
    for module in model.modules():
        if isinstance(module, FactorizedConv2d):
            used(module)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_plain_is_the_network(layer, form):
    model, x = small(layer, torch.float64), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    network = to_convolutions(model, form)
    assert_close(network(x), model.eval()(x))
    kinds = [type(module) for module in network.modules()]
    assert set(kinds) & set(LAYERS.values()) <= {nn.Conv2d}
    assert kinds.count(nn.BatchNorm2d) == 1  # bn2


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet20", {}), ("vgg16_bn", {"width": 0.25}), ("mobilenetv2", {"width": 0.25}), ("timm/mobilenetv2_035", {})],
)
def test_networks_people_use_keep_no_batch_norm(name, options):
    """In several branches an engine can't fold them by itself. timm's have an activation in them, ReLU6 here."""
    torch.manual_seed(0)
    model = trained(create_model(name, num_classes=10, **options), torch.float64).eval()
    small = decef.convert(model, "cpac", rank=1, from_scratch=True, implementation="factorized").eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    network = to_convolutions(small, "branches")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert_close(network(x), small(x))


def test_plain_leaves_the_network_alone():
    model = small("decef").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_convolutions(model)
    assert model.training
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_plain_by_layer_and_unknown_forms():
    model = small("cpac")
    network = to_convolutions(model, {"conv1": "reconstructed", "conv3": "factorized"})
    assert isinstance(network.conv1, nn.Conv2d)
    assert len(network.conv3) == 4
    assert isinstance(network.conv2, decef.CPACConv2d)
    with pytest.raises(ValueError, match="there are reconstructed, factorized, branches, wide, aligned"):
        to_convolutions(model, "chains")
    with pytest.raises(ValueError, match="the network has no low-rank layer 'conv9'"):
        to_convolutions(model, {"conv9": "wide"})


def test_a_network_that_cannot_be_traced_keeps_its_batch_norms(caplog):
    class Decides(Small):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    torch.manual_seed(0)
    model, x = decef.convert(trained(Decides()), "decef", rank=3).eval(), torch.randn(2, 3, 9, 9)
    network = to_convolutions(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 3
    assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    deployed = decef.deploy(model, x, engines=["onnxruntime", "eager"])
    assert deployed.engine == "eager"
    assert "engine onnxruntime (reconstructed) is left out" in caplog.text  # such control flow has no ONNX
    assert "batch norms are not folded" in caplog.text
    assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv2d", "decef"])
def test_hooks_and_computed_weights_are_not_folded_away(layer):
    model = small(layer).eval()
    parametrizations.spectral_norm(model.conv1, "weight" if layer == "conv2d" else "coefficients")
    model.conv3.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 3, 9, 9)
    for form in ("reconstructed", "branches"):
        assert_close(to_convolutions(model, form)(x), model(x), rtol=1e-4, atol=1e-5)
    assert_close(decef.deploy(model, x, engines=["eager"])(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_output_outlives_the_next_call():
    model, x = small("decef").cuda().eval(), torch.randn(2, 3, 9, 9, device="cuda")
    deployed = decef.deploy(model, x, engines=["compile"])
    first = deployed(x)
    expected = first.clone()
    deployed(2 * x)
    assert torch.equal(first, expected)


def test_a_form_that_cannot_run_is_left_out_alone(monkeypatch, caplog):
    def refuse(model, layers, forms):
        if set(forms.values()) == {"wide"}:
            raise RuntimeError("too wide")
        return arranged(model, layers, forms)

    def pretend(steps, **how):
        return {key: 1.0 if "wide" in key else 3.0 if "reconstructed" in key else 1.1 for key in steps}

    module = sys.modules["decef.inference.deploy"]
    monkeypatch.setattr(module, "arranged", refuse)
    monkeypatch.setattr(module, "interleaved_times", pretend)
    deployed = decef.deploy(small("decef"), torch.randn(1, 3, 9, 9), engines=["eager"])
    assert "engine eager (wide) is left out: too wide" in caplog.text
    assert {time["arrangement"] for time in deployed.times} == {"reconstructed", "factorized", "branches"}


def test_layers_without_a_form_say_what_they_run_as(monkeypatch):
    """All aligned: BasisConv at rank 3 becomes so, at rank 16 its chain already is."""

    def pretend(steps, **how):
        return {key: 1.0 if "aligned" in key or "factorized" in key else 3.0 for key in steps}

    torch.manual_seed(0)
    model = nn.Sequential(LAYERS["basisconv"](8, 8, 3, rank=3), LAYERS["basisconv"](8, 32, 3, rank=16))
    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    deployed = decef.deploy(model, torch.randn(1, 8, 9, 9), engines=["eager"])
    aligned = next(time for time in deployed.times if time["arrangement"] == "aligned")
    assert aligned["seconds"] == 1.0
    assert deployed.forms["1"] == "factorized"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # the compiler's own
@pytest.mark.parametrize(
    ("layer", "engine"),
    [("decef", engine) for engine in ENGINES if engine in available(CPU)]
    + [("conv2d", "eager"), ("rank1", "eager"), ("basisconv2021", "eager")],
)
def test_every_engine_computes_the_network(layer, engine):
    model, x = small(layer), torch.randn(2, 3, 9, 9)
    expected = model.eval()(x).detach()
    deployed = decef.deploy(model, x, engines=[engine])
    assert deployed.engine == engine
    assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5)
    assert set(deployed.forms) == (set() if layer == "conv2d" else {"conv1", "conv2", "conv3"})
    names = {time["arrangement"] for time in deployed.times}
    if layer != "conv2d":
        forms = {"factorized"} | ({"aligned"} if layer == "basisconv2021" else {"branches", "wide"})
        assert {"reconstructed"} <= names <= {"measured", "reconstructed"} | (set() if engine == "compile" else forms)
    if engine == "onnxruntime":
        with pytest.raises(ValueError, match=r"deployed for inputs of \(2, 3, 9, 9\), not \(3, 3, 9, 9\)"):
            deployed(torch.randn(3, 3, 9, 9))


def test_deploy_takes_the_fastest(monkeypatch):
    slow = {"reconstructed": 3.0, "factorized": 1.0, "branches": 2.0, "wide": 5.0, "measured": 4.0}

    def pretend(steps, **how):
        return {key: slow[key[1] if isinstance(key, tuple) else key] for key in steps}

    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    deployed = decef.deploy(small("decef"), torch.randn(1, 3, 9, 9), engines=["eager"])
    assert deployed.arrangement == "factorized"
    assert set(deployed.forms.values()) == {"factorized"}


@pytest.mark.parametrize(("share", "taken"), [(0.99, "reconstructed"), (0.97, "wide")])
def test_what_is_faster_than_dense_by_noise_alone_is_not_taken(monkeypatch, share, taken):
    def pretend(steps, **how):
        form = lambda key: key[1] if isinstance(key, tuple) else key  # noqa: E731
        return {key: {"wide": share, "reconstructed": 1.0}.get(form(key), 2.0) for key in steps}

    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    deployed = decef.deploy(small("decef"), torch.randn(1, 3, 9, 9), engines=["eager"])
    assert (deployed.arrangement, set(deployed.forms.values())) == (taken, {taken})


def test_forms_that_are_far_slower_alone_are_not_tried_in_the_network(monkeypatch):
    def pretend(steps, **how):
        seconds = {"reconstructed": 1.0, "branches": 0.5, "factorized": 0.6, "wide": 0.7, "measured": 0.4}
        return {key: seconds[key[1] if isinstance(key, tuple) else key] for key in steps}

    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    deployed = decef.deploy(small("decef"), torch.randn(1, 3, 9, 9), engines=["eager"])
    assert [time["arrangement"] for time in deployed.times] == ["reconstructed", "factorized", "branches"]
    assert deployed.arrangement == "branches"


def test_close_ones_are_timed_again_for_longer_beside_dense(monkeypatch):
    asked = []

    def pretend(steps, rounds, reduce):
        """While the close ones are timed again, the machine is half as fast."""
        asked.append((list(steps), rounds))
        seconds = {"a": 1.0, "b": 1.1, "c": 1.3, "dense": 2.0} if rounds == 3 else {"a": 2.0, "b": 1.8, "dense": 4.0}
        return {key: seconds[key] for key in steps}

    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    best, seconds = _fastest(dict.fromkeys(("a", "b", "c", "dense")), dense=["dense"])
    assert asked == [(["a", "b", "c", "dense"], 3), (["a", "b", "dense"], 6)]
    assert (best, seconds) == ("b", {"a": 2.0, "b": 1.8, "c": 1.3, "dense": 4.0})


def test_what_computes_something_else_is_never_taken(monkeypatch, caplog):
    wrong = {"wide"}

    def off(model, layers, forms):
        made = arranged(model, layers, forms)
        if set(forms.values()) <= wrong:
            made.head.bias.data += 0.1
        return made

    def pretend(steps, **how):
        return {key: 1.0 if "wide" in key else 1.1 for key in steps}

    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "arranged", off)
    monkeypatch.setattr(sys.modules["decef.inference.deploy"], "interleaved_times", pretend)
    x = torch.randn(1, 3, 9, 9)
    deployed = decef.deploy(small("decef"), x, engines=["eager"])
    assert "wide" not in {time["arrangement"] for time in deployed.times}
    assert "engine eager (wide) is left out: the output differs from the original's by" in caplog.text
    wrong |= set(FORMS)
    with pytest.raises(ValueError, match="none of eager could run the network and give the same output"):
        decef.deploy(small("decef"), x, engines=["eager"])


def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    path = tmp_path / "network.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr("decef.inference.export.to_convolutions", lambda model, form: small("conv2d").eval())
    with pytest.raises(ValueError, match="the output differs from the original's by"):
        write(small("decef"), path, (2, 3, 9, 9), form="factorized")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("network.pt2", b"old")]


def test_equal_means_up_to_rounding():
    expected = torch.tensor([1.0, -50.0])
    engines.check_equal(expected * (1 + 1e-6), expected)
    for bad in (expected + 0.1, expected * torch.nan, -expected):
        with pytest.raises(ValueError, match="the output differs"):
            engines.check_equal(bad, expected)


class Idle(nn.Module):
    """With a layer that doesn't run, as a head that is for training alone."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_does_not_run_is_deployed_as_dense():
    model, x = decef.convert(Idle(), "decef", rank=2).eval(), torch.randn(1, 3, 9, 9)
    deployed = decef.deploy(model, x, engines=["eager"])
    assert set(deployed.forms) == {"used", "unused"}
    assert deployed.forms["unused"] == "reconstructed"
    assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_deploy_refuses(monkeypatch):
    model, x = small("decef"), torch.randn(1, 3, 9, 9)
    with pytest.raises(ValueError, match="no engine 'tensorrt'; there are eager, compile, onnxruntime"):
        decef.deploy(model, x, engines=["tensorrt"])
    with pytest.raises(ValueError, match=r"engines=\[\] leaves none to run the network"):
        decef.deploy(model, x, engines=[])
    with pytest.raises(ValueError, match="the network must give one tensor to be deployed, not a tuple"):
        decef.deploy(Pair(), x)
    with pytest.raises(ValueError, match="the network returns tuple, not a tensor: wrap it in one that does"):
        write(Pair(), "never-written.pt2", x.shape)
    with pytest.raises(ValueError, match=r"example_input must be a tensor, such as images\[:1\], not tuple"):
        decef.deploy(model, (3, 9, 9))
    monkeypatch.setattr("decef.inference.engines.available", lambda device, precision: [])
    with pytest.raises(ValueError, match="no engine here runs in int8: that needs a CPU"):
        decef.deploy(model, x, precision="int8")


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_a_network_on_another_device_than_the_example_is_refused():
    with pytest.raises(ValueError, match="the network is on cpu, example_input on meta: move one of them"):
        decef.deploy(nn.Conv2d(1, 2, 3), torch.empty(1, 1, 4, 4, device="meta"), engines=["eager"])


def test_forms_of_a_layer_have_what_they_say():
    forms = forms_of(decef.DeCEFConv2d(4, 8, 3, padding=1, rank=3))
    convolutions = {name: [m for m in form.modules() if isinstance(m, torch.nn.Conv2d)] for name, form in forms.items()}
    assert {name: len(found) for name, found in convolutions.items()} == {
        "reconstructed": 1,
        "factorized": 2,
        "branches": 6,
        "wide": 2,
    }
    assert isinstance(forms["reconstructed"], torch.nn.Conv2d)
    assert convolutions["wide"][0].in_channels == 12
    assert "wide" not in forms_of(decef.Rank1Conv2d(4, 8, 3, groups=2, rank=3))


def test_a_1x1_kernel_as_cpac_is_two_convolutions():
    """Its spatial vectors are scalars, and only the first convolution sees positions that a stride leaves out."""
    layer = decef.CPACConv2d(8, 12, 1, stride=2, padding=1, groups=2, rank=3, dtype=torch.float64)
    forms, x = forms_of(layer), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert set(forms) == {"reconstructed", "factorized", "aligned"}
    for name in ("factorized", "aligned"):
        assert [m.stride for m in forms[name].modules() if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1)]
        assert_close(forms[name](x), layer(x))
    assert "aligned" not in forms_of(decef.CPACConv2d(32, 32, 1, rank=16))  # its chain is


@pytest.mark.parametrize(("layer", "spatial"), [("basisconv", 0), ("basisconv2021", 0), ("cpac", 1)])
def test_aligned_inner_channels_are_zeros_up_to_a_block(layer, spatial):
    torch.manual_seed(0)
    conv = used(LAYERS[layer](36, 72, 3, padding=1, groups=2, rank=17).double()).eval()
    aligned, x = forms_of(conv)["aligned"], torch.randn(2, 36, 5, 5, dtype=torch.float64)
    assert [m.out_channels for m in aligned[:-1]] == [2 * 32] * (spatial + 1)
    assert_close(aligned(x), conv(x))
    assert all(not m.weight.unflatten(0, (2, 32))[:, 17:].any() for m in aligned[:-1])
    assert "aligned" not in forms_of(LAYERS["basisconv"](36, 72, 3, rank=16))  # its chain is


def test_a_batch_norm_is_folded_into_one_of_two_layers_that_share_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    model[3].weight = model[0].weight
    model = trained(decef.convert(model, "decef", rank=2)).eval()
    assert model[0].coefficients is model[3].coefficients
    x = torch.randn(2, 3, 9, 9)
    assert_close(to_convolutions(model)(x), model(x), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.norm(self.conv(x)).relu(), self.conv.weight)


def test_a_batch_norm_is_not_folded_into_a_weight_that_is_used_elsewhere():
    model, x = trained(Tied()).eval(), torch.randn(2, 3, 9, 9)
    assert_close(to_convolutions(model)(x), model(x))


def test_of_two_batch_norms_in_a_row_the_first_is_folded():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))).eval()
    x, plain = torch.randn(2, 3, 9, 9), to_convolutions(model)
    assert_close(plain(x), model(x))
    assert [type(module) for module in plain] == [nn.Conv2d, _Folded, nn.BatchNorm2d]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x.sub_(0.5))


def test_a_network_that_changes_its_input_is_deployed_and_the_example_stays():
    model, x = InPlace().eval(), torch.randn(2, 3, 9, 9)
    before, expected = x.clone(), model(x.clone())
    deployed = decef.deploy(model, x, engines=["eager"])
    assert torch.equal(x, before)
    assert_close(deployed(x.clone()), expected)


@pytest.mark.parametrize("name", ["network.pt2", "network.onnx"])
def test_a_network_that_changes_its_input_is_exported(tmp_path, name):
    write(decef.convert(InPlace(), "decef", rank=2), tmp_path / name, (2, 3, 9, 9), form="factorized")
    assert (tmp_path / name).is_file()


class ByName(Small):
    """Calls a convolution by its argument's name."""

    def forward(self, x):
        return self.conv1(input=x)


def test_every_form_may_be_called_by_the_name_of_its_argument():
    model, x = decef.convert(ByName(), "decef", rank=2, implementation="factorized").eval(), torch.randn(2, 3, 9, 9)
    for form in FORMS:
        assert_close(to_convolutions(model, form)(x), model(x), rtol=1e-4, atol=1e-5)


class Flattens(nn.Module):
    """By `view`, which doesn't take channels-last layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 49, 5)

    def forward(self, x):
        return self.linear(self.conv(x).view(len(x), -1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # the compiler's own
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_network_that_flattens_by_view_runs_in_torch(engine):
    model, x = decef.convert(Flattens(), "decef", rank=2).eval(), torch.randn(2, 3, 9, 9)
    assert_close(decef.deploy(model, x, engines=[engine])(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_export_leaves_torch_as_it_was():
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.__dict__["from_torchlib"]
    one, other = (to_onnx(small("conv2d"), torch.randn(1, 3, 9, 9)) for _ in range(2))
    assert one.SerializeToString() == other.SerializeToString()
    assert ONNXRegistry.__dict__["from_torchlib"] is before


def test_onnx_with_a_free_batch():
    import onnxruntime

    model = to_convolutions(small("cpac"))
    proto = to_onnx(model, torch.randn(2, 3, 9, 9), dynamic_batch=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 9, 9)
    (output,) = session.run(["output"], {"input": x.numpy()})
    assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def export(call):
    """What scripts/export.py says, with its status."""

    def export(*arguments):
        done = call("export.py", *arguments)
        return done.returncode, done.stdout + done.stderr

    return export


OWN = """
from torch import nn
def make(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4))
"""


def test_a_network_of_ones_own_and_a_file_are_exported_as_typed(call, tmp_path):
    (tmp_path / "mynets.py").write_text(OWN)
    done = call("export.py", "mynets:make", "--size", 1, 5, 5, "--out", "own.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own.onnx").is_file()
    path = RELEASED / "resnet20-cifar10-cpac-0.667.safetensors"
    done = call("export.py", path, "--form", "factorized", "--out", "small.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small.pt2").stat().st_size < 1.1e6  # its weights have 0.7 MB, the dense network's 1.1


def test_export_as_typed(export, tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    plan = decef.plan(model, "basisconv", rank=Budget(flops=0.5), exclude="conv1", input_size=(3, 32, 32))
    plan.save(tmp_path / "plan.yaml")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "network.onnx"
    code, said = export(
        "resnet20", "--weights", tmp_path / "weights.pt", "--plan", tmp_path / "plan.yaml", "--form", "factorized",
        "--out", out,
    )  # fmt: skip
    assert code == 0, said
    assert "equal to the original in " in said
    assert "of torch" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.onnx", "plan.yaml", "weights.pt"]


def test_a_torch_program_is_the_network(tmp_path):
    model, x = small("cpac"), torch.randn(2, 3, 9, 9)
    said = write(model, tmp_path / "network.pt2", x.shape, form="branches")
    assert "equal to the original in torch.export" in said[0]
    assert_close(torch.export.load(tmp_path / "network.pt2").module()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="must end in"):
        write(model, tmp_path / "network.tflite", x.shape)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]


def test_a_torch_program_with_a_free_batch(tmp_path):
    model, path = small("cpac"), tmp_path / "network.pt2"
    write(model, path, (1, 3, 9, 9), form="factorized", dynamic_batch=True)
    program = torch.export.load(path).module()
    for x in (torch.randn(1, 3, 9, 9), torch.randn(5, 3, 9, 9)):
        assert_close(program(x), model.eval()(x), rtol=1e-3, atol=1e-4)


class Pairs(nn.Module):
    def forward(self, x):
        return x, x


def test_what_torch_cannot_export_is_said_in_one_line(tmp_path):
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"^the network cannot be exported by torch\.export: .+$"):
        write(Decides(), tmp_path / "network.pt2", (1, 3, 9, 9), form="factorized")
    for network, message in ((nn.Bilinear(9, 9, 2), "doesn't run on an input of"), (Pairs(), "returns tuple, not a")):
        with pytest.raises(ValueError, match=message):
            write(network, tmp_path / "network.pt2", (1, 3, 9, 9), form="factorized")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet20", "--out", "network.tflite"], "must end in .onnx or .pt2"),
        (["resnet20", "--out", "network.onnx"], "resnet20 would have random weights: say where"),
        (["resnet20-cifar10-decef-0.667", "--out", "network.onnx", "--form", "quick"], "there is no form 'quick'"),
        (
            ["resnet20-cifar10-decef-0.667", "--out", "x.onnx", "--size", "1", "9", "9"],
            "doesn't run on an input of (1, 1,",
        ),
        (["resnet21", "--out", "network.onnx", "--pretrained"], "'resnet21' is no run's folder"),
        (["resnet20", "--out", "network.onnx", "--size", "3", "4"], "expected 3 arguments"),
        (["resnet20", "--out", "network.onnx", "--batch", "0"], "an input of (0, 3, 32, 32) is empty"),
    ],
)
def test_export_refuses(export, arguments, message):
    code, said = export(*arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_however_many_networks_are_compiled_none_runs_uncompiled(monkeypatch):
    """torch compiles one forward eight times, and runs what comes after it as it is."""
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph(*args)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    x = torch.randn(1, 3, 9, 9)
    for count in range(12):
        runner = engines.load("compile", engines.Loadable(nn.Sequential(nn.Conv2d(3, 4, 3)), x))
        with torch.no_grad():
            runner(x)
        assert len(ran) == count + 1


def test_what_is_deployed_stays_in_evaluation_mode():
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5)).eval()
    deployed = decef.deploy(convert(model, "decef", rank=8), x, engines=["eager"])
    assert not deployed.training
    nn.Sequential(deployed).train()
    assert_close(deployed(x), model(x))


@pytest.mark.parametrize("form", ["wide", "branches"])
def test_forms_run_on_one_image_without_a_batch_dimension(form):
    layer, x = DeCEFConv2d(3, 8, 3, rank=2), torch.randn(3, 8, 8)
    made = to_convolutions(nn.Sequential(layer), form)
    assert_close(made(x), layer(x))
