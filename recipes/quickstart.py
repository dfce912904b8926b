"""The whole story on any laptop, nothing downloaded: make a small Llama, compress it, finetune its codebooks, merge.

    python recipes/quickstart.py [--output_dir DIR] [--bits B]

1. A Llama of 0.6 M parameters learns by heart, in about a minute, who lives where, eats what, does what in a made-up
   country ("tulon lives in bera .", "the food of tulon is plum .").
2. `cluscomp compress`, here in Python: its weights become codes and codebooks.
3. TRL's SFTTrainer finetunes the codebooks to answer questions ("where does tulon live ?"), which no text so far held,
   about three people out of four.
4. The adapter is saved, loaded again, and merged. Merged and finetuned give the same logits to the last bit.

What to look at is the table at the end. The questions are about the people left out in step 3, so a right answer needs
both: a fact that only the dense model ever read, and a form that only the codebooks ever learned.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    get_cosine_schedule_with_warmup,
)
from trl import SFTConfig, SFTTrainer

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits
from cluscomp_peft.quiet import hide_bars, hush

VALUES = {
    "home": "bera sorin tavel mosk ulma kolin pedra vash ridel onto felm garu".split(),
    "food": "plum rice bread fish corn soup cheese beans apple egg honey nuts".split(),
    "work": "baker smith farmer sailor teacher tailor miller hunter potter weaver".split(),
    "colour": "red blue green black white yellow brown grey".split(),
}
STATEMENTS = {
    "home": ("{} lives in {} .", "the home of {} is {} .", "if you look for {} , go to {} ."),
    "food": ("{} eats {} .", "the food of {} is {} .", "at noon {} has some {} ."),
    "work": ("{} works as a {} .", "the work of {} is {} .", "people know {} , the {} ."),
    "colour": ("{} wears {} .", "the colour of {} is {} .", "the coat of {} looks {} ."),
}
QUESTIONS = {
    "home": "where does {} live ?",
    "food": "what does {} eat ?",
    "work": "what does {} do for a living ?",
    "colour": "which colour does {} like ?",
}
PEOPLE = 64
WINDOW = 64  # tokens (words) of a training window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", help="where models go (default: a temporary folder)")
    parser.add_argument("--bits", type=float, default=4.0, help="true bits per weight (default 4)")
    parser.add_argument("--pretrain_steps", type=int, default=250, help="steps for the dense model")
    parser.add_argument("--sft_steps", type=int, default=200, help="steps for the codebooks")
    options = parser.parse_args()
    if options.output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            run(folder, options)
    else:
        run(options.output_dir, options)


def run(folder: str, options: argparse.Namespace) -> None:
    started = time.perf_counter()
    hush()
    hide_bars()
    torch.manual_seed(0)
    facts = make_facts(random.Random(0))
    tokenizer = make_tokenizer(facts)
    people = list(facts)
    train = questions(facts, people[: PEOPLE * 3 // 4])
    test = questions(facts, people[PEOPLE * 3 // 4 :])

    dense_dir, compressed_dir, adapter_dir, merged_dir = (
        os.path.join(folder, name) for name in ("dense", "compressed", "adapter", "merged")
    )
    with stage(f"1/5 a Llama of 0.6 M parameters learns {len(facts)} people by heart"):
        pretrain(tokenizer, facts, options.pretrain_steps).save_pretrained(dense_dir)
        tokenizer.save_pretrained(dense_dir)
        rows = [measure("dense", AutoModelForCausalLM.from_pretrained(dense_dir), tokenizer, test, dense_dir)]

    with stage("2/5 its weights become codes and codebooks"):
        config = ClusCompQuantizationConfig(bits=options.bits)
        compress_checkpoint(dense_dir, compressed_dir, config, overwrite=True)
        model = AutoModelForCausalLM.from_pretrained(compressed_dir)
        rows.append(measure("compressed", model, tokenizer, test, compressed_dir))

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=os.path.join(folder, "trainer"),
            max_steps=options.sft_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-5,  # lower than the usual 2e-4: each of the few rows is seen 33 times
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=WINDOW,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        peft_config=ClusCompConfig(task_type="CAUSAL_LM", num_blocks=1),  # merging adds no codebooks
    )
    trainer.remove_callback(PrinterCallback)
    with stage(f"3/5 the codebooks learn to answer questions: {len(train)} of them, about three people of four"):
        trainer.train()
        trainer.save_model(adapter_dir)

    with stage("4/5 the saved adapter is loaded onto the compressed model"):
        finetuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_dir), adapter_dir)
        rows.append(measure("finetuned", finetuned, tokenizer, test, adapter_dir))
        finetuned_logits = logits_of(finetuned, tokenizer, test)
    with stage("5/5 it is merged"):
        merged = finetuned.merge_and_unload(safe_merge=True)
        merged.save_pretrained(merged_dir)
        merged = AutoModelForCausalLM.from_pretrained(merged_dir)
        rows.append(measure("merged", merged, tokenizer, test, merged_dir))

    print_table(rows)
    if not torch.equal(finetuned_logits, logits_of(merged, tokenizer, test)):
        raise SystemExit("merged and finetuned logits differ")
    print("merged = finetuned: every logit is equal to the last bit")
    print(f"done in {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads")


@contextmanager
def stage(words: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(words, flush=True)
    started = time.perf_counter()
    yield
    print(f"    {time.perf_counter() - started:.1f} s", flush=True)


# -- the made-up country


def make_facts(rng: random.Random) -> dict[str, dict[str, str]]:
    """Name to home, food, work and colour."""
    facts: dict[str, dict[str, str]] = {}
    while len(facts) < PEOPLE:
        name = "".join(rng.choice("aeiou" if i % 2 else "bdfgklmnprstv") for i in range(5))
        facts[name] = {kind: rng.choice(values) for kind, values in VALUES.items()}
    return facts


def statement(rng: random.Random, facts: dict[str, dict[str, str]]) -> str:
    """A line of pre-training text."""
    name = rng.choice(list(facts))
    kind = rng.choice(list(VALUES))
    return rng.choice(STATEMENTS[kind]).format(name, facts[name][kind])


def questions(facts: dict[str, dict[str, str]], people: list[str]) -> list[dict[str, str]]:
    """Rows to finetune on, or to test with: every question about each of the people."""
    return [
        {"prompt": f"Question : {question.format(name)} Answer : ", "completion": facts[name][kind]}
        for name in people
        for kind, question in QUESTIONS.items()
    ]


def make_tokenizer(facts: dict[str, dict[str, str]]) -> PreTrainedTokenizerFast:
    """One token per word."""
    sentences = [*QUESTIONS.values(), *(line for lines in STATEMENTS.values() for line in lines)]
    words = dict.fromkeys(word for line in sentences for word in line.split() if word != "{}")
    words.update(dict.fromkeys(word for values in VALUES.values() for word in values))
    words.update(dict.fromkeys(("Question", "Answer", ":", *facts)))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


# -- training and measuring


def pretrain(tokenizer: PreTrainedTokenizerFast, facts: dict[str, dict[str, str]], steps: int) -> LlamaForCausalLM:
    """The dense model, trained on statements from scratch."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            initializer_range=0.08,  # a small model on little text learns faster from larger weights
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    rng = random.Random(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, 30, steps)
    bar = tqdm(range(steps), desc="    training", disable=None, leave=False)
    for _ in bar:
        texts = [" ".join(statement(rng, facts) for _ in range(WINDOW // 4)) for _ in range(32)]
        batch = tokenizer(texts, return_tensors="pt", truncation=True, max_length=WINDOW)["input_ids"]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@dataclass
class Row:
    model: str
    true_bits: float
    kilobytes: float
    loss: float
    exact: float


def measure(name: str, model, tokenizer, rows: list[dict[str, str]], folder: str) -> Row:
    """Loss on the answers, and the share of answers that greedy decoding gets right."""
    model.eval()
    input_ids, is_answer = encode(tokenizer, rows)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long()).logits[:, :-1]
    target, is_answer = input_ids[:, 1:], is_answer[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    # Greedy decoding gives the answer exactly if, fed the answer, the model predicts each of its tokens.
    right = ((logits.argmax(-1) == target) | ~is_answer).all(1)
    size = sum(
        os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder) if file.endswith(".safetensors")
    )
    loss = float(losses[is_answer].mean())
    return Row(name, true_bits(model), size / 1e3, loss, float(right.float().mean()))


def logits_of(model, tokenizer, rows: list[dict[str, str]]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=encode(tokenizer, rows[:64])[0]).logits


def encode(tokenizer, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids of prompt + answer + end, and which of them belong to the answer."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        is_answer[i, len(prompt) : len(prompt) + len(answer)] = True
    return input_ids, is_answer


def print_table(rows: list[Row]) -> None:
    print("\nquestions about people that finetuning never saw\n")
    print(f"{'model':<12}{'true bits':>10}{'files, kB':>11}{'loss':>9}{'exact answers':>15}")
    for row in map(asdict, rows):
        print(
            f"{row['model']:<12}{row['true_bits']:>10.2f}{row['kilobytes']:>11.0f}{row['loss']:>9.4f}{row['exact']:>14.1%}"
        )
    print("\nfiles of 'finetuned' are the adapter alone; it is loaded onto 'compressed'\n")


if __name__ == "__main__":
    main()
