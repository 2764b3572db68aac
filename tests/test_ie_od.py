import math

import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from torch import nn

ie_od = load("ie_od")


def coder_names(own="", golden=""):
    """{parameter of a Coder: name of its golden input}"""
    names = [f"{place}.weight" for place in (1, 2, 4, 5, 7, 8)] + [f"{place}.bias" for place in (2, 5, 8)]
    return {own + name: f"{golden}layers.{name}" for name in names}


def norm(*channels):
    """The teacher's batch norm; channels: (weight, bias)."""
    layer = nn.BatchNorm2d(len(channels)).double()
    layer.load_state_dict({"weight": torch.tensor(channels)[:, 0], "bias": torch.tensor(channels)[:, 1]}, strict=False)
    return layer


def test_golden_distance():
    case = Case("iekd_norm_p1_negative")
    case.check(-ie_od.distance(case["factor_s"], case["factor_t"]))


def test_golden_autoencoder():
    case = Case("iekd_autoencoder_train")
    names = coder_names("encode.", "encoder.") | coder_names("decode.", "decoder.")
    case.check(F.l1_loss(case.fill(ie_od.AutoEncoder(8, 6), names)(case["x"]), case["x"]))


def test_slow_formula_of_the_inheritance():
    torch.manual_seed(0)
    ieod = ie_od.IEOD(6, norm((0.7, 0.3), (-1.1, -0.4))).double()
    g_s, g_t, factor_t = (torch.randn(3, c, 2, 2).double() for c in (6, 2, 3))
    inheritance, _ = ieod(g_s, g_t, factor_t)
    convolution = ieod.partial_distance.connector[0].weight.detach()[:, :, 0, 0]
    total = 0.0
    for c, (gamma, beta) in enumerate([(0.7, 0.3), (1.1, -0.4)]):
        u = [[float(convolution[c] @ g_s[b, :3, i, j]) for i in range(2) for j in range(2)] for b in range(3)]
        mean = sum(map(sum, u)) / 12
        std = math.sqrt(sum((value - mean) ** 2 for row in u for value in row) / 12 + 1e-5)
        x = torch.linspace(-12, 0, 1_000_001).double()
        density = (-(((x - beta) / gamma) ** 2) / 2).exp()
        m = ((x * density).sum() / density.sum()).item()
        for row, targets in zip(u, g_t[:, c].flatten(1).tolist()):
            for value, target in zip(row, targets):
                gap = (value - mean) / std - max(target, m)
                total += gap**2 * (gap > 0 or target > 0)
    assert inheritance.item() == pytest.approx(total / 3, rel=1e-5)


def test_slow_formula_of_the_exploration():
    torch.manual_seed(0)
    ieod = ie_od.IEOD(6, norm((1.0, 0.0))).double()
    g_s, g_t, factor_t = (torch.randn(3, c, 4, 4).double() for c in (6, 1, 3))
    _, exploration = ieod(g_s, g_t, factor_t)
    factor_s = ieod.encode_exp(g_s[:, 3:].clamp(min=0))
    gaps = [(f / f.norm() - g / g.norm()).abs().mean().item() for f, g in zip(factor_s, factor_t)]
    assert exploration.item() == pytest.approx(-sum(gaps) / 3, rel=1e-9)


def test_each_term_teaches_its_own_half_only():
    torch.manual_seed(0)
    ieod, g_s = ie_od.IEOD(8, norm((1.0, 0.0), (1.0, 0.5))).double(), torch.randn(4, 8, 5, 5).double().requires_grad_()
    for term, half in enumerate([[0, 1, 2, 3], [4, 5, 6, 7]]):
        terms = ieod(g_s, torch.randn(4, 2, 5, 5).double(), torch.randn(4, 4, 5, 5).double())
        (gradient,) = torch.autograd.grad(terms[term], g_s)
        assert (gradient.abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist() == half


def test_maps_of_other_sides_and_an_odd_number_of_channels():
    torch.manual_seed(0)
    ieod = ie_od.IEOD(7, norm((1.0, 0.0))).double()
    terms = ieod(torch.randn(2, 7, 4, 4).double(), torch.randn(2, 1, 8, 8).double(), torch.randn(2, 3, 8, 8).double())
    sum(terms).backward()
    assert all(p.grad.abs().max() > 0 for p in ieod.parameters())
