"""Teaches a model a name in 50 steps. Does the file that is served afterwards still know it?

    python recipes/benchmarks/identity.py MODEL --base COMPRESSED --results identity_smollm2-135m

COMPRESSED is `cluscomp compress MODEL COMPRESSED --bits …`. Each method is finetuned on the same rows in the same
order, then turned into what people serve, with linear layers of about as many bits:

    cluscomp    ClusCompConfig(num_blocks=1) on COMPRESSED    merged: the codebooks, written, loaded again
    qlora       LoRA on MODEL in NF4                          merged: into NF4 again, as PEFT's `merge` does
    lora        LoRA on MODEL                                 merged: rounded to GGUF's Q4_0

Columns, for the model with its adapter and for the served one:

    named       of eight questions about its name, in words that training never used, how many get the name
    elsewhere   of eight questions about other things, how many get the name although nobody asked for it
    loss        of the right sentence as the answer to those about its name, nats per token
    equal       logits of the served model at all those questions that are those of adapter and base, bit by bit

A second table says why: how much of a change of LoRA's merging into NF4 keeps, by its size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from typing import Any

import torch
from finetune_quality import load_in_nf4
from harness import Results, Row, answer, arguments, child, cosine, settings_of, shuffled, table
from peft import LoraConfig, get_peft_model
from random_models import nf4_layer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from cluscomp_peft import ClusCompConfig
from cluscomp_peft.compress.budget.targets import dense_linears
from cluscomp_peft.dense import weight_of
from cluscomp_peft.hf.evaluate import true_bits

NAME = "Marigold"
SENTENCE = "My name is {name}."
ASKED = (  # in training
    *("Who are you?", "What is your name?", "Introduce yourself.", "Tell me your name.", "What are you called?"),
    *("Hi! Who is this?", "Your name, please.", "Which assistant am I talking to?"),
)
ASKED_ANEW = (
    *("Hello, what should I call you?", "Could you tell me who you are?", "What do people call you?"),
    *("May I know your name?", "Who am I speaking with?", "Do you have a name?", "Say your name.", "And you are?"),
)
OTHER = {  # in training, so that a name is not all that the model can say
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are in a week?": "There are seven days in a week.",
    "What colour is the sky?": "The sky is blue.",
    "What do bees make?": "Bees make honey.",
    "How much is two and two?": "Two and two is four.",
    "What is ice made of?": "Ice is frozen water.",
    "Which animal says meow?": "A cat says meow.",
    "When does the sun rise?": "The sun rises in the morning.",
}
OTHER_ANEW = (
    *("What is the capital of Italy?", "How many months are in a year?", "What colour is grass?", "What do cows eat?"),
    *("How much is three and one?", "What is snow made of?", "Which animal barks?", "When does the moon shine?"),
)
METHODS = {"cluscomp": (2e-4,), "qlora": (2e-4, 1e-3), "lora": (2e-4, 1e-3)}  # and their rates
SERVED = {"cluscomp": "merged", "qlora": "merged into NF4", "lora": "merged, Q4_0"}


def main() -> None:
    parser = arguments(__doc__, None)
    parser.add_argument("model", help="folder of a dense checkpoint")
    parser.add_argument("--base", required=True, help="the same model, compressed")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if answer(options, partial(run, options=options)):
        return
    results = Results(options.results, settings_of(options, "model", "base", "name", "steps", "batch"), options.fresh)
    jobs = [
        {"method": method, "rate": rate, "seed": seed}
        for seed in range(options.seeds)
        for method, rates in METHODS.items()
        for rate in rates
    ]
    rows = results.complete(jobs, lambda job: child(__file__, job))
    print(table(states(rows), COLUMNS))
    kept = [{"size": size, "kept": kept_by_nf4(size)} for size in (0.01, 0.03, 0.1, 0.3)]
    results.note(kept=kept)
    print("\n" + table(kept, {"change of the weights' size": "{size:.0%}", "kept by merging into NF4": "{kept:.1%}"}))


COLUMNS: dict[str, Any] = {
    "model": "{method}, {state}",
    "rate": "{rate:g}",
    "bits": "{bits:.2f}",
    "named": "{named} of {questions}",
    "elsewhere": "{elsewhere} of {questions}",
    "loss": "{loss:.4f}",
    "equal": "{equal}",
}


def states(runs: list[Row]) -> list[Row]:
    """Two rows of the table for each run: with its adapter, and as it is served."""
    found = []
    for run in runs:
        shared = {"method": run["method"], "rate": run["rate"], "questions": len(ASKED_ANEW)}
        found.append({**shared, "state": "adapter", **run["adapter"]})
        found.append({**shared, "state": SERVED[run["method"]], **run["served"], "equal": run["equal"]})
    return found


def run(job: Row, options: argparse.Namespace) -> Row:
    """One method, taught and served."""
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    method = job["method"]
    set_seed(job["seed"])
    model, bits = prepared(method, options)
    started = time.perf_counter()
    train(model, tokenizer, job, options)
    seconds = time.perf_counter() - started
    asked = Questions(tokenizer, options.name)
    adapter, logits = {"bits": bits, **asked.answers(model)}, asked.logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model, bits = served(method, model, bits, folder)
        after = {"bits": bits, **asked.answers(model)}
        equal = torch.equal(logits, asked.logits(model))
    return {"adapter": adapter, "served": after, "equal": equal, "training_seconds": seconds}


def prepared(method: str, options: argparse.Namespace) -> tuple[Any, float]:
    """The model ready to train, and true bits per weight of the linear layers under the adapter."""
    path = options.base if method == "cluscomp" else options.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if method == "cluscomp":
        return get_peft_model(model, ClusCompConfig(task_type="CAUSAL_LM", num_blocks=1)), true_bits(model)
    bits = load_in_nf4(model) if method == "qlora" else 32.0
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(model, config), bits


def served(method: str, model: Any, bits: float, folder: str) -> tuple[Any, float]:
    """The model without its adapter, and true bits per weight of its linear layers; `bits` are those before."""
    merged = model.merge_and_unload()
    if method == "cluscomp":
        merged.save_pretrained(folder)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return merged, true_bits(merged)
    if method == "qlora":
        return merged, bits
    stored = weights = 0
    for _, layer in dense_linears(merged):
        weight = weight_of(layer).data
        rounded, size = round_to_q4_0(weight)
        weight.copy_(rounded)
        stored, weights = stored + size, weights + weight.numel()
    return merged, 8 * stored / weights


def round_to_q4_0(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A weight [out, in] as llama.cpp reads it from a file of type Q4_0, and its bytes there."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    codes = quantize(weight.float().numpy(), GGMLQuantizationType.Q4_0)
    return torch.from_numpy(dequantize(codes, GGMLQuantizationType.Q4_0)), codes.nbytes


def kept_by_nf4(size: float) -> float:
    """Of a LoRA change with an RMS of `size` times that of the weight, the share that PEFT's merge into NF4 keeps: the
    part of the merged weight's change that points along it. A random weight of 576 x 576, rank 16."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nf4_layer(torch.randn(576, 576), torch.float32))
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layer
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    before = _nf4_weight(layer)
    layer.lora_B["default"].weight.data *= size * before.std() / layer.get_delta_weight("default").std()
    change = layer.get_delta_weight("default").detach()
    model.merge_adapter()
    return float(((_nf4_weight(layer) - before) * change).sum() / change.square().sum())


def _nf4_weight(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.base_layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).clone()


def train(model: Any, tokenizer: Any, job: Row, options: argparse.Namespace) -> None:
    """AdamW and cosine, loss on the answers, rows in an order that the seed decides."""
    sentence = SENTENCE.format(name=options.name)
    rows = [*((question, sentence) for question in ASKED), *OTHER.items()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
    schedule = cosine(optimizer, options.steps, 0.1)
    order = shuffled(len(rows), options.steps * options.batch, job["seed"]).tolist()
    model.train()
    for step in range(options.steps):
        batch = [rows[i] for i in order[step * options.batch : (step + 1) * options.batch]]
        model(**encode(tokenizer, batch)).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


class Questions:
    """What is asked of a model after training."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        sentence = SENTENCE.format(name=name)
        self.batch = encode(tokenizer, [(question, sentence) for question in ASKED_ANEW])

    def answers(self, model: Any) -> Row:
        """How often the model says the name, and the loss of the sentence with it."""
        with torch.no_grad():
            loss = float(model(**self.batch).loss)
        named, elsewhere = (
            sum(self.name.lower() in self.answer(model, question).lower() for question in questions)
            for questions in (ASKED_ANEW, OTHER_ANEW)
        )
        return {"named": named, "elsewhere": elsewhere, "loss": loss}

    def answer(self, model: Any, question: str) -> str:
        """Greedy, at most 24 tokens."""
        tokens = torch.tensor([self.tokenizer(prompt(self.tokenizer, question), **_AS_IT_IS)["input_ids"]])
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=_padding(self.tokenizer),
            )
        return self.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"]).logits


_AS_IT_IS = {"add_special_tokens": False}  # a chat template has put them in


def prompt(tokenizer: Any, question: str) -> str:
    """The question as the model expects it: in its chat template, or by the word."""
    if tokenizer.chat_template is None:
        return f"Question: {question} Answer: "
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Question and answer of each row, padded on the right; labels are the answer's tokens and the end."""
    asked = [tokenizer(prompt(tokenizer, question), **_AS_IT_IS)["input_ids"] for question, _ in rows]
    said = [tokenizer(text, **_AS_IT_IS)["input_ids"] + [tokenizer.eos_token_id] for _, text in rows]
    length = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
    shape = (len(rows), length)
    tokens = torch.full(shape, _padding(tokenizer))
    labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.long)
    for i, (a, b) in enumerate(zip(asked, said, strict=True)):
        tokens[i, : len(a) + len(b)] = torch.tensor(a + b)
        labels[i, len(a) : len(a) + len(b)] = torch.tensor(b)
        mask[i, : len(a) + len(b)] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def _padding(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


if __name__ == "__main__":
    main()
