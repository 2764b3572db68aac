import pytest
import torch
import torch.nn.functional as F
from golden import Case, load

mlld = load("mlld")
ls = load("ls")
VIEWS = "weak_s", "strong_s", "weak_t", "strong_t"


@pytest.mark.parametrize("name", ["mlld_c100", "mlld_c10_odd", "mlkd_logitstd_c100", "mlkd_logitstd_c10_odd"])
def test_golden(name):
    case = Case(name)
    logits = [case[view] for view in VIEWS]
    kd, bc, cc = mlld.mlld_losses(*logits, case.hyper["T"], "half")
    if case.hyper["logit_stand"]:  # in the KD terms only
        kd, _, _ = mlld.mlld_losses(*map(ls.standardize, logits), case.hyper["T"], "half")
    ce = F.cross_entropy(case["weak_s"], case["target"]) + F.cross_entropy(case["strong_s"], case["target"])
    terms = dict(ce=case.hyper["ce_weight"] * ce) | {
        key: case.hyper["kd_weight"] * term for key, term in dict(kd=kd, bc=bc, cc=cc).items()
    }
    for key, term in terms.items():
        assert term.item() == pytest.approx(case.outputs[f"loss_{key}"], rel=1e-9), key
    case.check(sum(terms.values()))


def test_slow_formula_of_the_mask_by_image():
    torch.manual_seed(2)
    weak_s, strong_s, weak_t, strong_t = torch.randn(4, 7, 5, dtype=torch.float64) * 3
    p = weak_t.softmax(1)
    images = p.amax(1) <= p.amax(1).sort().values[3]  # the median of 7
    classes = p.sum(0) <= p.sum(0).sort().values[2]
    kd = bc = cc = 0.0
    for t in (4.0, 3.0, 5.0, 2.0, 6.0):
        p_s, p_t = (weak_s / t).softmax(1), (weak_t / t).softmax(1)
        kl = t**2 * (p_t * (p_t / p_s).log()).sum(1)
        q_s, q_t = (strong_s / t).softmax(1), (strong_t / t).softmax(1)
        kd += kl[images].sum() / 7 + (kl if t in (2.0, 6.0) else t**2 * (q_t * (q_t / q_s).log()).sum(1)).mean()
        for i in range(7):
            bc += images[i] * sum((p_t[i] @ p_t[j] - p_s[i] @ p_s[j]) ** 2 for j in range(7)) / 7
        for c in range(5):
            cc += classes[c] * sum((p_t[:, c] @ p_t[:, d] - p_s[:, c] @ p_s[:, d]) ** 2 for d in range(5)) / 5
    ours = mlld.mlld_losses(weak_s, strong_s, weak_t, strong_t, 4.0, "image")
    assert [term.item() for term in ours] == pytest.approx([kd.item(), bc.item(), cc.item()], rel=1e-9)


def test_the_share_of_the_mask():
    assert mlld.unsure(torch.tensor([0.1, 0.4, 0.2, 0.9]), "half") == 0.5
    assert mlld.unsure(torch.tensor([0.1, 0.4, 0.2]), "image").tolist() == [1, 0, 1]
