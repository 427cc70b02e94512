"""The programs of the guide run and print what it says, and the messages that it quotes are those of the library."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from subprocesses import ROOT
from torch import nn

import gmp_kernels as gmp

PAGES = (
    *("index", "quickstart", "training", "choosing", "large-models", "resume"),
    *("migrating/torch-prune", "migrating/tf-mot", "migrating/nncf"),
)
STEPS_PER_EPOCH = 4


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Return (info string, text) of each fenced block. Those of other libraries have a title, and do not run here."""
    return re.findall(r"^```(.+)\n((?:.*\n)*?)```$", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE)


def a_model() -> nn.Module:
    # Shapes of which the sparsities of the guide are whole numbers of weights.
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))


@pytest.mark.filterwarnings("error::gmp_kernels.GMPWarning", "ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_and_print_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, printed, num_programs = a_model(), "", 0
    names = {
        "torch": torch,
        "gmp": gmp,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        "loader": [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(STEPS_PER_EPOCH)],
        "loss_fn": nn.functional.cross_entropy,
    }
    for kind, text in blocks_of(page):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"{page}.md", "exec"), names)
            printed = out.getvalue()
            num_programs += 1
        elif kind == "text":
            assert text in printed
    assert num_programs > 0


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
