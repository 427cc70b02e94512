"""The rule of default targets: the role of each tensor of a model, from its name, shape and, if known, module.

Models and checkpoints follow the same rule. A checkpoint has names and shapes only; a model adds the types of modules,
which decide where the names leave doubt.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from functools import cache

__all__ = [
    "ADAPTER",
    "COMPLEX",
    "DEFAULT_RULE",
    "EMBEDDING",
    "EMPTY",
    "HEAD",
    "NO_WEIGHTS",
    "PARAMETRIZATION",
    "QUANTIZED",
    "ROUTER",
    "SMALL",
    "Roles",
    "effective_name",
]

DEFAULT_RULE = (
    "the floating-point weights of two or more dimensions that multiply activations, so no biases, norms, embeddings, "
    "routers of experts, low-rank adapters or output heads of language models"
)

EMBEDDING = "embedding"
ROUTER = "router"
HEAD = "output head"
ADAPTER = "low-rank adapter"
SMALL = "norm, bias, scale or constant"
PARAMETRIZATION = "part of a parametrization"
EMPTY = "empty"
COMPLEX = "complex"
QUANTIZED = "quantized"
NO_WEIGHTS = "index or mask"

# Parts of names that wrappers put in, which say nothing about the module.
WRAPPERS = {"base_layer", "default", "module", "modules_to_save", "original_module"}
# A module with such a word in its name multiplies, whatever else the name says ("embed_proj").
MULTIPLIERS = {
    *("conv", "dense", "fc", "lin", "linear", "map", "mapping", "mlp"),
    *("proj", "project", "projection", "projections", "projector"),
}
ADAPTERS = {"hada", "lokr", "lora"}
GATES = {"gate", "gates", "gating"}
POSITIONS = {"pos", "position", "positional", "positions"}
TABLES = {"table", "token", "tokens"} | POSITIONS
LEARNED_INPUTS = {"latent", "latents", "prompt", "prompts", "queries", "query"}
BIASES = {"bias", "biases"}
NORMS = {"bn", "gn", "grn", "ln"}
CONSTANTS = BIASES | {
    *("absmax", "alpha", "alphas", "beta", "cache", "cached", "codebook", "codebooks", "codes", "cos", "decay"),
    *("freq", "freqs", "gain", "gamma", "mask", "masks", "pe", "scale", "scales", "sin", "tril", "triu", "zero"),
    "zeros",
}
PARAMETRIZED = re.compile(r"(?P<path>(?:.*\.)?)parametrizations\.(?P<attribute>[^.]+)\.(?P<rest>.+)")


def effective_name(name: str, names: Container[str]) -> str:
    """Return the name of the weight computed from this tensor, one of ``names``; its own name if there is none."""
    if found := PARAMETRIZED.fullmatch(name):
        return f"{found['path']}{found['attribute']}" if found["rest"].startswith("original") else name
    for suffix, partners in (("_v", ("_g",)), ("_orig", ("_mask", "_u"))):
        stem = name.removesuffix(suffix)
        if stem != name and any(f"{stem}{partner}" in names for partner in partners):
            return stem
    return name


class Roles:
    """Roles of all tensors of a model, each found from its own name and shape and those of its neighbours.

    Parameters
    ----------
    shapes : mapping of str to sequence of int
        {name: shape} of everything the model has, buffers included: neighbours tell a router from a gate, or a table
        from a projection.
    types : mapping of str to tuple of str
        {name: (class name of the module that owns it, kind)} where the module is known; the kind is "weight",
        "embedding", "norm" or "head" where its type, or the model itself, says so, and else empty.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], types: Mapping[str, tuple[str, str]]) -> None:
        self._shapes = shapes
        self._types = dict.fromkeys(shapes, ("", "")) | dict(types)
        self._children: dict[str, set[str]] = defaultdict(set)
        for name in shapes:
            parts = name.split(".")
            for depth, part in enumerate(parts):
                self._children[".".join(parts[:depth])].add(part)
        self._head = self._find_head()

    def obstacle(self, name: str) -> str | None:
        """Return the reason why a tensor cannot be pruned at all, as far as names tell; None if there is none.

        The only such reason is that a weight is computed from it, other than by scaling (weight_norm, spectral_norm).
        """
        found = PARAMETRIZED.fullmatch(name)
        if found is None or found["rest"] == "original1":
            return None
        is_scaled = found["rest"] == "original" and name.removesuffix("original") + "0._u" in self._shapes
        return None if is_scaled else PARAMETRIZATION

    def reason_against(self, name: str) -> str | None:
        """Return why the tensor is no default target; None if it is one."""
        if len(self._shapes[name]) < 2 or self._is_scaled_apart(name):
            return SMALL
        if self.obstacle(name) is not None:
            return PARAMETRIZATION
        parts = effective_name(name, self._shapes).split(".")
        if any(_words(part) & ADAPTERS for part in parts):
            return ADAPTER
        if self._is_router(name, parts):
            return ROUTER
        is_called_head = any("lm_head" in part or part == "embed_out" for part in parts)
        if is_called_head or self._types[name][1] == "head" or name == self._head:
            return HEAD
        if self._is_embedding(name):
            return EMBEDDING
        return SMALL if self._is_small(name) else None

    def _is_scaled_apart(self, name: str) -> bool:
        """Whether a tensor holds the lengths that weight_norm keeps apart from the directions."""
        if name.endswith("_g"):
            return f"{name[:-2]}_v" in self._shapes
        return name.endswith(".original0") and f"{name[:-1]}1" in self._shapes

    def _find_head(self) -> str | None:
        """Return the matrix that has a row for each entry of the vocabulary, if there is exactly one."""
        vocabulary, matrices = 0, []
        for name, shape in self._shapes.items():
            _, owner, attribute = self._parts(name)
            if len(shape) != 2 or attribute != "weight":
                continue
            if not self._is_embedding(name):
                matrices.append(name)
            elif shape[0] > shape[1] and not _words(owner) & POSITIONS:
                vocabulary = max(vocabulary, shape[0])
        rows = [name for name in matrices if self._shapes[name][0] == vocabulary]
        return rows[0] if vocabulary and len(rows) == 1 else None

    def _parts(self, name: str) -> tuple[str, str, str]:
        """Return the path of the module that owns a tensor, the part of it that names the module, and the attribute.

        That part is the last one that is neither a number nor from a wrapper.
        """
        path, _, attribute = effective_name(name, self._shapes).rpartition(".")
        named = (part for part in reversed(path.split(".")) if not part.isdecimal() and not part.startswith("_"))
        return path, next((part for part in named if part not in WRAPPERS), ""), attribute

    def _is_router(self, name: str, parts: Sequence[str]) -> bool:
        for depth, part in enumerate(parts):
            words = _words(part)
            if any("expert" in below for below in parts[depth + 1 :]):
                continue
            if words & {"router", "routers"}:
                return True
            if words & GATES and not words & MULTIPLIERS and self._has_few(name, ".".join(parts[:depth])):
                return True
        return "router" in _camel_words(self._types[name][0])

    def _has_few(self, name: str, path: str) -> bool:
        """Whether a gate has as many outputs as there are experts beside it, or is small among their matrices."""
        beside = [child for child in self._children[path] if "expert" in child and not _words(child) & GATES]
        if not beside:
            return False
        shape = self._shapes[name]
        counts, largest = {1}, 0
        for child in beside:
            below = ".".join(part for part in (path, child) if part)
            counts.add(1 + max((int(part) for part in self._children.get(below, ()) if part.isdecimal()), default=0))
            for other in map(self._shapes.__getitem__, self._below(below)):
                if len(other) == 3:
                    counts.add(other[0])
                if len(other) >= 2:
                    largest = max(largest, other[-1] * other[-2])
        return not counts.isdisjoint(shape) or 2 * math.prod(shape) < largest

    def _below(self, path: str) -> list[str]:
        if path in self._shapes:
            return [path]
        return [name for child in sorted(self._children.get(path, ())) for name in self._below(f"{path}.{child}")]

    def _is_embedding(self, name: str) -> bool:
        shape, (module, kind) = self._shapes[name], self._types[name]
        if kind:
            return kind == "embedding"
        path, owner, attribute = self._parts(name)
        words = _words(owner) | _camel_words(module)
        is_in_table = any(_names_embedding(part) for part in (owner, module))
        if attribute in {"weight", "weights"}:
            is_table = is_in_table or owner in {"shared", "wpe", "wte"} or bool(words & (TABLES | BIASES))
            return is_table and len(shape) == 2 and not words & MULTIPLIERS and not self._has_bias(path)
        words = _words(attribute)
        if words & (MULTIPLIERS | {"kernel", "weight", "weights"}):
            return False
        # A bare parameter that begins with a dimension of 1 is the same for every sample: tokens, positions.
        is_broadcast = len(shape) == 3 and shape[0] == 1 and _num_wide(shape) == 2
        return is_in_table or _names_embedding(attribute) or bool(words & (TABLES | LEARNED_INPUTS)) or is_broadcast

    def _is_small(self, name: str) -> bool:
        shape, (module, kind) = self._shapes[name], self._types[name]
        if kind:
            return kind == "norm"
        path, owner, attribute = self._parts(name)
        if attribute == "weight":
            bias = self._bias(path)
            if bias is not None and len(bias) >= 2:
                return tuple(bias) == tuple(shape)
            words = _words(owner) | _camel_words(module)
            is_norm = _names_norm(owner) or "norm" in words
            return is_norm and not self._has_bias(path) and not words & MULTIPLIERS
        words = _words(attribute)
        if words & CONSTANTS or _names_norm(attribute) or attribute.lower().startswith("a_log"):
            return True
        # Recurrent and attention weights keep their role whatever their shape; a bare vector has none.
        is_named = bool(words & {"kernel", "weight", "weights"})
        return not is_named and (_num_wide(shape) < 2 or len(shape) > 3)

    def _bias(self, path: str) -> Sequence[int] | None:
        """Return the shape of the biases of a module."""
        return self._shapes.get(f"{path}.bias" if path else "bias")

    def _has_bias(self, path: str) -> bool:
        """Whether a vector of biases lies beside a matrix, as it does in a projection."""
        bias = self._bias(path)
        return bias is not None and len(bias) == 1


@cache
def _words(part: str) -> frozenset[str]:
    return frozenset(word.rstrip("0123456789") for word in re.split(r"[^0-9a-z]+", part.lower()))


@cache
def _camel_words(module: str) -> frozenset[str]:
    return frozenset(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", module))


def _names_embedding(part: str) -> bool:
    return "embed" in part.lower() or "emb" in _words(part)


def _names_norm(part: str) -> bool:
    return any(word in NORMS or word.endswith(("norm", "norms")) for word in _words(part))


def _num_wide(shape: Sequence[int]) -> int:
    return sum(size > 1 for size in shape)
