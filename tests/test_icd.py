import math

import pytest
import torch
from golden import CASES, Case, load

icd = load("icd")
NAMES = {
    "project_s.weight": "embed_s.weight",
    "project_s.bias": "embed_s.bias",
    "project_t.weight": "embed_t.weight",
    "project_t.bias": "embed_t.bias",
    "tau": "params.tau",
    "bias": "params.b",
}


def total(loss, f_s, f_t, alpha=0.5):
    contrast, invariance = loss(f_s, f_t)
    return contrast + alpha * invariance


@pytest.mark.parametrize("name", [name for name, (case, _) in CASES.items() if case["method"] == "ICD"])
def test_golden(name):
    case = Case(name)
    loss = icd.ICD(16, 12, init_tau=0.0, dim=8, max_scale=case.hyper["max_scale"])
    case.fill(loss, NAMES)
    no_gradient = ("params.b", "params.tau") if name == "icd_tau_beyond_clamp" else ("params.b",)
    case.check(total(loss, case["f_s"], case["f_t"], case.hyper["alpha"]), no_gradient)


@pytest.mark.parametrize("batch", [2, 3, 8, 16])
def test_slow_formula(batch):
    torch.manual_seed(batch)
    loss, f_s, f_t = icd.ICD(5, 7, 1.0, dim=4).double(), torch.randn(batch, 5).double(), torch.randn(batch, 7).double()
    with torch.no_grad():
        a = [v / v.norm() for v in loss.project_s(f_s)]
        b = [v / v.norm() for v in loss.project_t(f_t)]
    logits = [[math.e * float(u @ v) for v in b] for u in a]
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits]
    columns = [[logits[j][i] for j in range(batch)] for i in range(batch)]
    q = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in columns]
    contrast = sum(-math.log(p[i][i]) for i in range(batch)) / batch
    invariance = sum(q[i][j] * math.log(q[i][j] / p[i][j]) for i in range(batch) for j in range(batch)) / batch
    assert invariance > 0
    assert [term.item() for term in loss(f_s, f_t)] == pytest.approx([contrast, invariance], rel=1e-9)


def test_same_vectors_on_both_sides_leave_only_the_contrast():
    torch.manual_seed(0)
    loss, f = icd.ICD(5, 5, 1.0, dim=4), torch.randn(6, 5)
    loss.project_t.load_state_dict(loss.project_s.state_dict())
    contrast, invariance = loss(f, f)
    assert contrast.item() > 0.1 and invariance.item() == pytest.approx(0, abs=1e-7)


def test_bias_changes_nothing():
    torch.manual_seed(0)
    loss, f_s, f_t = icd.ICD(5, 7, 1.0).double(), torch.randn(6, 5).double(), torch.randn(6, 7).double()
    values = []
    for bias in (0.0, 7.0):
        loss.bias.data.fill_(bias)
        values.append(total(loss, f_s, f_t).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize(("tau", "scale", "learns"), [(1.0, math.e, True), (0.0, 1.0, True), (3.0, 10.0, False)])
def test_scale_and_its_clamp(tau, scale, learns):
    torch.manual_seed(0)
    loss = icd.ICD(5, 7, tau)
    assert loss.scale().item() == pytest.approx(scale)
    total(loss, torch.randn(6, 5), torch.randn(6, 7)).backward()
    assert (loss.tau.grad.item() != 0) == learns


def test_finite_for_identical_rows_at_the_largest_scale():
    loss = icd.ICD(5, 7, 5.0)
    value = total(loss, torch.ones(4, 5), torch.ones(4, 7))
    value.backward()
    assert value.item() == pytest.approx(math.log(4), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_extra_parameters():
    for d_s, d_t, extra in (256, 256, 65_794), (64, 64, 16_642), (64, 128, 24_834), (1280, 2048, 426_242):
        assert sum(p.numel() for p in icd.ICD(d_s, d_t, 1.0).parameters()) == extra
