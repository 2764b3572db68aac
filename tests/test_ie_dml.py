from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from running import Drive, small_data

import common

ie_dml, ie_kd = load("ie_dml"), load("ie_kd")


@pytest.mark.parametrize(("name", "sign"), [("iekd_norm_p1_positive", 1), ("iekd_norm_p1_negative", -1)])
def test_golden_distance(name, sign):
    case = Case(name)
    case.check(sign * ie_dml.distance(case["factor_s"], case["factor_t"]))


@pytest.mark.parametrize("name", ["dml_c100_net1", "dml_c100_net2", "dml_c10_net1", "dml_c10_net2"])
def test_golden_dml(name):
    case, args = Case(name), ie_dml.Args()
    own = case[f"logits_{name[-1]}"]
    other = case["logits_2" if name[-1] == "1" else "logits_1"]
    kl = ie_dml.kd_loss(own, other, args.kd_temperature)
    case.check(args.ce_weight * F.cross_entropy(own, case["target"]) + args.kd_weight * kl)


def test_terms_are_those_of_ie_kd_and_teach_their_own_part():
    torch.manual_seed(0)
    iedml, iekd, autoencoder = ie_dml.IEDML(12, 6).double(), ie_kd.IEKD(12, "first").double(), ie_kd.AutoEncoder(12, 6).double()
    for other in iekd, autoencoder:
        other.load_state_dict({name: value for name, value in iedml.state_dict().items() if name in other.state_dict()})
    f, factor = torch.randn(4, 12, 5, 5).double().requires_grad_(), torch.randn(4, 6, 5, 5).double()
    terms = iedml(f, factor)
    assert terms == (*iekd(f, factor), F.l1_loss(autoencoder(f), f))
    modules = {"encode_inh"}, {"encode_exp"}, {"encode", "decode"}
    for term, taught, channels in zip(terms, modules, ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [])):
        iedml.zero_grad()
        f.grad = None
        term.backward()
        assert {name.split(".")[0] for name, p in iedml.named_parameters() if p.grad is not None} == taught
        assert ([] if f.grad is None else f.grad.abs().amax((0, 2, 3)).nonzero().flatten().tolist()) == channels


def test_networks_of_other_width_and_side_share_the_factor():
    torch.manual_seed(0)
    small, wide = ie_dml.IEDML(8, 4), ie_dml.IEDML(20, 4)
    f_small, f_wide = torch.randn(3, 8, 8, 8), torch.randn(3, 20, 4, 4)
    assert all(value.isfinite() for value in small(f_small, wide.encode(f_wide)))
    assert all(value.isfinite() for value in wide(f_wide, small.encode(f_small)))


def test_a_step_by_hand(monkeypatch):
    """One batch: the peer learns from the untrained student, then the student from the peer that has just moved."""
    data = partial(small_data, n=16)
    monkeypatch.setattr(common, "accuracy", lambda net, images: sum(p.sum().item() for p in net.parameters()))  # tells who it is
    flags = dict(peer="resnet8", kd_weight=2.0, inheritance_weight=30.0, exploration_weight=20.0)
    drive = Drive(monkeypatch, "ie_dml", data=data, **flags)
    ((x, y, _),) = data(drive.args, padding="reflect")[0].epoch(1)
    nets = torch.nn.ModuleDict()
    nets["student"], nets["peer"] = (common.build("resnet8", 100) for _ in range(2))
    nets["iedml_s"], nets["iedml_p"] = (ie_dml.IEDML(64, 32) for _ in range(2))
    nets.load_state_dict(drive.before[""])

    def turn(own, other, coders, coders_other):
        z, features = nets[own](x)
        z_other, features_other = nets[other](x)
        factor = nets[coders_other].encode(features_other.last).detach()
        inheritance, exploration, reconstruction = nets[coders](features.last, factor)
        kl = F.kl_div(z.log_softmax(1), z_other.detach().softmax(1), reduction="batchmean")
        loss = F.cross_entropy(z, y) + 2 * kl + 30 * inheritance + 20 * exploration + reconstruction
        parameters = [*nets[own].parameters(), *nets[coders].parameters()]
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        loss.backward()
        optimizer.step()
        nets.zero_grad()
        return loss.item()

    turn("peer", "student", "iedml_p", "iedml_s")
    loss = turn("student", "peer", "iedml_s", "iedml_p")
    (_, train, test, more), *_ = drive.rows
    assert train["loss"] == pytest.approx(loss, rel=1e-4)
    for name, value in nets.state_dict().items():  # also the statistics: each network runs forward twice
        torch.testing.assert_close(drive.after[""][name], value, rtol=1e-3, atol=1e-5)
    assert test == common.accuracy(drive.trained["student"], None)
    assert more == {"peer": pytest.approx(common.accuracy(drive.trained["peer"], None))}


def test_without_mutual_terms_it_is_the_plain_student(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", partial(torch.optim.SGD, nesterov=True))
        plain = Drive(patch, "vanilla", data=partial(small_data, padding="reflect"), lr=0.1).student
    drive = Drive(monkeypatch, "ie_dml", peer="resnet14", kd_weight=0.0, inheritance_weight=0.0, exploration_weight=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), drive.student.parameters()))
