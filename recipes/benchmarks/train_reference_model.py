"""Trains a small Llama from scratch, for measurements that need a trained model where none can be downloaded.

    python recipes/benchmarks/train_reference_model.py --size 25m --text novels.txt.xz wikitext2_train.txt.xz \\
        --valid wikitext2_valid.txt.xz --output_dir reference_25m

Random weights are of no use for judging compression: nothing was learned that rounding could destroy. Train long
enough that rounding to 3 bits visibly hurts, which the last line shows beside the dense loss: on a GPU minutes, on a
CPU core `--size 4m --vocab 2048 --seqlen 256 --batch 8 --minutes 35`.

Byte-level BPE trained on the same text, grouped-query attention, tied embeddings, AdamW with a warm-up and a cosine.
Both `--minutes` and `--steps` limit the training, and the schedule follows the one that will end it. CUDA uses bf16
autocast over fp32 weights. Saves model, tokenizer and reference.json (settings, losses, speed) to `--output_dir`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from baselines import round_to_nearest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cluscomp_peft.compress.calibration.text import read_documents, token_windows
from cluscomp_peft.hf.evaluate import evaluate

END = "<|endoftext|>"
PIECE = 100_000  # characters that are tokenised at once; a whole book's offsets would take gigabytes

# hidden, intermediate, layers, heads, key-value heads, learning rate; parameters with 8192 tokens give the name
SIZES = {
    "4m": (192, 512, 5, 6, 2, 3e-3),
    "10m": (320, 864, 7, 10, 2, 2e-3),
    "25m": (512, 1280, 8, 8, 2, 1.5e-3),
    "60m": (768, 1920, 9, 12, 4, 1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help=".txt, .jsonl, also .xz")
    parser.add_argument("--valid", required=True, help="text that training never sees")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--size", choices=SIZES, default="4m")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training; reading and evaluation come on top")
    parser.add_argument("--steps", type=int, help="at most; by default only time ends the training")
    parser.add_argument("--learning_rate", type=float, help="by default that of the size")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the training")
    parser.add_argument("--valid_tokens", type=int, default=200_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    documents = [document for path in options.text for document in read_documents(path)]
    tokenizer = train_tokenizer(documents, options.vocab, options.seqlen)
    stream = encode(documents, tokenizer)
    windows = token_windows(read_documents(options.valid), tokenizer, options.seqlen, max_tokens=options.valid_tokens)
    if len(stream) <= options.seqlen:
        raise SystemExit(
            f"the text has {len(stream)} tokens, less than a window of --seqlen {options.seqlen} and one."
        )
    model = make_model(options.size, len(tokenizer), options.seqlen, tokenizer.eos_token_id).to(options.device)
    inside = sum(parameter.numel() for parameter in model.model.layers.parameters())
    print(f"{model.num_parameters():,} parameters, {inside:,} of them in blocks; {len(stream):,} tokens of text")

    result = train(model, stream, options)
    result["valid_loss"] = evaluate(model, windows, progress=True).loss
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    rounded, _ = round_to_nearest(copy.deepcopy(model), bits=3, block=64)
    result["valid_loss_3bit_rounded"] = evaluate(rounded, windows, progress=True).loss
    # Names of files, not where they lie: the folder travels.
    settings = {**vars(options), "text": [os.path.basename(path) for path in options.text]}
    settings = {**settings, "valid": os.path.basename(options.valid), "output_dir": None}
    content = {
        "parameters": model.num_parameters(),
        "parameters_in_blocks": inside,
        "tokens_of_text": len(stream),
        **result,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "torch": torch.__version__,
    }
    with open(os.path.join(options.output_dir, "reference.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    print(f"{result['steps']} steps, {result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} tokens/s")
    print(f"train {result['train_loss']:.4f}, valid {result['valid_loss']:.4f}", end="")
    print(f", valid rounded to 3 bits {result['valid_loss_3bit_rounded']:.4f}")


def train_tokenizer(documents: list[str], vocab: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, from at most 20 million characters spread over the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet)
    every = math.ceil(sum(map(len, documents)) / 20e6)
    sample = (piece for i, piece in enumerate(p for text in documents for p in pieces(text)) if i % every == 0)
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=length)


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All tokens of the documents, each with an end, int32."""
    parts = []
    for text in tqdm(documents, desc="Tokenising", unit="document", disable=None):
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(pieces(text))):
            parts.append(torch.tensor(encoding.ids, dtype=torch.int32))
        parts.append(torch.tensor([tokenizer.eos_token_id], dtype=torch.int32))
    return torch.cat(parts)


def pieces(text: str) -> Iterator[str]:
    """Cuts of about PIECE characters, at ends of lines where there are any."""
    start = 0
    while start < len(text):
        line = text.rfind("\n", start, start + PIECE)
        end = len(text) if start + PIECE >= len(text) else line + 1 if line > start else start + PIECE
        yield text[start:end]
        start = end


def make_model(size: str, vocab: int, length: int, end: int) -> LlamaForCausalLM:
    hidden, wide, layers, heads, groups, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Windows from random places, until time or steps are over."""
    device = torch.device(options.device)
    stream = stream.to(device)
    rate = SIZES[options.size][-1] if options.learning_rate is None else options.learning_rate
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if options.compile else model
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.seqlen + 1, device=device)
    model.train()
    step, done, average, told, started = 0, 0.0, None, 0, time.perf_counter()
    with tqdm(total=100, desc="Training", unit="%", disable=None) as bar:
        while done < 1:
            # Warm-up and cosine over the share done, so that the rate has fallen to a tenth when time is up.
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
            warm = min(1.0, done / options.warmup) if options.warmup > 0 else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * max(cosine * warm, 1e-3)
            places = torch.randint(len(stream) - options.seqlen, (options.batch, 1), generator=generator)
            tokens = stream[places.to(device) + offsets].long()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = run(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = loss.detach()
            average = loss if average is None else average + (loss - average) * max(0.01, 1 / (step + 1))
            step += 1
            if device.type == "cuda" and step % 10 == 0:
                torch.cuda.synchronize()  # or the clock would run ahead of the work
            seconds = time.perf_counter() - started
            done = max(seconds / (60 * options.minutes), step / options.steps if options.steps else 0.0)
            speed = step * options.batch * options.seqlen / seconds
            if done >= (told + 1) / 20:
                told = int(done * 20)
                bar.update(min(100, 5 * told) - bar.n)
                bar.set_postfix(step=step, loss=f"{average:.3f}", tokens_s=f"{speed:,.0f}")
                if bar.disable:
                    print(f"{done:4.0%}  step {step}  loss {average:.4f}  {speed:,.0f} tokens/s", flush=True)
    if not math.isfinite(average):
        raise SystemExit(
            f"the loss is {float(average)} after {step} steps; try a smaller --learning_rate than {rate}."
        )
    return {
        "train_loss": float(average),
        "steps": step,
        "tokens": step * options.batch * options.seqlen,
        "seconds": seconds,
        "tokens_per_second": speed,
    }


if __name__ == "__main__":
    main()
