"""The step as a CUDA graph: on the CPU against an imitation of one, for every method; on a GPU against the eager step."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import Script, common, only_quickly, quick, random_weights, rows, same_end, small_data, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What a capture cannot hold: the host would wait for the GPU, copy its own numbers to it, or draw
UNFIT = "_local_scalar_dense nonzero masked_select unique bincount repeat_interleave equal lift_fresh rand bernoulli normal_"


def storages(values):
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


class Tape(TorchDispatchMode):
    """Does on the CPU what a CUDA graph does: keeps each operation with the memory it reads and writes, and repeats them.

    Python numbers are frozen, and the capture itself changes nothing. Operations outside a graph's reach are refused.
    """

    def __init__(self):
        super().__init__()
        self.tape, self.before, self.made = [], {}, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.__name__.split(".")[0]
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if any(name.startswith(word) for word in UNFIT.split()) or (name.startswith("index") and masks):
            raise RuntimeError(f"{name} in a capture")
        for place, x in storages((args, kwargs)).items():
            if place not in self.made and place not in self.before:
                self.before[place] = (x, x.detach().clone())
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))  # with their shapes of now
        result = operation(*args, **kwargs)
        assert all(x.device.type == "cpu" for x in tree_leaves(result) if isinstance(x, torch.Tensor)), f"{name}: no device"
        self.made |= {place: x for place, x in storages(result).items() if place not in self.before}
        returned = operation._schema.returns
        kind = returned[0].alias_info if returned else None
        if kind is None or kind.is_write:  # a view is there already
            self.tape.append((operation, *kept, tree_map_only(torch.Tensor, torch.Tensor.detach, result), kind is None))
        return result

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, result, fresh in self.tape:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)) if fresh else ():
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

    @contextlib.contextmanager
    def capture(self):
        with torch.device("meta"), self:  # a tensor made without a device would be on the CPU while the rest is on the GPU
            yield
        with torch.no_grad():
            for x, value in self.before.values():
                x.copy_(value)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture
def turn_on(device, monkeypatch):
    """Call it and steps become graphs from there on, on the CPU imitated ones."""

    def turn_on():
        monkeypatch.setattr(common, "GRAPH", True)
        if device == "cpu":
            stream = SimpleNamespace(wait_stream=lambda other: None)
            fakes = dict(Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext())
            for name, fake in (fakes | dict(CUDAGraph=Tape, graph=lambda tape, stream: tape.capture())).items():
                monkeypatch.setattr(torch.cuda, name, fake)
            monkeypatch.setattr(common, "cuda_graph", common.Graph)

    return turn_on


@pytest.fixture
def captures(monkeypatch):
    """The number of captures so far is this list's length."""
    calls, capture = [], common.Graph.capture
    monkeypatch.setattr(common.Graph, "capture", lambda graph, batch: (calls.append(graph), capture(graph, batch)))
    return calls


@pytest.fixture
def script(device, monkeypatch, capfd, tmp_path):
    """A method's run: four epochs of two full batches and a smaller one; the rate falls after the third.

    On the CPU it is a power of two, of which a tenth is the same float32 whether taken as a number or as a float32 tensor.
    """
    script = Script(monkeypatch, capfd, tmp_path)
    random_weights("teacher.pt", "resnet14")

    def run(method, folder):
        flags = f"--epochs 4 --milestones 3 --lr 0.0625 --device {device} --runs {folder}"
        return script(method, flags, *(words.replace("epochs 2", "epochs 4") for words in quick(method, "resnet14")))

    run.dying = script.dying
    return run


@only_quickly("icd", "ft", "crd", "dual_aug")
def test_a_graph_ends_like_the_step(method, script, turn_on, captures):
    assert script(method, "eager").code == 0
    turn_on()
    done = script(method, "graph")
    assert done.code == 0, done.err
    assert len(captures) == len(list(Path("graph").glob("*/checkpoint*.pt")))  # one per phase
    a, b = (next(Path(runs).iterdir()) for runs in ("eager", "graph"))  # where a sum begins in memory can change its last bit
    assert [row["loss"] for row in rows(a)] == pytest.approx([row["loss"] for row in rows(b)], rel=1e-5)
    assert np.allclose(weights(a / "student.pt"), weights(b / "student.pt"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("graph_first", [True, False])
def test_a_run_resumed_just_before_its_rate_falls(graph_first, script, turn_on, captures, monkeypatch):
    """With a graph and without one before and after the kill, in both orders, the end is that of the whole run."""
    assert script("kd", "whole").code == 0
    if graph_first:
        turn_on()
    with script.dying(after=2):
        assert script("kd", "broken").code == -9
    assert len(captures) == graph_first
    monkeypatch.setattr(common.Graph, "WARM_UP", 1)  # so that the third epoch ends with a replay, before the rate falls
    turn_on()
    assert script("kd", "broken").code == 0
    assert len(captures) == graph_first + 1
    same_end("whole", "broken")
    assert [row["lr"] for row in rows(next(Path("broken").iterdir()))] == [0.0625, 0.0625, 0.0625, 0.00625]


def test_a_graph_is_left_again(script, turn_on, monkeypatch):
    """What a graph left in a checkpoint, a learning rate on the device, is of use without one too."""
    assert script("kd", "whole").code == 0
    with script.dying(), monkeypatch.context() as patch:
        patch.setattr(common, "GRAPH", True)
        assert script("kd", "broken").code == -9
    assert script("kd", "broken").code == 0
    same_end("whole", "broken")


def test_other_shapes_run_as_they_are(device, turn_on, captures):
    turn_on()
    step = common.cuda_graph(lambda x: {"sum": 2 * x.sum()})
    for n in 4, 4, 4, 4, 3, 4, 5, 4:
        x = torch.rand(n, 2, device=device)
        assert torch.equal(step(x)["sum"], 2 * x.sum())
    assert len(captures) == 1


def test_off_by_default_and_on_the_cpu(monkeypatch, captures):
    step = torch.sum
    assert common.cuda_graph(step) is step
    monkeypatch.setattr(common, "GRAPH", True)
    assert [common.cuda_graph(step)(torch.ones(n)).item() for n in (2, 2, 2, 2, 2)] == [2] * 5
    assert not captures


@pytest.mark.parametrize("gpu", [pytest.param("cuda", marks=GPU)])
def test_views_are_the_same_floats_on_a_gpu(gpu):
    views = []
    for device in "cpu", gpu:
        train, _ = small_data(SimpleNamespace(seed=1, batch_size=16, device=device, epochs=1))
        views.append(torch.cat([x.cpu() for x, _, _ in train.epoch(1)]))
    assert torch.equal(*views)


def test_a_step_that_waits_for_the_device_is_refused(device, turn_on, capfd):
    """The last test here: where PyTorch does not clean up after a failed capture, nothing can be captured after it."""
    turn_on()
    step = common.cuda_graph(lambda x: {"sum": torch.full((), x.sum().item())})
    with pytest.raises(SystemExit) as end:
        for _ in range(4):
            step(torch.ones(2, device=device))
    assert end.value.code == 1
    assert "without CUDA_GRAPH=1" in capfd.readouterr().err
