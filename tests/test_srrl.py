import pytest
import torch
from golden import Case, load
from torch import nn

srrl = load("srrl")


def check(case, names, f_s, f_t, classifier):
    """The sum of both terms against a golden case. The golden gradients include those of the frozen classifier."""
    loss = srrl.SRRL(case[f_s].shape[1], case[f_t].shape[1])
    case.fill(loss, {f"connector.{name}": f"{names}.{name}" for name in ("0.weight", "1.weight", "1.bias")})
    classifier_t = nn.Linear(*reversed(case[f"{classifier}.weight"].shape))
    case.fill(classifier_t, {end: f"{classifier}.{end}" for end in ("weight", "bias")})
    pooled_t = case[f_t] if case[f_t].dim() == 2 else case[f_t].mean((2, 3))
    terms = loss(case[f_s], pooled_t, case["logits_t"], classifier_t)
    case.check(sum(terms))
    return [term.item() for term in terms]


def test_golden_pooled():
    case = Case("srrl_simkd_version")
    terms = check(case, "srrl.transfer", "f_s", "f_t", "cls_t")
    assert terms == pytest.approx([case.outputs["feature_mse"], case.outputs["logit_mse"]], rel=1e-9)


def test_golden_map():
    case = Case("srrl_original")
    terms = check(case, "connector.Connectors", "s", "t", "fc")
    assert terms == pytest.approx([case.outputs["statistics"], case.outputs["regression"]], rel=1e-9)


def test_the_teachers_features_cost_nothing():
    torch.manual_seed(0)
    loss, classifier_t, f_t = srrl.SRRL(7, 7), nn.Linear(7, 3), torch.rand(6, 7)
    loss.connector = nn.Identity()
    z_t = classifier_t(f_t)
    assert [term.item() for term in loss(f_t, f_t, z_t, classifier_t)] == [0, 0]
    assert [term.item() for term in loss(f_t, f_t - 3, z_t + 2, classifier_t)] == pytest.approx([9, 4], rel=1e-5)
