"""`cluscomp export --to gguf`: read back by transformers and, where it is installed, computed by llama.cpp itself."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cluscomp_peft.cli import main
from tests.conftest import config_for, logits_of, train_briefly
from tests.grids import grid, quick

gguf = pytest.importorskip("gguf")
gguf_file = pytest.importorskip("cluscomp_peft.export.gguf.file")

TEXT = [
    "The quick brown fox, it's said, doesn't jump over 1234567 lazy dogs.",
    "def f(x):\n\treturn x ** 2  # ünïcode, 日本語 and 🙂\n\n\n    end",
    "  leading and   inner spaces, TABS\t\tand UPPER'S  ",
] * 20
SIZE = 384
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]


def byte_level(split: str = "gpt-2") -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = SPLITS[split](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=SIZE - 8, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def with_byte_tokens() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces become ▁, one is put before the text, unknown letters become bytes, <s> goes first."""
    names = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=110, limit_alphabet=50))
    content = json.loads(learned.to_str())["model"]
    tokens = names + sorted(content["vocab"], key=content["vocab"].get)
    bpe = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in content["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    bpe.normalizer = learned.normalizer
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SIZES = dict(
    vocab_size=SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
ROPE3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "Llama with frequencies divided": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE3)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),  # the only size that transformers reads
}


def save(folder, name: str = "Llama", tokenizer=None) -> str:
    torch.manual_seed(0)
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
        elif key.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the folders of a dense model and of the same compressed, by name."""
    folders: dict[str, tuple[str, str]] = {}

    def make(name: str) -> tuple[str, str]:
        if name not in folders:
            dense = save(tmp_path_factory.mktemp("dense"), name)
            target = str(tmp_path_factory.mktemp("made") / "out")
            assert main(["compress", dense, target, "--group-size", "2", "--num-clusters", "32"]) == 0
            folders[name] = dense, target
        return folders[name]

    return make


def export(source, target, *arguments: str) -> int:
    return main(["export", str(source), str(target), "--to", "gguf", *arguments])


def read_back(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randint(4, SIZE - 8, (2, 20), generator=torch.Generator().manual_seed(1))


@grid(name=quick(["Llama", "tied Llama", "Mistral", "Qwen2", "Qwen3"], "tied Llama", "Qwen2"))
def test_transformers_reads_back_the_decoded_weights(made, inputs, tmp_path, name):
    _, folder = made(name)
    out = tmp_path / "model.gguf"
    assert export(folder, out, "--type", "F32") == 0
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    found = read_back(out)
    weights = found.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.state_dict().items())
    assert torch.equal(logits_of(found, inputs), logits_of(expected, inputs))
    if name == "Mistral":
        assert gguf.GGUFReader(out).get_field("llama.context_length").contents() == 64
    assert os.listdir(tmp_path) == ["model.gguf"]


@grid(name=quick(["Llama", "tied Llama", "Qwen2"], "Llama"))
def test_clustered_embeddings_are_decoded_too(made, inputs, tmp_path, name):
    dense, _ = made(name)
    folder, out = tmp_path / "made", tmp_path / "model.gguf"
    flags = ["--bits", "6", "--embeddings", "6", "--calibration", "none"]
    assert main(["compress", dense, str(folder), *flags]) == 0
    assert export(folder, out, "--type", "F32") == 0
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    found = read_back(out)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items())
    assert torch.equal(logits_of(found, inputs), logits_of(expected, inputs))
    names = {tensor.name for tensor in gguf.GGUFReader(out).tensors}
    assert "token_embd.weight" in names and ("output.weight" in names) == (name != "tied Llama")


@pytest.mark.parametrize(
    ("kind", "bound"), [("F16", 5e-4), ("BF16", 4e-3), ("Q8_0", 6e-3), ("Q5_1", 0.05), ("Q4_0", 0.11)]
)
def test_types_are_as_near_as_they_promise(made, tmp_path, capsys, kind, bound):
    _, folder = made("Llama")
    out = tmp_path / "model.gguf"
    assert export(folder, out, "--type", kind) == 0
    assert f"21 tensors as {kind}, {os.path.getsize(out) / 1e6:.1f} MB" in capsys.readouterr().out
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert all(value == ("F32" if "norm" in name else kind) for name, value in stored.items())
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize().state_dict()
    found = read_back(out).state_dict()
    errors = {key: float((found[key] - value).norm() / value.norm()) for key, value in expected.items()}
    assert all(error <= (0 if "norm" in key else bound) for key, error in errors.items())


@pytest.mark.slow
def test_the_frequencies_of_llama_3_are_divided_by_what_the_file_holds(made, tmp_path):
    _, folder = made("Llama with frequencies divided")
    assert export(folder, tmp_path / "model.gguf", "--type", "F32") == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    factors = torch.tensor(tensors["rope_freqs.weight"].data)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    expected = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    assert torch.allclose(plain / factors, expected) and float(factors.max()) == 8 and float(factors.min()) == 1


@pytest.mark.parametrize("kind", ["compressed", "born"])
def test_an_adapter_is_merged_on_the_way(made, inputs, tmp_path, kind):
    dense, folder = made("Llama")
    base = folder if kind == "compressed" else dense
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config_for(kind))
    train_briefly(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert export(base, tmp_path / "model.gguf", "--type", "F32", "--adapter", str(tmp_path / "adapter")) == 0
    assert torch.equal(logits_of(read_back(tmp_path / "model.gguf"), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_goes_along(tmp_path, split):
    tokenizer = byte_level(split)
    tokenizer.chat_template = "{% for message in messages %}<|turn|>{{ message.content }}{% endfor %}"
    folder = save(tmp_path / "dense", tokenizer=tokenizer)
    assert export(folder, tmp_path / "model.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == split
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert [types[index] for index in (1, 2, 3, 300, SIZE - 1)] == [3, 3, 3, 1, 5]  # control, normal, unused
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert found.chat_template == tokenizer.chat_template
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    assert found.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokenizer.convert_ids_to_tokens(
        list(range(len(tokenizer)))
    )


def test_tokens_of_bytes_get_ranks_of_merges_for_scores(tmp_path):
    tokenizer = with_byte_tokens()
    folder = save(tmp_path / "dense", tokenizer=tokenizer)
    assert export(folder, tmp_path / "model.gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    scores = dict(zip(tokens, reader.get_field("tokenizer.ggml.scores").contents(), strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ranked = [scores["".join(pair)] for pair in merges]
    assert ranked == sorted(ranked, reverse=True) and scores["<0x41>"] < min(ranked)
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() is True
    types = dict(zip(tokens, reader.get_field("tokenizer.ggml.token_type").contents(), strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "<0x41>", "▁")] == [2, 3, 6, 1]


def test_what_has_no_form_in_gguf_is_refused_and_leaves_nothing(made, dense_dir, tmp_path, capsys):
    _, folder = made("Llama")
    out = tmp_path / "model.gguf"

    def refused(*arguments) -> str:
        capsys.readouterr()
        assert export(*arguments) == 1
        return capsys.readouterr().err

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96)).save_pretrained(tmp_path / "gpt2")
    assert "GPT2LMHeadModel has no form in GGUF here, only LlamaForCausalLM" in refused(tmp_path / "gpt2", out)
    assert "type WordLevel" in refused(dense_dir, out)
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert "cuts text in a way" in refused(save(tmp_path / "cut", tokenizer=tokenizer), out)
    LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")).save_pretrained(tmp_path / "gelu")
    assert "hidden_act='gelu'" in refused(tmp_path / "gelu", out)
    assert "--type must be one of" in refused(folder, out, "--type", "Q9")
    assert "--dtype belongs to --to dense" in refused(folder, out, "--dtype", "float16")
    assert "must be the name of a file" in refused(folder, tmp_path)
    assert not out.exists()
    out.write_text("mine")
    assert "exists already" in refused(folder, out)
    assert "is no GGUF file" in refused(folder, out, "--overwrite")
    assert export(folder, tmp_path / "other.gguf") == 0 == export(folder, tmp_path / "other.gguf", "--overwrite")
    assert {entry.name for entry in tmp_path.iterdir()} == {"gpt2", "cut", "gelu", "model.gguf", "other.gguf"}


def test_files_beside_the_target_stay(made, tmp_path, monkeypatch):
    _, folder = made("Llama")
    names = ["model.gguf.tmp", ".model.gguf.F16", ".model.gguf.F16.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(gguf_file, "check_library", lambda kind: None)  # without llama.cpp's library
    monkeypatch.setattr(gguf_file, "requantize", lambda source, target, kind: shutil.copy(source, target))
    assert export(folder, tmp_path / "model.gguf", "--type", "Q4_K_M") == 0
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model.gguf"])
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored == {"F16", "F32"}


# -- llama.cpp itself


@pytest.fixture
def llama_cpp():
    pytest.importorskip("cyllama")
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    return llama_cpp


def opened(llama_cpp, path):
    return llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_predicts_the_same_tokens(llama_cpp, made, inputs, tmp_path, name):
    _, folder = made(name)
    assert export(folder, tmp_path / "model.gguf", "--type", "F32") == 0
    model, tokens = opened(llama_cpp, tmp_path / "model.gguf"), inputs[0].tolist()
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    batch.add_sequence(tokens, 0, True)
    context = llama_cpp.LlamaContext(model, llama_cpp.LlamaContextParams())
    context.decode(batch)
    sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    sampler.add_greedy()
    found = torch.tensor([sampler.sample(context, index) for index in range(len(tokens))])
    logits = logits_of(AutoModelForCausalLM.from_pretrained(folder), inputs)[0]
    best = logits.topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 0.03 * logits.std()  # its cache is in fp16
    assert int(clear.sum()) > 15 and torch.equal(found[clear], best.indices[clear, 0])


@pytest.mark.slow
@pytest.mark.parametrize("split", [*SPLITS, "bytes"])
def test_llama_cpp_cuts_text_into_the_same_tokens(llama_cpp, tmp_path, split):
    tokenizer = with_byte_tokens() if split == "bytes" else byte_level(split)
    assert export(save(tmp_path / "dense", tokenizer=tokenizer), tmp_path / "model.gguf") == 0
    model = opened(llama_cpp, tmp_path / "model.gguf")  # held: the vocabulary is a part of it
    vocabulary = model.get_vocab()
    for text in [*TEXT[:3], "new WORDS 42 that were never seen: ñ"]:
        assert vocabulary.tokenize(text, True, True) == tokenizer(text)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("Q4_K_M", 0.12), ("Q6_K", 0.04)])
def test_llama_cpp_makes_its_own_types(llama_cpp, tmp_path, kind, most):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512}  # K-quants have blocks of 256
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "dense")
    byte_level().save_pretrained(tmp_path / "dense")
    assert export(tmp_path / "dense", tmp_path / "model.gguf", "--type", kind) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", "model.gguf"}
    expected, found = model.state_dict(), read_back(tmp_path / "model.gguf").state_dict()
    for key, value in expected.items():
        assert float((found[key] - value).norm() / value.norm()) < most
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kind.removesuffix("_M") in stored
