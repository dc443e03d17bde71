import dataclasses
import math

import pytest
import torch
from support import DIGITS, TRAIN, Memory, network, train
from torch import nn

from decef.conversion import convert
from decef.data import DATASETS, Images
from decef.layers import LAYERS, DeCEFConv2d, FactorizedConv2d
from decef.training.loop import evaluate, fit
from decef.training.optim import lr_at, make_optimizer, penalties


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_type_learns_the_digits(layer):
    model = network(layer)
    frozen = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (layer == "basisconv")
    metrics = train(model, dataclasses.replace(TRAIN, epochs=8), size=1437)
    assert [m["epoch"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["test_top1"] > 85
    assert metrics[-1]["train_loss"] < 0.5 * metrics[0]["train_loss"]
    for name, value in frozen.items():
        assert torch.equal(value, model.get_parameter(name))


def test_both_implementations_train_alike():
    config = dataclasses.replace(TRAIN, epochs=1)
    runs = [
        train(network("decef", implementation=i).double(), config, size=128) for i in ("factorized", "reconstructed")
    ]
    assert runs[0][-1]["train_loss"] == pytest.approx(runs[1][-1]["train_loss"], rel=1e-5)


def test_a_seed_repeats_bit_for_bit_and_another_does_not():
    models = [network(seed=s) for s in (0, 0, 1)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, dataclasses.replace(TRAIN, epochs=1), seed=seed)
    first, second, other = [torch.cat([p.flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_an_interrupted_run_ends_as_an_uninterrupted_one():
    config = dataclasses.replace(TRAIN, epochs=2)
    whole, state = network("decef"), Memory(stop_after=1)
    expected = train(whole, config, size=256)
    with pytest.raises(KeyboardInterrupt):
        train(network("decef"), config, state=state, size=256)
    state.stop_after = None
    resumed = network("decef", seed=99)  # what it starts with must not matter
    metrics = train(resumed, config, state=state, size=256)
    assert [m["epoch"] for m in metrics] == [2]
    assert metrics[-1]["test_loss"] == expected[-1]["test_loss"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_diverging_run_says_so():
    with pytest.raises(FloatingPointError, match=r"not finite any more from step \d+ on \(learning rate"):
        train(network(), dataclasses.replace(TRAIN, lr=1e20))


def test_validation_images_are_not_trained_on():
    images, _ = DIGITS
    trained, measured = [], []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, x):
            (trained if self.training else measured).extend(x[:, 0, 0, 0].round().int().tolist())
            return self.linear(x.flatten(1))

    metrics = []
    config = dataclasses.replace(TRAIN, epochs=2, validation=0.25, batch_size=1)
    pixels = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 1, 8, 8)
    numbered = Images(pixels, images.labels[:80], std=(1 / 255,))
    test = Images(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8), images.labels[:4], std=(1 / 255,))
    fit(Spy(), numbered, test, config, seed=0, saved=None, save=Memory().save, on_epoch=metrics.append)
    assert len(set(trained)) == 60
    assert set(measured) == {*range(80)} - set(trained) | {200}
    assert metrics[-1]["val_loss"] > 0


def test_evaluate_against_a_hand_count():
    model = network().eval()
    _, test = DIGITS
    known = DATASETS["digits"]
    logits = model((test.images / 255 - torch.tensor(known.mean)) / torch.tensor(known.std))
    loss, top1 = evaluate(model, test)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == test.labels).double().mean().item())
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-4)


def test_learning_rates():
    onecycle = dataclasses.replace(TRAIN, lr=1.0, warmup=0.2)
    assert [lr_at(onecycle, d) for d in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    cosine = dataclasses.replace(onecycle, schedule="cosine", warmup=0.0)
    assert [lr_at(cosine, d) for d in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert lr_at(cosine, 0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    step = dataclasses.replace(onecycle, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [lr_at(step, d) for d in (0, 0.49, 0.5, 0.8)] == pytest.approx([1, 1, 0.1, 0.01])


def test_images_are_smaller_where_the_schedule_says_so():
    sizes = []
    model = network()
    model.conv1.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[2]) if module.training else None
    )
    train(model, dataclasses.replace(TRAIN, scales=((0.5, 0.5), (0.75, 0.75))), size=64)
    assert sizes == [4, 4, 6, 8]


def test_orthogonality_holds_the_filters_and_takes_their_weight_decay():
    config = dataclasses.replace(TRAIN, weight_decay=0.01)
    model = network("decef")
    groups = make_optimizer(model, config, 0.1).param_groups
    free = list(groups[1]["params"])
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]
    assert len(free) == sum(1 for name, _ in model.named_parameters() if name.endswith("eigenfilters"))

    def drift(orthogonality):
        model = network("decef")
        train(model, config, size=256, orthogonality=orthogonality)
        return sum(m.orthogonality().item() for m in model.modules() if hasattr(m, "orthogonality"))

    assert drift(0.1) < 0.2 * drift(0.0)


def test_the_2021_basis_keeps_its_weight_decay_beside_the_penalty():
    config = dataclasses.replace(TRAIN, weight_decay=0.01)
    assert [g["weight_decay"] for g in make_optimizer(network("basisconv2021"), config, 0.1).param_groups] == [0.01]


@pytest.mark.parametrize("layer", ["decef", "cpac", "rank1"])
def test_kernel_decay_is_the_dense_networks(layer):
    """The factors get the gradient of weight_decay / 2 ||W||^2 of the composed kernel, and no other decay."""
    config = dataclasses.replace(TRAIN, decay="kernel", weight_decay=0.02)
    model = network(layer).double()
    layers = [m for m in model.modules() if isinstance(m, FactorizedConv2d)]
    factors = [p for m in layers for p in m.factors().values()]
    expected = torch.autograd.grad(0.02 / 2 * sum(m.compose().square().sum() for m in layers), factors)
    torch.testing.assert_close(torch.autograd.grad(penalties(model, config), factors), expected)
    groups = make_optimizer(model, config).param_groups
    decayed = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {decayed[p] for p in factors} == {0.0}
    assert {decayed[p] for p in set(decayed) - set(factors)} == {0.02}
    by_factors = dataclasses.replace(config, decay="factors")
    assert penalties(model, by_factors) == 0
    assert len(make_optimizer(model, by_factors).param_groups) == 1


def test_adam_where_it_is_asked_for():
    optimizer = make_optimizer(network("decef"), dataclasses.replace(TRAIN, adam=True, weight_decay=0.01), 0.1)
    assert type(optimizer) is torch.optim.Adam
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (TRAIN.lr, 0.01),
        (TRAIN.lr, 0.0),
    ]


def test_momentum_and_nesterov_are_those_asked_for():
    (group,) = make_optimizer(network(), dataclasses.replace(TRAIN, momentum=0.8, nesterov=False)).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.8, False)


def test_shared_factors_are_decayed_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    small = convert(model, "decef", rank=4)
    config = dataclasses.replace(TRAIN, decay="kernel", weight_decay=0.02)
    torch.testing.assert_close(penalties(small, config), 0.01 * model[0].weight.square().sum())
    once = small[0].orthogonality()
    torch.testing.assert_close(penalties(small, TRAIN, 0.5), 0.5 * once)


def test_factors_that_are_computed_are_not_taken_for_shared():
    layers = [DeCEFConv2d(4, 4, 3, rank=2) for _ in range(6)]
    for name in ("eigenfilters", "coefficients"):
        for layer in layers:
            nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())
    whole = 0.5 * sum(layer.orthogonality() for layer in layers)
    torch.testing.assert_close(penalties(nn.Sequential(*layers), TRAIN, 0.5), whole)


def test_kernel_decay_trains_another_network():
    def kernels(decay):
        model = network("cpac")
        train(model, dataclasses.replace(TRAIN, decay=decay, weight_decay=0.05, epochs=2), size=256)
        return torch.cat([m.compose().flatten() for m in model.modules() if isinstance(m, FactorizedConv2d)])

    assert not torch.allclose(kernels("factors"), kernels("kernel"), rtol=0.01)


def test_bf16_trains_too():
    model, seen = network("rank1"), set()
    model.conv1.register_forward_hook(lambda module, args, y: seen.add(y.dtype) if module.training else None)
    (images, test), config = DIGITS, dataclasses.replace(TRAIN, precision="bf16", epochs=1, batch_size=8)
    few = images.subset(slice(0, 8)), test.subset(slice(0, 8))  # bf16 may be emulated
    fit(model, *few, config, seed=0, saved=None, save=Memory().save, on_epoch=lambda metrics: None)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "train.epochs=0 must be a whole number, at least 1"),
        ({"epochs": "ten"}, "train.epochs='ten' must be a whole number"),
        ({"lr": 0}, "train.lr=0 must be a number above 0"),
        ({"lr": "fast"}, "train.lr='fast' must be a number"),
        ({"schedule": "cyclic"}, "train.schedule='cyclic' must be one of onecycle, cosine, step"),
        ({"momentum": 0.0}, "train.nesterov=True must be false when momentum is 0"),
        ({"scales": ((0.5, 2),)}, "train.scales"),
        ({"validation": 1.0}, "train.validation=1.0"),
        ({"decay": "frobenius"}, "train.decay='frobenius' must be null or one of factors, kernel"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAIN, **change)
