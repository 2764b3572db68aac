"""FSP: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning. Yim, Joo, Bae and
Kim, 2017, arXiv: none (CVPR 2017).

How one stage's map is turned into the next one's is the flow of the solution procedure (FSP). A matrix of the inner products
between the channels of two neighbouring maps describes it. In a first stage the student learns the teacher's matrices, in
the second the labels.

    G_k   = 1 / (H * W) * sum over the positions p of  f_k(p) f_k+1(p)^T                          Eq. 1
    L_fsp = sum over k = 0 ... n - 1 of the mean over batch and entries of (G_k,s - G_k,t)^2      Eq. 2
    L     = w * L_fsp in stage 1,   r * CE + a * T^2 * KL(p_t || p_s) in stage 2                  Eq. 3

w = 1, r = 1, a = 0, f_0 the stem's map, f_1 ... f_n the stages'; the larger map of two is average-pooled first. Both networks
must have the same numbers of channels: there is no FSP for wrn_40_2/wrn_40_1 or across families. Stage 1 lasts 30 epochs, at
the student's learning rate throughout. The equation numbers are ours.

Differences
- from the paper: Eq. 2 sums the squares of a matrix there; the mean is RepDistiller's.
- from RepDistiller's code (HobbitLong/RepDistiller, commit b84f547, distiller_zoo/FSP.py): the value is the same, the memory
  is not: it makes B * C * C * H * W numbers before it sums the positions, up to 1 GiB, here a matrix product sums them. Its
  flag -b has no effect on FSP; --fsp-weight has one. What lies behind the last map is in eval mode there in stage 1; here its
  batch norms see the images, which changes no loss.

    python methods/fsp.py --teacher resnet56 --student resnet20
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from common import Run, accuracy, build, fail, graphed, load_data, load_teacher, shapes


@dataclass
class Args:
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
    epochs: int = 240
    """passes over the training images"""
    batch_size: int = 64
    """images a step; the last, smaller batch of an epoch is kept"""
    lr: float | None = None
    """learning rate at the start; by default 0.05, but 0.01 for mobilenetv2, shufflenetv1 and shufflenetv2"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 5/8, 6/8 and 7/8 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    kd_weight: float = 0.0
    """a, weight of the KD term"""
    kd_temperature: float = 4.0
    """T, by which both networks' logits are divided in the KD term"""
    fsp_weight: float = 1.0
    """w, weight of the FSP term, the whole loss of stage 1"""
    init_epochs: int = 30
    """passes over the training images in stage 1"""


def kd_loss(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_t || p_s) of logits (B, C): summed over the classes, averaged over the batch."""
    log_p_s = F.log_softmax(z_s / temperature, 1)
    log_p_t = F.log_softmax(z_t / temperature, 1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def same_side(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C_s, H_s, W_s) and (B, C_t, H_t, W_t), the larger ones average-pooled to the side of the smaller ones."""
    side_s, side_t = f_s.shape[2], f_t.shape[2]
    if side_s > side_t:
        f_s = F.adaptive_avg_pool2d(f_s, side_t)
    elif side_t > side_s:
        f_t = F.adaptive_avg_pool2d(f_t, side_s)
    return f_s, f_t


def flow(f: Tensor, f_next: Tensor) -> Tensor:
    """G of neighbouring maps (B, C, H, W) and (B, D, H', W'): matrices (B, C, D)."""
    f, f_next = (side.flatten(2) for side in same_side(f, f_next))
    return f @ f_next.mT / f.shape[2]  # Eq. 1


def fsp_loss(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """The FSP term for maps f_0 ... f_n, (B, C, H, W) each, with the same numbers of channels in both networks."""
    pairs = zip(pairwise(maps_s), pairwise(maps_t), strict=True)
    return sum((flow(*neighbours_s) - flow(*neighbours_t)).square().mean() for neighbours_s, neighbours_t in pairs)  # Eq. 2


def check_channels(args: Args) -> None:
    """End the program if the two networks' maps differ in their numbers of channels."""
    teacher, student = ([c for c, _, _ in shapes(build(name, 100)).maps] for name in (args.teacher, args.student))
    if teacher != student:
        channels = f"{args.teacher} has {' '.join(map(str, teacher))}, {args.student} {' '.join(map(str, student))}"
        fail(f"FSP needs as many channels in the student's maps as in the teacher's: {channels}", 2)


def main(args: Args) -> float:
    check_channels(args)
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args)
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)

    init = nn.ModuleDict(dict(student=student))  # what stage 1 trains
    init_optimizer = SGD(init.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    init_schedule = MultiStepLR(init_optimizer, [], gamma=0.1)

    @graphed
    def init_step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        _, features_s = student(x)

        loss = args.fsp_weight * fsp_loss(features_s.maps, features_t.maps)  # Eq. 3

        init_optimizer.zero_grad()
        loss.backward()
        init_optimizer.step()
        return (loss.detach() * len(y))[None]

    for epoch in run.epochs(args.init_epochs, trained=init, optimizer=init_optimizer, schedule=init_schedule, phase="init"):
        init.train()
        sums = sum(init_step(*batch) for batch in train.epoch(epoch, phase="init"))
        run.log(epoch, sums / len(train), None, init_schedule)
        init_schedule.step()

    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        z_s, _ = student(x)

        loss = args.ce_weight * F.cross_entropy(z_s, y)
        if args.kd_weight:  # stage 2 needs the teacher for nothing else
            with torch.no_grad():
                z_t, _ = teacher(x)
            loss = loss + args.kd_weight * kd_loss(z_s, z_t, args.kd_temperature)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach() * len(y), (z_s.argmax(1) == y).sum()])

    for epoch in run.epochs(args.epochs, trained=trained, optimizer=optimizer, schedule=schedule):
        trained.train()
        sums = sum(step(*batch) for batch in train.epoch(epoch))
        run.log(epoch, sums / len(train), accuracy(student, test), schedule)
        schedule.step()
    return run.finish(student, teacher)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
