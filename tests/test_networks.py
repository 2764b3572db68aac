"""The 22 networks against the published implementation's numbers, and what every network must do."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import GOLDEN, common, same, snapshot
from torch import nn

MODELS = json.loads((GOLDEN / "models.json").read_text())["networks"]
ARRAYS = np.load(GOLDEN / "models.npz")
OURS = {"ResNet50": "resnet50", "MobileNetV2": "mobilenetv2", "ShuffleV1": "shufflenetv1", "ShuffleV2": "shufflenetv2"}
for model in MODELS:
    model["own_name"] = OURS.get(model["name"], model["name"])
TRAINED = [model for model in MODELS if "train" in model]


def name_of(model):
    return model["own_name"]


def images(n):
    """The images of the golden rule, (n, 3, 32, 32) float64."""
    n, c, y, x = np.meshgrid(np.arange(n), np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    waves = np.sin(0.2 * (n + 1) * x + 0.15 * (c + 1) * y + n) + 0.5 * np.cos(0.1 * (n + 2) * (x - y) + c)
    return torch.from_numpy(waves + 0.4 * (n - 0.5))


def golden_net(model):
    """The network in float64 with the weights of the golden rule."""
    net = common.build(model["own_name"], 100).double()
    i = 0
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        k = torch.arange(value.numel())
        u = ((7 * k * k + (2 * i + 3) * k + 11 * i) % 10007).double() / 10007 - 0.5
        if value.dim() >= 2:
            u = model["gain"] * (24 / (value.numel() / len(value))) ** 0.5 * u
        elif name.endswith("running_var"):
            u = 1 + 0.5 * u
        elif name.endswith(".weight"):
            u = 1 + 0.4 * u
        else:
            u = 0.2 * u
        value.copy_(u.reshape(value.shape))
        i += 1
    assert i == model["n_float_tensors"]
    return net


def close(own, golden):
    return torch.allclose(torch.as_tensor(own), torch.as_tensor(golden, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def matches(tensor, golden):
    probe = tensor.flatten()[[j * (tensor.numel() - 1) // 7 for j in range(8)]]
    moments = [tensor.mean(), tensor.std(), tensor.min(), tensor.max()]
    return close(probe, golden["probe"]) and close(torch.stack(moments), [golden[key] for key in ("mean", "std", "min", "max")])


def test_all_22_are_here():
    assert sorted(map(name_of, MODELS)) == sorted(common.NETWORKS)


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_golden(model):
    net = golden_net(model).eval()
    assert [[name, list(value.shape)] for name, value in net.state_dict().items()] == model["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == model["params"]
    with torch.no_grad():
        logits, f = net(images(2))
    assert close(logits, ARRAYS[model["logits"]])
    assert close(f.pooled, ARRAYS[model["pooled"]])
    for own, golden in ([*f.maps, f.pooled], model["feats"]), ([*f.preacts, f.pooled], model["preact_feats"]):
        assert [list(tensor.shape) for tensor in own] == [entry["shape"] for entry in golden]
        for place, (tensor, entry) in enumerate(zip(own, golden)):
            assert matches(tensor, entry), place
    assert torch.allclose(f.last.mean((2, 3)), f.pooled, rtol=1e-12, atol=1e-12)
    *_, weight, bias = net.parameters()
    assert torch.allclose(f.pooled @ weight.T + bias, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", TRAINED, ids=name_of)
def test_golden_training_step(model):
    net, golden = golden_net(model).train(), model["train"]
    logits, _ = net(images(golden["images"]))
    loss = F.cross_entropy(logits, torch.tensor(golden["labels"]))
    loss.backward()
    assert close(logits.detach(), ARRAYS[golden["logits"]])
    assert loss.item() == pytest.approx(golden["cross_entropy"], rel=1e-9)
    norms = {name: p.grad.norm() for name, p in net.named_parameters()}
    assert torch.stack(list(norms.values())).norm().item() == pytest.approx(golden["grad_l2_all"], rel=1e-8)
    for name, norm in golden["grad_l2"].items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-8), name
    state = net.state_dict()
    for name, value in golden["running_after"].items():
        assert state[name].mean().item() == pytest.approx(value["mean"], rel=1e-9), name
        assert state[name].flatten()[0].item() == pytest.approx(value["first"], rel=1e-9), name


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_float32_channels_last(model):
    """Forward and backward as in training: every parameter learns, every running statistic moves exactly once."""
    torch.manual_seed(0)
    net = common.build(model["own_name"], 10)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.dim() == 4)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    inputs = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, x: inputs.setdefault(norm, []).append(x[0].detach()))
    logits, f = net(x)
    assert logits.shape == (4, 10)
    for tensor in (logits, *f.maps, *f.preacts, f.last, f.pooled):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    torch.testing.assert_close(f.last.mean((2, 3)), f.pooled)
    for norm in norms:
        (seen,) = inputs[norm]
        torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert norm.num_batches_tracked == 1
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


FAMILIES = ["resnet8x4", "resnet50", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_preacts(name):
    torch.manual_seed(0)
    net = common.build(name, 10).eval()
    with torch.no_grad():
        _, f = net(torch.randn(2, 3, 32, 32))
    pairs = list(zip(f.maps, f.preacts))
    assert torch.equal(*pairs[0])
    for own, preact in pairs[1:]:
        if name == "mobilenetv2":
            assert torch.equal(own, preact) and own.min() < 0
        elif name == "shufflenetv2":
            assert torch.equal(F.channel_shuffle(preact.relu(), 2), own)
        elif name.startswith("wrn"):
            assert own.min() < 0 and preact.min() < 0 and not torch.equal(own, preact)
        else:
            assert torch.equal(preact.relu(), own) and preact.min() < 0
    if name.startswith("wrn"):
        assert torch.equal(f.preacts[-1].relu(), f.last)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8", "mobilenetv2"])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(name, training):
    net = common.build(name, 10).train(training)
    before = snapshot(net)
    shapes = common.shapes(net)
    assert net.training == training
    assert all(module.training == training for module in net.modules())
    assert same(before, snapshot(net))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    golden = next(model for model in MODELS if model["own_name"] == name)
    assert [list(shape) for shape in shapes.maps] == [entry["shape"][1:] for entry in golden["feats"][:-1]]
    assert [list(shape) for shape in shapes.preacts] == [entry["shape"][1:] for entry in golden["preact_feats"][:-1]]
    assert [shapes.pooled] == golden["feats"][-1]["shape"][1:]
    assert shapes.last[0] == shapes.pooled


def kurtosis(z):
    """3 for normal values, 1.8 for uniform ones."""
    return (z**4).mean() / (z**2).mean() ** 2


def check_spread(tensors, expected_kurtosis):
    """Each (values, standard deviation) has mean 0 and that deviation within chance, and all together have the given shape."""
    standardised = []
    for value, std in tensors:
        z = value.detach().flatten()[:100_000].double() / std
        assert abs(z.mean()) < 5 / len(z) ** 0.5
        assert abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5
        standardised.append(z)
    assert kurtosis(torch.cat(standardised)).item() == pytest.approx(expected_kurtosis, abs=0.1)


def fan_in(layer):
    return layer.weight[0].numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_initialisation(name):
    torch.manual_seed(5)
    net = common.build(name, 100)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    (linear,) = (module for module in net.modules() if isinstance(module, nn.Linear))
    if name.startswith("shufflenet"):  # uniform within 1 / sqrt(fan_in)
        check_spread([(conv.weight, (3 * fan_in(conv)) ** -0.5) for conv in convs], 1.8)
    else:
        check_spread([(conv.weight, (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5) for conv in convs], 3)
    if name.startswith(("vgg", "mobilenet")):
        check_spread([(linear.weight, 0.01)], 3)
    else:
        check_spread([(linear.weight, (3 * fan_in(linear)) ** -0.5)], 1.8)
    if name.startswith(("vgg", "mobilenet", "wrn")):
        assert not linear.bias.any()
    else:
        assert linear.bias.any() and linear.bias.abs().max() <= fan_in(linear) ** -0.5
    assert all(conv.bias is None or not conv.bias.any() for conv in convs)
    assert (convs[0].bias is not None) == name.startswith("vgg")
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.weight == 1).all() and not norm.bias.any()
        assert (norm.running_var == 1).all() and not norm.running_mean.any()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv1"])
@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "module.", "no counters"])
def test_checkpoints_load(name, form, tmp_path):
    torch.manual_seed(1)
    trained = common.build(name, 10)
    trained(torch.randn(4, 3, 32, 32))  # moves the running statistics
    expected = snapshot(trained)
    state = copy.copy(expected)
    if form == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "no counters":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if form in ("model", "module."):
        state = {"model": state, "epoch": 240, "best_acc": torch.tensor(71.0)}
    if form == "state_dict":
        state = {"state_dict": state}
    torch.save(state, tmp_path / "net.pth")
    net = common.build(name, 10)
    common.load_weights(net, tmp_path / "net.pth")
    if form == "no counters":
        expected = {key: torch.tensor(0) if key.endswith("num_batches_tracked") else value for key, value in expected.items()}
    assert same(snapshot(net), expected)


@pytest.mark.parametrize("classes", [10, 100])
def test_build_is_seeded_and_has_the_asked_classes(classes):
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(common.build("resnet8", classes))
    assert same(snapshot(nets[0]), snapshot(nets[1])) and not same(snapshot(nets[0]), snapshot(nets[2]))
    assert nets[0](torch.zeros(2, 3, 32, 32))[0].shape == (2, classes)
