import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Drive, array, common, load, same, small_data, snapshot
from torch import nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

r2kd = load("r2kd")
RAW = common.synthetic(None)
KINDS = ["mixup", "cutmix", "cutmixpick", "cutout", "autoaugment"]


@pytest.fixture(autouse=True)
def one_synthetic_set(monkeypatch):
    monkeypatch.setattr(common, "synthetic", lambda data: RAW)


def drive(monkeypatch, **flags):
    return Drive(monkeypatch, "r2kd", **{"teacher": "resnet8", "batch_size": 8} | flags)


def value_loss(z_s, z_t, temperature=4.0):
    return r2kd.r2kd_loss(z_s, z_t, temperature, 1.0, 0.0, 0.0)


def rank_loss(z_s, z_t, temperature=4.0, rho=0.0):
    return r2kd.r2kd_loss(z_s, z_t, temperature, 0.0, 1.0, rho)


# Golden cases


@pytest.mark.parametrize("name", [f"r2kd_value_{what}" for what in ("c100_T4", "c100_T1", "c10_T4", "c10_T1")])
def test_golden_value(name):
    case = Case(name)
    case.check(r2kd.r2kd_loss(case["logits_s"], case["logits_t"], case.hyper["T"], case.hyper["weight"], 0.0, 0.0))


@pytest.mark.parametrize("name", [f"r2kd_rank_{what}" for what in ("c100_T4", "c100_T1", "c10_T4", "c10_T1")])
def test_golden_rank(name):
    case = Case(name)
    loss = r2kd.r2kd_loss(case["logits_s"], case["logits_t"], case.hyper["T"], 0.0, case.hyper["weight"], 0.0)
    case.check(loss)  # no gradient


@pytest.mark.parametrize("name", [f"r2kd_total_{what}" for what in ("c100_plain", "c100_aug", "c10_plain", "c10_aug")])
def test_golden_total(name):
    case = Case(name)
    weights = case.hyper["T"], case.hyper["value_weight"], case.hyper["rank_weight"], 0.0
    p = case.hyper["prune_weight"]
    loss = F.cross_entropy(case["logits_s"], case["target"])
    for prefix in ("", "aug_") if name.endswith("aug") else ("",):
        z_t = p * case[f"{prefix}logits_t"] + (1 - p) * case[f"{prefix}logits_pruned"]
        loss = loss + r2kd.r2kd_loss(case[f"{prefix}logits_s"], z_t, *weights)
    case.check(loss)


@pytest.mark.parametrize("name", ["conv", "linear", "linear_half_5x5", "linear_half_3x5"])
def test_golden_pruning(name):
    case = Case(f"r2kd_prune_{name}")
    shape = case["weight"].shape
    layer = nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    case.fill(layer, {"weight": "weight", "bias": "bias"})
    copy = r2kd.pruned(layer, case.hyper["amount"])
    assert torch.equal(copy.weight, array(case.outputs["weight_after"]))
    assert torch.equal(copy.bias, array(case.outputs["bias_after"]))
    assert (copy.weight == 0).sum() == case.outputs["n_zero"]
    assert not (layer.weight == 0).any()


@pytest.mark.parametrize("name", ["mixup_0", "mixup_1", "cutmix_0", "cutmix_1", "cutout_0", "cutout_1"])
def test_golden_mixing(name):
    case = Case(f"r2kd_{name}")
    kind, x = name.split("_")[0], case["image"]
    lam = case.hyper.get("lam", case.hyper.get("lam_drawn"))
    centre = case.hyper.get("centre", case.hyper.get("centre_yx"))
    other = case.inputs.get("permutation")
    before = x.clone()
    mixed = r2kd.mix(kind, x, other, lam, centre)
    assert (mixed - array(case.outputs["mixed"])).abs().max() <= 1e-12
    assert torch.equal(x, before)
    if kind == "cutmix":
        top, left, bottom, right = case.hyper["box"]
        assert case.outputs["lam_adjusted"] == 1 - (bottom - top) * (right - left) / 64
        changed = (mixed != x).any(0).any(0).nonzero()
        assert changed.amin(0).tolist() == [top, left]
        assert (changed.amax(0) + 1).tolist() == [bottom, right]


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
def test_golden_step(what):
    case, kind = Case(f"r2kd_full_{what}"), what.split("_")[0]
    student, teacher = tiny(case, 5, "student."), tiny(case, 8, "teacher.").eval().requires_grad_(False)
    copy, p = r2kd.pruned(teacher, case.hyper["prune_amount"]), case.hyper["prune_weight"]
    assert not copy.training
    copy.train(what.endswith("released"))  # what the released code forgets to undo
    assert torch.equal(copy.conv.weight, array(case.outputs["pruned_conv_weight"]))
    assert torch.equal(copy.fc.weight, array(case.outputs["pruned_fc_weight"]))
    batches = [case["image"]]
    if kind != "none":
        drawn = case.outputs
        other = array(drawn["permutation"]) if "permutation" in drawn else None
        batches.append(r2kd.mix(kind, case["image"], other, drawn.get("lam"), drawn.get("centre", drawn.get("centre_yx"))))
    weights = case.hyper["T"], case.hyper["value_weight"], case.hyper["rank_weight"], 0.0
    loss = 0
    for x in batches:
        z_s, _ = student(x)
        loss = loss + (F.cross_entropy(z_s, case["target"]) if x is case["image"] else 0)
        loss = loss + r2kd.r2kd_loss(z_s, p * teacher(x)[0] + (1 - p) * copy(x)[0], *weights)
    case.check(loss, no_gradient=("student.conv.bias",))  # a batch norm follows it
    assert torch.allclose(copy.bn.running_mean, array(case.outputs["pruned_running_mean_after"]), atol=1e-12)


def test_golden_pick():
    case = Case("r2kd_cutmixpick")
    teacher, x = tiny(case, 8).eval(), case["image"]
    mixed = r2kd.mix("cutmix", x, case["permutation"], case.hyper["lam_drawn"], [5, 3])
    released = r2kd.pick(mixed, teacher(x)[0], keep=64)  # scored before mixing, as in the released code
    assert (released - array(case.outputs["picked"])).abs().max() < 1e-12
    assert torch.equal(released, mixed[array(case.outputs["order"])])


# The loss


def test_value_slow_formula():
    torch.manual_seed(0)
    z_s, z_t = 5 * torch.randn(5, 7).double(), 5 * torch.randn(5, 7).double()

    def softened(z):
        rows = [[math.exp(v / 3) for v in row] for row in z.tolist()]
        return [[v / sum(row) for v in row] for row in rows]

    def distance(a, b):
        cosines = []
        for u, v in zip(a, b, strict=True):
            dot, lengths = sum(i * j for i, j in zip(u, v)), math.hypot(*u) * math.hypot(*v)
            cosines.append(abs(dot) / (lengths + 1e-8))
        return 1 - sum(cosines) / len(cosines)

    q_s, q_t = softened(z_s), softened(z_t)
    expected = 9 * (distance(q_s, q_t) + distance(list(zip(*q_s)), list(zip(*q_t))))
    assert value_loss(z_s, z_t, 3.0).item() == pytest.approx(expected, rel=1e-9)


def test_equal_logits_give_nothing():
    z = torch.randn(8, 20).double()
    for loss in value_loss(z, z), rank_loss(z, z), rank_loss(z, z, rho=0.1):
        assert loss.item() == pytest.approx(0, abs=1e-4)  # but for the 1e-8 in the denominator


def test_each_weight_scales_its_own_term():
    z_s, z_t = torch.randn(8, 20).double(), torch.randn(8, 20).double()
    value, rank = value_loss(z_s, z_t), rank_loss(z_s, z_t)
    assert value > 0 < rank
    assert r2kd.r2kd_loss(z_s, z_t, 4.0, 3.0, 5.0, 0.0).item() == pytest.approx((3 * value + 5 * rank).item())


def test_hard_ranks_have_no_gradient_and_soft_ones_do():
    z_s, z_t = torch.randn(8, 20, requires_grad=True), torch.randn(8, 20)
    assert not r2kd.ranks(z_s, 0.0).requires_grad
    rank_loss(z_s, z_t, rho=0.1).backward()
    assert (z_s.grad != 0).float().mean() > 0.9


def test_soft_ranks_become_hard_ones():
    torch.manual_seed(0)
    z_s, z_t = torch.randn(6, 12).double(), torch.randn(6, 12).double()

    def spearman(a, b):
        n = len(a)
        gaps = sum((sum(v < u for v in a) - sum(v < w for v in b)) ** 2 for u, w in zip(a, b))
        return 1 - 6 * gaps / (n * (n * n - 1))

    expected = 1 - sum(spearman(a, b) for a, b in zip(z_s.tolist(), z_t.tolist())) / 6
    assert rank_loss(z_s, z_t, 1.0, rho=1e-4).item() == pytest.approx(expected, abs=1e-4)
    assert rank_loss(z_s, z_t, 1.0).item() == pytest.approx(expected, abs=1e-4)
    assert rank_loss(z_s, z_t, 1.0, rho=1.0).item() != pytest.approx(expected, abs=1e-2)


def test_soft_ranks_slow_formula():
    z, rho = torch.randn(3, 5).double(), 0.3
    for row, own in zip(z.tolist(), r2kd.ranks(z, rho).tolist()):
        ranks = [0.5 + sum(1 / (1 + math.exp(-(u - v) / rho)) for v in row) for u in row]
        assert own == pytest.approx([(rank - sum(ranks) / 5) / 15 for rank in ranks], abs=1e-12)


@pytest.mark.parametrize("size", [50.0, 200.0])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_finite(size, rho):
    z_s = torch.tensor([[size, -size, 0.0], [size, -size, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    for z_t in (-z_s.detach(), z_s.detach(), torch.zeros(3, 3)):
        for temperature in (1.0, 4.0):
            z_s.grad = None
            loss = r2kd.r2kd_loss(z_s, z_t, temperature, 2.0, 2.0, rho)
            loss.backward()
            assert loss.isfinite()
            assert z_s.grad.isfinite().all()


# The pruned teacher


@pytest.mark.parametrize(("name", "rate"), [("resnet8", 0.1), ("mobilenetv2", 0.3), ("vgg8", 0.1), ("resnet8", 0.0)])
def test_pruned_copy(name, rate):
    torch.manual_seed(0)
    net = r2kd.build(name, 100).eval().requires_grad_(False)
    before = snapshot(net)
    copy = r2kd.pruned(net, rate)
    assert same(snapshot(net), before)
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())
    assert {key: value.shape for key, value in copy.state_dict().items()} == {key: value.shape for key, value in before.items()}
    layers = [key for key, module in copy.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for key, value in copy.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module in layers and kind == "weight":
            zero = value == 0
            assert zero.sum() == round(rate * value.numel()), key
            assert torch.equal(value[~zero], before[key][~zero])
            assert not zero.any() or before[key][zero].abs().max() <= before[key][~zero].abs().min()
        else:
            assert torch.equal(value, before[key]), key


def test_mix_of_teachers(monkeypatch):
    """p = 1 leaves out the pruned teacher and p = 0 the other one, which the pruned one equals when nothing is pruned."""
    whole = drive(monkeypatch, teacher_mix=1.0, prune_rate=0.9)
    assert same(whole.after[""], drive(monkeypatch, teacher_mix=0.0, prune_rate=0.0).after[""])
    assert not same(whole.after[""], drive(monkeypatch, teacher_mix=0.0, prune_rate=0.9).after[""])


# The second batch


@cache
def images(seed=1, batch_size=16):
    """A small training set and an untrained teacher."""
    train, _ = small_data(r2kd.Args(dataset="synthetic", device="cpu", seed=seed, batch_size=batch_size))
    torch.manual_seed(0)
    return train, r2kd.build("resnet8", train.classes).eval().requires_grad_(False)


def second_batches(kind, epoch=1, seed=1):
    train, teacher = images(seed)
    return list(r2kd.views(train.epoch(epoch), train, kind, teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_the_epoch_alone_decides_the_draws(kind):
    torch.manual_seed(1)
    first = second_batches(kind)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = second_batches(kind)
    assert torch.equal(torch.get_rng_state(), state)  # the global state is left as it was
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    train, _ = images()
    for (x, y, index, x_new), (x_plain, y_plain, index_plain) in zip(first, train.epoch(1), strict=True):
        assert torch.equal(x, x_plain)
        assert torch.equal(y, y_plain)
        assert torch.equal(index, index_plain)
        assert x_new.dtype == torch.float32
        assert len(x_new) == (min(2 * len(x), 64) if kind == "cutmixpick" else len(x))
    others = [second_batches(kind, epoch=2), second_batches(kind, seed=2)]
    assert all(any(not torch.equal(a[3], b[3]) for a, b in zip(first, other)) for other in others)


def test_no_second_batch():
    assert {len(batch) for batch in second_batches("none")} == {3}


def test_cutout_is_one_square_of_the_mean_colour():
    for x, _, _, x_new in second_batches("cutout"):
        zero = (x_new == 0).all(1)
        assert (zero == zero[:1]).all()
        rows, columns = zero[0].any(1), zero[0].any(0)
        assert 4 <= rows.sum() <= 8 and 4 <= columns.sum() <= 8
        assert zero[0].sum() == rows.sum() * columns.sum()
        assert torch.equal(torch.where(zero[:, None], x, x_new), x)


def test_cutmix_area_follows_the_mixing_factor():
    x, other = torch.zeros(2, 3, 32, 32), torch.tensor([1, 0])
    x[1] = 1
    for lam in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        mixed = r2kd.mix("cutmix", x, other, lam, [16, 16])
        side = math.sqrt(1 - lam) * 32
        assert side - 2 < mixed[0, 0].sum().sqrt() <= side  # even sides, rounded down
        assert torch.equal(mixed[1], 1 - mixed[0])


def drawn(monkeypatch, kind, n=300):
    """Mixing factors and centres that `views` hands to `mix`."""
    module, draws = load("r2kd"), []
    monkeypatch.setattr(module, "mix", lambda kind, x, other, lam, centre: draws.append((lam, *centre, other.tolist())) or x)
    train, _ = images()
    x, y, index = next(iter(train.epoch(1)))
    list(module.views([(x, y, index)] * n, train, kind, None))
    return draws


@pytest.mark.parametrize(("kind", "spread"), [("mixup", 0.2), ("cutmix", 1.0)])
def test_distribution_of_the_draws(kind, spread, monkeypatch):
    draws = drawn(monkeypatch, kind)
    lam = torch.tensor([draw[0] for draw in draws])
    variance = 1 / (4 * (2 * spread + 1))  # of Beta(a, a)
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 300))
    assert lam.var().item() == pytest.approx(variance, rel=0.25)
    centres = torch.tensor([draw[1:3] for draw in draws])
    assert centres.min() == 0
    assert centres.max() == 31
    assert centres.float().mean(0).tolist() == pytest.approx([15.5, 15.5], abs=2.2)
    assert all(sorted(draw[3]) == list(range(16)) for draw in draws)
    assert len({tuple(draw[3]) for draw in draws}) == 300


def test_cutmixpick_keeps_the_mixed_images_of_highest_entropy(monkeypatch):
    module, pools = load("r2kd"), []
    pick = module.pick
    monkeypatch.setattr(module, "pick", lambda x, z, keep: pools.append((x, z, keep)) or pick(x, z, keep))
    train, teacher = images(batch_size=40)
    batches = list(module.views(train.epoch(1), train, "cutmixpick", teacher))
    assert [len(batch[3]) for batch in batches] == [64, 64, 8]
    for (pool, z, keep), (x, _, _, picked) in zip(pools, batches, strict=True):
        assert keep == 64
        assert len(pool) == 2 * len(x)
        assert not torch.equal(pool[: len(x)], pool[len(x) :])  # two passes with draws of their own
        assert torch.equal(z, teacher(pool)[0])  # the mixed images are scored
        p = z.double().softmax(1)
        entropy = -(p * p.log()).sum(1)
        best = entropy.argsort(descending=True)[:64]
        assert torch.equal(picked.flatten(1).sum(1).sort().values, pool[best].flatten(1).sum(1).sort().values)


def test_pick_is_finite_for_large_logits():
    x, z = torch.arange(3.0).reshape(3, 1, 1, 1), torch.tensor([[200.0, -200.0], [0.0, 0.0], [200.0, 199.0]])
    assert r2kd.pick(x, z, keep=2).flatten().tolist() == [2.0, 1.0]
    assert len(r2kd.pick(x, z, keep=64)) == 3


def test_autoaugment_is_torchvisions_policy_in_pixels():
    batches, (train, _) = second_batches("autoaugment"), images()
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    (order, offsets), changed = train_draws(train), 0
    seeds = [torch.randint(2**62, (), generator=train.generator).item() for _ in batches]
    for (x, _, _, x_new), index, offset, seed in zip(batches, order.split(16), offsets.split(16, dim=1), seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            expected = train.normalise(policy(train.crop(index, offset)))
        assert torch.equal(x_new, expected)
        changed += not torch.equal(x_new, x)
    assert changed


def train_draws(train):
    """Order and offsets of epoch 1, drawn once more; `train.generator` then stands where a method's own draws begin."""
    batches = train.epoch(1)
    next(batches)  # seeds the generator
    train.generator.manual_seed(train.generator.initial_seed())
    return torch.randperm(len(train), generator=train.generator), train.offsets()


def test_every_policy_of_autoaugment_takes_a_batch(monkeypatch):
    train, _ = images()
    for policy in range(25):
        monkeypatch.setattr(AutoAugment, "get_params", staticmethod(lambda n, k=policy: (k, torch.zeros(2), torch.ones(2))))
        x, _, _, x_new = next(iter(r2kd.views(train.epoch(1), train, "autoaugment", None)))
        assert x_new.shape == x.shape
        assert x_new.isfinite().all()


# The script


def test_hard_rank_weight_changes_the_loss_and_nothing_else(monkeypatch):
    none, some = drive(monkeypatch, rank_weight=0.0), drive(monkeypatch, rank_weight=2.0)
    assert same(none.after[""], some.after[""])
    assert none.rows[0][1][0] < some.rows[0][1][0]
    assert not same(none.after[""], drive(monkeypatch, rank_temperature=0.1).after[""])


def test_the_second_batch_has_no_cross_entropy(monkeypatch):
    alone = drive(monkeypatch, value_weight=0.0, rank_weight=0.0, augment="none")
    mixed = drive(monkeypatch, value_weight=0.0, rank_weight=0.0)
    learnt = [name for name, _ in alone.trained.named_parameters()]
    assert all(torch.equal(alone.after[""][name], mixed.after[""][name]) for name in learnt)  # batch statistics see x' too


@pytest.mark.parametrize("augment", ["none", "mixup", "cutmixpick", "autoaugment"])
def test_other_augmentations_train(augment, monkeypatch):
    own = drive(monkeypatch, augment=augment, kd_weight=1.0)
    assert math.isfinite(own.rows[0][1][0])
    assert same(own.teacher_before, snapshot(own.teacher))
    assert not own.teacher.training


def test_the_pruned_teacher_stays_as_it_is(monkeypatch):
    module, copies = load("r2kd"), []
    pruned = module.pruned
    monkeypatch.setattr(module, "pruned", lambda net, rate: copies.append(pruned(net, rate)) or copies[-1])
    monkeypatch.setattr("harness.load", lambda method: module)
    own = drive(monkeypatch)
    assert same(snapshot(copies[0]), snapshot(pruned(own.teacher, 0.1)))
    assert not copies[0].training
    assert sum(p.numel() for p in own.trained.parameters()) == sum(p.numel() for p in own.student.parameters())


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("augment", "mixcut", "is unknown: take one of none, mixup, cutmix, cutmixpick, cutout, autoaugment"),
        ("prune_rate", 1.0, "must be in [0, 1)"),
        ("prune_rate", -0.1, "must be in [0, 1)"),
        ("prune_rate", math.nan, "must be in [0, 1)"),
        ("rank_temperature", -0.1, "must not be negative"),
    ],
)
def test_a_bad_value_is_one_line(flag, value, message, capsys):
    with pytest.raises(SystemExit) as end:
        r2kd.main(r2kd.Args(**{flag: value}))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --{flag.replace('_', '-')} {value} {message}"
