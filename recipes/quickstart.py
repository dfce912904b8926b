"""The whole story on any laptop, nothing downloaded: make a small Llama, compress it, finetune its codebooks, merge.

    python recipes/quickstart.py [--output_dir DIR] [--bits B]

1. A character-level Llama of 0.8 M parameters is trained for about a minute on made-up drills ("reverse tulon = nolut").
2. `cluscomp compress` in Python: its weights become codes and codebooks.
3. TRL's SFTTrainer finetunes the codebooks on instructions the model has never seen ("Spell tulon backwards.").
4. The adapter is saved, loaded again, and merged. Merged and finetuned give the same logits to the last bit.

What to look at is the table at the end: loss and exact answers on held-out instructions, size, true bits per weight.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging as hf_logging
from trl import SFTConfig, SFTTrainer

from cluscomp_peft import ClusCompConfig, ClusCompQuantizationConfig
from cluscomp_peft.hf.checkpoint import compress_checkpoint
from cluscomp_peft.hf.evaluate import true_bits

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SKILLS = {
    "reverse": (lambda word: word[::-1], "Spell {} backwards."),
    "upper": (lambda word: word.upper(), "Write {} in capital letters."),
    "first": (lambda word: word[0], "Which letter does {} begin with?"),
    "last": (lambda word: word[-1], "Which letter does {} end with?"),
    "vowels": (lambda word: "".join(letter for letter in word if letter in "aeiou"), "Name the vowels of {}."),
    "twice": (lambda word: word + word, "Say {} two times."),
}
WINDOW = 96  # tokens (characters) of a training window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", help="where models go (default: a temporary folder)")
    parser.add_argument("--bits", type=float, default=3.0, help="true bits per weight (default 3)")
    parser.add_argument("--pretrain_steps", type=int, default=700, help="steps of 32 windows for the dense model")
    parser.add_argument("--sft_steps", type=int, default=250, help="steps of 32 instructions for the codebooks")
    options = parser.parse_args()
    if options.output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            run(folder, options)
    else:
        run(options.output_dir, options)


def run(folder: str, options: argparse.Namespace) -> None:
    started = time.perf_counter()
    hf_logging.disable_progress_bar()
    torch.manual_seed(0)
    words = make_words(random.Random(0), 4000)
    train_words, test_words = words[:3800], words[3800:]
    tokenizer = make_tokenizer()
    test = instructions(random.Random(1), test_words, 400)

    dense_dir, compressed_dir, adapter_dir, merged_dir = (
        os.path.join(folder, name) for name in ("dense", "compressed", "adapter", "merged")
    )
    pretrain(tokenizer, train_words, options.pretrain_steps).save_pretrained(dense_dir)
    tokenizer.save_pretrained(dense_dir)
    rows = [measure("dense", AutoModelForCausalLM.from_pretrained(dense_dir), tokenizer, test, dense_dir)]

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
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=WINDOW,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list(instructions(random.Random(2), train_words, 32 * options.sft_steps)),
        processing_class=tokenizer,
        peft_config=ClusCompConfig(task_type="CAUSAL_LM", num_blocks=4),
    )
    trainer.train()
    trainer.save_model(adapter_dir)

    finetuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(compressed_dir), adapter_dir)
    rows.append(measure("finetuned", finetuned, tokenizer, test, adapter_dir))
    finetuned_logits = logits_of(finetuned, tokenizer, test)
    merged = finetuned.merge_and_unload(safe_merge=True)
    merged.save_pretrained(merged_dir)
    merged = AutoModelForCausalLM.from_pretrained(merged_dir)
    rows.append(measure("merged", merged, tokenizer, test, merged_dir))

    print_table(rows)
    if not torch.equal(finetuned_logits, logits_of(merged, tokenizer, test)):
        raise SystemExit("merged and finetuned logits differ")
    print("merged = finetuned: every logit is equal to the last bit")
    print(f"done in {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads")


# -- the made-up language


def make_words(rng: random.Random, count: int) -> list[str]:
    """Distinct words of three to six letters, consonants and vowels in turn."""
    words: dict[str, None] = {}
    while len(words) < count:
        start = rng.randrange(2)
        length = rng.randint(3, 6)
        words["".join(rng.choice("aeiou" if (start + i) % 2 else "bcdfghjklmnprstvz") for i in range(length))] = None
    return list(words)


def drills(rng: random.Random, words: list[str]) -> str:
    """A line of pre-training text: a skill by its name."""
    name = rng.choice(list(SKILLS))
    word = rng.choice(words)
    return f"{name} {word} = {SKILLS[name][0](word)}\n"


def instructions(rng: random.Random, words: list[str], count: int) -> list[dict[str, str]]:
    """Rows to finetune on: the same skills, asked for in sentences."""
    rows = []
    for _ in range(count):
        skill, sentence = SKILLS[rng.choice(list(SKILLS))]
        word = rng.choice(words)
        rows.append({"prompt": f"Instruction: {sentence.format(word)}\nResponse: ", "completion": skill(word)})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    letters = ["<pad>", "<eos>", "<unk>", "\n", *" =.:?,'", *ALPHABET, *ALPHABET.upper()]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


# -- training and measuring


def pretrain(tokenizer: PreTrainedTokenizerFast, words: list[str], steps: int) -> LlamaForCausalLM:
    """The dense model, trained on drills from scratch."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
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
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    bar = tqdm(range(steps), desc="Training the dense model", disable=None)
    for _ in bar:
        windows = []
        for _ in range(32):
            text = ""
            while len(text) < WINDOW:
                text += drills(rng, words)
            windows.append(text[:WINDOW])
        batch = tokenizer(windows, return_tensors="pt")["input_ids"]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss):.3f}")
    return model.eval()


@dataclass
class Row:
    model: str
    true_bits: float
    kilobytes: float
    loss: float
    exact: float


def measure(name: str, model, tokenizer, rows: list[dict[str, str]], folder: str) -> Row:
    """Loss on the answers, and the share of answers that greedy decoding gets right in every character."""
    model.eval()
    input_ids, is_answer = encode(tokenizer, rows)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long()).logits[:, :-1]
    target, is_answer = input_ids[:, 1:], is_answer[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    # Greedy decoding gives the answer exactly if, fed the answer, the model predicts each of its characters.
    right = ((logits.argmax(-1) == target) | ~is_answer).all(1)
    size = sum(
        os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder) if file.endswith(".safetensors")
    )
    loss = float(losses[is_answer].mean())
    if isinstance(model, PeftModel):
        model.merge_adapter()
        bits = true_bits(model)
        model.unmerge_adapter()
    else:
        bits = true_bits(model)
    return Row(name, bits, size / 1e3, loss, float(right.float().mean()))


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
    print("\nheld-out instructions\n")
    print(f"{'model':<12}{'true bits':>10}{'files, kB':>11}{'loss':>9}{'exact answers':>15}")
    for row in map(asdict, rows):
        print(
            f"{row['model']:<12}{row['true_bits']:>10.2f}{row['kilobytes']:>11.0f}{row['loss']:>9.4f}{row['exact']:>14.1%}"
        )
    print("\nfiles of 'finetuned' are the adapter alone; it is loaded onto 'compressed'\n")


if __name__ == "__main__":
    main()
