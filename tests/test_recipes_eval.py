"""eval() in recipes is arithmetic of floats: Python's where it has a value, refused in words where it has none."""

from __future__ import annotations

import ast
import math
import operator
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_kernels import recipes
from gmp_kernels.errors import RecipeError
from gmp_kernels.recipes.expressions import Variables
from gmp_kernels.recipes.modifiers import EpochRange, GradualPruning, SetLearningRate


def evaluated(text: str, variables: str = "") -> float:
    """The value of an eval(), as the end of a modifier; at most 10^6 epochs."""
    (modifier,) = recipes.load(f'{variables}modifiers:\n  - !EpochRangeModifier {{end_epoch: "{text}"}}\n').modifiers
    assert isinstance(modifier, EpochRange)
    return modifier.end


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eval(1 + 2 * 3 - 4 / 8)", 6.5),
        ("eval(7 // 2 + 7 % 4 + 2 ** 5)", 38),
        ("eval(-(-3) + +2)", 5),
        ("eval(max(1, a, b) + min(a, 3) + abs(-2) + int(2.9) + float(1) + round(2.5) + round(1.26, 1))", 21.3),
        ("eval(c)", 14),
        ("eval(  b )", 10),
        ("eval(d * 10)", 1e-3),
        ("eval(d)", 1e-4),
        ("eval(round(5, -10**9))", 0),
    ],
)
def test_eval(text: str, value: float) -> None:
    assert evaluated(text, "c: eval(b + a)\na: 4\nb: eval(a * 2.5)\nd: 1e-4\n") == pytest.approx(value, rel=1e-15)


def test_a_name_alone_may_be_text_or_a_list() -> None:
    variables = "names: [a.weight, 're:b']\ncurve: linear\n"
    arguments = (
        "params: eval(names), inter_func: eval(curve), init_sparsity: 0, final_sparsity: 0.8, update_frequency: 1"
    )
    (modifier,) = recipes.load(
        f"{variables}modifiers:\n  - !GMPruningModifier {{{arguments}, end_epoch: 2}}\n"
    ).modifiers
    assert isinstance(modifier, GradualPruning)
    assert modifier.entries == ((0.8, ("a.weight", "re:b")),)
    assert modifier.curve == "linear"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "eval(9**9**9)",
            "eval(2**2**2**2**2**2)",
            "eval(10**308 * 10**308)",
            "eval(1e999)",
        ),
        *("eval(1/0)", "eval((-8)**0.5)", "eval(1j)", "eval('3')", "eval(True)", "eval(3)(4)", "eval([1])", "eval()"),
        *("eval(__import__('os').system('true'))", "eval(a.real)", "eval(open('x'))", "eval(lambda: 1)", "eval(1 < 2)"),
        *("eval(max())", "eval(min(3))", "eval(int('3'))", "eval(round(1, 2, 3))", "eval(abs(x=1))", "eval(missing)"),
        *(
            "eval(text + 1)",
            f"eval({'(' * 400}1{')' * 400})",
            f"eval({'1+' * 600}1)",
            "eval(1 if 1 else 2)",
            "eval(~1)",
        ),
        *("eval(loop)", "eval(self + 1)", "eval(1 +)", "eval(1 & 2)", "eval(0 ** -1)", "eval(1 @ 2)"),
    ],
)
def test_eval_refuses_what_is_no_bounded_arithmetic(text: str) -> None:
    variables = "a: 4\ntext: word\nloop: eval(pool)\npool: eval(loop * 2)\nself: eval(self)\n"
    with pytest.raises(RecipeError, match="expected"):
        evaluated(text, variables)


BINARY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv}
BINARY |= {"%": operator.mod, "**": operator.pow}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 0) -> tuple[str, object]:
    """An expression, and its value by Python's own operators of floats; None if that is no finite real number."""
    if depth == 3 or draw(st.booleans()):
        number = draw(st.integers(0, 50) | st.floats(0, 50).map(lambda x: round(x, 2)))
        return repr(number), float(number)
    left, a = draw(expressions(depth + 1))
    right, b = draw(expressions(depth + 1))
    symbol = draw(st.sampled_from(sorted(BINARY)))
    text = f"({left}) {symbol} ({right})"
    try:
        value = BINARY[symbol](a, b) if None not in (a, b) else None
        return text, value if isinstance(value, (int, float)) and math.isfinite(value) else None
    except (ArithmeticError, TypeError):
        return text, None


@settings(deadline=None, max_examples=150)
@given(case=expressions())
def test_eval_is_pythons_arithmetic(case: tuple[str, object]) -> None:
    text, value = case
    learning = f"modifiers:\n  - !SetLearningRateModifier {{learning_rate: 'eval(abs({text}))'}}\n"
    try:
        (modifier,) = recipes.load(learning).modifiers
    except RecipeError:
        assert value is None
        return
    assert isinstance(modifier, SetLearningRate)
    assert modifier.value == abs(value)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=200)
@given(text=st.text("0123456789.+-*/%(),_ abceimnrtx'[]{}:<>=!\\\n", max_size=40))
def test_eval_of_anything_is_a_number_or_an_error(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            value = Variables({"a": 2}).resolve(f"eval({text})")
        except RecipeError:
            return
    assert isinstance(value, (int, float))
    names = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
    assert names <= {"a", "abs", "int", "max", "min", "round", "float"}


def test_variables_that_need_themselves_are_named() -> None:
    with pytest.raises(RecipeError, match="pool -> loop -> pool"):
        evaluated("eval(pool)", "loop: eval(pool + 1)\npool: eval(loop * 2)\n")


def test_variables_that_square_one_another_stop_early() -> None:
    """As whole numbers, the 40th would have 10^14 digits."""
    squares = "".join(f"x{i}: eval(x{i - 1} * x{i - 1})\n" for i in range(1, 41))
    with pytest.raises(RecipeError, match="the value is inf"):
        evaluated("eval(x40)", f"x0: 1{'0' * 300}\n{squares}")
