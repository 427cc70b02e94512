"""One object that drives a run: the same bits as its parts stepped by hand, resumes, skipped steps, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compared_runs import OPTIMIZERS, assert_same_bits, bits, make_optimizer
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

import gmp_kernels as gmp
from gmp_kernels.errors import GMPError, NonFiniteError, ScheduleError, SparsityError, StateError
from gmp_kernels.schedules import Cubic, OneShot

STAGES = gmp.Stages(1, 4, 3, steps_per_epoch=3)


def model_and_optimizer(kind: str = "torch") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    biases = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.05}]
    return model, make_optimizer(kind, groups, lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    optimizer.zero_grad()
    model(torch.randn(8, 12)).square().mean().backward()
    optimizer.step()


def options(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_is_its_parts_stepped_by_hand(kind: str) -> None:
    model, optimizer = model_and_optimizer(kind)
    run = STAGES.attach(model, optimizer, 0.8)
    by_hand, other = model_and_optimizer(kind)
    lr_scheduler = STAGES.lr_scheduler(other)
    pruner = gmp.GMPScheduler(by_hand, other, STAGES.schedule(0.05, 0.8))
    parts = gmp.Run([pruner])
    for step in range(STAGES.total_steps):
        STAGES.end_weight_decay(other, step)
        assert_same_bits(bits(model, optimizer, run), bits(by_hand, other, parts))
        train(model, optimizer, step)
        train(by_hand, other, step)
        report = pruner.step()
        lr_scheduler.step()
        reports = run.step()
        assert [found.sparsity for found in reports] == ([] if report is None else [report.sparsity])
    assert_same_bits(bits(model, optimizer, run), bits(by_hand, other, parts))
    assert run.finished and run.sparsity == pruner.sparsity == 307 / 384
    assert {decay for _, decay in options(optimizer)} == {0.0}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", [("model", "optimizer", "run"), ("run", "optimizer", "model")])
@pytest.mark.parametrize("stop", [2, 9, 15, 18])
def test_resume_is_bit_equal(kind: str, order: tuple[str, ...], stop: int) -> None:
    def build() -> dict[str, Any]:
        model, optimizer = model_and_optimizer(kind)
        rates = STAGES.lr_scheduler(optimizer, pruning="rewind", cycles=2)
        return {"model": model, "optimizer": optimizer, "run": STAGES.attach(model, optimizer, lr_scheduler=rates)}

    def go_on(parts: dict[str, Any], begin: int, end: int) -> list[Any]:
        seen = []
        for step in range(begin, end):
            seen.append(options(parts["optimizer"]))
            train(parts["model"], parts["optimizer"], step)
            parts["run"].step()
        return seen

    whole, stopped, resumed = build(), build(), build()
    seen = go_on(whole, 0, STAGES.total_steps)
    go_on(stopped, 0, stop)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in stopped.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for name in order:
        resumed[name].load_state_dict(saved[name])
    assert go_on(resumed, stop, STAGES.total_steps) == seen[stop:]
    assert_same_bits(bits(**resumed), bits(**whole))


def test_loading_sets_the_learning_rate_even_of_a_new_optimizer() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer)
    for step in range(22):
        train(model, optimizer, step)
        run.step()
    fresh, new = model_and_optimizer()
    resumed = STAGES.attach(fresh, new)
    resumed.load_state_dict(run.state_dict())
    assert options(new) == options(optimizer) == [(pytest.approx(2e-4), 0.0)] * 2


@pytest.mark.parametrize("shape", [{}, {"pruning": "rewind"}, {"finetuning": lambda o: ConstantLR(o, 1.0)}])
def test_the_learning_rate_begins_where_the_optimizer_has_it(shape: dict[str, Any]) -> None:
    """And not at that of the dense training before, which an lr_scheduler of torch leaves in the param groups."""
    model, optimizer = model_and_optimizer()
    ConstantLR(optimizer, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    run = STAGES.attach(model, optimizer, lr_scheduler=STAGES.lr_scheduler(optimizer, **shape))
    train(model, optimizer, 0)
    run.step()
    assert [rate for rate, _ in options(optimizer)] == [0.003, 0.003]


def test_masks_alone_go_into_a_run_of_another_length() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer)
    for step in range(13):
        train(model, optimizer, step)
        run.step()
    longer = gmp.Stages(1, 8, 3, steps_per_epoch=3)
    fresh, new = model_and_optimizer()
    resumed = longer.attach(fresh, new)
    with pytest.raises(StateError, match=r"expected schedule\['end_step'\] 27, got 15; .*masks_only=True"):
        resumed.load_state_dict(run.state_dict())
    resumed.load_state_dict(run.state_dict(), masks_only=True)
    assert resumed.pruner.masks == run.pruner.masks and resumed.sparsity == run.sparsity > 0.5
    assert resumed.step_count == 0 and options(new) == [(0.02, 0.1), (0.02, 0.05)]
    with pytest.raises(StateError, match=r"got the state of a Run; load it by run\.load_state_dict"):
        resumed.pruner.load_state_dict(run.state_dict())


def test_an_lr_scheduler_that_the_loop_steps_too_is_warned_about() -> None:
    model, optimizer = model_and_optimizer()
    lr_scheduler = STAGES.lr_scheduler(optimizer)
    run = STAGES.attach(model, optimizer, lr_scheduler=lr_scheduler)
    train(model, optimizer, 0)
    run.step()
    lr_scheduler.step()
    train(model, optimizer, 1)
    with pytest.warns(gmp.GMPWarning, match=r"is at step 2 instead of 1; leave its step\(\) to run\.step\(\)"):
        run.step()


LR_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "cosine": lambda o: CosineAnnealingLR(o, 40),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o, total_iters=5), CosineAnnealingLR(o, 35)], [5]),
    "chain": lambda o: ChainedScheduler([LinearLR(o, total_iters=20), CosineAnnealingLR(o, 40)]),
}


@pytest.mark.parametrize("kind", LR_SCHEDULERS)
@pytest.mark.parametrize("before", [0, 8])
def test_an_lr_scheduler_goes_on_where_it_is(kind: str, before: int) -> None:
    """Whether it comes from dense training or not, and in a run that resumes."""

    def begin() -> dict[str, Any]:
        model, optimizer = model_and_optimizer()
        lr_scheduler = LR_SCHEDULERS[kind](optimizer)
        for step in range(before):
            train(model, optimizer, step)
            lr_scheduler.step()
        run = STAGES.attach(model, optimizer, lr_scheduler=lr_scheduler)
        return {"model": model, "optimizer": optimizer, "run": run}

    def go_on(parts: dict[str, Any], steps: range) -> list[float]:
        rates = []
        for step in steps:
            train(parts["model"], parts["optimizer"], step)
            parts["run"].step()
            rates.append(options(parts["optimizer"])[0][0])
        return rates

    other, alone = model_and_optimizer()
    lr_scheduler = LR_SCHEDULERS[kind](alone)
    expected = []
    for step in range(before + STAGES.total_steps):
        train(other, alone, step)
        lr_scheduler.step()
        expected.append(options(alone)[0][0])
    whole = begin()
    seen = go_on(whole, range(10))
    state = copy.deepcopy({name: part.state_dict() for name, part in whole.items()})
    seen += go_on(whole, range(10, STAGES.total_steps))
    assert seen == expected[before:]
    resumed = begin()
    for name, part in resumed.items():
        part.load_state_dict(state[name])
    assert go_on(resumed, range(10, STAGES.total_steps)) == seen[10:]


def test_a_step_that_is_skipped_changes_nothing() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer, lr_scheduler=STAGES.lr_scheduler(optimizer, pruning="cosine"))
    for step in range(8):
        train(model, optimizer, step)
        run.step()
    before = options(optimizer), run.step_count
    for _ in range(5):
        assert run.step() == ()
    assert (options(optimizer), run.step_count) == before


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    model, _ = model_and_optimizer()
    rate = torch.tensor(0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    run = STAGES.attach(model, optimizer)
    for step in range(22):
        train(model, optimizer, step)
        run.step()
    state = run.state_dict()
    run.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(2e-4)


def test_options_that_attach_leaves_alone() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer, OneShot(0.5), lr_scheduler=None, remove_weight_decay=False, ignore=["0"])
    for step in range(STAGES.total_steps):
        train(model, optimizer, step)
        run.step()
    assert options(optimizer) == [(0.02, 0.1), (0.02, 0.05)]
    assert list(run.pruner.masks) == ["2.weight"] and run.lr_scheduler is None
    run.load_state_dict(run.state_dict())


def test_weight_decay_of_one_param_group() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer, remove_weight_decay=[0])
    for step in range(STAGES.pruning_end_step):
        assert options(optimizer)[0][1] == 0.1
        train(model, optimizer, step)
        run.step()
    assert [decay for _, decay in options(optimizer)] == [0.0, 0.05]


def test_a_low_final_sparsity_lowers_the_first() -> None:
    model, optimizer = model_and_optimizer()
    assert STAGES.attach(model, optimizer, 0.02).pruner.schedule == STAGES.schedule(0.02, 0.02)


@pytest.mark.parametrize("stages", [gmp.Stages(1, 3, 0, steps_per_epoch=4), gmp.Stages.from_steps(7, pruning=59 / 60)])
def test_a_run_without_fine_tuning_reaches_its_sparsity(stages: gmp.Stages) -> None:
    model, optimizer = model_and_optimizer()
    run = stages.attach(model, optimizer, 0.75)
    for step in range(stages.total_steps):
        train(model, optimizer, step)
        run.step()
    assert run.finished and run.sparsity == 0.75


def test_an_optimizer_that_is_wrapped() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    model, inner = model_and_optimizer()
    wrapped = Wrapper(inner)
    run = STAGES.attach(model, wrapped)
    other, plain = model_and_optimizer()
    expected = STAGES.attach(other, plain)
    for step in range(STAGES.total_steps):
        train(model, wrapped, step)
        run.step()
        train(other, plain, step)
        expected.step()
    assert options(inner) == options(plain)
    assert_same_bits(bits(model, inner, run), bits(other, plain, expected))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_go_on_alone(duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer)
    for step in range(7):
        train(model, optimizer, step)
        run.step()
    twin, its_optimizer, its_run = duplicate((model, optimizer, run))
    for step in range(7, STAGES.total_steps):
        train(twin, its_optimizer, step)
        its_run.step()
    assert (run.step_count, its_run.step_count) == (7, STAGES.total_steps)
    assert options(optimizer) == [(0.02, 0.1), (0.02, 0.05)] and its_run.finished
    other, plain = model_and_optimizer()
    expected = STAGES.attach(other, plain)
    for step in range(STAGES.total_steps):
        train(other, plain, step)
        expected.step()
    assert_same_bits(bits(twin, its_optimizer, its_run), bits(other, plain, expected))


def two_pruners() -> tuple[nn.Module, torch.optim.Optimizer, gmp.Run]:
    model, optimizer = model_and_optimizer("gmp")
    pruners = [
        gmp.GMPScheduler(model, optimizer, Cubic(0.1, 0.5, 2, 8, frequency=3), targets="0"),
        gmp.GMPScheduler(model, optimizer, OneShot(0.75, 5), targets="2"),
    ]
    return model, optimizer, gmp.Run(pruners, lr_scheduler=STAGES.lr_scheduler(optimizer))


def test_several_pruners_in_one_run() -> None:
    model, optimizer, run = two_pruners()
    reports = []
    for step in range(9):
        train(model, optimizer, step)
        reports.append([found.step for found in run.step()])
    assert reports == [[], [], [2], [], [], [5, 5], [], [], [8]]
    assert run.finished and run.sparsity == 1 - (384 - 144 - 72) / 384
    assert run.step_count == 9
    with pytest.raises(StateError, match=r"expected one pruner, got 2; use run\.pruners"):
        _ = run.pruner
    assert (
        "0.weight" in repr(run) and "2.weight" in repr(run) and repr(run).startswith("Run, learning rates 0.02, 0.02\n")
    )


def test_a_state_that_is_refused_changes_nothing() -> None:
    model, optimizer, run = two_pruners()
    for step in range(6):
        train(model, optimizer, step)
        run.step()
    state = run.state_dict()
    fresh, _, other = two_pruners()
    before = copy.deepcopy((other.state_dict(), fresh.state_dict()))
    second = {**state, "pruners": [state["pruners"][0], state["pruners"][0]]}  # refused after the first was checked
    for wrong, message in [
        (second, "layers"),
        ({**state, "pruners": state["pruners"][:1]}, "as many pruners as this one, 2, got 1"),
        (state["pruners"][0], r"expected what Run.state_dict\(\) returned, got \['history"),
        (None, "got NoneType"),
        ({**state, "lr_scheduler": None}, "expected an lr_scheduler in the state, as in this run, got none"),
        ({**state, "lr_scheduler": {"_last_lr": [0.1]}}, "learning rates of 2 param groups in the state, got 1"),
        ({**state, "lr_scheduler": {"_last_lr": [0.1, 0.1]}}, "expected the state of a LambdaLR, got that of another"),
        ({**state, "lr_scheduler": {"_last_lr": 0.1}}, "learning rates of 2 param groups in the state, got None"),
        ({**state, "lr_scheduler": [0.1, 0.1]}, "learning rates of 2 param groups in the state, got None"),
    ]:
        with pytest.raises(StateError, match=message):
            other.load_state_dict(wrong)  # type: ignore[arg-type]
        after = other.state_dict()
        assert after["lr_scheduler"] == before[0]["lr_scheduler"]
        for one, two in zip(after["pruners"], before[0]["pruners"], strict=True):
            assert str(one) == str(two)
        assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before[1].items())
    other.load_state_dict(state)
    assert other.step_count == 6 and other.sparsity == run.sparsity


@pytest.mark.parametrize("kind", LR_SCHEDULERS)
@pytest.mark.parametrize("other", LR_SCHEDULERS)
def test_the_state_of_another_lr_scheduler_is_refused(kind: str, other: str) -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer, lr_scheduler=LR_SCHEDULERS[kind](optimizer))
    fresh, new = model_and_optimizer()
    state = STAGES.attach(fresh, new, lr_scheduler=LR_SCHEDULERS[other](new)).state_dict()
    if kind == other:
        run.load_state_dict(state)
        return
    with pytest.raises(StateError, match="got that of another lr_scheduler"):
        run.load_state_dict(state)


def test_an_update_that_raises_leaves_the_learning_rate_and_is_made_up() -> None:
    model, optimizer = model_and_optimizer()
    run = STAGES.attach(model, optimizer, lr_scheduler=STAGES.lr_scheduler(optimizer, pruning="cosine"))
    for step in range(6):
        train(model, optimizer, step)
        run.step()
    train(model, optimizer, 6)
    before = options(optimizer)
    weight = model.get_parameter("0.weight")
    index = weight.detach().abs().argmax()
    kept = weight.detach().flatten()[index].item()
    with torch.no_grad():
        weight.view(-1)[index] = float("nan")
    with pytest.raises(NonFiniteError):
        run.step()
    assert options(optimizer) == before
    with torch.no_grad():
        weight.view(-1)[index] = kept
    assert len(run.step()) == 1
    assert options(optimizer) != before


def test_a_pruner_that_is_no_sequence_or_comes_twice_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    pruner = gmp.GMPScheduler(model, optimizer, STAGES.schedule())
    with pytest.raises(TypeError, match="expected a sequence of GMPScheduler, got one alone"):
        gmp.Run(pruner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one twice"):
        gmp.Run([pruner, pruner])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, o: gmp.Run([]), ValueError, "expected at least one pruner"),
        (lambda m, o: gmp.Run([m]), TypeError, "expected a sequence of GMPScheduler, got Sequential"),
        (lambda m, o: gmp.Run(None), TypeError, "expected a sequence of GMPScheduler, got NoneType"),
        (
            lambda m, o: STAGES.attach(m, o, lr_scheduler=ConstantLR(model_and_optimizer()[1])),
            ValueError,
            "Stages.attach: expected an lr_scheduler of the optimizer that is followed, got one of another AdamW",
        ),
        (
            lambda m, o: STAGES.attach(m, o, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(o)),
            TypeError,
            "stepped without arguments, got a ReduceLROnPlateau",
        ),
        (lambda m, o: STAGES.attach(m, o, lr_scheduler="cosine"), TypeError, "Stages.attach: .*, got a str"),
        (lambda m, o: STAGES.attach(m, o, 0.9, frequency=2), TypeError, "got 'frequency', which belongs to the sched"),
        (lambda m, o: STAGES.attach(m, o, 90), SparsityError, "Stages.attach: schedule: expected a sparsity in"),
        (lambda m, o: STAGES.attach(m, o, remove_weight_decay=[2]), ScheduleError, "indices of the 2 param groups"),
        (lambda m, o: STAGES.attach(m, o, remove_weight_decay=5), ScheduleError, "indices of .* groups .*, got 5"),
        (lambda m, o: STAGES.attach(m, o, 0.9, targets="5"), GMPError, "matches nothing"),
        (
            lambda m, o: STAGES.attach(o, m),
            TypeError,
            "expected a torch.optim.Optimizer or a wrapper around one, got a Sequential",
        ),
    ],
)
def test_what_is_refused(make: Callable[[Any, Any], Any], error: type[Exception], message: str) -> None:
    model, optimizer = model_and_optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        make(model, optimizer)
    after = optimizer.state_dict()
    assert [{k: v for k, v in group.items() if k != "initial_lr"} for group in after["param_groups"]] == before[
        "param_groups"
    ]
    assert not optimizer._optimizer_step_post_hooks  # nothing holds the parameters
