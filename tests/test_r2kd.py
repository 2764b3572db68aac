import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden import Case, load
from running import Drive, same, small_data, snapshot
from torch import nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

r2kd = load("r2kd")


def drawn(monkeypatch, lam=None, center=None, other=None):
    """Make `augment` draw these. Returns the parameters of the Beta distributions it asks for."""
    asked, draw = [], SimpleNamespace(sample=lambda: torch.tensor(lam, dtype=torch.float64))
    monkeypatch.setattr(r2kd, "Beta", lambda *parameters: asked.append(parameters) or draw)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(center or [0, 0]))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n) if other is None else other)
    return asked


def augmented(kind, x, size, teacher=None):
    return r2kd.augment(kind, x, "cifar100", SimpleNamespace(size=size), teacher)


# Golden cases


@pytest.mark.parametrize("what", ["c100_T4", "c100_T1", "c10_T4", "c10_T1"])
def test_golden_terms(what):
    case = Case(f"r2kd_value_{what}")
    case.check(case.hyper["weight"] * r2kd.value_loss(case["logits_s"], case["logits_t"], case.hyper["T"]))
    case = Case(f"r2kd_rank_{what}")
    rank = case.hyper["weight"] * r2kd.rank_loss(case["logits_s"], case["logits_t"], 0.0)
    assert not rank.requires_grad
    assert rank.item() == pytest.approx(case.value, rel=1e-9)


@pytest.mark.parametrize("amount", ["conv", "linear", "linear_half_5x5", "linear_half_3x5"])
def test_golden_pruning(amount):
    case = Case(f"r2kd_prune_{amount}")
    shape = case["weight"].shape
    layer = nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    copy = r2kd.pruned(case.fill(layer, {"weight": "weight", "bias": "bias"}), case.hyper["amount"], "batch")
    assert torch.equal(copy.weight, case.array(case.outputs["weight_after"]))
    assert torch.equal(copy.bias, case.array(case.outputs["bias_after"]))
    assert not (layer.weight == 0).any()


@pytest.mark.parametrize("name", ["mixup_0", "mixup_1", "cutmix_0", "cutmix_1", "cutout_0", "cutout_1"])
def test_golden_augmentation(name, monkeypatch):
    case, kind = Case(f"r2kd_{name}"), name.split("_")[0]
    x, lam = case["image"], case.hyper.get("lam", case.hyper.get("lam_drawn"))
    center = case.hyper.get("centre", case.hyper.get("centre_yx"))
    asked = drawn(monkeypatch, lam, center, case.inputs.get("permutation"))
    before = x.clone()
    own = augmented(kind, x, size=32 if kind == "cutout" else 8)  # the golden square has side 8 on images of side 8
    assert (own - case.array(case.outputs["mixed"])).abs().max() <= 1e-12
    assert torch.equal(x, before)
    assert asked == ([] if kind == "cutout" else [(case.hyper["beta_parameter"],) * 2])


class Tiny(nn.Module):
    """The networks of the golden steps: 3x3 convolution, batch norm, ReLU, 2x2 pool, linear layer."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Linear(4 * width, 10)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(self.conv(x))), 2).flatten(1)), None


def tiny(case, width, prefix=""):
    net = Tiny(width)
    net = case.fill(net, {name: prefix + name for name, _ in net.named_parameters()})
    net.bn.running_mean.copy_(case[f"{prefix}bn.running_mean"])
    net.bn.running_var.copy_(case[f"{prefix}bn.running_var"])
    return net


@pytest.mark.parametrize("what", ["none_released", "mixup_released", "cutmix_released", "cutmix_eval", "cutout_released"])
def test_golden_step(what, monkeypatch):
    """As released the pruned teacher is in train mode: --pruned-bn batch, the default; "eval" is --pruned-bn running."""
    case, kind = Case(f"r2kd_full_{what}"), what.split("_")[0]
    student, teacher = tiny(case, 5, "student."), tiny(case, 8, "teacher.").eval().requires_grad_(False)
    copy = r2kd.pruned(teacher, case.hyper["prune_amount"], "batch" if what.endswith("released") else "running")
    before, out, p, t = snapshot(copy), case.outputs, case.hyper["prune_weight"], case.hyper["T"]
    views = [case["image"]]
    if kind != "none":
        other = case.array(out["permutation"]) if "permutation" in out else None
        drawn(monkeypatch, out.get("lam"), out.get("centre", out.get("centre_yx")), other)
        views.append(augmented(kind, views[0], size=32 if kind == "cutout" else 8))
    loss = F.cross_entropy(student(views[0])[0], case["target"])
    for x in views:
        z_s, z_t = student(x)[0], p * teacher(x)[0] + (1 - p) * copy(x)[0]
        loss = loss + case.hyper["value_weight"] * r2kd.value_loss(z_s, z_t, t)
        loss = loss + case.hyper["rank_weight"] * r2kd.rank_loss(z_s, z_t, 0.0)
    case.check(loss, no_gradient=("student.conv.bias",))  # a batch norm follows it
    assert same(before, snapshot(copy))  # unlike the released one's, no statistics drift


def test_golden_pick(monkeypatch):
    case = Case("r2kd_cutmixpick")
    teacher, x = tiny(case, 8).eval(), case["image"]
    drawn(monkeypatch, case.hyper["lam_drawn"], [5, 3], case["permutation"])
    mixed = augmented("cutmix", x, size=8)
    released = r2kd.pick(mixed, teacher(x)[0], keep=64)  # the released code scores the images before mixing
    assert (released - case.array(case.outputs["picked"])).abs().max() < 1e-12


# The terms


def test_value_slow_formula():
    torch.manual_seed(0)
    z_s, z_t = 5 * torch.randn(2, 5, 7).double()

    def distance(rows_s, rows_t):
        return 1 - sum(a @ b / (a.norm() * b.norm() + 1e-8) for a, b in zip(rows_s, rows_t, strict=True)) / len(rows_s)

    p_s, p_t = ((z / 3).exp() / (z / 3).exp().sum(1, keepdim=True) for z in (z_s, z_t))
    expected = 9 * (distance([*p_s], [*p_t]) + distance([*p_s.T], [*p_t.T]))
    assert r2kd.value_loss(z_s, z_t, 3.0).item() == pytest.approx(expected.item(), rel=1e-9)
    assert r2kd.value_loss(z_s, z_s, 3.0).item() == pytest.approx(0, abs=1e-5)


def test_ranks_slow_formula():
    torch.manual_seed(0)
    z, softness = torch.randn(3, 5).double().requires_grad_(), 0.3
    for row, soft, hard in zip(z.tolist(), r2kd.ranks(z, softness).tolist(), r2kd.ranks(z, 0.0).tolist()):
        for own, ranks in (
            (soft, [0.5 + sum(1 / (1 + math.exp(-(u - v) / softness)) for v in row) for u in row]),
            (hard, [1 + sum(v < u for v in row) for u in row]),
        ):
            assert own == pytest.approx([(rank - sum(ranks) / 5) / 15 for rank in ranks], abs=1e-12)
    assert torch.allclose(r2kd.ranks(z, 1e-6), r2kd.ranks(z, 0.0))
    r2kd.rank_loss(z, torch.randn(3, 5).double(), softness).backward()
    assert (z.grad != 0).all()


@pytest.mark.parametrize("softness", [0.0, 0.4])
def test_finite(softness):
    z_s = torch.tensor([[200.0, -200.0, 0.0], [200.0, -200.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for z_t in (-z_s.detach(), z_s.detach(), torch.zeros(3, 3)):
        loss = r2kd.value_loss(z_s, z_t, 1.0) + r2kd.rank_loss(z_s, z_t, softness)
        (gradient,) = torch.autograd.grad(loss, z_s)
        assert loss.isfinite() and gradient.isfinite().all()


# The pruned teacher


@pytest.mark.parametrize(("name", "rate"), [("resnet8", 0.0), ("mobilenetv2", 0.3), ("torchvision.resnet18", 0.1)])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_pruned_copy(name, rate, bn):
    torch.manual_seed(0)
    net, x = r2kd.build(name, 10), torch.randn(6, 3, 32, 32)
    net(x)  # statistics unlike their start
    before, net = snapshot(net), net.eval().requires_grad_(False)
    copy = r2kd.pruned(net, rate, bn)
    layers = {f"{path}.weight" for path, module in copy.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for key, value in copy.state_dict().items():
        zero = (value == 0) if key in layers else torch.zeros_like(value, dtype=torch.bool)
        assert zero.sum() == (round(rate * value.numel()) if key in layers else 0), key
        assert torch.equal(value[~zero], before[key][~zero]), key
        assert not zero.any() or before[key][zero].abs().max() <= before[key][~zero].abs().min()
    after = snapshot(copy)
    assert torch.allclose(copy(x)[0][:3], copy(x[:3])[0], atol=1e-4) == (bn == "running")  # else it depends on the batch
    assert same(after, snapshot(copy)) and same(before, snapshot(net))
    assert not any(p.requires_grad for p in copy.parameters())


# x'


def test_cutout_is_one_square_that_reaches_every_place():
    torch.manual_seed(0)
    reached = torch.zeros(16, 16, dtype=torch.bool)
    for _ in range(200):
        zero = augmented("cutout", torch.ones(2, 3, 16, 16), size=16) == 0
        assert (zero == zero[:1, :1]).all()
        assert {2, 3, 4} >= {int(zero[0, 0].any(k).sum()) for k in (0, 1)}  # a quarter of the side, less what lies outside
        reached |= zero[0, 0]
    assert reached.all()


def test_cutmixpick_keeps_the_mixed_images_of_highest_entropy(monkeypatch):
    pools, pick = [], r2kd.pick
    monkeypatch.setattr(r2kd, "pick", lambda x, z, keep: pools.append((x, z)) or pick(x, z, keep))
    torch.manual_seed(0)
    picked = augmented("cutmixpick", torch.randn(40, 3, 16, 16), 16, teacher=lambda x: (9 * x[:, 0, 0], None))
    ((pool, z),) = pools
    assert len(pool) == 80 and torch.equal(z, 9 * pool[:, 0, 0]) and not torch.equal(pool[:40], pool[40:])
    p = z.double().softmax(1)
    expected = pool[torch.special.xlogy(p, p).sum(1).argsort()[:64]]
    assert torch.equal(picked.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("dataset", "policy"), [("cifar100", "CIFAR10"), ("tinyimagenet", "IMAGENET"), ("folder", "IMAGENET")])
def test_autoaugment_is_torchvisions_in_whole_pixels(dataset, policy):
    train, _ = small_data(r2kd.Args(dataset="synthetic", device="cpu"))
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(60):  # most of the 25 policies
        torch.manual_seed(seed)
        own = r2kd.augment("autoaugment", train.normalize(pixels), dataset, train, None)
        torch.manual_seed(seed)
        assert torch.equal(own, train.normalize(AutoAugment(AutoAugmentPolicy[policy])(pixels)))


# The script


class Batches(Drive):
    """Keeps the batches that `step` was given, and the global random state before each."""

    def call_step(self, step, tensors):
        self.batches = [*getattr(self, "batches", []), tensors]
        self.states = [*getattr(self, "states", []), torch.get_rng_state()]
        return step(*tensors)


def drive(monkeypatch, **flags):
    return Batches(monkeypatch, "r2kd", **{"teacher": "resnet8", "batch_size": 8} | flags)


@pytest.mark.parametrize("kind", ["none", "mixup", "cutmix", "cutmixpick", "cutout", "autoaugment"])
def test_second_views(kind, monkeypatch):
    own = drive(monkeypatch, augment=kind, kd_weight=1.0)
    train, _ = small_data(own.args)
    for (*batch, x_aug), plain in zip(own.batches, train.epoch(1) if kind != "none" else ()):
        assert all(torch.equal(a, b) for a, b in zip(batch, plain, strict=True))
        torch.manual_seed(torch.randint(2**62, (), generator=train.generator).item())  # so the epoch decides the draws
        assert torch.equal(x_aug, r2kd.augment(kind, plain[0], "synthetic", train, own.teacher))
    assert all(torch.equal(state, own.states[0]) for state in own.states)  # draws leave the global state alone
    assert all(math.isfinite(value) for _, train, _, _ in own.rows for value in train.values())
    assert same(own.teacher_before, snapshot(own.teacher)) and not own.teacher.training
    _, terms, _, _ = own.rows[0]
    assert terms["loss"] == pytest.approx(terms["ce"] + terms["kd"] + 2 * terms["value"] + 2 * terms["rank"], rel=1e-5)


def test_the_weight_of_hard_ranks_changes_the_loss_and_nothing_else(monkeypatch):
    none, some = drive(monkeypatch, rank_weight=0.0), drive(monkeypatch)
    assert same(none.after[""], some.after[""])
    assert none.rows[0][1]["loss"] < some.rows[0][1]["loss"]
    assert not same(none.after[""], drive(monkeypatch, rank_temperature=0.1).after[""])


def test_the_second_view_has_no_cross_entropy(monkeypatch):
    alone, mixed = (drive(monkeypatch, value_weight=0.0, rank_weight=0.0, augment=kind) for kind in ("none", "cutmix"))
    assert all(torch.equal(a, b) for a, b in zip(alone.student.parameters(), mixed.student.parameters()))


def test_mix_of_teachers(monkeypatch):
    """teacher_mix 1 leaves out the pruned teacher and 0 the other one, which the pruned one equals when nothing is pruned."""
    whole = drive(monkeypatch, teacher_mix=1.0, prune_rate=0.9)
    assert same(whole.after[""], drive(monkeypatch, teacher_mix=0.0, prune_rate=0.0, pruned_bn="running").after[""])
    assert not same(whole.after[""], drive(monkeypatch, teacher_mix=0.0, prune_rate=0.0).after[""])
    assert not same(whole.after[""], drive(monkeypatch, teacher_mix=0.0, prune_rate=0.9, pruned_bn="running").after[""])
