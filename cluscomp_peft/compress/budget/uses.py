"""What the source of a module's class says about the weights of its layers, where no forward pass can tell.

F.linear(x, self.proj.weight)          a use
x.to(self.proj.weight.dtype)           a question, which any layer answers
if self.fused: kernel(self.proj.weight)          a use under a condition
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["WeightUse", "weight_uses"]

_QUESTIONS = {"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "size", "dim", "numel"}
_ASKING = {"isinstance", "hasattr", "getattr", "type", "id"}
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.BoolOp, ast.FunctionDef, ast.Lambda, ast.ListComp)


@dataclass(frozen=True)
class WeightUse:
    """That code computes with `self.PATH.weight`. conditional (`bool`): In branches alone."""

    conditional: bool


@functools.cache
def weight_uses(kind: Any) -> dict[str, WeightUse]:
    """{path of a layer inside the module: how its weight is used} by `forward` and the methods that it calls.

    Empty where there is no source, and for torch's own modules, which look first whether a weight is a plain tensor.
    """
    if kind.__module__.partition(".")[0] == "torch" or not issubclass(kind, nn.Module):
        return {}
    found: dict[str, WeightUse] = {}
    _visit(kind, "forward", False, found, set())
    return found


def _visit(kind: type, name: str, conditional: bool, found: dict[str, WeightUse], seen: set) -> None:
    if (name, conditional) in seen or not inspect.isfunction(getattr(kind, name, None)):
        return
    seen.add((name, conditional))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, name)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return
    own = tree.args.args[0].arg
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    asked = _only_asked(tree, parents)
    for node in ast.walk(tree):
        path = _path(node, own)
        if path is None:
            continue
        branch = conditional or _in_branch(node, parents, tree)
        parent = parents[node]
        if path[-1] == "weight" and len(path) > 1:
            assigned = isinstance(parent, ast.Assign) and [getattr(target, "id", None) for target in parent.targets]
            if not _asks(node, parents) and not (assigned and set(assigned) <= asked):
                layer = ".".join(path[:-1])
                use = found.get(layer)
                found[layer] = WeightUse(branch and (use is None or use.conditional))
        elif len(path) == 1 and isinstance(parent, ast.Call) and parent.func is node:
            _visit(kind, path[0], branch, found, seen)


def _path(node: ast.AST, own: str) -> list[str] | None:
    """["fc", "weight"] of `self.fc.weight`; only where it is read."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return None
    parts: list[str] = []
    inner: Any = node
    while isinstance(inner, ast.Attribute):
        parts.insert(0, inner.attr)
        inner = inner.value
    return parts if isinstance(inner, ast.Name) and inner.id == own else None


def _asks(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether an expression is only asked what it is."""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr in _QUESTIONS
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in _ASKING
    return isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)


def _only_asked(tree: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[str]:
    """Names of variables that are only asked what they are."""
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return {node.id for node in reads} - {node.id for node in reads if not _asks(node, parents)}


def _in_branch(node: ast.AST, parents: dict[ast.AST, ast.AST], tree: ast.AST) -> bool:
    """Whether something may keep a part of a function from being run; a condition itself always is."""
    while node is not tree:
        parent = parents[node]
        if isinstance(parent, _BRANCHES) and parent is not tree and node is not getattr(parent, "test", None):
            return True
        node = parent
    return False
