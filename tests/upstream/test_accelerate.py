"""Contract tests of what `cluscomp_peft.upstream.accelerate` touches."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from cluscomp_peft.upstream import accelerate as room
from tests.upstream.contract import contract

CPU = torch.device("cpu")


@pytest.fixture
def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.fixture
def offloaded(dense) -> nn.Sequential:
    return cpu_offload(copy.deepcopy(dense), execution_device=CPU)


@contract(room, "hook_of")
def test_a_hook_is_found_on_its_module(dense):
    layer, hook = dense[0], ModelHook()
    assert room.hook_of(layer) is None
    add_hook_to_module(layer, hook)
    assert room.hook_of(layer) is hook
    remove_hook_from_module(layer)
    assert room.hook_of(layer) is None


@contract(room, "offload_hook")
def test_the_hook_that_offloads_is_found_also_among_others(dense, offloaded):
    assert room.offload_hook(dense[0]) is None
    add_hook_to_module(dense[0], ModelHook())
    assert room.offload_hook(dense[0]) is None
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    hook = room.offload_hook(offloaded[0])
    assert hook is not None
    add_hook_to_module(offloaded[0], ModelHook(), append=True)
    assert isinstance(room.hook_of(offloaded[0]), SequentialHook) and room.offload_hook(offloaded[0]) is hook


@contract(room, "kept_weights")
def test_the_numbers_are_kept_under_their_names_in_the_module(dense, offloaded):
    kept = room.kept_weights(room.offload_hook(offloaded[1]))
    assert "weight" in kept and "1.weight" not in kept and "absent" not in kept
    assert torch.equal(kept["weight"], dense[1].weight) and torch.equal(kept["bias"], dense[1].bias)


@contract(room, "keep_weight")
def test_a_call_computes_with_the_numbers_that_were_put_in_place_of_the_kept_ones(dense, offloaded):
    x = torch.randn(2, 4)
    room.keep_weight(room.offload_hook(offloaded[0]), "weight", torch.ones(3, 4))
    assert torch.equal(offloaded[0](x), nn.functional.linear(x, torch.ones(3, 4), dense[0].bias))
    assert offloaded[0].weight.is_meta
    remove_hook_from_module(offloaded[0])
    assert torch.equal(offloaded[0].weight, torch.ones(3, 4))


@contract(room, "take_away")
def test_numbers_are_taken_away_again(offloaded):
    hook = room.offload_hook(offloaded[0])
    hook.pre_forward(offloaded[0], torch.randn(2, 4))
    assert not offloaded[0].weight.is_meta
    room.take_away(offloaded[0], hook)
    assert offloaded[0].weight.is_meta


@contract(room, "take_away", says="`offloading.offload_on_error` is there because of this.")
def test_numbers_stay_in_memory_when_a_call_ends_by_an_exception(offloaded):
    with pytest.raises(RuntimeError):
        offloaded[0](torch.randn(2, 5))
    assert not offloaded[0].weight.is_meta


@contract(room, "bring_to")
def test_the_device_of_the_numbers_is_known(offloaded):
    assert room.bring_to(room.offload_hook(offloaded[0])) == CPU


@contract(room, "device_map_of")
def test_a_dispatched_model_knows_its_map(dense):
    assert room.device_map_of(dense) is None
    places = {"0": "cpu", "1": "disk"}
    model = dispatch_model(
        dense, places, main_device="cpu", offload_index={}, state_dict=dense.state_dict(), force_hooks=True
    )
    assert room.device_map_of(model) == places


@contract(room, "state_dict_of_offloaded")
def test_the_numbers_of_an_offloaded_model_are_read_back(dense, offloaded):
    found = room.state_dict_of_offloaded(offloaded)
    assert found.keys() == dense.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in dense.state_dict().items())
