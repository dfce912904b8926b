"""Contract tests of what `cluscomp_peft.upstream.deepspeed` touches; ZeRO-3 runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from cluscomp_peft.upstream import deepspeed as room
from tests import warm
from tests.upstream.contract import contract

PROGRAM = """
import json, sys
import deepspeed, torch
from cluscomp_peft.upstream.deepspeed import gather, shape_of_whole

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled first, for minutes
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="file://" + sys.argv[1] + ".store")
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
    layer = torch.nn.Linear(5, 3)
facts = {"left": layer.weight.numel(), "whole": list(shape_of_whole(layer.weight))}
with gather(layer.weight):
    facts["gathered"], facts["finite"] = list(layer.weight.shape), bool(layer.weight.isfinite().all())
facts["after"] = layer.weight.numel()
json.dump(facts, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory) -> dict:
    """What a process saw of the weight [3, 5] of a linear layer under ZeRO-3."""
    pytest.importorskip("deepspeed")
    out = str(tmp_path_factory.mktemp("zero") / "facts.json")
    process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [warm.python("deepspeed"), "-c", PROGRAM, out], capture_output=True, text=True, env={**os.environ, **process}
    )
    if done.returncode:
        return {"error": done.stderr}
    with open(out) as file:
        return json.load(file)


@contract(room, "shape_of_whole")
def test_a_partitioned_parameter_is_empty_and_knows_its_shape(partitioned):
    assert "error" not in partitioned, partitioned["error"]
    assert partitioned["left"] == 0 and partitioned["whole"] == [3, 5]
    assert room.shape_of_whole(torch.zeros(2, 7)) == torch.Size([2, 7])


@contract(room, "gather")
def test_a_partitioned_parameter_is_whole_while_it_is_gathered(partitioned):
    assert "error" not in partitioned, partitioned["error"]
    assert partitioned["gathered"] == [3, 5] and partitioned["finite"] and partitioned["after"] == 0


@contract(room, "zero_defaults")
def test_zero_has_defaults_in_numbers_of_elements():
    pytest.importorskip("deepspeed")
    bucket, persistent, reuse = room.zero_defaults()
    assert 0 < persistent < bucket < reuse
