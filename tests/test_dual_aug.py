import pytest
import torch
import torchvision.transforms.functional as vision
from harness import Drive, common, load, same, small_data

dual_aug = load("dual_aug")
RAW = common.synthetic(None)
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


@pytest.fixture(autouse=True)
def one_synthetic_set(monkeypatch):
    monkeypatch.setattr(common, "synthetic", lambda data: RAW)


def images(n, side=32, seed=0):
    """Smooth colours in [0, 1] with some exactly black, white and gray pixels among them."""
    pixels = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    pixels[:, :, 0, 0], pixels[:, :, 0, 1], pixels[:, :, 1, 0] = 0, 1, 0.4
    pixels[:, 1, 1, 1] = pixels[:, 0, 1, 1]  # two channels share the maximum or the minimum
    return pixels


def draws_of(factors, n, jittered=0.0, gray=0.9):
    """The draws (6, n) that give each image the factors {name: value or tensor (n,)}, all others neutral."""
    rows = {name: torch.as_tensor(value, dtype=torch.float).expand(n) for name, value in (NEUTRAL | factors).items()}
    scaled = [(rows[name] - 0.6) / 0.8 for name in ("brightness", "contrast", "saturation")] + [(rows["hue"] + 0.1) / 0.2]
    return torch.stack([*scaled, torch.full((n,), jittered), torch.full((n,), gray)])


def batches(aug, epochs=1, seed=1):
    """All (x_s, y, index, x_t) of some epochs of a small training set, and that set."""
    args = dual_aug.Args(dataset="synthetic", device="cpu", seed=seed, batch_size=16)
    train, _ = small_data(args)
    return [list(dual_aug.views(train.epoch(e), train, *aug)) for e in range(1, epochs + 1)], train


@pytest.mark.parametrize("factor", [0.6, 0.93, 1.37, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_one_operation_equals_torchvision(name, factor):
    pixels = images(4)
    own = dual_aug.color(pixels, draws_of({name: factor}, 4), [0, 1, 2, 3])
    assert (own - getattr(vision, f"adjust_{name}")(pixels, factor)).abs().max() < 1e-3


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_equals_torchvision(shift):
    pixels = images(4)
    own = dual_aug.shift_hue(pixels, torch.full((4, 1, 1, 1), shift))
    assert (own - vision.adjust_hue(pixels, shift)).abs().max() < 1e-3


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_jitter_equals_torchvision_image_by_image(order):
    n, random = 6, torch.Generator().manual_seed(0)
    draws = torch.cat([torch.rand(4, n, generator=random), torch.zeros(1, n), torch.ones(1, n)])
    pixels, names = images(n), ["brightness", "contrast", "saturation", "hue"]
    own = dual_aug.color(pixels, draws, order)
    for i in range(n):
        image = pixels[i]
        for k in order:
            factor = float(0.2 * draws[3, i] - 0.1 if k == 3 else 0.6 + 0.8 * draws[k, i])
            image = getattr(vision, f"adjust_{names[k]}")(image, factor)
        assert (own[i] - image).abs().max() < 1e-3
    assert not torch.allclose(own, dual_aug.color(pixels, draws, [1, 0, 3, 2]), atol=1e-2)  # the order counts


def test_neutral_factors_give_the_input_and_gray_is_gray():
    pixels = images(4)
    assert (dual_aug.color(pixels, draws_of({}, 4), [0, 1, 2, 3]) - pixels).abs().max() < 1e-5
    assert torch.equal(dual_aug.color(pixels, draws_of({"hue": 0.1}, 4, jittered=0.8), [0, 1, 2, 3]), pixels)
    gray = dual_aug.color(pixels, draws_of({}, 4, jittered=0.9, gray=0.1), [0, 1, 2, 3])
    assert (gray - vision.rgb_to_grayscale(pixels, 3)).abs().max() < 1e-3
    plain = dual_aug.shift_hue(gray, torch.full((4, 1, 1, 1), 0.1))  # gray has no hue to turn
    assert (plain - gray).abs().max() < 1e-5


def test_shares_of_jittered_and_gray_images():
    n = 10_000
    pixels, draws = images(n, side=3), torch.rand(6, n, generator=torch.Generator().manual_seed(0))
    out = dual_aug.color(pixels, draws, [0, 1, 2, 3])
    gray = (out - out[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    untouched = (out == pixels).flatten(1).all(1)
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.012)
    assert untouched.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.012)  # neither jittered nor gray


def test_factors_fill_their_ranges():
    draws = torch.rand(6, 2000, generator=torch.Generator().manual_seed(0))
    draws[4], draws[5] = 0, 1
    flat = torch.full((2000, 3, 1, 1), 0.5)  # shows brightness alone
    level = dual_aug.color(flat, draws, [0, 1, 2, 3])[:, 0, 0, 0]
    assert 0.3 <= level.min() < 0.302
    assert 0.698 < level.max() <= 0.7


def test_cutout():
    n, side = 200, 32
    draws = torch.rand(2, n, generator=torch.Generator().manual_seed(0))
    x = torch.ones(n, 3, side, side)
    out = dual_aug.cutout(x, draws)
    assert torch.equal(x, torch.ones_like(x))  # a copy
    for i in range(n):
        row, column = int(draws[0, i] * side), int(draws[1, i] * side)
        expected = torch.ones(3, side, side)
        expected[:, max(row - 4, 0) : row + 4, max(column - 4, 0) : column + 4] = 0
        assert torch.equal(out[i], expected), i
    assert len({tuple(place) for place in (out[:, 0] == 0).nonzero()[:, 1:].tolist()}) == side * side  # it reaches every pixel


def test_the_student_sees_the_views_of_every_other_method():
    (own,), train = batches(("weak", "weak", False))
    for (x_s, y, index, _), (x, y_icd, index_icd) in zip(own, train.epoch(1), strict=True):
        assert torch.equal(x_s, x)
        assert torch.equal(y, y_icd)
        assert torch.equal(index, index_icd)


@pytest.mark.parametrize("same_view", [False, True])
def test_views_differ_between_networks_and_repeat_with_the_seed(same_view):
    (first, second), train = batches(("color", "weak", same_view), epochs=2)
    (again,), _ = batches(("color", "weak", same_view))
    (other,), _ = batches(("color", "weak", same_view), seed=2)
    x_s, x_t = (torch.cat([batch[k] for batch in first]) for k in (0, 3))
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], other[0][0])
    differ = (x_s != x_t).flatten(1).any(1).float().mean().item()
    assert differ == 0 if same_view else differ > 0.9
    if not same_view:  # the teacher's weak view is one of the crops of its image, drawn anew
        index = torch.cat([batch[2] for batch in first])
        plain = train.normalise(train.crop(index, torch.tensor([[4], [4], [0]]).expand(3, len(index))))
        assert (x_t == plain).flatten(1).all(1).float().mean() < 0.2
        found = torch.zeros(len(index), dtype=torch.bool)
        for top in range(9):
            for left in range(9):
                for flip in range(2):
                    crop = train.normalise(train.crop(index, torch.tensor([[top], [left], [flip]]).expand(3, len(index))))
                    found |= (x_t == crop).flatten(1).all(1)
        assert found.all()


def test_the_students_views_do_not_depend_on_the_teachers():
    (first,), _ = batches(("color", "weak", False))
    for aug in (("color", "color", False), ("color", "cutout", False), ("color", "weak", True)):
        (second,), _ = batches(aug)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second))


def test_every_image_and_network_has_factors_of_its_own():
    train, _ = small_data(dual_aug.Args(dataset="synthetic", device="cpu", batch_size=16))
    train.pixels.copy_(torch.tensor([150, 100, 120]))  # one colour everywhere: crop and flip do not show
    batches = list(dual_aug.views(train.epoch(1), train, "color", "color", False))
    x_s, x_t = (torch.cat([batch[k][:, :, 0, 0] for batch in batches]) for k in (0, 3))
    assert (x_s - x_t).abs().amax(1).gt(1e-3).float().mean() > 0.85  # 4 % are jittered for neither network
    for colors in x_s, x_t:
        gaps = (colors[:, None] - colors[None]).abs().amax(2)
        assert gaps[~torch.eye(len(colors), dtype=torch.bool)].gt(1e-4).float().mean() > 0.85


def test_normalised_after_the_colours():
    args = dual_aug.Args(dataset="synthetic", device="cpu", batch_size=16)
    train, _ = small_data(args)
    train.pixels.zero_()
    black = (-train.mean / train.std)[:, None, None].expand(3, 32, 32)
    for x_s, _, _, _ in dual_aug.views(train.epoch(1), train, "color", "weak", False):
        assert (x_s - black).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["color", "cutout"])
def test_either_side_can_be_changed(kind):
    (student,), train = batches((kind, "weak", False))
    (teacher,), _ = batches(("weak", kind, False))
    plain = [x for x, _, _ in train.epoch(1)]
    assert all(torch.equal(batch[0], x) for batch, x in zip(teacher, plain))
    assert not any(torch.equal(batch[0], x) for batch, x in zip(student, plain))
    assert not any(torch.equal(a[3], b[3]) for a, b in zip(student, teacher))


def test_weak_and_same_view_is_icd_bit_for_bit(monkeypatch):
    icd = Drive(monkeypatch, "icd", epochs=2, kd_weight=1.0)
    own = Drive(monkeypatch, "dual_aug", epochs=2, kd_weight=1.0, student_aug="weak", same_view=True)
    assert same(icd.after[""], own.after[""])
    assert icd.rows == own.rows
    default = Drive(monkeypatch, "dual_aug", epochs=2, kd_weight=1.0)
    assert not same(icd.after[""], default.after[""])


def test_each_network_reads_its_own_view(monkeypatch):
    module, seen, given = load("dual_aug"), {}, []
    views = module.views

    def kept(*words):
        for batch in views(*words):
            given.append(batch)
            yield batch

    def remember(net, inputs):
        if inputs[0].shape in ((16, 3, 32, 32), (4, 3, 32, 32)):  # the batches of training and no others
            seen.setdefault(net, []).append(inputs[0])

    monkeypatch.setattr(module, "views", kept)
    monkeypatch.setattr("harness.load", lambda method: module)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        drive = Drive(monkeypatch, "dual_aug")
    finally:
        hook.remove()
    assert len(given) == 3
    assert all(x is batch[0] for x, batch in zip(seen[drive.student], given, strict=True))
    assert all(x is batch[3] for x, batch in zip(seen[drive.teacher], given, strict=True))


@pytest.mark.parametrize("flag", ["student_aug", "teacher_aug"])
def test_an_unknown_augmentation_is_one_line(flag, capsys):
    with pytest.raises(SystemExit) as end:
        dual_aug.main(dual_aug.Args(**{flag: "autoaugment"}))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --{flag.replace('_', '-')} autoaugment is unknown: take one of weak, color, cutout"
