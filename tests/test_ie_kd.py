import math

import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from running import Drive, same, small_data

ie_kd = load("ie_kd")
LAYERS = [f"{place}.weight" for place in (1, 2, 4, 5, 7, 8)] + [f"{place}.bias" for place in (2, 5, 8)]


def coder_names(own="", golden=""):
    """{parameter of a Coder: name of its golden input}"""
    return {own + name: f"{golden}layers.{name}" for name in LAYERS}


def fill_statistics(coder, case, golden=""):
    for place in (2, 5, 8):
        for buffer in ("running_mean", "running_var"):
            getattr(coder[place], buffer).copy_(case[f"{golden}layers.{place}.{buffer}"])


@pytest.mark.parametrize(("name", "sign"), [("iekd_norm_p1_positive", 1), ("iekd_norm_p1_negative", -1)])
def test_golden_distance(name, sign):
    case = Case(name)
    case.check(sign * ie_kd.distance(case["factor_s"], case["factor_t"]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_golden_coder(mode):
    case = Case(f"iekd_coder_bn_{mode}")
    coder = case.fill(ie_kd.Coder(8, 5), coder_names())
    fill_statistics(coder, case)
    case.check((coder.train(mode == "train")(case["x"]) * case["probe"]).sum())


def test_golden_reconstruction(monkeypatch):
    case = Case("iekd_rec_p1")
    autoencoder = ie_kd.AutoEncoder(10, 5).double()
    monkeypatch.setattr(autoencoder.decode, "forward", lambda factor: case["y"])
    case.check(F.l1_loss(autoencoder(case["x"]), case["x"]))


def test_golden_autoencoder():
    case = Case("iekd_autoencoder_train")
    names = coder_names("encode.", "encoder.") | coder_names("decode.", "decoder.")
    case.check(F.l1_loss(case.fill(ie_kd.AutoEncoder(8, 6), names)(case["x"]), case["x"]))


def test_golden_cka():
    case = Case("iekd_cka_linear")
    case.check(ie_kd.linear_cka(case["x"], case["y"]))


def test_golden_total():
    case, args = Case("iekd_total"), ie_kd.Args()
    iekd, encode_t = ie_kd.IEKD(12, "first"), ie_kd.Coder(10, 6)
    case.fill(iekd, coder_names("encode_inh.", "enc_inh.") | coder_names("encode_exp.", "enc_exp."))
    case.fill(encode_t, coder_names("", "enc_t."))
    fill_statistics(encode_t, case, "enc_t.")
    with torch.no_grad():
        factor_t = encode_t.eval()(case["f_t"])
    inheritance, exploration = iekd(case["f_s"], factor_t)
    assert inheritance.item() == pytest.approx(case.outputs["inh"], rel=1e-9)
    assert exploration.item() == pytest.approx(case.outputs["exp"], rel=1e-9)
    loss = args.ce_weight * F.cross_entropy(case["logits_s"], case["target"])
    case.check(loss + args.inheritance_weight * inheritance + args.exploration_weight * exploration)


def test_distance_zero_bound_and_scale():
    torch.manual_seed(0)
    f, g = torch.randn(2, 4, 3, 5, 5).double()
    assert ie_kd.distance(f, f).item() == 0
    assert ie_kd.distance(7 * f, 0.1 * g).item() == pytest.approx(ie_kd.distance(f, g).item(), rel=1e-12)
    ones = torch.ones(2, 3, 5, 5)
    assert ie_kd.distance(ones, -ones).item() == pytest.approx(2 / math.sqrt(75))


def test_the_larger_factor_is_pooled():
    torch.manual_seed(0)
    f, g = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4)
    pooled = f.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    assert ie_kd.distance(f, g).item() == pytest.approx(ie_kd.distance(pooled, g).item(), rel=1e-6)
    assert ie_kd.distance(g, f).item() == pytest.approx(ie_kd.distance(f, g).item(), rel=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1e4])
def test_finite_for_constant_maps(fill):
    f_s, iekd = torch.full((2, 6, 4, 4), fill, requires_grad=True), ie_kd.IEKD(6, "first")
    loss = sum(iekd(f_s, torch.full((2, 3, 4, 4), fill)))
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in iekd.parameters())


@pytest.mark.parametrize(("c_in", "c_out", "parameters"), [(64, 32, 64_768), (32, 64, 64_832), (32, 32, 27_840)])
def test_coder(c_in, c_out, parameters):
    coder = ie_kd.Coder(c_in, c_out)
    assert sum(p.numel() for p in coder.parameters()) == parameters
    for place, c in (1, c_in), (4, c_out), (7, c_out):
        assert coder[place].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * c)), rel=0.03)


@pytest.mark.parametrize("split", ["first", "random"])
def test_each_term_teaches_its_own_half_only(split):
    torch.manual_seed(0)
    iekd, f_s = ie_kd.IEKD(8, split), torch.randn(4, 8, 5, 5, requires_grad=True)
    halves = [half.flatten().tolist() for half in iekd.halves(torch.arange(8)[None, :, None, None])]
    assert sorted(halves[0] + halves[1]) == list(range(8))
    assert (halves[0] == [0, 1, 2, 3]) == (split == "first")
    for term, half in zip(iekd(f_s, torch.randn(4, 4, 5, 5)), halves):
        (gradient,) = torch.autograd.grad(term, f_s, retain_graph=True)
        assert (gradient.abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist() == sorted(half)


def test_the_random_split_is_in_the_checkpoint():
    one, other = ie_kd.IEKD(64, "random"), ie_kd.IEKD(64, "random")
    assert not torch.equal(one.order, other.order)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.order, other.order)


def test_cka_is_blind_to_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, 2, 2).double(), torch.randn(20, 5, 2, 2).double()
    rotation = torch.linalg.qr(torch.randn(12, 12).double()).Q
    assert ie_kd.linear_cka(x, x).item() == pytest.approx(1, rel=1e-12)
    assert ie_kd.linear_cka(3 * x.flatten(1) @ rotation + 1, y).item() == pytest.approx(ie_kd.linear_cka(x, y).item(), rel=1e-9)
    assert ie_kd.linear_cka(torch.ones(20, 3), y.float()).item() == 0


def test_phases_and_what_they_move(monkeypatch):
    drive = Drive(monkeypatch, "ie_kd", split="random", epochs=2)
    assert sorted(drive.schedulers[""].milestones) == [1] and not drive.schedulers["autoencoder"].milestones
    first, second = drive.phases["autoencoder"], drive.phases[""]
    assert list(first) == ["autoencoder"] and list(second) == ["student", "iekd"]
    assert same(drive.after["autoencoder"], first.state_dict())  # phase 2 leaves parameters and statistics alone
    assert same(drive.teacher_before, drive.teacher.state_dict())
    for phase, trained in drive.phases.items():
        assert all(not torch.equal(drive.before[phase][name], drive.after[phase][name]) for name, _ in trained.named_parameters())
    (_, train_1, test_1, _), (_, train_2, _, more), _ = drive.rows
    assert list(train_1) == ["loss"] and test_1 is None
    assert train_2["loss"] == pytest.approx(train_2["ce"] + 50 * train_2["inh"] + 50 * train_2["exp"], rel=1e-5)
    assert list(more) == ["cka_inh_exp", "cka_exp_t", "cka_inh_t"]


def test_the_logged_cka_is_that_of_the_test_images_in_eval_mode(monkeypatch):
    drive = Drive(monkeypatch, "ie_kd")
    ((x, _),) = small_data(drive.args)[1].batches()
    with torch.no_grad():
        f_s, f_t = drive.student.eval()(x)[1].last, drive.teacher(x)[1].last
    pairs = dict(cka_inh_exp=(f_s[:, :32], f_s[:, 32:]), cka_exp_t=(f_s[:, 32:], f_t), cka_inh_t=(f_s[:, :32], f_t))
    for name, pair in pairs.items():
        assert drive.rows[-1][3][name] == pytest.approx(ie_kd.linear_cka(*pair).item(), rel=1e-5)
