"""What fails a test when this project calls what another package has deprecated, and only then."""

from __future__ import annotations

import logging
import warnings

import pytest

from tests import deprecations


@pytest.fixture
def found():
    yield deprecations.calls
    deprecations.calls.clear()


def function_of(package: str, body: str, **names):
    """A function that another package could have: `body` runs when it is called."""
    space = {"__name__": f"{package}.module", "warnings": warnings, "logging": logging, **names}
    exec(compile(f"def function():\n    {body}", f"/elsewhere/{package}/module.py", "exec"), space)
    return space["function"]


@pytest.mark.parametrize("category", ["DeprecationWarning", "FutureWarning"])
def test_a_call_from_here_is_found_every_time(found, category):
    call = function_of("transformers", f"warnings.warn('gone in v9', {category})")
    for _ in range(2):
        call()
    assert len(found) == 2
    assert all(line.startswith("tests/test_deprecations.py:") and line.endswith("gone in v9") for line in found)


def test_a_call_that_torch_passes_on_is_found(found):
    inner = function_of("transformers", "warnings.warn('gone in v9', FutureWarning)")
    function_of("torch", "return inner()", inner=inner)()
    assert len(found) == 1


def test_what_is_logged_as_deprecated_is_found(found, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)  # whatever other tests left
    logging.getLogger("transformers.models").manager._clear_cache()
    function_of("transformers", "logging.getLogger('transformers.models').warning('`torch_dtype` is deprecated!')")()
    function_of("transformers", "logging.getLogger('transformers.models').warning('weights are new')")()
    assert len(found) == 1 and "torch_dtype" in found[0]


def test_what_packages_call_of_each_other_is_theirs(found):
    inner = function_of("transformers", "warnings.warn('gone in v9', FutureWarning)")
    outer = function_of("peft", "return inner()", inner=inner)
    function_of("torch", "return outer()", outer=outer)()
    assert not found


def test_other_warnings_pass():
    with pytest.warns(UserWarning, match="mind"):
        warnings.warn("mind this", stacklevel=1)


def test_a_found_call_fails_once():
    function_of("peft", "warnings.warn('gone in v9', FutureWarning)")()
    with pytest.raises(AssertionError, match=r"tests/test_deprecations\.py:\d+ .*gone in v9"):
        deprecations.check()
    deprecations.check()
