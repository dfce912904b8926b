"""A compressed model is taught a name, merged at the same bits, written, loaded, and still says it.

The model is small enough to learn the script's questions in seconds: it first learns to give another name to all of
them, in the words of training and in those that only the test uses.
"""

from __future__ import annotations

import importlib
from argparse import Namespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from tests.conftest import RECIPES, tiny_llama

BENCHMARKS = RECIPES / "benchmarks"
OLD, NEW = "Basil", "Marigold"


@pytest.fixture(scope="module")
def identity():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(torch, "set_num_threads", lambda threads: None)  # of the tests to come
        yield importlib.import_module("identity")


@pytest.fixture(scope="module")
def options(identity, tmp_path_factory) -> Namespace:
    """A dense model that calls itself by the old name, and the same compressed."""
    folder = tmp_path_factory.mktemp("identity")
    questions = [*identity.ASKED, *identity.ASKED_ANEW, *identity.OTHER, *identity.OTHER_ANEW]
    names = [identity.SENTENCE.format(name=name) for name in (OLD, NEW)]
    split = pre_tokenizers.WhitespaceSplit()
    texts = [*questions, *names, *identity.OTHER.values(), "Question: Answer:"]
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    model = tiny_llama(**shape, pad_token_id=None, eos_token_id=0).train()
    rows = [(question, names[0]) for question in (*identity.ASKED, *identity.ASKED_ANEW)]
    # The other questions have to mean something as well, or what is learned of names spreads to them.
    others = zip(identity.OTHER_ANEW, identity.OTHER.values(), strict=True)
    batch = identity.encode(tokenizer, [*rows, *identity.OTHER.items(), *others])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dense, base = str(folder / "dense"), str(folder / "base")
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    compress_checkpoint(dense, base, ClusCompQuantizationConfig(bits=4.0), calibration="none")
    return Namespace(model=dense, base=base, name=NEW, steps=50, batch=8, threads=1)


def test_a_merged_model_still_says_the_name_it_was_taught(identity, options):
    run = identity.run({"method": "cluscomp", "rate": 2e-4, "seed": 0}, options)
    asked = len(identity.ASKED_ANEW)
    assert run["adapter"]["named"] == asked and run["adapter"]["elsewhere"] == 0
    # Written at the bits of the base, loaded again: the same answers, for every logit is the same.
    assert run["equal"] and run["served"] == run["adapter"]
    untaught = identity.run({"method": "cluscomp", "rate": 0.0, "seed": 0}, Namespace(**{**vars(options), "steps": 1}))
    assert untaught["adapter"]["named"] == 0
    table = identity.table(identity.states([{"method": "cluscomp", "rate": 2e-4, **run}]), identity.COLUMNS)
    assert f"| cluscomp, merged | 0.0002 | {run['served']['bits']:.2f} | {asked} of {asked} | 0 of 8 |" in table


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_what_the_other_methods_serve_is_rounded_anew(identity, options, method):
    pytest.importorskip("bitsandbytes" if method == "qlora" else "gguf")
    run = identity.run({"method": method, "rate": 2e-3, "seed": 0}, options)
    assert run["adapter"]["named"] > 0
    assert not run["equal"] and run["served"]["bits"] == 4.5


def test_small_changes_do_not_survive_a_merge_into_nf4(identity):
    pytest.importorskip("bitsandbytes")
    assert identity.kept_by_nf4(0.01) < 0.1 and identity.kept_by_nf4(0.3) > 0.9
