"""Undocumented names of peft, transformers, accelerate, deepspeed and torch are touched in `upstream` alone, and each
is held by a contract test."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluscomp_peft
from cluscomp_peft.upstream import peft, torch, transformers
from tests.upstream import test_accelerate, test_deepspeed, test_peft, test_torch, test_transformers  # noqa: F401
from tests.upstream.contract import HELD

PACKAGE = Path(cluscomp_peft.__file__).parent
LIBRARIES = ("peft", "transformers", "accelerate", "deepspeed", "torch")
ROOMS = (*LIBRARIES, "transformers_experts")

# What other files import of these libraries: documented names.
DOCUMENTED = {
    "accelerate": {"PartialState", "init_empty_weights"},
    "accelerate.hooks": {"ModelHook", "add_hook_to_module", "remove_hook_from_module"},
    "peft": None,
    "peft.config": {"PeftConfig"},
    "peft.tuners.lora": {"Linear"},
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"},
    "peft.utils": {"PeftType", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"},
    "transformers": None,
    "transformers.pytorch_utils": {"Conv1D"},
    "transformers.quantizers.base": {"HfQuantizer"},
    "transformers.trainer_utils": {"get_last_checkpoint"},
    "transformers.utils.logging": {"disable_progress_bar"},
    "transformers.utils.quantization_config": {"QuantizationConfigMixin"},
}
# Undocumented ones without an underscore, or that are written as text, for getattr() and the like.
KNOWN = {
    "_hf_hook",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_tied_weights_keys",
    "all_tied_weights_keys",
    "distributed_config",
    "ds_id",
    "ds_shape",
    "ds_tensor",
    "hf_device_map",
    "hqq_quantized",
    "model_accepts_loss_kwargs",
    "original_devices",
    "original_module",
    "weights_map",
}
AS_TEXT = KNOWN | {"hf_quantizer"}  # which is also a name that we give to an attribute
OVERRIDES = {
    "cluscomp_peft.tuner.model": ("ClusCompModel", peft.TUNER_METHODS, "peft"),
    "cluscomp_peft.tuner.clustered_layer": ("ClusCompLinear", peft.LAYER_ATTRIBUTES, "peft"),
    "cluscomp_peft.tuner.dense_layer": ("ClusCompDenseLinear", peft.LAYER_ATTRIBUTES, "peft"),
    "cluscomp_peft.tuner.lora": ("LoraClusteredLinear", peft.LORA_METHODS, "peft"),
    "cluscomp_peft.hf.quantizer": ("ClusCompHfQuantizer", transformers.QUANTIZER_METHODS, "transformers"),
    "cluscomp_peft.compress.recovery": ("RecoveryTrainer", transformers.TRAINER_METHODS, "transformers"),
}
TABLES = {
    *peft.TUNER_METHODS,
    *peft.LAYER_ATTRIBUTES,
    *peft.LORA_METHODS,
    *transformers.QUANTIZER_METHODS,
    *transformers.TRAINER_METHODS,
}
# Of Python itself, numba's compiled functions (jit.py) and ctypes.
ELSEWHERE = {"_asdict", "_exit", "_fields", "_fields_", "_replace"}
ELSEWHERE |= {"_cache_path", "_data_path", "_dump", "_impl", "_open_for_write"}


def files() -> dict[str, ast.Module]:
    """The package's files outside of `upstream`, by their path in it."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {
        name: ast.parse(path.read_text(encoding="utf-8"))
        for name, path in sorted(paths.items())
        if not name.startswith("upstream/")
    }


def imported(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of what is imported from the libraries; no name where it is the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in LIBRARIES:
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in LIBRARIES]
            yield from ((node.lineno, name, "") for name in names)


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a file gives to something: functions, classes, variables, attributes, keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def allowed(name: str, file: str) -> bool:
    return any(file.startswith(place) for place in torch.INTERNALS.get(name, ((), ""))[0])


def test_only_documented_names_are_imported():
    found = []
    for file, tree in files().items():
        for line, module, name in imported(tree):
            private = [part for part in (*module.split("."), name) if part.startswith("_")]
            if module.split(".")[0] == "torch":
                wrong = [part for part in private if not allowed(part, file)]
            else:
                names = DOCUMENTED.get(module, set())
                wrong = private or (names is not None and name not in names)
            if wrong:
                found.append(f"{file}:{line}: from {module} import {name}")
    assert not found, f"move these to cluscomp_peft/upstream: {found}"


def test_no_attribute_of_theirs_is_touched():
    trees = files()
    own = {name for tree in trees.values() for name in own_names(tree)}
    known = (own | ELSEWHERE | TABLES) - KNOWN - set(torch.INTERNALS)
    found = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if (private or node.attr in KNOWN) and node.attr not in known and not allowed(node.attr, file):
                found.append(f"{file}:{node.lineno}: .{node.attr}")
    assert not found, f"move these to cluscomp_peft/upstream: {found}"


def test_no_name_of_theirs_is_written_as_text():
    found = [
        f"{file}:{node.lineno}: {node.value!r}"
        for file, tree in files().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in AS_TEXT
    ]
    assert not found, f"move these to cluscomp_peft/upstream: {found}"


@pytest.mark.parametrize("module", OVERRIDES)
def test_what_is_overridden_is_listed(module):
    """Private methods and attributes of theirs that a class of ours, or its objects, have of their own."""
    name, table, library = OVERRIDES[module]
    kind = getattr(importlib.import_module(module), name)
    theirs = {key for base in kind.__mro__ if base.__module__.split(".")[0] == library for key in vars(base)}
    ours = set()
    for base in kind.__mro__:
        if base.__module__.startswith("cluscomp_peft."):
            ours |= {key for key in vars(base) if not key.startswith("_abc_")}
            ours |= set(own_names(ast.parse(inspect.getsource(base))))
    shared = {key for key in ours & theirs if key.startswith("_") and not key.startswith("__")}
    assert shared - set(torch.INTERNALS) <= set(table)


def test_what_is_listed_is_used():
    """A name that nobody touches any more leaves its room."""
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    ours = "\n".join(text for name, text in texts.items() if not name.startswith("upstream/"))
    unused = [name for name in TABLES | set(torch.INTERNALS) if name not in ours]
    for room in ROOMS:
        exported = importlib.import_module(f"cluscomp_peft.upstream.{room}").__all__
        unused += [name for name in exported if name not in ours and not name.isupper()]
    assert not unused


def test_every_name_is_held_by_a_contract_test():
    wanted = set()
    for file in ROOMS:
        room = importlib.import_module(f"cluscomp_peft.upstream.{file}")
        for name in room.__all__:
            value = getattr(room, name)
            wanted |= {(file, f"{name}.{key}") for key in value} if isinstance(value, dict) else {(file, name)}
    assert wanted == HELD
