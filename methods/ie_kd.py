"""IE-KD: Revisiting Knowledge Distillation: An Inheritance and Exploration Framework. Huang, Shen, Xing et al., CVPR 2021,
arXiv 2107.00181. Taken to be IE-FT, the variant built on factor transfer.

An auto-encoder first learns to compress the teacher's last map into a factor. Then one half of the student's channels has to
reproduce that factor through a small encoder of its own (inheritance), and the other half has to differ from it
(exploration), so that the student does not merely repeat the teacher. At test time only the student is left.

    L_rec   = mean |f_t - D_t(E_t(f_t))|                                 Eq. 1, phase 1 trains E_t and D_t
    D(F, G) = mean over images and elements of | F/||F|| - G/||G|| |     Eq. 2, ||F|| is the norm of an image's whole factor
    L_inh   =  D(E_inh(f_inh), E_t(f_t))                                 Eq. 3
    L_exp   = -D(E_exp(f_exp), E_t(f_t))                                 Eq. 4, never below -2/sqrt(elements)
    L       = r * CE + lambda_inh * L_inh + lambda_exp * L_exp           Eq. 5, phase 2 trains student, E_inh and E_exp

r = 1, lambda_inh = lambda_exp = 50, no KL term; f is the map that is pooled into the classifier. The numbers of the equations
are ours. Form and recipe come from the authors' code (aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-
Framework, commit 3274ab0: loss/factor_transfer.py, loss/reconstruction.py).

Differences
- from the paper: not compared but for its abstract. The weights are those of its Table 6b as told by others, who square L_rec.
- from the authors' code: it calls the frozen network "student" and the trained one "teacher"; here the names are the paper's.
  Seeds are set, and the last epoch counts, not the best on the test set.
  No configuration in it runs, and the weights of 1 in the only one for IE-KD are next to nothing for a mean over all elements.
- ours: a factor has half as many channels as the student (the code: 32, half of a resnet's 64); of two factors that differ in
  side the larger is average-pooled; the CIFAR-10 recipe serves every data set, with our pixels, teachers and initialisation.
- kept although odd: L_exp can fall through E_exp alone, while f_exp still resembles the teacher. So the log has the linear CKA of
  halves and teacher's map, 1 if equal up to rotation and scale: a mean over test batches of 500 images, biased upwards.

    python methods/ie_kd.py --teacher resnet56 --student resnet20
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import Images, Run, accuracy, build, fail, graphed, load_data, load_teacher, shapes


@dataclass
class Args:
    drops: ClassVar[tuple[float, ...]] = (1 / 2, 3 / 4)  # the default milestones, as parts of the epochs
    teacher: str = "resnet56"
    """the trained network to learn from, a name in common.NETWORKS"""
    student: str = "resnet20"
    """the network to train, a name in common.NETWORKS"""
    dataset: str = "cifar100"
    """cifar100, cifar10, or synthetic (small, nothing to download)"""
    data: Path = Path("data")
    """folder of the data sets"""
    runs: Path = Path("runs")
    """folder in which this run makes its own"""
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda, cuda:1, ... or cpu"""
    teacher_weights: Path | None = None
    """checkpoint of the teacher; by default one in teachers/, else a run of methods/vanilla.py, which is started if need be"""
    epochs: int = 160
    """passes over the training images"""
    batch_size: int = 128
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = 0.1
    """learning rate at the start of either phase; constant in the first"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 1/2 and 3/4 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    inheritance_weight: float = 50.0
    """lambda_inh, weight of the inheritance term; 0 leaves exploration only"""
    exploration_weight: float = 50.0
    """lambda_exp, weight of the exploration term; 0 leaves inheritance only"""
    split: str = "first"
    """which channels of the student inherit: the first half, or a random half that is drawn once"""
    init_epochs: int = 30
    """passes over the training images in phase 1, which trains the teacher's auto-encoder"""


class Coder(nn.Sequential):
    """Encoder or decoder: maps (B, c_in, H, W) to (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int):
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]  # as released; it changes no map that comes out of a ReLU
        for c, c_next in (c_in, c_in), (c_in, c_out), (c_out, c_out):
            layers += [nn.Conv2d(c, c_next, 3, padding=1, bias=False), nn.BatchNorm2d(c_next), nn.LeakyReLU(0.1)]
            nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        super().__init__(*layers)


class AutoEncoder(nn.Module):
    """E_t and D_t: a map (B, c_t, H, W) to its factor (B, width, H, W) and back; called with a map, it gives L_rec."""

    def __init__(self, c_t: int, width: int):
        super().__init__()
        self.encode, self.decode = Coder(c_t, width), Coder(width, c_t)

    def forward(self, f_t: Tensor) -> Tensor:
        return F.l1_loss(self.decode(self.encode(f_t)), f_t, reduction="mean")  # Eq. 1


def distance(f: Tensor, g: Tensor) -> Tensor:
    """D of two factors (B, C, H, W), which may differ in side: from 0 to 2 / sqrt(C * H * W)."""
    side = min(f.shape[-1], g.shape[-1])
    f, g = (F.adaptive_avg_pool2d(factor, side) if factor.shape[-1] > side else factor for factor in (f, g))
    return (F.normalize(f.flatten(1), dim=1) - F.normalize(g.flatten(1), dim=1)).abs().mean()  # Eq. 2


class IEKD(nn.Module):
    """The split of a student's map of c_s channels, and the two terms; E_inh and E_exp are trained."""

    def __init__(self, c_s: int, split: str = "first"):
        super().__init__()
        self.width = c_s // 2
        self.encode_inh, self.encode_exp = Coder(self.width, self.width), Coder(c_s - self.width, self.width)
        self.register_buffer("order", torch.randperm(c_s) if split == "random" else None)

    def halves(self, f_s: Tensor) -> tuple[Tensor, Tensor]:
        """f_inh and f_exp, which together have all channels of f_s (B, c_s, H, W)."""
        f_s = f_s if self.order is None else f_s[:, self.order]
        return f_s[:, : self.width], f_s[:, self.width :]

    def forward(self, f_s: Tensor, factor_t: Tensor) -> tuple[Tensor, Tensor]:
        """L_inh and L_exp of the student's map (B, c_s, H, W) and the teacher's factor (B, width, H', W')."""
        f_inh, f_exp = self.halves(f_s)
        inheritance = distance(self.encode_inh(f_inh), factor_t)  # Eq. 3
        exploration = -distance(self.encode_exp(f_exp), factor_t)  # Eq. 4
        return inheritance, exploration


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA (centred, biased) of two representations (B, ...) of the same images, from 0 to 1."""
    x, y = (f.flatten(1) - f.flatten(1).mean(0) for f in (x, y))
    return F.cosine_similarity((x @ x.T).flatten(), (y @ y.T).flatten(), dim=0)


@torch.no_grad()
def similarities(student: nn.Module, iekd: IEKD, teacher: nn.Module, images: Images) -> dict[str, Tensor]:
    """Mean linear CKA of the student's halves and the teacher's map in batches of `images`. The student is left in eval mode."""
    student.eval()
    rows = []
    for x, _ in images.batches():
        (f_inh, f_exp), f_t = iekd.halves(student(x)[1].last), teacher(x)[1].last
        rows.append(torch.stack([linear_cka(f_inh, f_exp), linear_cka(f_exp, f_t), linear_cka(f_inh, f_t)]))
    return dict(zip(("cka_inh_exp", "cka_exp_t", "cka_inh_t"), torch.stack(rows).mean(0)))


def main(args: Args) -> float:
    if args.split not in ("first", "random"):
        fail(f"--split {args.split} is unknown: take first or random", 2)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args, padding="reflect")
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    iekd = IEKD(shapes(student).last[0], args.split).to(args.device)
    autoencoder = AutoEncoder(shapes(teacher).last[0], iekd.width).to(args.device)

    init = nn.ModuleDict(dict(autoencoder=autoencoder))  # what phase 1 trains
    init_optimizer = SGD(init.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True, fused=True)
    init_schedule = MultiStepLR(init_optimizer, [], gamma=0.1)

    @graphed
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)

        loss = autoencoder(features_t.last)  # Eq. 1

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return (loss.detach() * len(y))[None]

    for epoch in run.epochs(args.init_epochs, init, init_optimizer, init_schedule, phase="autoencoder"):
        init.train()
        sums = sum(init_step(*batch) for batch in train.epoch(epoch, phase="autoencoder"))
        run.log(epoch, sums / len(train), None, init_schedule)
        init_schedule.step()
    autoencoder.eval().requires_grad_(False)

    trained = nn.ModuleDict(dict(student=student, iekd=iekd))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
            factor_t = autoencoder.encode(features_t.last)
        z_s, features_s = student(x)

        inheritance, exploration = iekd(features_s.last, factor_t)
        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.inheritance_weight * inheritance + args.exploration_weight * exploration  # Eq. 5

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule, **similarities(student, iekd, teacher, test))
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
