"""The programs of the guide run and print what it says, and the messages that it quotes are those of the library."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from subprocesses import ROOT
from torch import nn

import gmp_kernels as gmp

PAGES = (
    *("README", "index", "quickstart", "training", "choosing", "large-models", "resume"),
    *("migrating/torch-prune", "migrating/tf-mot", "migrating/nncf"),
)
STEPS_PER_EPOCH = 4


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Return (info string, text) of each fenced block. Those of other libraries have a title, and do not run here."""
    path = ROOT / ("README.md" if page == "README" else f"docs/{page}.md")
    return re.findall(r"^```(.+)\n((?:.*\n)*?)```$", path.read_text(), re.MULTILINE)


def a_model() -> nn.Module:
    # Shapes of which the sparsities of the guide are whole numbers of weights.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))


def names_in_scope() -> dict[str, Any]:
    """Return what the programs of the guide take as given."""
    model = a_model()
    return {
        "torch": torch,
        "gmp": gmp,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loader": [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(STEPS_PER_EPOCH)],
        "loss_fn": nn.functional.cross_entropy,
    }


@pytest.mark.filterwarnings("error::gmp_kernels.GMPWarning", "ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_and_print_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names, printed, num_programs = names_in_scope(), "", 0
    for kind, text in blocks_of(page):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"{page}.md", "exec"), names)
            printed = out.getvalue()
            num_programs += 1
        elif kind == "text":
            assert text in printed
    assert num_programs > 0


def scoring() -> dict[str, Any]:
    """Return what the programs on patterns and scores define."""
    names = names_in_scope() | {"stages": gmp.Stages(1, 4, 3, steps_per_epoch=STEPS_PER_EPOCH)}
    for kind, text in blocks_of("training"):
        if kind == "python" and ("NM(" in text or "scores=" in text):
            exec(compile(text, "training.md", "exec"), names)
    return names


def test_wanda_in_the_guide_is_its_definition() -> None:
    names = scoring()
    model, x = names["model"], torch.cat([batch for batch, _ in names["loader"]])
    assert model.training and not any(layer._forward_pre_hooks for layer in model)  # as before the calibration
    for i in (0, 2, 4):
        weight, inputs = model[i].weight.detach(), model[:i](x).detach()
        columns = [weight[:, j].abs() * inputs[:, j].square().sum().sqrt() for j in range(weight.shape[1])]
        torch.testing.assert_close(names["wanda"](f"{i}.weight", weight, {}), torch.stack(columns, 1))

    weight, norms = model[0].weight.detach().clone(), x.square().sum(0).sqrt()
    names["run"].pruner.remove()
    arguments = {"targets": "0", "pattern": names["NM"](2, 4), "scores": names["wanda"]}
    gmp.GMPScheduler(model, names["adam"], gmp.schedules.OneShot(0.5), **arguments).step()
    for before, after in zip(weight.view(-1, 4), model[0].weight.detach().view(-1, 4), strict=True):
        assert int((after != 0).sum()) == 2 and torch.equal(after[after != 0], before[after != 0])
    kept = (model[0].weight != 0).view(-1, 4)
    scores = (weight.abs() * norms).view(-1, 4)
    assert torch.all(scores.where(kept, torch.inf).amin(1) > scores.where(~kept, 0.0).amax(1))


def test_lamp_in_the_guide_is_its_definition() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0], [0.0, 1.0, -0.25]])
    flat = weight.flatten().tolist()
    expected = []
    for i, value in enumerate(flat):
        # Of equal magnitudes the first counts as the larger one, as where ties are pruned.
        others = [w for j, w in enumerate(flat) if (-abs(w), j) <= (-abs(value), i)]
        expected.append(value**2 / sum(w**2 for w in others))
    assert scoring()["lamp"]("0.weight", weight, {}).flatten().tolist() == pytest.approx(expected)


def of_sparseml() -> dict[str, Any]:
    shutil.copy(ROOT / "examples/recipe.yaml", "recipe.yaml")
    return names_in_scope()


def of_transformers() -> dict[str, Any]:
    from hf_trainers import STEPS, make_model, tokens
    from transformers import TrainingArguments

    options = {"max_steps": STEPS, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return {"model": make_model(), "args": TrainingArguments("run", **options), "data": tokens()}


def of_lightning() -> dict[str, Any]:
    from lightning_trainers import Module

    module = Module()
    return {"gmp": gmp, "module": module, "model": module}


def of_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader, TensorDataset

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    names = names_in_scope()
    loader = DataLoader(TensorDataset(torch.randn(80, 20), torch.randint(10, (80,))), batch_size=2)
    names["model"], names["optimizer"], loader = accelerator.prepare(names["model"], names["optimizer"], loader)

    def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return names | {"accelerator": accelerator, "loader": loader, "total_steps": 20, "loss_fn": loss_fn}


# Pages of trainers: what their programs take as given. Some take long to import.
TRAINERS: dict[str, Callable[[], dict[str, Any]]] = {
    "migrating/sparseml": of_sparseml,
    "trainers/accelerate": of_accelerate,
    "trainers/lightning": of_lightning,
    "trainers/transformers": of_transformers,
}


@pytest.mark.filterwarnings("error::gmp_kernels.GMPWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.thorough if "trainers" in page else ()) for page in TRAINERS]
)
def test_the_programs_for_a_trainer_prune_the_model(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = TRAINERS[page]()
    for kind, text in blocks_of(page):
        if kind == "python":
            exec(compile(text, f"{page}.md", "exec"), names)
    # Embeddings, and the output that shares theirs, are left out by default.
    weights = [
        p for name, p in names["model"].named_parameters() if p.dim() == 2 and "wte" not in name and "wpe" not in name
    ]
    assert [int((weight == 0).sum()) for weight in weights] == [round(0.9 * weight.numel()) for weight in weights]


def test_the_programs_for_averages_keep_them_sparse() -> None:
    names = names_in_scope()
    names["run"] = run = gmp.Stages.from_steps(10, stabilization=0).attach(names["model"], names["optimizer"])
    program, one_call = (text for kind, text in blocks_of("trainers/ema") if kind == "python")
    exec(compile(program, "ema.md", "exec"), names)
    _, first, others = program.partition("\noptimizer.step()")
    for _ in range(5):
        for p in names["model"].parameters():
            p.grad = torch.randn_like(p)
        exec(compile(first + others, "ema.md", "exec"), names)
    averages = dict(names["average"].module.named_parameters())
    for name, mask in run.pruner.masks.items():
        assert torch.equal(averages[name] != 0, mask.to_bool()) and mask.num_kept < mask.numel
    weights = torch.randn(2, 6)
    masks = [gmp.BitMask.from_bool(weights[0] > 0), None]
    names |= {"averages": list(torch.ones(2, 6)), "weights": list(weights), "masks": masks}
    exec(compile(one_call, "ema.md", "exec"), names)
    assert torch.equal(names["averages"][0] != 0, weights[0] > 0)
    assert torch.all(names["averages"][1] != 0)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("error::gmp_kernels.GMPWarning")
def test_each_program_for_several_processes_prunes() -> None:
    programs = [text for kind, text in blocks_of("trainers/distributed") if kind == "python"]
    assert len(programs) == 2
    stages = None
    for program in programs:
        names = names_in_scope() | {"stages": stages}
        exec(compile(program, "distributed.md", "exec"), names)
        stages = names["stages"]
        for _ in range(STEPS_PER_EPOCH + 1):
            for p in names["model"].parameters():
                p.grad = torch.ones_like(p)
            names["optimizer"].step()
            reports = names["run"].step()
        assert [report.sparsity for report in reports] == [0.05]


class Case:
    """A run in which something is about to go wrong."""

    def __init__(self, model: nn.Module | None = None, final: float = 0.9, **arguments: object) -> None:
        self.model = a_model() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)  # only pruning writes
        self.run = gmp.Stages(1, 4, 3, steps_per_epoch=STEPS_PER_EPOCH).attach(
            self.model, self.optimizer, final, **arguments
        )

    def train(self, steps: int) -> Case:
        for _ in range(steps):
            for p in self.model.parameters():
                p.grad = torch.randn_like(p)
            self.optimizer.step()
            self.run.step()
        return self

    def write(self, weight: str, change: Callable[[torch.Tensor], object]) -> Case:
        with torch.no_grad():
            change(self.model.get_parameter(weight))
        return self


def no_steps() -> None:
    case = Case()
    for _ in range(100):
        case.run.step()


def frozen() -> None:
    model = a_model()
    model.get_parameter("2.weight").requires_grad_(False)
    Case(model)


def pruned_before() -> None:
    model = a_model()
    gmp.prune_([p for p in model.parameters() if p.dim() > 1], sparsity=0.5)
    Case(model).run.step()


def earlier_weights() -> None:
    earlier = copy.deepcopy(a_model().state_dict())
    case = Case().train(24)
    case.model.load_state_dict(earlier)
    case.run.step()


def later_weights() -> None:
    later = Case().train(10).model.state_dict()
    case = Case().train(5)
    case.model.load_state_dict(later)
    case.run.step()


def attached_twice() -> None:
    case = Case()
    Case(case.model)
    case.run.step()


def transposed() -> None:
    model = a_model()
    model[2].weight = nn.Parameter(model[2].weight.detach().t())
    Case(model)


WRONG: dict[str, Callable[[], object]] = {
    "no steps": no_steps,
    "an embedding": lambda: Case(nn.Sequential(nn.Embedding(1000, 20), nn.Linear(20, 10))),
    "frozen": frozen,
    "misspelled": lambda: Case(targets="2.weights"),
    "pruned before": pruned_before,
    "earlier weights": earlier_weights,
    "later weights": later_weights,
    "written": lambda: Case().train(24).write("0.weight", lambda w: w.add_(10)).run.pruner.verify(),
    "emptied by the schedule": lambda: Case(final=0.9995),
    "emptied by the ranking": lambda: Case(scope="global").write("0.weight", lambda w: w.mul_(1e-6)).train(24),
    "NaN": lambda: Case().write("2.weight", lambda w: w[3, 5].fill_(torch.nan)).train(8),
    "another sparsity": lambda: Case(final=0.95).run.load_state_dict(Case().run.state_dict()),
    "other targets": lambda: Case(ignore="4").run.load_state_dict(Case().run.state_dict()),
    "not a pruner's": lambda: Case().run.pruner.load_state_dict(Case().run.state_dict()),
    "attached twice": attached_twice,
    "transposed": transposed,
    "float8": lambda: Case(a_model().to(torch.float8_e4m3fn)),
    "a percentage": lambda: Case(final=90),
}


def messages_of(go_wrong: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            go_wrong()
        except gmp.GMPError as error:
            return [f"{type(error).__name__}: {error}"]
    return [str(warning.message) for warning in said]


def test_troubleshooting_quotes_what_the_library_says() -> None:
    quoted = {" ".join(text.split()) for kind, text in blocks_of("troubleshooting") if kind == "text"}
    said = [message for go_wrong in WRONG.values() for message in messages_of(go_wrong)]
    assert len(said) == len(WRONG)
    assert quoted == set(said)
