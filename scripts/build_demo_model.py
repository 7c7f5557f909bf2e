"""Build the demo model of the package: train it, write it and measure it.

    python scripts/build_demo_model.py

Takes some minutes on one CPU thread, and writes an ordinary Hugging Face folder.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from sae_lens_matryoshka.demo import corpus

MODEL_DIR = Path(corpus.__file__).with_name("model")
END_OF_TEXT = "<|endoftext|>"
CONTEXT, BATCH, STEPS, WARMUP = 256, 8, 1150, 30  # tokens, sequences, optimizer steps
LEARNING_RATE = 2e-3
HELD_OUT_SEED = 1_000_003  # of texts that are not trained on


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the corpus is one token with its leading space.

    There are no merges: anything else falls back to bytes. Fragments of words would be alphabetic
    tokens, and the absorption evaluation would ask for their first letter too.
    """
    words = [word.replace(" ", "Ġ") for word in corpus.spelling_words()]
    tokens = dict.fromkeys([END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def build_model(vocab_size: int) -> GPTNeoXForCausalLM:
    """An untrained GPT-NeoX of three layers, width 128."""
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            # With the usual 0.02 the letters share a few dimensions and probes confuse them.
            initializer_range=0.09,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    # A small start, so that what embeddings learn (letter, topic) outweighs their initialization.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)  # type: ignore[arg-type]
    return model


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Int[torch.Tensor, "rows context"]:
    """Texts, each after an end-of-text token, in one stream that is cut into rows."""
    ids = itertools.chain.from_iterable([0, *row] for row in tokenizer(texts)["input_ids"])
    stream = torch.tensor(list(ids))
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(model: GPTNeoXForCausalLM, rows: torch.Tensor) -> None:
    """AdamW on next-token loss: linear warm-up, then cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP),
        ],
        milestones=[WARMUP],
    )
    model.train()
    bar = tqdm(range(STEPS), desc="training")
    for step in bar:
        batch = rows[step * BATCH : (step + 1) * BATCH]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def spelling_accuracy(
    model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> float:
    """Share of spelling prompts whose answer the model predicts."""
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    predicted = torch.cat([model(row[:, :-1]).logits[:, -1].argmax(-1) for row in ids.split(64)])
    return (predicted == ids[:, -1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the training texts")
    args = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(1)  # the order of sums, and so the result, depends on it
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))

    texts = corpus.texts(STEPS * BATCH * CONTEXT // 50, args.seed)  # over 50 tokens each: enough
    rows = pack(texts, tokenizer)
    train(model, rows)

    held_out = pack(corpus.texts(500, HELD_OUT_SEED), tokenizer)
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss.item()
    prompts = corpus.spelling_prompts(1000, HELD_OUT_SEED)
    accuracy = spelling_accuracy(model, tokenizer, prompts)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # safetensors makes files that only their owner can read.
    (args.out / "model.safetensors").chmod(0o644)
    # transformers 4 does not know the name that transformers 5 gives the tokenizer's class.
    config = args.out / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"tokens in the vocabulary      {len(tokenizer)}")
    print(f"next-token loss, unseen texts {loss:.3f} nats")
    print(f"first-letter accuracy, unseen {accuracy:.3f}")
    print(f"folder                        {size / 1e6:.2f} MB")
    print(f"time                          {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
