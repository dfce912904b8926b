"""Models of every kind through the command: the class that config.json names, an untouched config, words that are true
of what is there, and a line on what stays dense."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.clustered_weight import clustered_weights
from cluscomp_peft.compress.budget.coverage import coverage_line
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from tests import warm
from tests.conftest import config_for
from tests.grids import grid, quick

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SEQ2SEQ = dict(
    vocab_size=96,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
)
TEXT = dict(**SMALL, vocab_size=96, num_key_value_heads=2)
IMAGES = dict(vision_config=dict(**SMALL, image_size=32, patch_size=8))
MODELS = {
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **SEQ2SEQ, num_mel_bins=16, max_source_positions=32, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=96)),
    "bert body": lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=96)),
    "embedding": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT)),
    "classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8)),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **SMALL, vocab_size=96, conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        )
    ),
    "recurrent gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **{**TEXT, "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 96},
            lru_width=32, head_dim=8, attention_window_size=8,
        )
    ),
    "zamba 2": lambda: hf.Zamba2ForCausalLM(  # whose hybrid layers share a transformer
        hf.Zamba2Config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=4,
            mamba_headdim=16, mamba_ngroups=1, num_mem_blocks=1, chunk_size=8, adapter_rank=4,
        )
    ),
    "gemma 3 with images": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=dict(**TEXT, head_dim=8, sliding_window=8), **IMAGES, mm_tokens_per_image=4,
            image_token_index=90, boi_token_index=91, eoi_token_index=92,
        )
    ),
    "qwen 2.5 with images": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=dict(**TEXT, rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])),
            vision_config=dict(
                depth=2, hidden_size=32, num_heads=4, intermediate_size=48, out_hidden_size=32, patch_size=4,
                spatial_merge_size=2,
            ),
            image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        )
    ),
}  # fmt: skip
NOT_BY_TEXT = {
    "bart": "an encoder and a decoder",
    "t5": "an encoder and a decoder",
    "whisper": "an encoder and a decoder",
    "bert": "does not predict next tokens",
    "embedding": "does not predict next tokens",
    "classifier": "does not predict next tokens",
    "vit": "does not predict next tokens",
    "wav2vec2": "does not predict next tokens",
}


def settings(**changes) -> ClusCompQuantizationConfig:
    return ClusCompQuantizationConfig(group_size=2, num_clusters=16, quality="fast", **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a random model; made once each."""
    made: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = str(tmp_path_factory.mktemp("model"))
            MODELS[kind]().save_pretrained(made[kind])
        return made[kind]

    return folder


def config_of(folder) -> dict:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        return json.load(file)


@grid(kind=quick(list(MODELS), "t5", "bert", "embedding", "vit", "zamba 2", "gemma 3 with images"))
def test_a_model_is_compressed_as_what_it_is(kind, saved, tmp_path, capsys):
    source, target = saved(kind), str(tmp_path / "out")
    flags = ["--group-size", "2", "--num-clusters", "16", "--quality", "fast"]
    assert main(["compress", source, target, *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    before, after = config_of(source), config_of(target)
    del after["quantization_config"]
    assert after == before
    made = getattr(hf, before["architectures"][0])
    loaded = made.from_pretrained(target)
    expected = made.from_pretrained(source, quantization_config=settings())
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert main(["inspect", target]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"{len(clustered_weights(loaded))} matrices" in "\n".join(shown)
    # The same line in the end of both, and its numbers are those of the model.
    assert shown[-1] in said
    clustered, total = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= of| clustered)", shown[-1]))
    assert clustered == sum(layer.in_features * layer.out_features for _, layer in clustered_weights(loaded))
    dense = MODELS[kind]()
    own = {id(m.weight): m.weight.numel() for m in dense.modules() if isinstance(m, nn.Linear)}
    gates = sum(p.numel() for name, p in dense.named_parameters() if name.endswith("_gate_weight"))
    assert total == sum(own.values()) + gates


@pytest.mark.parametrize("kind", NOT_BY_TEXT)
def test_text_does_not_calibrate_what_does_not_continue_it(kind, saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    with pytest.raises(
        ValueError, match=f"{NOT_BY_TEXT[kind]}, so text cannot calibrate it; compress it with --calibration none"
    ):
        compress_checkpoint(saved(kind), str(tmp_path / "out"), settings(), calibration=str(text))
    assert os.listdir(tmp_path) == ["text.txt"]


@grid(kind=quick(["qwen 2.5 with images", "gemma 3 with images"], "gemma 3 with images"))
def test_text_calibrates_what_continues_it_and_leaves_the_eyes_alone(kind, saved, tokenizer, tmp_path):
    """Qwen's tower for images holds more weights here than its language model, and text never reaches it."""
    source, text = tmp_path / "source", tmp_path / "text.txt"
    shutil.copytree(saved(kind), source)
    tokenizer.save_pretrained(source)
    text.write_text(" ".join(f"w{number * 7 % 83}" for number in range(200)))
    compress_checkpoint(
        str(source), str(tmp_path / "out"), settings(), calibration=str(text), samples=4, seqlen=16, epochs=0
    )
    made = getattr(hf, config_of(source)["architectures"][0])
    plain = made.from_pretrained(source, quantization_config=settings()).state_dict()
    state = made.from_pretrained(tmp_path / "out").state_dict()
    assert state.keys() == plain.keys()
    differ = {name for name in state if name.endswith(".codebook") and not torch.equal(state[name], plain[name])}
    assert differ and all(".language_model." in name for name in differ)


def test_evaluate_says_what_a_model_is(saved, tmp_path, capsys):
    assert main(["evaluate", saved("t5"), "--data", "absent.txt"]) == 1
    error = capsys.readouterr().err
    assert "is a T5ForConditionalGeneration, but evaluate measures" in error and len(error) < 400


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["MyOwnModel"], r"names the class 'MyOwnModel', which transformers .* does not have"),
        ([], r"names no class in `architectures`.*type bart"),
        (["AutoConfig"], "names the class 'AutoConfig', which transformers"),
        (["BertModel"], "is of a bart model, but names the class BertModel, which is made from a BertConfig"),
    ],
)
def test_a_class_that_is_not_known_is_refused(architectures, message, saved, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(saved("bart"), source)
    (source / "config.json").write_text(json.dumps({**config_of(source), "architectures": architectures}))
    with pytest.raises(ValueError, match=message):
        compress_checkpoint(str(source), str(tmp_path / "out"), settings())


def test_what_is_absent_is_said_as_it_is(saved, tmp_path):
    """Not "download again": the weights may be whole, and those of another class."""
    source = tmp_path / "source"
    shutil.copytree(saved("bert body"), source)
    tensors = load_file(source / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.1\.output\.dense\.weight of BertModel") as raised:
        compress_checkpoint(str(source), str(tmp_path / "out"), settings())
    assert "download" not in str(raised.value)


def test_a_target_that_stays_dense_is_named_with_its_reason(dense_dir, tmp_path):
    for target, message in (
        ("lm_head", r"'lm_head', but it stays dense \(lm_head\): output head"),
        ("absent", "'absent', but no linear layer of LlamaForCausalLM is or ends with it"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_checkpoint(dense_dir, str(tmp_path / "out"), settings(target_modules=[target]))


def test_what_stays_dense_is_said_by_name_share_and_reason(saved, tmp_path):
    report = compress_checkpoint(
        saved("qwen 2.5 with images"), str(tmp_path / "out"), settings(exclude_modules=["o_proj"])
    )
    line = report["coverage"]
    assert "model.language_model.layers.*.self_attn.o_proj" in line and "(in exclude_modules)" in line
    assert re.search(r"model\.visual\.merger\.mlp\.0 [\d.]+ % \(", line)
    assert re.search(r"lm_head [\d.]+ % \(output head\)", line)
    report = compress_checkpoint(saved("recurrent gemma"), str(tmp_path / "gates"), settings())
    assert re.search(r"rg_lru\.input_gate_weight [\d.]+ % \(a 3-D parameter of no linear layer\)", report["coverage"])


@pytest.mark.parametrize("kind", ["compressed", "born", "dense"])
def test_get_peft_model_says_what_it_does_not_adapt(kind, dense_dir, compressed_dir, capsys):
    folder = compressed_dir if kind == "compressed" else dense_dir
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    capsys.readouterr()
    get_peft_model(model, config_for(kind, target_modules=["q_proj", "up_proj"]))
    *above, line = capsys.readouterr().err.splitlines()
    assert ("clustered without calibration text" in "".join(above)) is (kind == "born")
    total = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 52) + 96 * 32
    assert line.startswith(f"linear weights: {2 * (32 * 32 + 32 * 52):,} of {total:,} adapted (")
    assert "not adapted: model.layers.*.mlp.gate_proj" in line and "(not in target_modules)" in line
    assert "lm_head" in line and "(output head)" in line


def test_a_weight_that_is_shared_counts_once():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2))
    model[1].weight = model[0].weight
    assert coverage_line(model, {"2"}) == (
        "linear weights: 12 of 36 clustered (33.3 %); dense: 0 66.7 % (shares its weight with another module)"
    )
    assert coverage_line(nn.Sequential(nn.Linear(2, 3)), {"0"}) == "linear weights: 6 of 6 clustered (100.0 %)"


@pytest.mark.parametrize(
    "first", ["from cluscomp_peft import ClusCompQuantizationConfig", "import cluscomp_peft.hf.reading"]
)
def test_whatever_is_imported_first(first):
    """transformers imports the quantizer before it has any model: nothing beside it may need one to be imported."""
    subprocess.run([warm.python("torch"), "-W", "error::UserWarning", "-c", first], check=True, capture_output=True)
