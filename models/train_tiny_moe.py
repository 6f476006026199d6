"""Train a small Qwen3-MoE from text files, on a CPU, with the sizes of `tiny-qwen3-moe`.

    python models/train_tiny_moe.py --text wikipedia.jsonl.xz novels/*.txt --heldout heldout.jsonl \
        --steps 4482 --output my-tiny-qwen3-moe

Inputs are `.txt`, `.jsonl` or `.jsonl.xz` files; a line of JSON holds one document under "text", and a
plain text file is cut at paragraph ends into documents of about 8,000 characters. Documents are shuffled by
`--seed`, joined by <|endoftext|> and packed, so no token is padding. Texts that run out are read again in
another order.

The result is a folder that `transformers.AutoModelForCausalLM.from_pretrained` opens: bfloat16 weights, the
byte-level BPE trained on the same text (or the one given by `--tokenizer`), and a ChatML template.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# How Qwen2 cuts text before BPE: contractions, words with one leading mark, single digits, punctuation, line
# ends, spaces. llama.cpp knows this cut as `tokenizer.ggml.pre = qwen2`, so the GGUF tokenizes the same way.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TXT_DOCUMENT_CHARACTERS = 8_000
MAX_POSITIONS = 2048
ROPE_THETA = 10_000.0


# ---------------------------------------------------------------------------------------------- text


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in file order."""
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    elif path.suffix == ".txt":
        yield from split_text(path.read_text(encoding="utf-8-sig"))
    else:
        raise SystemExit(f"{path}: expected .txt, .jsonl or .jsonl.xz")


def split_text(text: str) -> Iterator[str]:
    """Cut a long text at paragraph ends into documents of about TXT_DOCUMENT_CHARACTERS."""
    held: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph) + 2
        if size >= TXT_DOCUMENT_CHARACTERS:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def endless_tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[np.ndarray]:
    """Token ids of one document and its end mark at a time, reshuffled on every pass over the documents."""
    order = list(range(len(documents)))
    shuffle = random.Random(seed)
    while True:
        shuffle.shuffle(order)
        for start in range(0, len(order), 64):
            texts = [documents[i] for i in order[start : start + 64]]
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
                yield np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64)


def batches(stream: Iterator[np.ndarray], batch: int, length: int) -> Iterator[torch.Tensor]:
    """Pack a token stream into int64 [batch, length]."""
    held = np.empty(0, dtype=np.int64)
    size = batch * length
    while True:
        pieces = [held]
        count = len(held)
        while count < size:
            pieces.append(next(stream))
            count += len(pieces[-1])
        held = np.concatenate(pieces)
        yield torch.from_numpy(held[:size].reshape(batch, length).copy())
        held = held[size:]


# ----------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Sequence[str], vocab_size: int, characters: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen2's pre-tokenization, learned from about `characters` characters of text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.normalizers import NFC

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (END_OF_TEXT, *CHAT_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),  # the special tokens take the last ids
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(documents, characters, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(CHAT_TOKENS),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def sample(documents: Sequence[str], characters: int, seed: int) -> Iterator[str]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    for i in order:
        yield documents[i]
        characters -= len(documents[i])
        if characters <= 0:
            return


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    # Engines choose their byte-pair code by this class name, and must not put a token before the text.
    update_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        add_bos_token=False,
        model_max_length=MAX_POSITIONS,
    )


def update_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------- model


def build_model(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Qwen3MoeForCausalLM:
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,  # of dense blocks; there are none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=12,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    # "eager" loops over the experts with plain linears, which autocast runs in bfloat16. "grouped_mm" ignores
    # autocast and multiplies in float32: 1.6 times slower per step on a CPU, for the same loss.
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: norms are gains, not weights."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor * peak` at the last step."""
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def heldout_loss(model: Qwen3MoeForCausalLM, windows: torch.Tensor) -> float:
    """Mean cross-entropy in float32, nats per predicted token, over int64 [windows, length]; no stride."""
    model.eval()
    total = 0.0
    for window in windows.split(4):
        logits = model(input_ids=window, use_cache=False).logits[:, :-1].float()
        targets = window[:, 1:].flatten()
        total += functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    model.train()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def train(model: Qwen3MoeForCausalLM, stream: Iterator[torch.Tensor], windows: torch.Tensor, args) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    started = time.monotonic()
    print(f"step {0:>5}  held-out {heldout_loss(model, windows):.4f} nats/token", flush=True)
    model.train()
    for step in range(args.steps):
        rate = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # The model adds router_aux_loss_coef times the load-balancing loss to the cross-entropy.
            loss = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        done = step + 1
        if done % args.evaluate_every == 0 or done == args.steps:
            print(
                f"step {done:>5}  held-out {heldout_loss(model, windows):.4f} nats/token"
                f"  train {loss.item():.4f}  lr {rate:.2e}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


# --------------------------------------------------------------------------------------------- script


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", type=Path, required=True, help="training files (.txt, .jsonl, .jsonl.xz)")
    add("--heldout", nargs="+", type=Path, required=True, help="files to evaluate on, never trained on")
    add("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    add("--tokenizer", type=Path, help="folder of a tokenizer to reuse instead of training one")
    add("--vocab-size", type=int, default=4096)
    add("--tokenizer-characters", type=int, default=20_000_000, help="what the tokenizer learns from")
    add("--steps", type=int, default=4482)
    add("--batch", type=int, default=8, help="windows per step")
    add("--length", type=int, default=512, help="tokens per window")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--warmup", type=int, default=200, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--evaluate-every", type=int, default=200)
    add("--heldout-windows", type=int, default=40)
    add("--threads", type=int, help="CPU threads (default: all)")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.output.exists() and any(args.output.iterdir()):
        raise SystemExit(f"{args.output} is not empty; choose another --output")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    documents = [text for path in args.text for text in read_documents(path) if text.strip()]
    if not documents:
        raise SystemExit("the --text files hold no text")
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters", flush=True)

    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(documents, args.vocab_size, args.tokenizer_characters, args.seed)
    vocab_size = len(tokenizer)

    heldout = endless_tokens([t for path in args.heldout for t in read_documents(path)], tokenizer, seed=0)
    windows = next(batches(heldout, args.heldout_windows, args.length))
    model = build_model(tokenizer, vocab_size)
    print(f"{model.num_parameters():,} parameters, vocabulary {vocab_size:,}", flush=True)
    stream = batches(endless_tokens(documents, tokenizer, args.seed), args.batch, args.length)
    train(model, stream, windows, args)

    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    # transformers 5 renames the first and nests the second; published checkpoints and converters have these.
    update_json(args.output / "config.json", num_experts=model.config.num_experts, rope_theta=ROPE_THETA)
    save_tokenizer(tokenizer, args.output)
    print(f"saved {args.output}", flush=True)


if __name__ == "__main__":
    main()
