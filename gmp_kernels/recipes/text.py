"""From the text of a recipe to the modifiers it lists: files, YAML, overrides, stages and variables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from gmp_kernels.errors import RecipeError
from gmp_kernels.recipes.expressions import Variables

__all__ = ["Item", "Overrides", "items_of"]

Overrides: TypeAlias = Mapping[str, Any] | str | None

# Windows writes a byte order mark before the text, and ends lines with \r\n.
FRONT_MATTER = re.compile(r"^\ufeff?(?:---|\+\+\+)[ \t\r]*$(.*?)^(?:---|\+\+\+)[ \t\r]*$", re.DOTALL | re.MULTILINE)


class Item(NamedTuple):
    """A modifier as a recipe gives it: its name, without the framework before it, and its arguments."""

    name: str
    arguments: dict[str, Any]


def items_of(recipe: str | PathLike[str], overrides: Overrides = None) -> list[Item]:
    """Return the modifiers of a recipe in its order, with all ``eval(...)`` texts replaced by their values.

    ``recipe`` and ``overrides`` are those of ``load``, which also lists what is raised.
    """
    container = _parse(_yaml_in(recipe))
    if isinstance(container, Item):
        container = [container]
    if isinstance(container, list):
        container = {"modifiers": container}
    if not isinstance(container, dict) or not container:
        raise RecipeError(
            "recipe: expected top-level keys, some with 'modifiers' in their names, got "
            f"{type(container).__name__}; is it a recipe?"
        )
    _override(container, _parse_overrides(overrides))
    stages = {key: value for key, value in container.items() if _is_stage(value)}
    shared = {key: value for key, value in container.items() if key not in stages}
    # New recipes may have their variables under "args".
    variables = args if isinstance(args := shared.get("args"), dict) else {}
    items = [
        item for part in [shared, *stages.values()] for item in _items_in(part, Variables(variables | shared | part))
    ]
    if not items:
        raise RecipeError(
            f"recipe: expected modifiers, got none among the keys {', '.join(map(str, container))}; list them under a "
            "key with 'modifiers' in its name"
        )
    return items


def _yaml_in(recipe: str | PathLike[str]) -> str:
    """Return the YAML of a file, of its front matter, or of a text."""
    given = fspath(recipe)
    if not isinstance(given, str):
        raise TypeError(f"load: expected a path or the text of a recipe, got {given!r}; pass a str")
    if given.startswith("zoo:"):
        raise RecipeError(
            f"load: expected a file, got the stub {given!r}; SparseZoo has been shut down: find a copy of the recipe "
            "and pass the path of its .md or .yaml file"
        )
    suffix = ""
    if not ("\n" in given or "\r" in given):
        path = Path(given)
        suffix = path.suffix.lower()
        if suffix not in (".md", ".yaml"):
            raise RecipeError(
                f"load: expected a .md or .yaml file, or a recipe's text with a newline, got {given!r}; "
                + ("rename the file: .yml is not read" if suffix == ".yml" else "pass the path of the file")
            )
        try:
            given = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"load: expected UTF-8 text, got '{path}': {error}; convert it") from None
    found = None if suffix == ".yaml" else FRONT_MATTER.search(given)
    if suffix == ".md" and found is None:
        raise RecipeError(
            f"load: expected a recipe between two lines of '---' or '+++', got none in '{fspath(recipe)}'; name a file "
            "that holds YAML alone .yaml"
        )
    return given if found is None else found[1]


def _parse_overrides(overrides: Overrides) -> dict[str, Any]:
    """Return the overrides of a mapping, of a JSON object, or of ``name=value,name=value``."""
    if overrides is None or isinstance(overrides, Mapping):
        return dict(overrides or {})
    if not isinstance(overrides, str):
        raise TypeError(f"recipe_args: expected a mapping or text, got a {type(overrides).__name__}; pass a dict")
    try:
        found = json.loads(overrides)
    except (ValueError, RecursionError):
        found = {}
        for part in filter(None, (part.strip() for part in overrides.split(","))):
            name, _, value = part.replace(":", "=").partition("=")
            if not name.strip() or not value.strip() or "=" in value or set(name) & set("{}!"):
                raise RecipeError(
                    f"recipe_args: expected 'name=value,name=value' or a JSON object, got {part!r}; pass a dict for "
                    "values with commas"
                ) from None
            found[name.strip()] = value.strip()
    if not isinstance(found, dict):
        raise RecipeError(f"recipe_args: expected a JSON object, got {overrides!r}; write e.g. {{'num_epochs': 10}}")
    return found


def _parse(text: str) -> Any:
    """Return the data of YAML, with ``Item`` for what has a tag of its own."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"recipes need {error.name}: install them with pip install 'gmp-kernels[recipes]'", name=error.name
        ) from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Safe, and makes an Item of any tag of one exclamation mark instead of an error."""

    def item(loader: Any, suffix: str, node: Any) -> Item:
        arguments = {}
        if isinstance(node, yaml.MappingNode):
            arguments = loader.construct_mapping(node, deep=True)
        elif getattr(node, "value", None):
            raise RecipeError(f"recipe: expected keys and values after !{suffix}, got others; indent them below it")
        return _item(suffix, arguments)

    Loader.add_multi_constructor("!", item)
    try:
        return yaml.load(text, Loader)
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe: expected YAML, got something else: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # PyYAML's own, for standard tags on values that do not fit them, such as !!bool 3.
        raise RecipeError(f"recipe: expected YAML, got a value that its tag does not fit: {error!r}") from None


def _override(container: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replace values of variables wherever the recipe sets them: at the top level, in stages and in args."""
    inner = [
        value for key, value in container.items() if _is_stage(value) or (key == "args" and isinstance(value, dict))
    ]
    levels = [container, *inner]
    for name, value in overrides.items():
        found = [level for level in levels if name in level]
        if not found:
            known = sorted({str(key) for level in levels for key in level if "modifiers" not in str(key)})
            raise RecipeError(
                f"recipe_args: expected names of the recipe's variables, got {name!r}; there are: "
                f"{', '.join(known) or 'none'}"
            )
        for level in found:
            level[name] = value


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and any("modifiers" in str(key) for key in value)


def _items_in(container: dict[str, Any], variables: Variables) -> Iterator[Item]:
    """Yield the modifiers of the recipe, or of one stage of it."""
    for key, value in container.items():
        if isinstance(value, Item):
            yield Item(value.name, variables.resolve(value.arguments))
        elif "modifiers" in str(key):
            for item in _listed(str(key), value):
                yield Item(item.name, variables.resolve(item.arguments))
        elif isinstance(value, list) and any(isinstance(item, Item) for item in value):
            raise RecipeError(
                f"recipe: expected modifiers under keys with 'modifiers' in their names, got some under {key!r}; "
                f"rename it to '{key}_modifiers'"
            )


def _listed(key: str, value: Any) -> Iterator[Item]:
    """Yield what is listed under a key: tagged modifiers, ``{Name: arguments}``, or both."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, Item):
            yield entry
        elif isinstance(entry, dict) and all(isinstance(arguments, (dict, type(None))) for arguments in entry.values()):
            for name, arguments in entry.items():
                yield _item(str(name), arguments or {})
        elif entry is not None:
            raise RecipeError(
                f"recipe: expected '- !NameOfModifier' and its arguments under {key!r}, or 'NameOfModifier:' and its "
                f"arguments, got {entry!r}; see the guide on recipes"
            )


def _item(name: str, arguments: dict[Any, Any]) -> Item:
    # Names may begin with the framework, as in !pytorch.GMPruningModifier.
    return Item(name.rpartition(".")[2], {str(key): value for key, value in arguments.items()})
