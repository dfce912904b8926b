"""Fixtures: tiny models and text, made here. Nothing is downloaded; `../shared` is used where it exists."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import functools
import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from tests import deprecations

# Tiny tensors: a second thread costs more than it gives, and two workers share the machine.
torch.set_num_threads(1)
torch.set_warn_always(True)  # whichever test comes first
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(93))]


# Files that take longest begin, so that in the end no worker is left alone with one.
FIRST = (
    "tests/recipes/test_distributed.py",
    "tests/test_interpreter.py",
    "tests/compress/test_checkpoint.py",
    "tests/clustering/test_cpu.py",
    "tests/recipes/test_trl.py",
    "tests/tuner/test_model.py",
    "tests/plan/test_forecast.py",
    "tests/benchmarks/test_gpu_suite.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(FIRST)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """Fails a test in which this project calls what another package has deprecated."""
    deprecations.listen()
    yield
    deprecations.check()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; tests that use it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


def tiny_llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """A random Llama of 2 layers with odd widths, grouped queries and weights large enough to matter."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory, tokenizer) -> str:
    """A saved dense model, fp32."""
    folder = str(tmp_path_factory.mktemp("dense"))
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compressed_dir(tmp_path_factory, dense_dir, tokenizer) -> str:
    """The same model compressed, with scales."""
    folder = str(tmp_path_factory.mktemp("compressed"))
    config = ClusCompQuantizationConfig(group_size=3, num_clusters=12, scales=True)
    AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _loaded(folder: str, dtype: torch.dtype | None) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, **({} if dtype is None else {"dtype": dtype}))


def load(folder: str, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """A copy of a model of one of the fixtures, in a tenth of the time that `from_pretrained` takes."""
    return copy.deepcopy(_loaded(folder, dtype))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, len(WORDS), (2, 10), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits


def train_briefly(model, tokens: torch.Tensor, steps: int = 3, lr: float = 5e-4) -> list[float]:
    """A few AdamW steps on whatever of the model is trainable; returns the losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# What transformers' trainer calls checkpointing of activations: its name since 5.23, and before.
RENAMED = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


def checkpoint_activations(model, use_reentrant: bool = False) -> None:
    """Has a transformers model compute its blocks' activations again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})


BORN = dict(group_size=3, num_clusters=12, scales=True)


def config_for(kind: str, **changes) -> ClusCompConfig:
    """The adapter config for one of the three bases: "compressed", "born" (clustered on creation), "dense"."""
    settings = {"compressed": {}, "born": BORN, "dense": dict(base="dense", **BORN)}[kind]
    return ClusCompConfig(task_type="CAUSAL_LM", **{**settings, **changes})


@pytest.fixture
def run_recipe(monkeypatch, tmp_path, capsys):
    """Runs a script as `python recipes/NAME` does, but in this process, which has imported TRL already."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(RECIPES))

    def run(name: str, *arguments: str) -> list[dict]:
        """Returns what the trainer logged."""
        monkeypatch.setattr(sys, "argv", [str(RECIPES / name), *arguments])
        capsys.readouterr()
        runpy.run_path(str(RECIPES / name), run_name="__main__")
        return logged(capsys.readouterr().out)

    return run


def flags(**settings) -> list[str]:
    """Settings as a command line has them."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


# Two steps of a trainer of TRL, by a command.
BRIEF_TRAINING = flags(
    max_steps=2,
    per_device_train_batch_size=4,
    max_length=32,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,
)


def logged(output: str) -> list[dict]:
    """The lines of a trainer's log, numbers as numbers."""
    lines = [line for line in output.splitlines() if line.startswith("{'")]
    return [{key: float(value) for key, value in json.loads(line.replace("'", '"')).items()} for line in lines]
