"""Models whose weights accelerate keeps elsewhere: on disk, in host memory, in the checkpoint. A machine without a GPU
computes on the CPU, where only "disk" offloads; `accelerate.cpu_offload` goes through the same hooks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

from cluscomp_peft import ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft.deltas import Delta
from cluscomp_peft.hf.quantizer import ClusCompHfQuantizer
from cluscomp_peft.offloading import execution_device, stored
from cluscomp_peft.upstream.accelerate import offload_hook
from tests.conftest import checkpoint_activations, config_for, logits_of, tiny_llama, train_briefly
from tests.grids import grid, quick

CPU = torch.device("cpu")
MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A compressed model; the dense one is beside it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=2).save_pretrained(folder / "dense")
    config = ClusCompQuantizationConfig(bits=5, scales=True)
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(folder / "c")
    return str(folder / "c")


@pytest.fixture
def dense(folder) -> str:
    return os.path.join(os.path.dirname(folder), "dense")


def resident(folder: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def on_disk(folder: str, **settings) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=MAP, **settings)


def by_hand(how: str, folder: str, tmp_path, **settings) -> LlamaForCausalLM:
    """A resident model, offloaded through one of accelerate's functions."""
    model = resident(folder)
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=CPU, **settings)
    if how == "disk_offload":
        return accelerate.disk_offload(model, tmp_path / "weights", execution_device=CPU, **settings)
    return accelerate.dispatch_model(model, MAP, offload_dir=tmp_path / "weights", **settings)


BY_HAND = ("cpu_offload", "disk_offload", "dispatch_model")


def offloaded(model: nn.Module) -> list[ClusteredLinear]:
    return [module for module in model.modules() if isinstance(module, ClusteredLinear) and module.codes.is_meta]


def clone(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter trains."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


# -- logits


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_logits_from_disk_are_the_same(folder, tokens, tmp_path, offload_buffers):
    model = on_disk(folder, offload_buffers=offload_buffers, offload_folder=tmp_path)
    assert len(offloaded(model)) == 14
    assert torch.equal(logits_of(model, tokens), logits_of(resident(folder), tokens))
    assert len(offloaded(model)) == 14


def test_auto_fills_memory_and_offloads_the_rest(folder, tokens, tmp_path):
    expected = resident(folder)
    sizes, _ = compute_module_sizes(expected)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(sizes[""] * 0.8)}, offload_folder=tmp_path
    )
    assert model.hf_device_map["model.layers.1"] == "disk" and model.hf_device_map["model.embed_tokens"] == "cpu"
    assert 7 <= len(offloaded(model)) <= 14
    assert torch.equal(logits_of(model, tokens), logits_of(expected, tokens))


@grid(how=BY_HAND, offload_buffers=[False, True])
def test_accelerates_functions(folder, tokens, tmp_path, how, offload_buffers):
    model = by_hand(how, folder, tmp_path, offload_buffers=offload_buffers)
    assert len(offloaded(model)) == 14
    assert torch.equal(logits_of(model, tokens), logits_of(resident(folder), tokens))


def test_generation(folder, tokens):
    settings = dict(max_new_tokens=8, do_sample=False)
    expected = resident(folder).generate(tokens, **settings)
    assert torch.equal(on_disk(folder).generate(tokens, **settings), expected)


# -- what device_map="auto" counts


def test_a_compressed_layer_counts_as_the_bytes_it_stores(folder):
    model = resident(folder)
    sizes, leaves = compute_module_sizes(model, model.hf_quantizer)
    for name, module in model.named_modules():
        if isinstance(module, ClusteredLinear):
            assert sizes[name] == leaves[name] == module.stored_bytes()


def test_on_the_fly_a_weight_counts_as_the_bytes_it_will_store(folder, dense):
    quantizer = ClusCompHfQuantizer(ClusCompQuantizationConfig(bits=5, scales=True), pre_quantized=False)
    model = AutoModelForCausalLM.from_pretrained(dense)
    quantizer._process_model_before_weight_loading(model)
    sizes, _ = compute_module_sizes(model, quantizer)
    compressed, _ = compute_module_sizes(resident(folder))
    assert all(sizes[name] == pytest.approx(size) for name, size in compressed.items())
    assert quantizer.adjust_max_memory({0: 1000, "cpu": 500}) == {0: 900, "cpu": 450}


def test_nothing_is_set_aside_for_a_compressed_checkpoint(folder):
    assert resident(folder).hf_quantizer.adjust_max_memory({0: 1000}) == {0: 1000}


@pytest.mark.parametrize("no_split", [["LlamaDecoderLayer"], None])
def test_no_clustered_layer_is_split(folder, no_split):
    model = resident(folder)
    sizes, _ = compute_module_sizes(model)
    for share in (0.3, 0.5, 0.7, 0.9):
        device_map = infer_auto_device_map(
            model,
            max_memory={"cpu": int(share * sizes[""])},
            no_split_module_classes=no_split,
            hf_quantizer=model.hf_quantizer,
        )
        modules = dict(model.named_modules())
        for name in device_map:
            assert name in modules, f"{name} is a parameter"
            if no_split:
                assert not name.startswith("model.layers.") or name.count(".") == 2


# -- adapters


def test_an_adapter_trains_as_it_does_in_memory(folder, tokens):
    expected = get_peft_model(resident(folder), config_for("compressed"))
    model = get_peft_model(on_disk(folder), config_for("compressed"))
    assert {value.device for value in clone(model).values()} == {CPU}
    assert train_briefly(model, tokens) == train_briefly(expected, tokens)
    for (name, ours), theirs in zip(clone(model).items(), clone(expected).values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert len(offloaded(model)) == 14
    assert torch.equal(logits_of(model, tokens), logits_of(expected, tokens))
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), logits_of(resident(folder), tokens))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_fetches_codes_again(folder, tokens, use_reentrant):
    losses = []
    for load in (resident, on_disk):
        model = load(folder)
        checkpoint_activations(model, use_reentrant)
        model.enable_input_require_grads()
        losses.append(train_briefly(get_peft_model(model, config_for("compressed")), tokens))
    assert losses[0] == losses[1]


@grid(how=quick(BY_HAND, "disk_offload"))
def test_an_adapter_on_a_model_offloaded_by_hand(folder, tokens, tmp_path, how):
    expected = get_peft_model(resident(folder), config_for("compressed"))
    model = get_peft_model(by_hand(how, folder, tmp_path), config_for("compressed"))
    assert train_briefly(model, tokens) == train_briefly(expected, tokens)
    assert torch.equal(logits_of(model, tokens), logits_of(expected, tokens))


@pytest.fixture
def adapter(folder, tokens, tmp_path) -> str:
    """A trained adapter, made and saved on an offloaded model."""
    model = get_peft_model(on_disk(folder), config_for("compressed"))
    train_briefly(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_an_adapter_moves_between_offloaded_and_resident(folder, tokens, adapter, tmp_path):
    saved = json.load(open(os.path.join(adapter, "adapter_config.json")))
    assert saved["fingerprint"] and saved["codebook_fingerprint"]
    expected = PeftModel.from_pretrained(resident(folder), adapter)
    before = {name: os.path.getmtime(os.path.join(folder, name)) for name in os.listdir(folder)}
    model = PeftModel.from_pretrained(on_disk(folder), adapter)
    assert {name: os.path.getmtime(os.path.join(folder, name)) for name in os.listdir(folder)} == before
    assert len(offloaded(model)) == 14
    assert model.hf_device_map == MAP
    assert all(not value.is_meta for name, value in model.named_parameters() if "cluscomp_" in name)
    assert torch.equal(logits_of(model, tokens), logits_of(expected, tokens))
    assert not torch.equal(logits_of(model, tokens), logits_of(resident(folder), tokens))
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(f"{path}/adapter_model.safetensors") for path in (tmp_path / "again", adapter))
    assert all(torch.equal(again[key], first[key]) for key in again.keys() | first.keys())


@grid(low_cpu_mem_usage=quick([False, True], True))
def test_a_loaded_adapter_trains_on(folder, tokens, adapter, low_cpu_mem_usage):
    losses = []
    for load in (resident, on_disk):
        settings = dict(is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        losses.append(train_briefly(PeftModel.from_pretrained(load(folder), adapter, **settings), tokens))
    assert losses[0] == losses[1]


def test_a_second_adapter(folder, tokens, adapter):
    expected = logits_of(PeftModel.from_pretrained(resident(folder), adapter), tokens)
    model = get_peft_model(on_disk(folder), config_for("compressed"))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model, tokens), expected)


def test_an_adapter_is_offloaded_with_its_model(folder, tokens, adapter, tmp_path):
    """Dispatching a model that has an adapter takes the deltas away too; they are found again."""
    model = PeftModel.from_pretrained(resident(folder), adapter)
    expected = logits_of(model, tokens)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert any(value.is_meta for name, value in model.named_parameters() if "cluscomp_delta" in name)
    assert torch.equal(logits_of(model, tokens), expected)


def test_offloaded_deltas_do_not_train(folder, tokens):
    model = get_peft_model(resident(folder), config_for("compressed"))
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(RuntimeError, match="offloaded"):
        model.train()


def test_what_is_offloaded_cannot_be_trained_whole(folder):
    with pytest.raises(ValueError, match="lm_head is offloaded"):
        get_peft_model(on_disk(folder), config_for("compressed", modules_to_save=["lm_head"]))
    model = get_peft_model(on_disk(folder), config_for("compressed", modules_to_save=["embed_tokens"]))
    assert not any(value.is_meta for value in clone(model).values())


def test_a_recomputed_block_leaves_nothing_behind(folder, tokens):
    """torch ends the computation of a block for the second time by an exception in its last layer."""
    model = on_disk(folder)
    checkpoint_activations(model)
    train_briefly(get_peft_model(model, config_for("compressed")), tokens, steps=1)
    assert len(offloaded(model)) == 14


def test_a_dense_model_on_disk_is_not_clustered(dense):
    model = on_disk(dense)
    for kind in ("born", "dense"):
        with pytest.raises(ValueError, match="cluscomp compress"):
            get_peft_model(model, config_for(kind))


# -- fingerprints


def other_codes(folder: str, target) -> str:
    """The checkpoint with one byte of codes changed, and no fingerprint to notice."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.codes"][0, 0] ^= 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_a_damaged_checkpoint_is_noticed_on_disk(folder, tmp_path):
    with pytest.raises(ValueError, match="not the ones it was saved with"):
        on_disk(other_codes(folder, tmp_path / "other"))


def test_an_incomplete_checkpoint_is_noticed_on_disk(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.codebook"]
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model.layers.1.mlp.up_proj.codebook"):
        on_disk(tmp_path / "other")


def test_an_adapter_of_another_base_is_refused(folder, adapter, tmp_path):
    path = tmp_path / "other"
    other = other_codes(folder, path)
    config = json.load(open(path / "config.json"))
    config["quantization_config"]["fingerprint"] = None
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="belongs to another base"):
        PeftModel.from_pretrained(on_disk(other), adapter)


# -- merging and saving


@grid(safe_merge=quick([False, True], True))
def test_merging_and_unloading(folder, tokens, adapter, tmp_path, safe_merge):
    expected = logits_of(PeftModel.from_pretrained(resident(folder), adapter).merge_and_unload(), tokens)
    model = PeftModel.from_pretrained(on_disk(folder), adapter).merge_and_unload(safe_merge=safe_merge)
    assert isinstance(model, LlamaForCausalLM) and len(offloaded(model)) == 14
    assert torch.equal(logits_of(model, tokens), expected)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(resident(tmp_path / "merged"), tokens), expected)
    assert torch.equal(logits_of(on_disk(tmp_path / "merged"), tokens), expected)


def test_merging_and_unmerging(folder, tokens, adapter):
    model = PeftModel.from_pretrained(on_disk(folder), adapter)
    adapted, base = logits_of(model, tokens), logits_of(resident(folder), tokens)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(logits_of(model, tokens), adapted)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model, tokens), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokens), base)
    assert torch.equal(logits_of(model, tokens), adapted)


def test_unloading(folder, tokens, adapter):
    model = PeftModel.from_pretrained(on_disk(folder), adapter).unload()
    assert torch.equal(logits_of(model, tokens), logits_of(resident(folder), tokens))


@grid(how=quick(["device_map", *BY_HAND], "device_map", "disk_offload"))
def test_saving_the_model(folder, tokens, tmp_path, how):
    model = on_disk(folder) if how == "device_map" else by_hand(how, folder, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    assert json.load(open(tmp_path / "saved" / "config.json"))["quantization_config"]["fingerprint"]
    assert torch.equal(logits_of(resident(tmp_path / "saved"), tokens), logits_of(resident(folder), tokens))


def test_dequantizing(folder, tokens):
    assert torch.equal(logits_of(on_disk(folder).dequantize(), tokens), logits_of(resident(folder), tokens))


@pytest.mark.parametrize("device_map", [MAP, "auto"])
def test_clustering_on_the_fly_refuses_to_offload(dense, tmp_path, device_map):
    with pytest.raises(ValueError, match="cluscomp compress"):
        AutoModelForCausalLM.from_pretrained(
            dense,
            device_map=device_map,
            max_memory={"cpu": 60_000},
            offload_folder=tmp_path,
            quantization_config=ClusCompQuantizationConfig(bits=5),
        )


# -- one layer


def test_a_layer_alone(tmp_path):
    from tests.test_linear import clustered, delta, inputs

    expected, layer = clustered(), clustered()
    accelerate.disk_offload(layer, tmp_path, execution_device=CPU)
    assert layer.codes.is_meta and execution_device(layer) == CPU and offload_hook(layer) is not None
    assert torch.equal(stored(layer, "codes"), expected.codes) and stored(layer, "nothing") is None
    assert layer.fingerprint() == expected.fingerprint() == layer.fingerprint()
    assert layer.codebook_fingerprint() == expected.codebook_fingerprint()
    assert torch.equal(layer.weight, expected.weight) and layer.spec == expected.spec
    assert torch.equal(layer.to_dense(torch.float32)(inputs()), expected.to_dense(torch.float32)(inputs()))
    change: list[Delta] = [delta(2, scale_in=True)]
    for module in (layer, expected):
        module.merge(change)
    assert layer.codebook.is_meta and layer.codebook.shape[0] == 2
    assert torch.equal(layer(inputs()), expected(inputs()))
    for module in (layer, expected):
        module.set_parameter("scale_in", None)
    assert torch.equal(layer(inputs()), expected(inputs()))


# -- memory, in processes of their own

BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"
CODE = """
import json, os, sys
from dataclasses import replace
import torch
from transformers import AutoModelForCausalLM
from random_models import Shape, build, prepare, random_tokens, small
from timing import read_status
from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.codes import ClusterSpec
from cluscomp_peft.hf.quantizer import ClusCompHfQuantizer
import random_models

# Few centroids: the trained deltas, which stay in memory, are small beside the codes.
random_models.choose_spec = lambda *args, **settings: ClusterSpec(3, 512)
SHAPE = Shape(hidden=2048, intermediate=5632, layers=24, heads=16, kv_heads=16, vocab=256)
job, folder = sys.argv[1:]
MAPS = {"resident": None, "disk": {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu"}}
MAPS["disk"] |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
tokens = torch.arange(32)[None] * 3 % SHAPE.vocab


def serve(model):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def train(model):
    model, optimizer = prepare(model, "cluscomp-3", checkpointing=True, rank=2)
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def peak():
    return read_status("VmHWM") - before


if job == "write":
    for path, shape in ((folder, SHAPE), (folder + "/tiny", replace(SHAPE, layers=1))):
        model = build(shape, "cluscomp-3", "cpu")
        model.hf_quantizer = ClusCompHfQuantizer(ClusCompQuantizationConfig(), pre_quantized=False)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        model.save_pretrained(path)
    print(json.dumps({}))
    sys.exit()
tiny = AutoModelForCausalLM.from_pretrained(folder + "/tiny", device_map=MAPS[job])
serve(tiny), train(tiny)  # what is compiled at first use counts for nobody
del tiny
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak
before = read_status("VmRSS")
model = AutoModelForCausalLM.from_pretrained(folder, device_map=MAPS[job])
result = {"logits": serve(model).double().sum().item(), "serving": peak()}
result |= {"losses": train(model), "training": peak()}
print(json.dumps(result))
"""


def run(*arguments: str) -> dict:
    # Memory that is given back at once: the peak then is what is held, not what malloc keeps for later.
    settings = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, cwd=BENCHMARKS, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc")
def test_a_model_on_disk_takes_a_fraction_of_its_size(tmp_path):
    """1.2 G weights: neither the codes nor, thanks to checkpointing, what autograd keeps of them are in memory."""
    run("write", str(tmp_path))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    in_memory, on_disk = run("resident", str(tmp_path)), run("disk", str(tmp_path))
    assert (on_disk["logits"], on_disk["losses"]) == (in_memory["logits"], in_memory["losses"])
    assert in_memory["serving"] > size > 2 * on_disk["serving"]
    assert on_disk["training"] < size / 2 < in_memory["training"], (size, in_memory, on_disk)
