"""Compression through its public face: what is written, resuming, locks, sizes, and input that cannot be met."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RwkvConfig,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

from cluscomp_peft import ClusCompQuantizationConfig, ClusteredLinear
from cluscomp_peft import dense as dense_layers
from cluscomp_peft.cli import main
from cluscomp_peft.codes import unpack
from cluscomp_peft.compress import checkpoint as checkpoint_module
from cluscomp_peft.compress.calibration import inputs as inputs_module
from cluscomp_peft.compress.calibration.activations import Stream
from cluscomp_peft.compress.calibration.blocks import BlockModel
from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.matrix import block as block_module
from cluscomp_peft.compress.stream import folder as target_folder
from cluscomp_peft.compress.stream import shards as shard
from cluscomp_peft.compress.stream.journal import Journal
from cluscomp_peft.compress.stream.pipeline import Calibration
from cluscomp_peft.compress.stream.source import DenseCheckpoint
from cluscomp_peft.hf.quantizer import model_fingerprint
from cluscomp_peft.layout import expand
from cluscomp_peft.upstream.transformers import renaming_of
from tests.conftest import WORDS, logits_of, tiny_llama
from tests.grids import grid, quick

COMMON = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=1)
NARROW = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama, tied": LlamaConfig(**COMMON, **NARROW, tie_word_embeddings=True),
    "gpt2": GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2": Gemma2Config(**COMMON, **NARROW, sliding_window=8),
    "qwen3": Qwen3Config(**COMMON, **NARROW, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "bloom": BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4),
    "gpt-neox": GPTNeoXConfig(  # whose head checkpoints call embed_out
        **COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
}
OTHERS = {  # blocks that return tuples, more of them than a batch has dimensions; projections around them; one block
    "gpt-neo": GPTNeoConfig(
        **COMMON,
        hidden_size=32,
        num_layers=5,
        num_heads=4,
        attention_types=[[["global", "local", "global", "local", "global"], 1]],
        window_size=8,
        max_position_embeddings=64,
    ),
    "opt": OPTConfig(
        **COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    ),
    # Blocks that return their output with attention weights, or with a state and attention weights.
    "bamba": BambaConfig(
        **COMMON,
        **{**NARROW, "num_hidden_layers": 3},
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        attn_layer_indices=[1],
        mamba_chunk_size=8,
    ),
    "rwkv": RwkvConfig(
        **COMMON,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        attention_hidden_size=32,
        context_length=64,
    ),
    "one block": LlamaConfig(**COMMON, **{**NARROW, "num_hidden_layers": 1}),
}
LENGTH, SAMPLES = 16, 9
QUICK = dict(samples=SAMPLES, seqlen=LENGTH, epochs=1)
TIMES = ("seconds", "stages", "peak_memory")
TIMED = {"cluscomp_report.json", "report.html", "README.md"}


def quick_config(**changes) -> ClusCompQuantizationConfig:
    return ClusCompQuantizationConfig(**{"bits": 5.0, "quality": "fast", **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    path.write_text(" ".join(WORDS[3 + draw.randrange(93)] for _ in range(LENGTH * SAMPLES + 5)))
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    """Folder of a random model of a family; made once each."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp("family"))
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config({**FAMILIES, **OTHERS}[family])
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data.mul_(5)
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def contents(folder) -> dict[str, bytes]:
    """Files of a checkpoint, without those that name times."""
    names = sorted(set(os.listdir(folder)) - TIMED)
    return {name: open(os.path.join(folder, name), "rb").read() for name in names}


def report_of(folder) -> dict:
    with open(os.path.join(folder, "cluscomp_report.json"), encoding="utf-8") as file:
        return json.load(file)


def by_hand(source: str, target: str) -> torch.nn.Module:
    """The dense model with weights that are put together from what the compressed checkpoint stores."""
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = dict(model.named_modules())
    tensors = load_file(os.path.join(target, "model.safetensors"))
    for key in [key for key in tensors if key.endswith(".codes")]:
        base = key.removesuffix(".codes")
        name = next(name for name in layers if name and (name.endswith(base) or base.endswith(name)))
        weight = layers[name].weight
        codebook = tensors[f"{base}.codebook"][0].float()
        conv1d = type(layers[name]).__name__ == "Conv1D"
        out_features = weight.shape[1] if conv1d else weight.shape[0]
        bits = max(1, math.ceil(math.log2(len(codebook))))
        groups = -(-out_features // codebook.shape[1])
        codes = unpack(tensors[key], bits, groups).long()
        decoded = codebook[codes].flatten(1)[:, :out_features]  # [in, out]
        if f"{base}.scale_in" in tensors:
            decoded = decoded * tensors[f"{base}.scale_in"].float()[:, None]
        if f"{base}.scale_out" in tensors:
            decoded = decoded * tensors[f"{base}.scale_out"].float()
        weight.data.copy_(decoded if conv1d else decoded.T)
    return model


def held_out_loss(model, tokenizer, text: str) -> float:
    windows = token_windows(read_documents(text), tokenizer, LENGTH, max_tokens=SAMPLES * LENGTH)
    given = Calibration(torch.cat([window for window in windows if window.shape[1] == LENGTH]))
    rows = torch.cat(given.batches[len(given.fitted) :])
    logits = logits_of(model, rows)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(logits, rows[:, 1:].flatten()))


# -- text to compress by


def bytewise_tokenizer() -> PreTrainedTokenizerFast:
    """Knows every text: a token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *letters])}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>", unk_token="<eos>")


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> str:
    """A dense model that can read the built-in text."""
    folder = str(tmp_path_factory.mktemp("bytewise"))
    tiny_llama(vocab_size=257).save_pretrained(folder)
    bytewise_tokenizer().save_pretrained(folder)
    return folder


def test_the_built_in_text_is_what_a_model_is_compressed_by(bytewise, tmp_path, capsys):
    few = ["--samples", "6", "--epochs", "1"]
    runs = {"default": few, "named": ["--calibration", "builtin", *few], "none": ["--calibration", "none"]}
    for name, flags in runs.items():
        assert main(["compress", bytewise, str(tmp_path / name), "--bits", "5", *flags]) == 0
        assert ("loss on held-out calibration text" in capsys.readouterr().out) is (name != "none")
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in ("default", "named", "none")}
    assert all(torch.equal(value, files["named"][key]) for key, value in files["default"].items())
    assert any(not torch.equal(value, files["none"].get(key, value.new())) for key, value in files["default"].items())
    summary = report_of(str(tmp_path / "default"))["summary"]
    assert (summary["calibration"], summary["sequences"], summary["tokens"]) == ("builtin", 6, 6 * 64)
    assert report_of(str(tmp_path / "none"))["summary"]["calibration"] is None


def test_a_tokenizer_that_does_not_know_the_built_in_text(dense, tmp_path, capsys):
    """Statistics of unknown tokens would be worse than none."""
    source, flags = dense("gpt2"), ["--bits", "5"]
    assert main(["compress", source, str(tmp_path / "auto"), *flags]) == 0
    said = capsys.readouterr().out
    assert f"without calibration text, which loses more: the tokenizer of {source} does not know 100 %" in said
    assert f"not measured. This does: cluscomp evaluate {tmp_path / 'auto'} --teacher {source} --data TEXT" in said
    assert main(["compress", source, str(tmp_path / "none"), *flags, "--calibration", "none"]) == 0
    assert "which loses more" not in capsys.readouterr().out
    name = "model.safetensors"
    assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "none" / name).read_bytes()
    refused(r"does not know 100 % of the text; compress it with --calibration none", tmp_path, source,
            str(tmp_path / "out"), quick_config(), calibration="builtin")  # fmt: skip


def test_blocks_that_text_cannot_go_through_are_clustered_without(bytewise, tmp_path, monkeypatch):
    monkeypatch.setattr("cluscomp_peft.compress.calibration.blocks.find_blocks", lambda model: None)
    summary = compress_checkpoint(bytewise, str(tmp_path / "out"), quick_config())
    assert "no list of blocks" in summary["not_calibrated"] and summary["calibration"] is None


def test_workers_and_the_built_in_text(bytewise, dense, tmp_path):
    refused("workers=2 and calibration do not go together", tmp_path, bytewise, str(tmp_path / "out"), quick_config(),
            workers=2)  # fmt: skip


# -- what is written


@grid(family=quick(list(FAMILIES), "llama, tied", "gemma2", "qwen3"))
def test_a_calibrated_checkpoint_is_what_its_codes_say(family, dense, text, tokenizer, tokens, tmp_path):
    source, target = dense(family), str(tmp_path / "out")
    summary = compress_checkpoint(source, target, quick_config(scales=True), calibration=text, **QUICK)
    model = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(logits_of(model, tokens), logits_of(by_hand(source, target), tokens))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ClusteredLinear)}
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert 4 < 8 * sum(layer.stored_bytes() for layer in layers.values()) / weights <= 5
    assert summary["true_bits"] == 8 * sum(layer.stored_bytes() for layer in layers.values()) / weights

    config = AutoConfig.from_pretrained(target).quantization_config
    config = config if isinstance(config, dict) else config.to_dict()
    assert config["fingerprint"] == model_fingerprint(model)
    names = [name for name, _ in model.named_modules()]
    assert expand(config["layout"], names, model.base_model_prefix) == {n: layer.spec for n, layer in layers.items()}

    report = report_of(target)
    assert report["matrices"].keys() == layers.keys()
    assert all(block["error_after"] <= block["error_before"] for block in report["blocks"].values())
    # Measured block by block while compressing; here by the models as a whole.
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert report["losses"]["dense"] == pytest.approx(held_out_loss(plain, tokenizer, text), rel=1e-5)
    assert report["losses"]["compressed"] == pytest.approx(held_out_loss(model, tokenizer, text), rel=2e-3)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert not {"journal.json", "lock", "dense.0", "compressed.1"} & set(os.listdir(target))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_dense_blocks_one_by_one_are_the_dense_model(family, dense, tokens):
    model = AutoModelForCausalLM.from_pretrained(dense(family))
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense(family)))
    source = DenseCheckpoint(dense(family), empty.base_model_prefix, renaming_of(empty))
    blocks = BlockModel(empty, source, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        hidden = blocks.stem(tokens)
        for index in range(len(blocks)):
            with blocks.loaded(index):
                hidden = blocks.run(index, hidden)
            assert {parameter.device.type for parameter in blocks.blocks[index].parameters()} == {"meta"}
        # Not to the last bit on every processor: MKL's products depend on how a weight lies in memory.
        torch.testing.assert_close(blocks.logits(tokens, hidden), logits_of(model, tokens), rtol=1e-5, atol=1e-5)


def test_blocks_that_stay_dense_hand_on_what_they_are_given(dense, text, tokenizer, tmp_path):
    """Only every second block is clustered; what it reads must have passed the one before."""
    source = str(tmp_path / "dense")
    tiny_llama(num_hidden_layers=4).save_pretrained(source)
    tokenizer.save_pretrained(source)
    names = [f"layers.{index}.mlp.{name}_proj" for index in (1, 3) for name in ("up", "down")]
    target = str(tmp_path / "out")
    config = quick_config(bits=6, target_modules=names)
    compress_checkpoint(source, target, config, calibration=text, **QUICK)
    model = AutoModelForCausalLM.from_pretrained(target)
    report = report_of(target)
    assert len(report["matrices"]) == 4 and list(report["blocks"]) == ["model.layers.1", "model.layers.3"]
    assert report["losses"]["compressed"] == pytest.approx(held_out_loss(model, tokenizer, text), rel=2e-3)


def test_no_loss_is_claimed_where_none_was_measured(dense, text, tmp_path):
    source = dense("llama, tied")
    # A single sequence is fitted to; nothing is held out.
    summary = compress_checkpoint(
        source, str(tmp_path / "one"), quick_config(), calibration=text, samples=1, seqlen=LENGTH, epochs=1
    )
    assert summary["losses"] == {}
    with open(tmp_path / "one" / "README.md", encoding="utf-8") as file:
        assert "no task was measured" in file.read()


def test_what_is_held_out_is_fitted_to_by_nobody(dense, text, tokenizer, tmp_path):
    """The codes do not change when only the held-out sequences do."""
    words = open(text, encoding="utf-8").read().split()
    other = tmp_path / "other.txt"
    other.write_text(" ".join(words[: LENGTH * (SAMPLES - 1)] + words[: LENGTH + 5]))
    made = []
    for path in (text, str(other)):
        target = str(tmp_path / f"out{len(made)}")
        config = quick_config(bits=None, group_size=2, num_clusters=16)
        compress_checkpoint(dense("qwen3"), target, config, calibration=path, samples=SAMPLES, seqlen=LENGTH, epochs=0)
        made.append((contents(target)["model.safetensors"], report_of(target)["losses"]))
    assert made[0][0] == made[1][0]
    assert made[0][1] != made[1][1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> tuple[str, str, torch.Tensor]:
    """A model that has learned what the word before the last one says, for which it needs its blocks: folder,
    calibration text, and other text as tokens."""
    folder = tmp_path_factory.mktemp("trained")
    draw = random.Random(1)
    followers = [[draw.randrange(3, len(WORDS)) for _ in range(3)] for _ in WORDS]

    def sentence(length: int) -> list[int]:
        words = [draw.randrange(3, len(WORDS)) for _ in range(2)]
        while len(words) < length:
            words.append(draw.choice(followers[words[-2]]))
        return words

    torch.manual_seed(0)
    # In fp64: hundreds of steps in fp32 end in another model on every kind of processor.
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON, **NARROW)).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        rows = torch.tensor([sentence(24) for _ in range(16)])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().float().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(" ".join(WORDS[word] for word in sentence(16 * 96)))
    return str(folder / "dense"), str(folder / "text.txt"), torch.tensor([sentence(24) for _ in range(64)])


@grid(
    settings=quick(
        {"one setting": dict(group_size=2, num_clusters=16), "shares of a budget": dict(bits=3)}, "shares of a budget"
    )
)
def test_calibration_brings_the_loss_nearer_to_dense(trained, tmp_path, settings):
    source, text, rows = trained

    def loss(folder: str) -> float:
        logits = logits_of(AutoModelForCausalLM.from_pretrained(folder), rows)[:, :-1].flatten(0, 1)
        return float(F.cross_entropy(logits, rows[:, 1:].flatten()))

    losses = {}
    for kind, flags in (("plain", {}), ("calibrated", dict(calibration=text, samples=96, seqlen=16, epochs=4))):
        target = str(tmp_path / kind)
        summary = compress_checkpoint(source, target, ClusCompQuantizationConfig(**settings), **flags)
        assert summary["true_bits"] <= settings.get("bits", 8)
        losses[kind] = loss(target)
    assert losses["calibrated"] - loss(source) < 0.4 * (losses["plain"] - loss(source))


# -- resuming


@pytest.fixture
def killed(monkeypatch):
    """A run that ends by `Killed` leaves its folder as a killed process would."""
    monkeypatch.setattr(Journal, "discard", Journal.close)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dense, text) -> str:
    target = str(tmp_path_factory.mktemp("undisturbed") / "out")
    compress_checkpoint(dense("llama, tied"), target, quick_config(), calibration=text, **QUICK)
    return target


def interrupted(monkeypatch, owner, name: str, call: int, after: bool) -> None:
    """From now on `name` raises at its n-th call, before or after its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapped)


@grid(
    at=quick(
        {
            "specs": (Journal, "commit", 1, True),
            "streams": (Journal, "commit", 2, True),
            "streams of the first block": (Journal, "commit", 3, False),
            "first block": (Journal, "commit", 3, True),
            "second block": (Journal, "commit", 5, False),
            "last shard": (Journal, "commit", 6, False),
            "tensors": (shard, "save_tensors", 2, True),
            "between the two streams of a block": (Stream, "write", 5, False),
            "all shards": (checkpoint_module, "_finish", 1, False),
            "before the move": (checkpoint_module, "move", 1, False),
            "some of the texts": (checkpoint_module, "write_text", 2, True),
            "before tidying": (target_folder, "_tidy", 1, False),
        },
        "streams of the first block",
        "tensors",
        "between the two streams of a block",
        "before the move",
        "before tidying",
    )
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    at, dense, text, undisturbed, killed, monkeypatch, tmp_path
):
    owner, name, call, after = at
    target = str(tmp_path / "out")
    arguments = (dense("llama, tied"), target, quick_config())
    with monkeypatch.context() as patch:
        interrupted(patch, owner, name, call, after)
        with pytest.raises(Killed):
            compress_checkpoint(*arguments, calibration=text, **QUICK)
    if name == "_tidy":  # it was finished but for the journal in it
        with pytest.raises(ValueError, match="exists already"):
            compress_checkpoint(*arguments, calibration=text, **QUICK)
    else:
        assert not os.path.exists(target)
        compress_checkpoint(*arguments, calibration=text, **QUICK)
    assert contents(target) == contents(undisturbed)
    before, after_ = report_of(undisturbed), report_of(target)
    for report in (before, after_):
        report["summary"] = {k: v for k, v in report["summary"].items() if k not in TIMES}
        for entry in report["blocks"].values():
            del entry["seconds"]
    assert after_ == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_run_killed_while_a_checkpoint_is_replaced(call, dense, undisturbed, killed, monkeypatch, tmp_path):
    target = str(tmp_path / "out")
    shutil.copytree(undisturbed, target)
    with monkeypatch.context() as patch:
        moves = []
        rename = os.rename

        def moving(*args):
            moves.append(1)
            rename(*args)
            if len(moves) == call:
                raise Killed

        patch.setattr(checkpoint_module.os, "rename", moving)
        with pytest.raises(Killed):
            compress_checkpoint(dense("gpt2"), target, quick_config(), overwrite=True)
    compress_checkpoint(dense("gpt2"), target, quick_config(), overwrite=True)
    assert "transformer.h.0.attn.c_attn" in report_of(target)["matrices"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_leftovers_without_a_journal_are_not_ours(overwrite, dense, undisturbed, tmp_path):
    """What an older version left, a journal that someone removed, or a folder of the user's: nothing of it may reach
    the checkpoint, and nothing of it is removed."""
    work = tmp_path / ".out.partial"
    shutil.copytree(undisturbed, work)
    (work / "stale.safetensors").write_bytes(b"old")
    before = contents(work)
    with pytest.raises(ValueError, match=r"\.out\.partial.* holds files that are no unfinished run .*move or remove"):
        compress_checkpoint(dense("gpt2"), str(tmp_path / "out"), quick_config(), overwrite=overwrite)
    assert contents(work) == before and os.listdir(tmp_path) == [".out.partial"]


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from cluscomp_peft.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_twenty_kills(dense, text, tokenizer, tmp_path):
    source = str(tmp_path / "dense")
    tiny_llama(num_hidden_layers=6, hidden_size=64, intermediate_size=100).save_pretrained(source)
    tokenizer.save_pretrained(source)
    flags = ["--bits", "5", "--calibration", text, "--samples", str(SAMPLES), "--seqlen", str(LENGTH)]
    assert main(["compress", source, str(tmp_path / "whole"), *flags]) == 0
    target = str(tmp_path / "out")
    command = [sys.executable, "-c", SCRIPT, "compress", source, target, *flags]
    draw, kills = random.Random(0), 0
    for _ in range(200):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # Imports take seconds; what counts is the time from the moment at which the folder is there.
        while process.poll() is None and not os.path.exists(tmp_path / ".out.partial" / "lock"):
            time.sleep(0.01)
        if kills < 20:
            time.sleep(draw.uniform(0, 3))
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        if status == 0:
            break
        kills += 1
        assert status == -signal.SIGKILL and not os.path.exists(target)
    assert kills >= 3
    assert contents(target) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["dense", "out", "whole"]


# -- one run at a time


def test_a_second_run_is_refused(dense, tmp_path):
    work = str(tmp_path / ".out.partial")
    journal = Journal(work, {"bits": 1})
    journal.commit(done={"x": {}})
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"another run is at work in .*\.out\.partial.*; wait for it"):
            compress_checkpoint(dense("gpt2"), str(tmp_path / "out"), quick_config(), overwrite=overwrite)
    assert json.load(open(os.path.join(work, "journal.json")))["content"] == {"done": {"x": {}}}
    journal.close()


def test_an_unfinished_run_with_other_settings_is_refused(dense, text, killed, monkeypatch, tmp_path):
    target = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupted(patch, Journal, "commit", 3, True)
        with pytest.raises(Killed):
            compress_checkpoint(dense("gpt2"), target, quick_config(), calibration=text, **QUICK)
    for changes, word in (({"epochs": 3}, "epochs"), ({"samples": 8}, "calibration, sequences")):
        with pytest.raises(ValueError, match=rf"unfinished run with another .*{word}.*--overwrite"):
            compress_checkpoint(dense("gpt2"), target, quick_config(), calibration=text, **{**QUICK, **changes})
    with pytest.raises(ValueError, match="unfinished run with another config; finish it"):
        compress_checkpoint(dense("gpt2"), target, quick_config(seed=1), calibration=text, **QUICK)
    compress_checkpoint(dense("gpt2"), target, quick_config(bits=6), overwrite=True)
    assert 5 < report_of(target)["summary"]["true_bits"] <= 6
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("anew", [False, True])
def test_a_damaged_journal_is_named(anew, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "journal.json").write_text("{")
    with pytest.raises(ValueError, match=r"journal\.json is damaged.*remove it yourself"):
        Journal(str(work), {}, anew=anew)
    assert os.listdir(work) == ["journal.json"]  # it does not prove that the folder is ours


def test_a_lock_on_a_folder_that_was_moved_away_is_none(tmp_path, monkeypatch):
    import fcntl

    work = tmp_path / "work"
    take = fcntl.flock

    def late(*args):  # the run that held the lock ends between the opening of the file and the lock
        shutil.rmtree(work)
        take(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another run"):
        Journal(str(work), {})


def test_the_folder_that_holds_the_dense_model_is_never_replaced(dense, tmp_path):
    outer = tmp_path / "outer"
    shutil.copytree(dense("gpt2"), outer)
    shutil.copytree(dense("gpt2"), outer / "dense")
    with pytest.raises(ValueError, match="or holds it"):
        compress_checkpoint(str(outer / "dense"), str(outer), quick_config(), overwrite=True)


# -- input that cannot be met


def refused(message: str, folder, *arguments, error=ValueError, **changes) -> None:
    """The call raises, and nothing is left in the folder but shards that were finished before."""
    before = sorted(os.listdir(folder))
    with pytest.raises(error, match=message):
        compress_checkpoint(*arguments, **changes)
    work = os.path.join(folder, ".out.partial")
    if os.path.isdir(work):
        assert json.load(open(os.path.join(work, "journal.json")))["content"]["done"]
        shutil.rmtree(work)
    assert sorted(os.listdir(folder)) == before


def test_calibration_that_cannot_be_used(dense, text, tokenizer, tmp_path):
    source, target = dense("llama, tied"), str(tmp_path / "results" / "out")
    os.mkdir(tmp_path / "results")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    results = tmp_path / "results"
    refused("has 4 tokens, fewer than one calibration sequence of 16; give more text",
            results, source, target, quick_config(), calibration=str(short), seqlen=LENGTH)  # fmt: skip
    refused("--seqlen 65 is more than the 64 positions", results, source, target, quick_config(), calibration=text,
            seqlen=65)  # fmt: skip
    refused("at least one sample", results, source, target, quick_config(), calibration=text, samples=0)
    small = str(tmp_path / "small")
    tiny_llama(vocab_size=40).save_pretrained(small)
    tokenizer.save_pretrained(small)
    refused("gives token 9., but the model has 40 embeddings", results, small, target, quick_config(),
            calibration=text, **QUICK)  # fmt: skip
    bare = str(tmp_path / "bare")
    tiny_llama().save_pretrained(bare)
    refused("no tokenizer, so calibration text cannot be read", results, bare, target, quick_config(),
            calibration=text, **QUICK)  # fmt: skip


def with_tensors(source: str, folder, change) -> str:
    """A copy of a dense model with changed tensors."""
    shutil.copytree(source, folder)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("bits", [5, None])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_activations_that_are_not_finite(key, bits, dense, text, tmp_path):
    def spoil(tensors):
        tensors[key][..., 1] = math.nan

    source = with_tensors(dense("llama, tied"), tmp_path / "dense", spoil)
    config = quick_config() if bits else quick_config(bits=None, group_size=2, num_clusters=16)
    refused("(NaN or infinite).*--dtype float32", tmp_path, source, str(tmp_path / "out"), config,
            calibration=text, **QUICK)  # fmt: skip


def test_activations_beyond_half_precision(dense, text, tmp_path, monkeypatch):
    """Computed in fp16, as on a GPU, large activations overflow; in fp32 they do not."""

    def raise_norms(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"].mul_(3e4)

    source = with_tensors(dense("llama, tied"), tmp_path / "dense", raise_norms)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_dtype_on", lambda device, stored: torch.float16)
        refused("NaN or infinite.*--dtype float32", tmp_path, source, str(tmp_path / "out"), quick_config(),
                calibration=text, **QUICK)  # fmt: skip
    compress_checkpoint(source, str(tmp_path / "out"), quick_config(), calibration=text, **QUICK)


def test_a_model_without_a_list_of_blocks(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr("cluscomp_peft.compress.calibration.blocks.find_blocks", lambda model: None)
    refused("LlamaForCausalLM has no list of blocks.*compress it with --calibration none", tmp_path,
            dense("llama, tied"), str(tmp_path / "out"), quick_config(), calibration=text, **QUICK)  # fmt: skip


@pytest.mark.parametrize("calibrated", [False, True])
def test_linear_layers_of_a_class_of_their_own(calibrated, text, tokenizer, tokens, tmp_path, monkeypatch):
    source = str(tmp_path / "dense")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(FalconConfig(**COMMON, **shape)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    flags = dict(calibration=text, **QUICK) if calibrated else {}
    with monkeypatch.context() as patch:
        patch.setattr(dense_layers, "LINEAR_CLASSES", ())
        refused("blocks of FalconForCausalLM are made of FalconLinear", tmp_path, source, str(tmp_path / "out"),
                quick_config(), **flags)  # fmt: skip
    compress_checkpoint(source, str(tmp_path / "out"), quick_config(), **flags)
    dense, model = (AutoModelForCausalLM.from_pretrained(path) for path in (source, str(tmp_path / "out")))
    layers = [module for module in model.modules() if isinstance(module, ClusteredLinear)]
    assert len(layers) == len([module for module in dense.modules() if isinstance(module, FalconLinear)]) == 8
    assert torch.allclose(logits_of(model, tokens), logits_of(model.dequantize(), tokens), atol=1e-5)


def test_a_head_under_another_name_is_read_and_written_as_it_was(dense, tmp_path):
    source = DenseCheckpoint(dense("gpt-neox"), "gpt_neox")
    assert source.find("lm_head.weight") is None
    assert "embed_out.weight" in source.shapes
    compress_checkpoint(dense("gpt-neox"), str(tmp_path / "out"), quick_config())
    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_layers_that_are_not_there(dense, tmp_path):
    config = quick_config(target_modules=["absent"])
    refused("absent", tmp_path, dense("gpt2"), str(tmp_path / "out"), config)


def test_a_layer_that_shares_its_weight(dense, text, tmp_path):
    """The output head that is the embedding cannot be clustered, and says so; nothing else is touched by tying."""
    config = quick_config(target_modules=["lm_head"])
    refused("lm_head", tmp_path, dense("llama, tied"), str(tmp_path / "out"), config, calibration=text, **QUICK)


@grid(damage=["missing", "cut off", "lacks a tensor", "index"], calibrated=[False, True])
def test_damaged_weights(damage, calibrated, dense, text, tokenizer, tmp_path):
    source = tmp_path / "dense"
    tiny_llama().save_pretrained(source, max_shard_size="20KB")
    tokenizer.save_pretrained(source)
    shard = sorted(source.glob("model-*.safetensors"))[2]
    message = rf"{shard.name}"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "index":
        (source / "model.safetensors.index.json").write_text("[]")
        message = r"index\.json is damaged"
    else:
        tensors = load_file(shard)
        name = next(name for name in tensors if "proj" in name)
        del tensors[name]
        save_file(tensors, shard, metadata={"format": "pt"})
        message = f"lacks {name}"
    flags = dict(calibration=text, **QUICK) if calibrated else {}
    refused(message, tmp_path, str(source), str(tmp_path / "out"), quick_config(), **flags)


def test_weights_under_two_names(dense, tmp_path):
    """Hubs hold some models twice; as transformers does, the usual name is read and the other left alone."""
    source = tmp_path / "dense"
    shutil.copytree(dense("gpt2"), source)
    save_file({"other": torch.zeros(2)}, source / "consolidated.safetensors")
    compress_checkpoint(str(source), str(tmp_path / "out"), quick_config())
    assert "other" not in load_file(tmp_path / "out" / "model.safetensors")


@grid(place=quick(["shard", "stream", "journal", "report"], "shard", "report"))
def test_a_full_disk_is_said_and_the_run_goes_on_later(place, dense, text, undisturbed, monkeypatch, tmp_path, capsys):
    target = str(tmp_path / "out")
    flags = ["--bits", "5", "--quality", "fast", "--calibration", text]
    flags += ["--samples", str(SAMPLES), "--seqlen", str(LENGTH), "--epochs", "1"]
    owner, name, call = {
        "shard": (shard, "save_tensors", 2),
        "stream": (Stream, "write", 5),
        "journal": (Journal, "commit", 4),
        "report": (checkpoint_module, "write_text", 2),
    }[place]
    with monkeypatch.context() as patch:
        original, calls = getattr(owner, name), []

        def full(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        patch.setattr(owner, name, full)
        assert main(["compress", dense("llama, tied"), target, *flags]) == 1
    line = capsys.readouterr().err
    assert f"{tmp_path} is full; make room there and run the same command again" in line and "Traceback" not in line
    assert os.listdir(tmp_path) == [".out.partial"]
    assert main(["compress", dense("llama, tied"), target, *flags]) == 0
    assert contents(target) == contents(undisturbed)


@pytest.mark.parametrize("size", ["40k", "120k"])
def test_a_disk_that_is_really_full(size, dense, text, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        flags = ["--bits", "5", "--calibration", text, "--samples", str(SAMPLES), "--seqlen", "16", "--epochs", "1"]
        assert main(["compress", dense("llama, tied"), str(disk / "out"), *flags]) == 1
        assert f"{disk} is full" in capsys.readouterr().err
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- size


@pytest.fixture(scope="module")
def few_megabytes(tmp_path_factory, tokenizer) -> str:
    folder = str(tmp_path_factory.mktemp("few"))
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=2048)
    tiny_llama(torch.bfloat16, **shape, max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@grid(size=quick([2_500_000, 2_900_000, 3_600_000], 2_900_000))
def test_size_holds_for_the_whole_folder_and_is_used(size, few_megabytes, tmp_path):
    target = str(tmp_path / "out")
    summary = compress_checkpoint(few_megabytes, target, quick_config(bits=None), size=size)
    total = sum(entry.stat().st_size for entry in os.scandir(target))
    assert 0.97 * size <= total <= size
    assert summary["size"] == size and summary["bits"] is None


@pytest.mark.slow
def test_size_with_calibration(few_megabytes, text, tmp_path):
    target, size = str(tmp_path / "out"), 2_700_000
    compress_checkpoint(few_megabytes, target, quick_config(bits=None), size=size, calibration=text, **QUICK)
    assert 0.97 * size <= sum(entry.stat().st_size for entry in os.scandir(target)) <= size


@pytest.mark.parametrize("size", [1000, 1_300_000])
def test_a_size_that_is_out_of_reach(size, few_megabytes, tmp_path):
    refused(
        f"a size of {size} bytes is out of reach: 2.* bytes are taken",
        tmp_path,
        few_megabytes,
        str(tmp_path / "out"),
        quick_config(bits=None),
        size=size,
    )


# -- activations and checkpoints on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_gives_back_what_was_written(dtype, tmp_path):
    parts = [torch.randn(3, 5, 4).to(dtype), torch.randn(3, 5, 4).to(dtype), torch.randn(1, 5, 4).to(dtype)]
    stream = Stream(str(tmp_path / "dense.0"), [3, 3, 1], 5, 4, dtype)
    for values in (parts, [-part for part in parts]):  # the second time it is replaced
        stream.write(iter(values))
        assert len(stream) == 3 and all(torch.equal(a, b) for a, b in zip(stream, values, strict=True))
        assert torch.equal(stream[-1], values[-1]) and torch.equal(stream[-2], values[-2])
    stream[0].zero_()  # a copy
    assert torch.equal(stream[0], -parts[0])
    with open(stream.path, "r+b") as file:
        file.truncate(10)
    with pytest.raises(OSError, match="cut off"):
        stream[0]


def test_a_dense_checkpoint_is_read_tensor_by_tensor(dense):
    folder = dense("gpt2")
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    source = DenseCheckpoint(folder, "transformer")
    assert source.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert source.key("h.0.ln_1.weight") == source.key("transformer.h.0.ln_1.weight") != None  # noqa: E711
    assert source.key("absent") is None
    for key, tensor in tensors.items():
        assert torch.equal(source.read(key), tensor) and source.num_bytes(key) == tensor.nbytes
        assert source.read(key, torch.bfloat16).dtype == torch.bfloat16


def test_feedback_needs_no_reconstruction_and_the_other_way_round(dense, text, tmp_path):
    made = []
    for feedback, epochs in ((True, 0), (False, 2), (False, 0)):
        target = str(tmp_path / f"out{len(made)}")
        compress_checkpoint(
            dense("gpt2"), target, quick_config(), calibration=text, samples=SAMPLES, seqlen=LENGTH,
            feedback=feedback, epochs=epochs,
        )  # fmt: skip
        blocks = report_of(target)["blocks"].values()
        assert all((block["epochs"] > 0) == (epochs > 0) for block in blocks)
        made.append(contents(target)["model.safetensors"])
    assert len(set(made)) == 3


def test_layers_of_a_block_read_their_input_once(dense, text, monkeypatch, tmp_path):
    """Layers that are given the same tensor share its moments."""
    seen = []
    observe = block_module._observe
    monkeypatch.setattr(block_module, "_observe", lambda *args: (seen.append(args[2]), observe(*args))[1])
    compress_checkpoint(dense("qwen3"), str(tmp_path / "out"), quick_config(), calibration=text, **QUICK)
    ends = [[name.rpartition(".")[2] for name in names] for names in seen[:4]]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_inputs_of_the_dense_block_are_kept_or_computed_again_to_the_same_end(dense, text, monkeypatch, tmp_path):
    fingerprints = []
    for room in (inputs_module.KEPT_BYTES, 20_000, 0):
        monkeypatch.setattr(inputs_module, "KEPT_BYTES", room)
        target = str(tmp_path / f"out{room}")
        compress_checkpoint(dense("qwen3"), target, quick_config(), calibration=text, **QUICK)
        fingerprints.append(AutoConfig.from_pretrained(target).quantization_config["fingerprint"])
    assert len(set(fingerprints)) == 1
