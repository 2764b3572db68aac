"""IE-AT: inheritance and exploration with attention maps. After Huang, Shen, Xing et al., Revisiting Knowledge Distillation: An
Inheritance and Exploration Framework, CVPR 2021, arXiv 2107.00181, which has IE-AT in its Table 1. The definition is ours.

One half of the student's channels has to attend to where the teacher does (inheritance, as in AT, arXiv 1612.03928), the other
half to where it does not (exploration), so that the student does not merely repeat the teacher.

    Q(f)   = q / ||q||,  q = the mean over channels of f^2, as a vector of positions     Eq. 1
    D      = mean over images and positions of (Q(f_s) - Q(f_t))^2                       Eq. 2
    L_inh  =  D(f_inh, f_t),   f_inh the first half of the student's channels            Eq. 3
    L_exp  = -D(f_exp, f_t),   f_exp the second half; never below -2 / positions         Eq. 4
    L      = r * CE + lambda_inh * L_inh + lambda_exp * L_exp                            Eq. 5

r = 1, lambda_inh = 1000, lambda_exp = 100; f is the map that is pooled into the classifier. The equation numbers are ours.

Differences
- from the paper: not compared but for its abstract; everything but the idea is ours. 1000 is AT's usual weight for the mean of
  squares. 100 was not tuned: on 8x8 positions the exploration term is never below -3.13, the size of the cross-entropy.
- from the authors' code (aliyun/Revisiting-Knowledge-Distillation-an-Inheritance-and-Exploration-Framework, commit 3274ab0): it
  has no IE-AT; the recipe is its CIFAR-10 one for every data set, with this project's pixels, teachers and initialisation.
  Seeds are set here, and the last epoch counts, not the best on the test set.
- from AT: the last map alone, where AT compares every stage. As there, of two maps that differ in side the larger one is
  average-pooled, and a mean ties the weights to the number of positions. Nothing is trained besides the student.

    python methods/ie_at.py --teacher resnet56 --student resnet20
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
from common import Run, accuracy, build, graphed, load_data, load_teacher


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
    """learning rate at the start"""
    milestones: tuple[int, ...] | None = None
    """epochs after which the learning rate falls to a tenth; by default 1/2 and 3/4 of all"""
    weight_decay: float = 5e-4
    """on all parameters, those of batch norm and of auxiliary modules too"""
    ce_weight: float = 1.0
    """r, weight of the cross-entropy with the labels"""
    inheritance_weight: float = 1000.0
    """lambda_inh, weight of the inheritance term; 0 leaves exploration only"""
    exploration_weight: float = 100.0
    """lambda_exp, weight of the exploration term; 0 leaves inheritance only"""


def attention(f: Tensor) -> Tensor:
    """Q of maps (B, C, H, W): unit vectors (B, H * W)."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)  # Eq. 1


def distance(f_s: Tensor, f_t: Tensor) -> Tensor:
    """D of maps (B, C_s, H_s, W_s) and (B, C_t, H_t, W_t): from 0 to 2 / positions of the smaller one."""
    side = min(f_s.shape[-1], f_t.shape[-1])
    f_s, f_t = (F.adaptive_avg_pool2d(f, side) if f.shape[-1] > side else f for f in (f_s, f_t))
    return (attention(f_s) - attention(f_t)).square().mean()  # Eq. 2


def ie_at_loss(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """L_inh and L_exp of the student's map (B, C_s, H_s, W_s) and the teacher's (B, C_t, H_t, W_t)."""
    half = f_s.shape[1] // 2
    inheritance = distance(f_s[:, :half], f_t)  # Eq. 3
    exploration = -distance(f_s[:, half:], f_t)  # Eq. 4
    return inheritance, exploration


def main(args: Args) -> float:
    run = Run(__file__, args)  # a run that is already finished prints its result and ends here
    train, test = load_data(args, padding="reflect")
    teacher = load_teacher(args, test)  # frozen, in eval mode

    torch.manual_seed(args.seed)  # right before the student: the same student for every teacher and method
    student = build(args.student, train.classes, args.device)
    trained = nn.ModuleDict(dict(student=student))  # what the optimiser trains and a checkpoint holds
    optimizer = SGD(trained.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True, fused=True)
    schedule = MultiStepLR(optimizer, args.milestones, gamma=0.1)

    @graphed
    def step(x, y, index):
        with torch.no_grad():
            _, features_t = teacher(x)
        z_s, features_s = student(x)

        inheritance, exploration = ie_at_loss(features_s.last, features_t.last)
        loss = args.ce_weight * F.cross_entropy(z_s, y)
        loss = loss + args.inheritance_weight * inheritance + args.exploration_weight * exploration  # Eq. 5

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
