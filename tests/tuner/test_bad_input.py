"""Bad input ends in an error that names the value and the cure, and leaves model and files as they were."""

from __future__ import annotations

import json
import pkgutil
import shutil
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import cast_mixed_precision_params
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.hf.quantizer import ClusCompHfQuantizer
from tests.conftest import BORN, config_for, load, logits_of, tiny_llama


@pytest.fixture
def compressed(compressed_dir):
    return load(compressed_dir)


@pytest.fixture
def adapter(tmp_path, compressed):
    """A saved adapter of the compressed model."""
    folder = tmp_path / "adapter"
    get_peft_model(compressed, config_for("compressed", init_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def born_adapter(tmp_path, dense_dir):
    """A saved adapter that carries its codes."""
    folder = tmp_path / "born"
    model = load(dense_dir)
    get_peft_model(model, config_for("born", init_weights=False)).save_pretrained(folder)
    return folder


def assert_untouched(model, expected, tokens):
    """No tuner layer, no config of an adapter, the same logits."""
    assert torch.equal(logits_of(model, tokens), expected)
    assert not any("cluscomp_" in name for name, _ in model.named_parameters())
    assert not getattr(model, "peft_config", None)
    assert not getattr(model, "_hf_peft_config_loaded", False)


def other_base(dense_dir, tmp_path):
    """The same model compressed with another seed: same shapes, other codes."""
    config = ClusCompQuantizationConfig(**BORN, seed=1)
    return AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)


@pytest.mark.parametrize("way", ["peft", "mixin"])
def test_an_adapter_on_another_compressed_base(adapter, dense_dir, tmp_path, tokens, way):
    model = other_base(dense_dir, tmp_path)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(model, adapter) if way == "peft" else model.load_adapter(str(adapter))
    assert_untouched(model, expected, tokens)


@pytest.mark.parametrize("way", ["peft", "mixin"])
def test_an_adapter_of_codes_on_a_dense_model(adapter, dense_dir, tokens, way):
    model = load(dense_dir)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="belongs to a compressed model"):
        PeftModel.from_pretrained(model, adapter) if way == "peft" else model.load_adapter(str(adapter))
    assert_untouched(model, expected, tokens)


@pytest.mark.parametrize("way", ["peft", "mixin"])
def test_a_dense_born_adapter_on_a_compressed_model(born_adapter, compressed, tokens, way):
    expected = logits_of(compressed, tokens)
    with pytest.raises(ValueError, match="carries its own codes"):
        if way == "peft":
            PeftModel.from_pretrained(compressed, born_adapter)
        else:
            compressed.load_adapter(str(born_adapter))
    assert_untouched(compressed, expected, tokens)


def test_a_refused_second_adapter_is_forgotten(adapter, dense_dir, tmp_path, tokens):
    model = get_peft_model(other_base(dense_dir, tmp_path), config_for("compressed", init_weights=False))
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="another base"):
        model.load_adapter(adapter, "second")
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits_of(model, tokens), expected)


def test_a_dense_born_adapter_beside_one_with_other_codes(born_adapter, dense_dir, tokens):
    model = load(dense_dir)
    model = get_peft_model(model, config_for("born", seed=1, init_weights=False))
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="another base"):
        model.load_adapter(born_adapter, "second")
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits_of(model, tokens), expected)


def test_a_second_adapter_with_other_clusters(dense_dir):
    model = get_peft_model(load(dense_dir), config_for("born"))
    with pytest.raises(ValueError, match="share the codes"):
        model.add_adapter("other", ClusCompConfig(group_size=2, num_clusters=12))
    with pytest.raises(ValueError, match="one kind of base"):
        model.add_adapter("other", config_for("dense"))
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("which", ["compressed", "born"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "incomplete"])
def test_a_damaged_adapter_file(which, damage, adapter, born_adapter, dense_dir, compressed_dir, tokens):
    folder = adapter if which == "compressed" else born_adapter
    file = folder / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 64)
    else:
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if name.endswith("codebook")))
        save_file(tensors, file)
    model = AutoModelForCausalLM.from_pretrained(compressed_dir if which == "compressed" else dense_dir)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors (is damaged|has no)"):
        PeftModel.from_pretrained(model, folder)
    assert_untouched(model, expected, tokens)


def test_a_config_without_its_weights(born_adapter, dense_dir, tokens):
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(born_adapter)
    model = get_peft_model(load(dense_dir), config)
    with pytest.raises(RuntimeError, match="weights were not loaded"):
        model(tokens)


@pytest.mark.parametrize("damage", ["cut", "missing tensor", "changed codes"])
def test_a_damaged_checkpoint(damage, compressed_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(compressed_dir, folder)
    file = folder / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.codes"
        if damage == "missing tensor":
            del tensors[name]
        else:
            tensors[name][3, 1] ^= 5
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"incomplete|fingerprint|not fully covered"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_whose_codes_exceed_the_codebook(compressed, tmp_path):
    """Every digest is right: the file was made so."""
    with torch.no_grad():
        compressed.model.layers[1].mlp.up_proj.codes[3, 0] = 255  # 12 clusters take 4 bits
    compressed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.codes names centroids beyond the 12"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["peft", "mixin", "state dict"])
@pytest.mark.parametrize("kind", ["born", "dense"])
def test_an_adapter_whose_codes_exceed_the_codebook(kind, way, dense_dir, tmp_path, tokens):
    model = get_peft_model(load(dense_dir), config_for(kind))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        (layer if kind == "dense" else layer.base_layer).codes[3, 0] = 255
    layer.note_digests("default")
    model.save_pretrained(tmp_path)
    base = load(dense_dir)
    with pytest.raises(ValueError, match="name centroids beyond the 12 of its codebook"):
        if way == "peft":
            PeftModel.from_pretrained(base, tmp_path)
        elif way == "mixin":
            base.load_adapter(str(tmp_path))
            logits_of(base, tokens)
        else:
            loaded = get_peft_model(base, ClusCompConfig.from_pretrained(tmp_path))
            loaded.load_state_dict(model.state_dict())
            logits_of(loaded, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3"),
        ({"layout": {}}, "none of the 0 clustered matrices"),
        ({"layout": {"model.layers.*.mlp.up_proj": {"group": 3}}}, "not readable"),
    ],
)
def test_a_checkpoint_config_that_cannot_be_read(change, message, compressed_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(compressed_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.5}, "between 1 and 8"),
        ({"bits": 9}, "between 1 and 8"),
        ({"group_size": 4}, "go together"),
        ({"group_size": 0, "num_clusters": 4}, "group_size must be"),
        ({"group_size": 4, "num_clusters": 1}, "num_clusters must be"),
        ({"group_size": 4, "num_clusters": 2**17}, "num_clusters must be"),
        ({"codebook_dtype": "int8"}, "codebook_dtype"),
        ({"quality": "good"}, "quality must be one of fast, default, best"),
    ],
)
def test_settings_out_of_range(settings, message):
    for config in (ClusCompQuantizationConfig, ClusCompConfig):
        with pytest.raises(ValueError, match=message):
            config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "sparse"}, "base must be"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"delta_scale": 0.0}, "delta_scale"),
        ({"target_modules": "a.*", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_parameters": ["weight"], "target_modules": "a.*"}, "target_parameters"),
    ],
)
def test_adapter_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusCompConfig(**settings)


def test_more_clusters_than_groups(dense_dir, tokens):
    config = ClusCompQuantizationConfig(group_size=4, num_clusters=4096)
    with pytest.raises(ValueError, match=r"model\.layers\.0\..*num_clusters=4096 is more than the \d+ groups"):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    # An adapter takes it as a wish for no loss at all, and says what that costs.
    model = load(dense_dir)
    expected = logits_of(model, tokens)
    with pytest.warns(UserWarning, match="num_clusters=4096 is more than the groups"):
        wrapped = get_peft_model(model, ClusCompConfig(group_size=4, num_clusters=4096))
    assert torch.equal(logits_of(wrapped, tokens), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path, tokens):
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = value
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj has 1 NaN or infinite"):
        get_peft_model(model, config_for("born"))
    assert {name: type(module) for name, module in model.named_modules()} == before
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj has 1 NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ClusCompQuantizationConfig(bits=4))


def test_experts_of_which_nothing_says_how_they_lie_are_refused_by_name():
    model = tiny_llama()
    model.model.layers[1].experts = torch.nn.Module()
    model.model.layers[1].experts.mixer = torch.nn.Parameter(torch.zeros(4, 6, 8))
    with pytest.raises(ValueError, match=r"fused experts.*layers\.1\.experts\.mixer \(4, 6, 8\)"):
        get_peft_model(model, ClusCompConfig(**BORN))
    wrapped = get_peft_model(model, ClusCompConfig(**BORN, target_modules=["q_proj", "o_proj"]))
    assert wrapped.get_nb_trainable_parameters()[0] > 0


def test_layers_that_are_no_linear_layers(dense_dir, tokens):
    model = load(dense_dir)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding|not supported"):
        get_peft_model(model, config_for("born", target_modules=["q_proj", "embed_tokens"]))
    assert_untouched(model, expected, tokens)


def test_a_dense_base_on_a_compressed_model(compressed, tokens):
    expected = logits_of(compressed, tokens)
    with pytest.raises(ValueError, match="base='dense' needs dense weights"):
        get_peft_model(compressed, ClusCompConfig(base="dense"))
    with pytest.raises(ValueError, match="base='dense' needs dense weights"):
        compressed.add_adapter(ClusCompConfig(base="dense"))
    assert_untouched(compressed, expected, tokens)


def test_unknown_target_modules(compressed_dir, dense_dir, tokens):
    for folder in (compressed_dir, dense_dir):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = logits_of(model, tokens)
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(model, ClusCompConfig(target_modules=["absent"]))
        assert_untouched(model, expected, tokens)
    with pytest.raises(ValueError, match="'absent'"):
        AutoModelForCausalLM.from_pretrained(
            dense_dir, quantization_config=ClusCompQuantizationConfig(target_modules=["absent"])
        )


def test_casts_of_codes_are_noticed(compressed, tokens):
    model = get_peft_model(compressed, config_for("compressed"))
    cast_mixed_precision_params(model, torch.bfloat16)
    with pytest.raises(TypeError, match="codes of a clustered weight must stay uint8"):
        model(tokens)


def test_kbit_preparation_does_not_corrupt_codes(compressed, tokens):
    expected = logits_of(compressed, tokens)
    prepared = prepare_model_for_kbit_training(compressed, use_gradient_checkpointing=False)
    assert prepared.model.layers[0].mlp.up_proj.codes.dtype == torch.uint8
    assert torch.equal(logits_of(prepared, tokens), expected)


def test_batches_of_several_adapters(compressed, tokens):
    model = get_peft_model(compressed, config_for("compressed"))
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=tokens, adapter_names=["default", "__base__"])


def test_what_peft_has_for_other_methods_only(adapter, compressed, compressed_dir):
    from peft.utils.hotswap import hotswap_adapter

    model = get_peft_model(compressed, config_for("compressed"))
    with pytest.raises(ValueError, match="Hotswap"):
        hotswap_adapter(model, str(adapter), adapter_name="default")
    with pytest.raises(ValueError, match=r"mixed|Mixed"):
        get_peft_model(load(compressed_dir), config_for("compressed"), mixed=True)


def test_safe_merge_finds_nan(compressed, tokens):
    model = get_peft_model(compressed, config_for("compressed"))
    expected = logits_of(model, tokens)
    delta = model.base_model.model.model.layers[1].mlp.up_proj.cluscomp_delta["default"].codebook
    delta.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.model.model.layers[1].mlp.up_proj.merge(safe_merge=True)
    delta.data[0, 0] = 0
    assert torch.equal(logits_of(model, tokens), expected)


def test_a_checkpoint_is_already_quantised(compressed_dir):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        AutoModelForCausalLM.from_pretrained(compressed_dir, quantization_config=ClusCompQuantizationConfig(bits=2))


@pytest.mark.parametrize("kind", ["compressed", "born", "dense"])
def test_weights_of_another_base_for_an_adapter_that_is_there(kind, dense_dir, compressed_dir, tmp_path, tokens):
    """What a Trainer does when it resumes: PEFT reads no config then."""

    def fresh(seed):
        if kind == "compressed":
            quantization = ClusCompQuantizationConfig(**BORN, seed=seed)
            return AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=quantization)
        return load(dense_dir)

    seeds = ({}, {}) if kind == "compressed" else ({"seed": 0}, {"seed": 1})
    get_peft_model(fresh(0), config_for(kind, init_weights=False, **seeds[0])).save_pretrained(tmp_path)
    model = get_peft_model(fresh(1), config_for(kind, init_weights=False, **seeds[1]))
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="another base"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits_of(model, tokens), expected)


def test_an_adapter_of_a_merged_base_on_the_unmerged_one(adapter, compressed, compressed_dir, tmp_path):
    merged = PeftModel.from_pretrained(load(compressed_dir), adapter).merge_and_unload()
    get_peft_model(merged, config_for("compressed", init_weights=False)).save_pretrained(tmp_path / "second")
    with pytest.warns(UserWarning, match="but other codebooks"):
        PeftModel.from_pretrained(load(compressed_dir), tmp_path / "second")


@pytest.mark.parametrize("phase", ["compress.policy.Policy.cluster", "tuner.model.ClusCompLinear"])
def test_an_interrupted_injection_is_undone(dense_dir, tokens, monkeypatch, phase):
    """Ctrl-C at the sixth matrix, while it is clustered and while its layer is replaced."""
    path = f"cluscomp_peft.{phase}"
    original, done = pkgutil.resolve_name(path), []

    def make(*arguments, **settings):
        done.append(1)
        if len(done) > 5:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    model = load(dense_dir)
    expected = logits_of(model, tokens)
    monkeypatch.setattr(path, make)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, config_for("born"))
    assert len(done) == 6
    assert_untouched(model, expected, tokens)


@pytest.mark.parametrize("kind", ["born", "dense", "compressed"])
def test_more_blocks_than_channels(kind, dense_dir, compressed_dir, tokens):
    model = AutoModelForCausalLM.from_pretrained(compressed_dir if kind == "compressed" else dense_dir)
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="num_blocks=40 is more than the 32 input channels"):
        get_peft_model(model, config_for(kind, num_blocks=40))
    assert_untouched(model, expected, tokens)


def test_weights_beyond_the_range_of_the_codebook(tokens):
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match=r"down_proj has values up to 1e\+05"):
        get_peft_model(model, config_for("born", codebook_dtype="float16"))
    assert_untouched(model, expected, tokens)


def test_two_kinds_of_base_on_one_model(dense_dir):
    model = load(dense_dir)
    model.add_adapter(config_for("born"), "first")
    with pytest.raises(ValueError, match="one kind of base"):
        model.add_adapter(config_for("dense"), "second")
    assert set(model.peft_config) == {"first"}


def test_dense_and_clustered_layers_in_one_adapter(compressed, tokens):
    expected = logits_of(compressed, tokens)
    with pytest.raises(ValueError, match=r"dense layers .lm_head. beside clustered ones"):
        get_peft_model(compressed, config_for("compressed", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"modules_to_save names model\.layers\.0\.mlp\.up_proj, which is clustered"):
        get_peft_model(compressed, config_for("compressed", modules_to_save=["up_proj"], target_modules=["q_proj"]))
    assert_untouched(compressed, expected, tokens)


@pytest.mark.parametrize("settings", [{"bits": "3"}, {"group_size": 2.0, "num_clusters": 8}, {"bits": True}])
def test_settings_of_the_wrong_type(settings):
    for config in (ClusCompQuantizationConfig, ClusCompConfig):
        with pytest.raises(ValueError, match="must be a"):
            config(**settings)
    for wrong in ({"num_blocks": 2.0}, {"num_blocks": True}, {"delta_scale": float("inf")}):
        with pytest.raises(ValueError, match="must be a"):
            ClusCompConfig(**wrong)


@pytest.mark.parametrize("kind", ["born", "dense"])
@pytest.mark.parametrize("settings", [{"bits": 2}, {"group_size": 2, "num_clusters": 12}])
def test_other_clustering_for_a_second_adapter(kind, settings, dense_dir):
    model = get_peft_model(load(dense_dir), config_for(kind))
    with pytest.raises(ValueError, match="share the codes"):
        model.add_adapter("other", ClusCompConfig(base="dense" if kind == "dense" else "clustered", **settings))
    assert set(model.peft_config) == {"default"}


def test_clustering_settings_on_a_compressed_model(compressed):
    with pytest.warns(UserWarning, match="compressed already"):
        get_peft_model(compressed, ClusCompConfig(bits=2))


def test_a_cast_model_saves_what_it_computes(compressed, tokens, tmp_path):
    compressed.to(torch.float32)
    model = get_peft_model(compressed, config_for("compressed", init_weights=False))
    merged = model.merge_and_unload()
    expected = logits_of(merged, tokens)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)
    merged.model.layers[0].mlp.up_proj.to(torch.bfloat16)
    with pytest.raises(ValueError, match="several dtypes"):
        merged.save_pretrained(tmp_path)


def test_a_model_compressed_on_the_fly_can_be_copied(dense_dir, tokens, monkeypatch):
    import copy

    from cluscomp_peft.hf import quantizer

    class Bar(quantizer.tqdm):
        """A bar that a terminal watches."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **{**settings, "disable": False})

    monkeypatch.setattr(quantizer, "tqdm", Bar)
    config = ClusCompQuantizationConfig(**BORN)
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    assert torch.equal(logits_of(copy.deepcopy(model), tokens), logits_of(model, tokens))


def test_an_interrupted_load_leaves_no_threads(dense_dir, monkeypatch):
    before, submit, calls = set(threading.enumerate()), ClusCompHfQuantizer.submit, []

    def interrupting(self, *args):
        calls.append(self)
        if len(calls) == 5:
            raise KeyboardInterrupt
        submit(self, *args)

    monkeypatch.setattr(ClusCompHfQuantizer, "submit", interrupting)
    with pytest.raises(KeyboardInterrupt) as held:  # whose traceback holds everything that was made
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=ClusCompQuantizationConfig(**BORN))
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(30)  # what is at work comes to its end
            assert not thread.is_alive()
    assert held.value is not None and len(calls) == 5
