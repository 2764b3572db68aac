import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from torch import nn

cat_kd = load("cat_kd")
import common


@pytest.mark.parametrize("name", ["plain_r2", "plain_r2_sizes_differ", "norm_r4", "norm_r2", "binarized"])
def test_golden(name):
    case = Case(f"catkd_{name}")
    m_t = case["cam_t"]
    if case.hyper.get("binarize"):  # an ablation of the authors that the method does not offer
        m_t = (m_t > m_t.abs().mean((2, 3), keepdim=True)).double()
    case.check(cat_kd.cat_loss(case["cam_s"], m_t, case.hyper["resolution"], case.hyper["normalize"]))


@pytest.mark.parametrize("name", ["plain", "norm"])
def test_golden_total(name):
    case = Case(f"catkd_total_{name}")
    m_s, m_t = (cat_kd.class_activation_maps(case[side], case[f"fc_{side}.weight"]) for side in "st")
    for own, golden in (m_s, "cam_s"), (m_t, "cam_t"), (m_s.mean((2, 3)), "logits_s"):
        assert torch.allclose(own, case.array(case.outputs[golden]), rtol=1e-9)
    loss_ce = F.cross_entropy(m_s.mean((2, 3)), case["target"])
    loss_cat = cat_kd.cat_loss(m_s, m_t, case.hyper["resolution"], case.hyper["normalize"])
    case.check(case.hyper["ce_weight"] * loss_ce + case.hyper["cat_weight"] * loss_cat)


@pytest.mark.parametrize("name", common.NETWORKS)
def test_mean_of_the_maps_is_the_logits_without_bias(name):
    torch.manual_seed(0)
    net = common.build(name, 7).double().eval()
    head = common.classifier(net)
    nn.init.normal_(head.bias)
    with torch.no_grad():
        z, features = net(torch.randn(2, 3, 32, 32).double())
        m = cat_kd.class_activation_maps(features.last, head.weight)
    assert torch.allclose(m.mean((2, 3)), z - head.bias)


def test_normalize_makes_the_scale_of_a_class_irrelevant():
    torch.manual_seed(0)
    m_s, m_t = torch.randn(2, 4, 5, 8, 8)
    scaled = m_s * torch.arange(1, 6)[:, None, None]
    assert cat_kd.cat_loss(scaled, m_t, 2, True).item() == pytest.approx(cat_kd.cat_loss(m_s, m_t, 2, True).item(), rel=1e-5)
    assert cat_kd.cat_loss(scaled, m_t, 2, False).item() > cat_kd.cat_loss(m_s, m_t, 2, False).item()
    assert cat_kd.cat_loss(m_s, m_s, 2, True).item() == 0
