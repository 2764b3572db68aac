"""The 22 networks against the published implementation's numbers, torchvision's networks, and what every network must do."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from golden import GOLDEN, load
from running import common, same, snapshot
from torch import nn

MODELS = json.loads((GOLDEN / "models.json").read_text())["networks"]
ARRAYS = np.load(GOLDEN / "models.npz")
OURS = {"ResNet50": "resnet50", "MobileNetV2": "mobilenetv2", "ShuffleV1": "shufflenetv1", "ShuffleV2": "shufflenetv2"}
for model in MODELS:
    model["own_name"] = OURS.get(model["name"], model["name"])
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model["own_name"])
FAMILIES = ["resnet8x4", "resnet50", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


def images(n):
    """The images of the golden rule, (n, 3, 32, 32) float64."""
    n, c, y, x = np.meshgrid(np.arange(n), np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    waves = np.sin(0.2 * (n + 1) * x + 0.15 * (c + 1) * y + n) + 0.5 * np.cos(0.1 * (n + 2) * (x - y) + c)
    return torch.from_numpy(waves + 0.4 * (n - 0.5))


def golden_net(model):
    """The network in float64 with the weights of the golden rule."""
    net = common.build(model["own_name"], 100).double()
    values = [(name, value) for name, value in net.state_dict().items() if value.is_floating_point()]
    assert len(values) == model["n_float_tensors"]
    for i, (name, value) in enumerate(values):
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
    return net


def close(own, golden):
    return torch.allclose(torch.as_tensor(own), torch.as_tensor(golden, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def matches(tensor, golden):
    probe = tensor.flatten()[[j * (tensor.numel() - 1) // 7 for j in range(8)]]
    moments = [tensor.mean(), tensor.std(), tensor.min(), tensor.max()]
    return close(probe, golden["probe"]) and close(torch.stack(moments), [golden[key] for key in ("mean", "std", "min", "max")])


@every_model
def test_golden(model):
    net = golden_net(model).eval()
    assert [[name, list(value.shape)] for name, value in net.state_dict().items()] == model["state_dict"]
    assert common.count(net) == model["params"]
    with torch.no_grad():
        logits, f = net(images(2))
    assert close(logits, ARRAYS[model["logits"]])
    assert close(f.pooled, ARRAYS[model["pooled"]])
    for own, golden in ([*f.maps, f.pooled], model["feats"]), ([*f.preacts, f.pooled], model["preact_feats"]):
        assert [list(tensor.shape) for tensor in own] == [entry["shape"] for entry in golden]
        for place, (tensor, entry) in enumerate(zip(own, golden)):
            assert matches(tensor, entry), place
    assert torch.allclose(f.last.mean((2, 3)), f.pooled, rtol=1e-12, atol=1e-12)
    head = common.classifier(net)
    assert torch.allclose(f.pooled @ head.weight.T + head.bias, logits, rtol=1e-9, atol=1e-9)
    shapes = common.feature_shapes(net, 32)
    assert [shapes.maps, shapes.preacts] == [[tuple(x.shape[1:]) for x in kind] for kind in (f.maps, f.preacts)]
    assert (shapes.last, shapes.pooled) == (tuple(f.last.shape[1:]), f.pooled.shape[1])


@every_model
def test_stage_norms_are_the_golden_ones(model, capsys):
    net = common.build(model["own_name"], 10)
    if model["bn_before_relu"] is None:
        with pytest.raises(SystemExit) as exit:
            common.stage_norms(net)
        assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
        return
    names = {module: name for name, module in net.named_modules()}
    norms = common.stage_norms(net)
    assert [names[norm] for norm in norms] == model["bn_before_relu"]
    seen = {}
    for norm in norms:
        norm.register_forward_hook(lambda norm, x, y: seen.update({norm: y}))
    with torch.no_grad():
        _, f = net.eval()(torch.randn(2, 3, 32, 32))
    assert [seen[norm].shape for norm in norms] == [preact.shape for preact in f.preacts[1:]]


@pytest.mark.parametrize("model", [m for m in MODELS if "train" in m], ids=lambda model: model["own_name"])
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


@every_model
def test_float32_channels_last(model):
    """Forward and backward as in training: every parameter learns, every running statistic moves exactly once."""
    torch.manual_seed(0)
    net = common.build(model["own_name"], 10)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.dim() == 4)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    inputs = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, x: inputs.setdefault(norm, []).append(x[0].detach()))
    logits, f = net(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))
    assert logits.shape == (4, 10)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in (logits, *f.maps, *f.preacts, f.last))
    for norm in norms:
        (seen,) = inputs[norm]
        torch.testing.assert_close(norm.running_mean, 0.1 * seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [32, 64])
def test_maps_and_preacts(name, size):
    torch.manual_seed(0)
    net = common.build(name, 10).eval()
    with torch.no_grad():
        _, f = net(torch.randn(2, 3, size, size))
    pairs = list(zip(f.maps, f.preacts, strict=True))
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
    at_32 = common.feature_shapes(net, 32)
    expected = [side * size // 32 for _, side, _ in at_32.maps]
    if name == "vgg8" and size == 64:
        expected[-1] //= 2  # one more max pool
    assert [x.shape[2] for x in f.maps] == expected
    assert f.pooled.shape == (2, at_32.pooled)
    torch.testing.assert_close(f.last.mean((2, 3)), f.pooled)


def test_a_look_at_the_shapes_changes_nothing():
    for training in True, False:
        net = common.build("resnet8", 10).train(training)
        before, state = snapshot(net), torch.random.get_rng_state()
        common.feature_shapes(net, 64)
        common.classifier(net)
        assert all(module.training == training for module in net.modules())
        assert same(before, snapshot(net)) and torch.equal(state, torch.random.get_rng_state())
        assert all(p.grad is None and p.requires_grad for p in net.parameters())


def check_spread(tensors, expected_kurtosis):
    """Each (values, standard deviation) has mean 0 and that deviation within chance, and all together have the given shape."""
    standardised = []
    for value, std in tensors:
        z = value.detach().flatten()[:100_000].double() / std
        assert abs(z.mean()) < 5 / len(z) ** 0.5
        assert abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5
        standardised.append(z)
    z = torch.cat(standardised)  # kurtosis: 3 if normal, 1.8 if uniform
    assert ((z**4).mean() / (z**2).mean() ** 2).item() == pytest.approx(expected_kurtosis, abs=0.1)


def fan_in(layer):
    return layer.weight[0].numel()


@pytest.mark.parametrize("name", FAMILIES)
def test_initialization(name):
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
    assert linear.bias.any() != name.startswith(("vgg", "mobilenet", "wrn"))
    assert all(conv.bias is None or not conv.bias.any() for conv in convs)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.weight == 1).all() and not norm.bias.any()


@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "module.", "no counters"])
def test_checkpoints_load(form, tmp_path):
    torch.manual_seed(1)
    trained = common.build("wrn_16_1", 10)
    trained(torch.randn(4, 3, 32, 32))  # moves the running statistics
    expected = snapshot(trained)
    state = copy.copy(expected)
    if form == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "no counters":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        expected |= {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    if form in ("model", "module."):
        state = {"model": state, "epoch": 240, "best_acc": torch.tensor(71.0)}
    if form == "state_dict":
        state = {"state_dict": state}
    torch.save(state, tmp_path / "net.pth")
    net = common.build("wrn_16_1", 10)
    common.load_weights(net, tmp_path / "net.pth")
    assert same(snapshot(net), expected)


# torchvision's networks


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "swin_t"])
def test_torchvision(name):
    torch.manual_seed(0)
    net = common.build(f"torchvision.{name}", 10)
    original = torchvision.models.get_model(name, num_classes=10)
    assert {*net.state_dict()} == {*original.state_dict()}
    original.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert net.training and all(module.training for module in net.modules())
    with torch.no_grad():
        logits, f = net.eval()(x)
        torch.testing.assert_close(logits, original.eval()(x))
    linear = [module for module in original.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(linear(f.pooled), logits)
    if name != "swin_t":  # its maps are (B, H, W, C)
        sides = [x.shape[2] for x in f.maps]
        assert sides == sorted({*sides}, reverse=True) and len(sides) > 2
        assert f.last is f.maps[-1] and all(m.shape == p.shape for m, p in zip(f.maps, f.preacts, strict=True))
        assert all(torch.equal(p, m) or torch.equal(p.relu(), m) for m, p in zip(f.maps, f.preacts))
    torch.manual_seed(1)
    trained = net.train()(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(trained, original.train()(x))  # dropout and batch statistics as they are


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_16"])  # no linear classifier; no maps
def test_torchvision_networks_that_are_refused(name, capsys):
    with pytest.raises(SystemExit) as exit:
        common.build(f"torchvision.{name}", 10)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and name in error and error.count("\n") == 1


def test_torchvision_resnet18():
    net = common.build("torchvision.resnet18", 10).eval()
    with torch.no_grad():
        _, f = net(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in f.maps] == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert all(torch.equal(p.relu(), m) and p.min() < 0 for m, p in zip(f.maps, f.preacts))
    names = {module: name for name, module in net.named_modules()}
    assert [names[norm] for norm in common.stage_norms(net)] == [f"layer{k}.1.bn2" for k in (1, 2, 3, 4)]
    assert common.classifier(net) is net.get_submodule("fc")
    torch.testing.assert_close(f.last.mean((2, 3)), f.pooled)
    pruned = load("r2kd").pruned(net, 0.0, "running")  # a deepcopy of such a network forgets its mode
    assert not pruned.training and torch.equal(pruned(torch.ones(1, 3, 64, 64))[0], net(torch.ones(1, 3, 64, 64))[0])


def test_a_network_without_the_usual_classifier(capsys):
    with pytest.raises(SystemExit) as exit:
        common.classifier(common.build("torchvision.mobilenet_v3_small", 10))
    assert exit.value.code == 2 and "classifier" in capsys.readouterr().err
