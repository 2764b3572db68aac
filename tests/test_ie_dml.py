from functools import partial

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Case, Drive, load, same, small_data

ie_dml, ie_kd = load("ie_dml"), load("ie_kd")


@pytest.mark.parametrize(("name", "sign"), [("iekd_norm_p1_positive", 1), ("iekd_norm_p1_negative", -1)])
def test_golden_distance(name, sign):
    case = Case(name)
    case.check(sign * ie_dml.distance(case["factor_s"], case["factor_t"]))


def filled(c=12, width=6):
    """IEDML and IEKD with the same parameters, and a map and a factor."""
    torch.manual_seed(0)
    iedml, iekd, autoencoder = ie_dml.IEDML(c, width).double(), ie_kd.IEKD(c).double(), ie_kd.AutoEncoder(c, width).double()
    for other in iekd, autoencoder:
        other.load_state_dict({name: value for name, value in iedml.state_dict().items() if name in other.state_dict()})
    return iedml, iekd, autoencoder, torch.randn(4, c, 5, 5).double(), torch.randn(4, width, 5, 5).double()


def test_terms_are_those_of_ie_kd():
    iedml, iekd, autoencoder, f, factor = filled()
    inheritance, exploration, reconstruction = iedml(f, factor)
    assert (inheritance, exploration) == iekd(f, factor)
    assert reconstruction == autoencoder(f)


def test_what_each_term_teaches():
    iedml, _, _, f, factor = filled()
    f.requires_grad_()
    taught = [("encode_inh",), ("encode_exp",), ("encode", "decode")]
    for term, modules in enumerate(taught):
        iedml.zero_grad()
        f.grad = None
        iedml(f, factor)[term].backward()
        assert {name.split(".")[0] for name, p in iedml.named_parameters() if p.grad is not None} == set(modules)
        channels = [] if f.grad is None else (f.grad.abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist()
        assert channels == [list(range(6)), list(range(6, 12)), []][term]


def test_networks_of_other_width_and_side_share_the_factor():
    torch.manual_seed(0)
    small, wide = ie_dml.IEDML(8, 4), ie_dml.IEDML(20, 4)
    f_small, f_wide = torch.randn(3, 8, 8, 8), torch.randn(3, 20, 4, 4)
    assert all(value.isfinite() for value in small(f_small, wide.encode(f_wide)))
    assert all(value.isfinite() for value in wide(f_wide, small.encode(f_small)))


class Recorder(torch.optim.SGD):
    """Notes at every step which modules of `trained` hold gradients, and which parameters the step changed."""

    turns: list[tuple[set[str], set[str]]]

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        super().step()
        with_gradient = {place for place, p in enumerate(parameters) if p.grad is not None}
        self.turns.append((with_gradient, {place for place, p in enumerate(parameters) if not torch.equal(p, before[place])}))


def test_the_loss_of_one_network_leaves_no_gradient_in_the_other(monkeypatch):
    Recorder.turns = []
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    drive = Drive(monkeypatch, "ie_dml", peer="resnet14")
    names = [name.split(".")[0] for name, _ in drive.trained.named_parameters()]
    turns = ("peer", "iedml_p"), ("student", "iedml_s")
    own = [{place for place, name in enumerate(names) if name in modules} for modules in turns]
    assert len(Recorder.turns) == 2 * drive.steps > 0
    for turn, (with_gradient, moved) in enumerate(Recorder.turns):
        assert with_gradient == moved == own[turn % 2]


def kl(z, z_other):
    return F.kl_div(z.log_softmax(1), z_other.softmax(1), reduction="batchmean")


def test_a_step_by_hand(monkeypatch):
    """One batch: the peer learns from the untrained student, then the student from the peer that has just moved."""
    data = partial(small_data, n=16)
    flags = dict(peer="resnet8", kd_weight=2.0, inheritance_weight=30.0, exploration_weight=20.0)
    drive = Drive(monkeypatch, "ie_dml", data=data, **flags)
    ((x, y, _),) = data(drive.args, padding="reflect")[0].epoch(1)
    nets = torch.nn.ModuleDict()
    torch.manual_seed(1)
    nets["student"], nets["peer"] = (harness.common.build("resnet8", 100) for _ in range(2))
    nets["iedml_s"], nets["iedml_p"] = (ie_dml.IEDML(64, 32) for _ in range(2))
    nets.load_state_dict(drive.before[""])

    def turn(own, other, coders, coders_other):
        with torch.no_grad():
            z_other, features_other = nets[other](x)
            factor = nets[coders_other].encode(features_other.last)
        z, features = nets[own](x)
        inheritance, exploration, reconstruction = nets[coders](features.last, factor)
        loss = F.cross_entropy(z, y) + 2 * kl(z, z_other) + 30 * inheritance + 20 * exploration + reconstruction
        parameters = [*nets[own].parameters(), *nets[coders].parameters()]
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        loss.backward()
        optimizer.step()
        nets.zero_grad()
        return loss.item()

    turn("peer", "student", "iedml_p", "iedml_s")
    loss = turn("student", "peer", "iedml_s", "iedml_p")
    assert drive.rows[0][1][0] == pytest.approx(loss, rel=1e-4)
    for name, value in nets.named_parameters():
        torch.testing.assert_close(drive.after[""][name], value.detach(), rtol=1e-3, atol=1e-5)


def test_alone_it_is_the_plain_student_and_both_are_reported(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "SGD", partial(torch.optim.SGD, nesterov=True))
        plain = Drive(patch, "vanilla", data=partial(small_data, padding="reflect"), lr=0.1).student.state_dict()
    drive = Drive(monkeypatch, "ie_dml", peer="resnet14", kd_weight=0.0, inheritance_weight=0.0, exploration_weight=0.0)
    assert same(plain, drive.student.state_dict())
    (_, _, test, more), *_ = drive.rows
    images = small_data(drive.args)[1]
    assert test == harness.common.accuracy(drive.student, images)
    assert more == {"peer": harness.common.accuracy(drive.trained["peer"], images)}
    assert not same(plain, Drive(monkeypatch, "ie_dml", peer="resnet14", kd_weight=0.0).student.state_dict())


def test_recipe():
    args = ie_dml.Args()
    harness.common.resolve(args)
    assert (args.epochs, args.batch_size, args.lr, args.milestones) == (160, 128, 0.1, (80, 120))
    assert not hasattr(args, "teacher")
    assert not hasattr(args, "teacher_weights")
