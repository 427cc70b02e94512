"""Values of ``eval(...)`` in recipes: arithmetic with the recipe's variables, and nothing else of Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from gmp_kernels.errors import RecipeError

__all__ = ["Variables", "number_in"]

OPERATORS: dict[type[ast.operator | ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": lambda number, *digits: round(number, *map(int, digits)),
}
WORDS = f"numbers, variables, + - * / // ** %, and {', '.join(FUNCTIONS)}"

# A recipe is text from elsewhere. These limits keep any of it from taking long, and so do floats: whole numbers would
# grow without end.
MOST_CHARACTERS = 1000
MOST_VALUES = 100_000
MOST_DEPTH = 40


class Variables:
    """Variables of a recipe, and the values of ``eval(...)`` texts that name them.

    Parameters
    ----------
    given : mapping of str to object
        {name: value}. A value may be an ``eval(...)`` text itself, in any order.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._open: list[str] = []  # variables whose values are being found
        self._num_values = 0

    def resolve(self, value: Any, depth: int = 0) -> Any:
        """Return ``value`` with every ``eval(...)`` text in it, at any depth, replaced by its value.

        Raises
        ------
        RecipeError
            A text is no arithmetic of numbers, has no value, or names itself; or there are too many values.
        """
        self._num_values += 1
        if self._num_values > MOST_VALUES or depth > MOST_DEPTH:
            raise RecipeError(
                f"recipe: expected at most {MOST_VALUES} values, nested at most {MOST_DEPTH} deep, got more; are there "
                "anchors that repeat one another?"
            )
        if isinstance(value, list):
            return [self.resolve(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {key: self.resolve(item, depth + 1) for key, item in value.items()}
        if isinstance(value, str) and value.startswith("eval(") and value.endswith(")"):
            return self._evaluate(value)
        return value

    def _evaluate(self, text: str) -> Any:
        expression = text[len("eval(") : -1].strip()
        if expression in self._given:
            return self._variable(expression, text)
        try:
            if len(expression) > MOST_CHARACTERS:
                raise ValueError(f"an expression of {len(expression)} characters")
            value = self._number(ast.parse(expression, mode="eval").body, text)
            if not math.isfinite(value):
                raise ValueError(f"the value is {value}")
            return value
        except RecipeError:
            raise
        except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
            shown = text if len(text) < 100 else f"{text[:100]}..."
            raise RecipeError(
                f"recipe: expected eval() of {WORDS}, with a finite value, got {shown!r}: {error}; write the number"
            ) from None

    def _variable(self, name: str, text: str) -> Any:
        if name not in self._given:
            raise RecipeError(
                f"recipe: expected eval() of variables that the recipe sets, got {text!r} with {name!r}; set it at the "
                f"top level of the recipe (there are: {', '.join(map(str, self._given)) or 'none'})"
            )
        if name in self._open:
            raise RecipeError(
                f"recipe: expected variables that do not need themselves, got {' -> '.join([*self._open, name])}; give "
                "one of them a number"
            )
        self._open.append(name)
        try:
            return self.resolve(self._given[name])
        finally:
            self._open.pop()

    def _number(self, node: ast.expr, text: str) -> float:
        """Return the value of a node of the expression ``text``."""
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name):
                value = number_in(self._variable(name, text))
                if value is None:
                    raise TypeError(f"{name!r} is not a number")
                return float(value)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return float(OPERATORS[type(op)](self._number(operand, text)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                # Of a complex number, the root of a negative one, float makes a TypeError.
                return float(OPERATORS[type(op)](self._number(left, text), self._number(right, text)))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return float(FUNCTIONS[name](*(self._number(argument, text) for argument in args)))
        raise TypeError(f"{ast.unparse(node)!r} is none of these")


def number_in(value: object) -> float | None:
    """Return a number, or one that YAML left as text, such as ``1e-4``; None for anything else.

    A whole number that no float can hold is none.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and "_" not in value):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (OverflowError, ValueError):
        return None
    return value if is_number else number  # type: ignore[return-value]
