import pytest
import torch
import torch.nn.functional as F
from golden import Case, load

reviewkd = load("reviewkd")
NAMES = {"enter.0": "conv1.0", "enter.1": "conv1.1", "leave.0": "conv2.0", "leave.1": "conv2.1", "attention": "att_conv.0"}


def names(block, own="", golden=""):
    """{parameter of ours: golden name} of a fusion block."""
    for name, _ in block.named_parameters():
        layer, end = name.rsplit(".", 1)
        yield own + name, f"{golden}{NAMES[layer]}.{end}"


def shape(tensor):
    return (*tensor.shape[1:], 1, 1)[:3]


def as_map(tensor):
    return tensor if tensor.dim() == 4 else tensor[:, :, None, None]


def test_golden_context_distance():
    case = Case("reviewkd_hcl")
    terms = [reviewkd.context_distance(case[f"s{k}"], case[f"t{k}"]) for k in (1, 2, 3, 4)]
    assert [term.item() for term in terms] == pytest.approx([case.outputs[f"stage{k}"] for k in (1, 2, 3, 4)], rel=1e-9)
    case.check(sum(terms))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["fuse", "first"])
def test_golden_fusion(kind, mode):
    case = Case(f"reviewkd_abf_{kind}_{mode}")
    block = reviewkd.Fusion(7, 6, 5, case.hyper["out_shape"], deepest=kind == "first").train(mode == "train")
    case.fill(block, dict(names(block)))
    for own, golden in ("enter.1", "conv1.1"), ("leave.1", "conv2.1"):
        for statistic in "running_mean", "running_var":
            block.get_buffer(f"{own}.{statistic}").copy_(case[f"{golden}.{statistic}"])
    r, g = block(case["x"], case["y"] if kind == "fuse" else None)
    assert torch.allclose(r, case.array(case.outputs["residual"]), rtol=1e-9)
    assert torch.allclose(g, case.array(case.outputs["out"]), rtol=1e-9)
    case.check((g * case["probe"]).sum())


def test_golden_total():
    case = Case("reviewkd_total")
    maps_s, maps_t = ([case[f"{side}{k}"] for k in (1, 2, 3, "_pooled")] for side in "st")
    review = reviewkd.ReviewKD([shape(f) for f in maps_s], [shape(f) for f in maps_t])
    case.fill(
        review, dict(pair for k, block in enumerate(review.fusions) for pair in names(block, f"fusions.{k}.", f"abfs.{k}."))
    )
    loss = review([as_map(f) for f in maps_s], [as_map(f) for f in maps_t])
    warmup = min(case.hyper["epoch"] / reviewkd.Args().warmup_epochs, 1)
    case.check(F.cross_entropy(case["logits_s"], case["target"]) + case.hyper["weight"] * warmup * loss)


def test_the_weight_of_a_left_out_pooling_goes_to_the_next():
    g, f = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    f[:, :, ::2] = -1  # every pooling of it is 0
    assert reviewkd.context_distance(g, f).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4))
    assert reviewkd.context_distance(g[..., :1, :1], f[..., :1, :1]).item() == pytest.approx(1)


def test_every_block_is_taught_by_the_shallowest_stage():
    torch.manual_seed(0)
    shapes = [(4, 8, 8), (6, 4, 4), (6, 1, 1)]
    review = reviewkd.ReviewKD(shapes, shapes)
    maps = [torch.randn(3, *shape) for shape in shapes]
    r = None
    for block, f_s in zip(review.fusions, reversed(maps)):
        r, g = block(f_s, r)
    g.square().sum().backward()
    for k, block in enumerate(review.fusions):
        assert all(p.grad.abs().max() > 0 for p in block.enter.parameters()) and (k == 2) == (
            block.leave[0].weight.grad is not None
        )
