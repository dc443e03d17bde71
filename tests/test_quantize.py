"""Networks in fewer bits: near the original, by how much is said, and what is quantised is counted."""

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from test_deploy import small
from torch import nn
from torch.testing import assert_close

import decef
from decef.inference import engines
from decef.inference.deploy import Deployed, Deployer
from decef.inference.engines import Loadable, load, to_onnx
from decef.inference.export import export
from decef.inference.forms import to_convolutions
from decef.inference.quantize import calibration_inputs, quantize

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shared():
    """A network, its deployer, what that gave in 8 bits, and all that was exported for that."""
    counted, export = [], engines._export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "_export", lambda *given: counted.append(given) or export(*given))
        model = small("decef").eval()
        deployer = Deployer(model, X)
        deployer.deploy(["onnxruntime"])
        eight = deployer.deploy(["onnxruntime"], "int8", [X])
    return model, deployer, eight, counted


@pytest.mark.parametrize("layer", ["conv2d", "decef"])
def test_eight_bits_are_near_the_network(layer, shared):
    model, _, deployed, _ = shared
    if layer == "conv2d":
        model = small(layer).eval()
        deployed = decef.deploy(model, X, engines=["onnxruntime"], precision="int8", calibration=[X])
    expected = model(X).detach()
    error = (deployed(X) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.2
    assert deployed.error == pytest.approx(error.item(), rel=1e-3)
    assert deployed.precision == "int8"
    assert set(deployed.forms) == (set() if layer == "conv2d" else {"conv1", "conv2", "conv3"})


def test_the_range_is_that_of_the_calibration():
    network = to_convolutions(small("conv2d"))
    near, far = (load("onnxruntime", Loadable(network, X), "int8", [scale * X]) for scale in (1.0, 30.0))
    expected = network(X)
    assert (near(X) - expected).norm() < 0.5 * (far(X) - expected).norm()


def test_it_is_calibrated_on_a_tensor_a_list_or_a_loader_alike(caplog):
    model, images = small("conv2d"), torch.cat([X, 3 * X, X[:1]])
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(5)), batch_size=4)
    for given in (images, [X, 3 * X], labelled):
        for one, other in zip(calibration_inputs(given, X), [X, 3 * X], strict=True):
            assert torch.equal(one, other)
    for sizes in ((3, 2), (1, 1, 1, 1, 1), (2, 0, 3)):  # of five one is left over
        odd = calibration_inputs(iter(images.split(sizes)), X)
        assert [len(one) for one in odd] == [2, 2]
        assert torch.equal(torch.cat(odd), images[:4])
    whole = decef.deploy(model, X, precision="int8", calibration=labelled)(X)
    assert "calibrated on the example alone" not in caplog.text
    alone = decef.deploy(model, X, precision="int8")(X)
    assert not torch.equal(alone, whole)
    assert "calibrated on the example alone" in caplog.text


def test_of_a_loader_no_more_is_read_than_calibrating_takes():
    batches = iter([X.repeat(200, 1, 1, 1)] * 5)  # of 400 images
    assert sum(map(len, calibration_inputs(batches, X))) == 1200
    assert len(list(batches)) == 2
    assert sum(map(len, calibration_inputs(X.repeat(1000, 1, 1, 1), X))) == 2000


@pytest.mark.parametrize(("saturates", "largest"), [(False, 127), (True, 64)])
def test_weights_have_seven_bits_where_eight_would_overflow(monkeypatch, saturates, largest):
    monkeypatch.setattr("decef.inference.quantize.int8_saturates", lambda: saturates)
    proto = quantize(to_onnx(to_convolutions(small("conv2d")), X), [X])
    weights = [onnx.numpy_helper.to_array(one) for one in proto.graph.initializer if len(one.dims) == 4]
    assert {str(one.dtype) for one in weights} == {"int8"}
    assert max(abs(one.astype(int)).max() for one in weights) == largest


def quantized_share(proto):
    """For each kind of operator that 8 bits can make faster: how many run in 8 bits, and how many there are."""
    kinds = ("Conv", "Gemm", "Add")
    dequantized = {out for node in proto.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    total = Counter()
    eight = Counter()
    for node in proto.graph.node:
        if node.op_type in kinds:
            total[node.op_type] += 1
            eight[node.op_type] += all(name in dequantized for name in node.input if name)
    return {kind: (eight[kind], total[kind]) for kind in kinds if total[kind]}


@pytest.mark.parametrize(("layer", "convolutions"), [("conv2d", 3), ("decef", 6)])
def test_all_that_costs_time_is_quantised(layer, convolutions):
    proto = to_onnx(to_convolutions(small(layer)), X)
    assert quantized_share(proto) == {"Conv": (0, convolutions), "Add": (0, 1), "Gemm": (0, 1)}
    assert quantized_share(quantize(proto, [X])) == {
        "Conv": (convolutions, convolutions),
        "Add": (1, 1),
        "Gemm": (1, 1),
    }
    with pytest.raises(ValueError, match="a batch to calibrate on"):
        quantize(proto, [])


def test_sixteen_bits_in_torch():
    model = small("cpac").eval()
    deployed = decef.deploy(model, X, engines=["eager"], precision="bf16")
    assert deployed(X).dtype == torch.float32
    assert 1e-4 < deployed.error < 0.1
    assert next(model.parameters()).dtype == torch.float32


def test_several_precisions_share_what_is_exported(shared):
    model, deployer, eight, counted = shared
    assert sum(len(inputs) > 1 for _, inputs, *_ in counted) == 1  # of the layers, side by side
    exported = [tuple(network.state_dict()) for network, *_ in counted]
    assert len(set(exported)) == len(exported)
    assert deployer.apply(eight.choice, [30 * X]).error > eight.error
    sixteen = deployer.deploy(["eager"], "bf16")
    full = deployer.deploy(["eager"])
    assert sixteen.error > 1e-4 > full.error
    assert_close(full(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("engine", "precision"), [("eager", "fp32"), ("onnxruntime", "int8")])
def test_a_choice_is_stored_and_made_again_without_measuring(tmp_path, monkeypatch, engine, precision, shared):
    model, _, deployed, _ = shared
    if precision == "fp32":
        deployed = decef.deploy(model, X, engines=[engine])
    deployed.save(tmp_path / "choice.json")
    monkeypatch.setattr("decef.inference.deploy.interleaved_times", None)
    again_on = {} if precision == "fp32" else {"calibration": [X]}
    again = Deployed.load(tmp_path / "choice.json", model, X, **again_on)
    assert (again.forms, again.arrangement, again.times) == (deployed.forms, deployed.arrangement, deployed.times)
    assert torch.equal(again(X), deployed(X))
    assert again.error == deployed.error
    with pytest.raises(ValueError, match=r"calibration has no 2 inputs|would do nothing in fp32"):
        Deployed.load(tmp_path / "choice.json", model, X, calibration=[X[:1]])
    with pytest.raises(ValueError, match="for a network with other low-rank layers"):
        Deployed.load(tmp_path / "choice.json", small("conv2d"), X, **again_on)
    if again_on:
        with pytest.raises(ValueError, match="int8 needs the inputs that it was calibrated on again"):
            Deployed.load(tmp_path / "choice.json", model, X)
    (tmp_path / "choice.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged or no file of Deployed\.save"):
        Deployed.load(tmp_path / "choice.json", model, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "there is no precision 'int4'; there are fp32, bf16, int8"),
        ({"precision": "int8", "engines": ["eager"]}, "engine 'eager' does not run in int8: onnxruntime can"),
        ({"precision": "bf16", "engines": ["onnxruntime"]}, "does not run in bf16: eager, compile can"),
        ({"calibration": [X]}, "calibration would do nothing in fp32"),
        (
            {"precision": "int8", "calibration": X[:, :2]},
            r"calibration is \(2, 2, 9, 9\); it must be like the example, \(2, 3, 9, 9\)",
        ),
        ({"precision": "int8", "calibration": ["x"]}, "calibration is str; it must be like the example"),
        ({"precision": "int8", "calibration": [X.byte()]}, "calibration is torch.uint8: normalise as the network"),
        ({"precision": "int8", "calibration": []}, "calibration has no 2 inputs, which is the example's batch size"),
        ({"precision": "int8", "calibration": X[:1]}, "calibration has no 2 inputs"),
    ],
)
def test_what_is_refused_before_anything_runs(options, message):
    class Late(nn.Module):
        def forward(self, x):
            raise AssertionError("it ran")

    with pytest.raises(ValueError, match=message):
        decef.deploy(Late(), X, **options)


def test_a_file_in_eight_bits_is_near_the_network(tmp_path):
    model, images, path = small("decef").eval(), torch.cat([X, 2 * X]), tmp_path / "network.onnx"
    said = export(model, path, X.shape, form="factorized", calibration=images)
    assert "in 8 bits: its output for an input of calibration is 0." in said[0]
    proto = onnx.load_model(path)
    assert quantized_share(proto)["Conv"][0] >= 3
    (output,) = onnxruntime.InferenceSession(path).run(None, {"input": X.numpy()})
    expected = model(X).detach()
    assert 1e-4 < (torch.from_numpy(output) - expected).norm() / expected.norm() < 0.2
    export(model, tmp_path / "free.onnx", X.shape, form="factorized", calibration=images, dynamic_batch=True)
    session = onnxruntime.InferenceSession(tmp_path / "free.onnx")
    assert session.run(None, {"input": torch.cat([X, X, X]).numpy()})[0].shape == (6, 5)
    with pytest.raises(ValueError, match=r"8 bits are for \.onnx files"):
        export(model, tmp_path / "network.pt2", X.shape, calibration=images)


def test_eight_bits_as_typed(call, tmp_path):
    torch.save(torch.randn(4, 3, 32, 32), tmp_path / "images.pt")
    given = "resnet20-cifar10-decef-0.667", "--form", "reconstructed", "--out", tmp_path / "n.onnx", "--int8"
    done = call("export.py", *given, tmp_path / "images.pt")
    assert done.returncode == 0, done.stderr
    assert "in 8 bits: " in done.stdout
    assert (tmp_path / "n.onnx").stat().st_size < 0.5e6  # the dense network's weights are 1.1 MB in fp32
    torch.save({"images": 1}, tmp_path / "images.pt")
    done = call("export.py", *given, tmp_path / "images.pt")
    assert (done.returncode, "must hold a tensor (N, C, H, W), not dict" in done.stderr) == (2, True)
