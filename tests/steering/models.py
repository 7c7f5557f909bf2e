"""A tiny model of each kind that `steer` takes, and SAEs of it."""

from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.load_model import HookedProxyLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_lens_matryoshka.levels.slicing import set_widths
from tests.tiny import D_MODEL, N_CTX, VOCAB, tiny_model

WIDTHS = [8, 24, 64]
BOS = 0


def tokenizer() -> Any:
    words = {"<s>": BOS, **{f"w{i}": i for i in range(1, VOCAB)}, "<pad>": VOCAB}
    raw = Tokenizer(WordLevel(words, unk_token="w1"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<pad>")


def transformer_lens_model() -> tuple[Any, str]:
    model = tiny_model()
    model.tokenizer = tokenizer()
    return model, "blocks.1.hook_resid_pre"


def transformers_model() -> tuple[Any, str]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=N_CTX,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), "model.layers.0"


def wrapped_model() -> tuple[Any, str]:
    model, hook = transformers_model()
    return HookedProxyLM(model, tokenizer(), hook_names=[hook]), hook


MODELS = {
    "HookedTransformer": transformer_lens_model,
    "HookedProxyLM": wrapped_model,
    "transformers": transformers_model,
}


def random_sae(hook: str, d_in: int = D_MODEL, **config: Any) -> Any:
    """A JumpReLU SAE, or with `k` a TopK SAE, whose latents fire on a part of the tokens."""
    torch.manual_seed(1)
    kind = (TopKSAE, TopKSAEConfig) if "k" in config else (JumpReLUSAE, JumpReLUSAEConfig)
    sae: Any = kind[0](kind[1](d_in=d_in, d_sae=WIDTHS[-1], **config))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, WIDTHS[-1]))
        sae.W_dec.copy_(torch.randn(WIDTHS[-1], d_in))
        sae.b_dec.copy_(torch.randn(d_in))
        if "k" not in config:
            sae.threshold.fill_(0.5)
    sae.cfg.metadata.hook_name = hook
    set_widths(sae, WIDTHS)
    return sae


def tokens(n: int = 12, n_texts: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(1, VOCAB, (n_texts, n), generator=generator)
    drawn[:, 0] = BOS
    return drawn


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def activations_of(model: Any, hook: str, ids: torch.Tensor) -> torch.Tensor:
    """What leaves the hook, after the hooks that are there."""
    found = []
    module = model.hook_dict[hook] if hasattr(model, "hook_dict") else model.get_submodule(hook)

    def read(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(read)
    logits_of(model, ids)
    handle.remove()
    return found[0]
