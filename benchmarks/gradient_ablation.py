"""What the estimate of `tree --ablation` is worth: against exact ablation of latents on tokens.

    python benchmarks/gradient_ablation.py SAE PAGE/gathered

PAGE is a folder of `sae-matryoshka tree SAE --dataset … --out PAGE`. Run it where the model is
found. In each of some contexts it takes random latents on random tokens where they fire, ablates
them one by one with the SAE's error kept, and compares the change of the loss with the gradient's.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.load_model import load_model
from scipy import stats
from tqdm import tqdm

from sae_lens_matryoshka import load_sae
from sae_lens_matryoshka.tree.ablation import _gradient
from sae_lens_matryoshka.tree.gathered import Gathered

LENGTH, FIRST = 128, 2  # tokens of a context, and the first that may be ablated
N_AFTER = 28  # tokens that follow an ablated one, at least


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sae", type=Path)
    parser.add_argument("gathered", type=Path)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=16, help="of a latent and a token, in each")
    args = parser.parse_args()
    sae = load_sae(args.sae, dtype="float32")
    metadata = sae.cfg.metadata
    model: Any = load_model(
        metadata.model_class_name, metadata.model_name, "cpu", hook_names=[metadata.hook_name]
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gathered = Gathered(args.gathered)
    shards = np.linspace(0, len(gathered.index.shards) - 1, args.contexts).astype(int)
    random = np.random.default_rng(0)
    pairs = []
    for shard in tqdm(shards, unit=" contexts"):
        pairs += _pairs(sae, model, gathered.tokens(shard)[:1, :LENGTH], args.pairs, random)
    estimated, exact = np.array(pairs).T
    same_sign = np.mean(estimated * exact > 0)
    rank, plain = stats.spearmanr(estimated, exact)[0], stats.pearsonr(estimated, exact)[0]
    print(
        f"{len(pairs)} pairs: the same sign in {same_sign:.0%}, rank correlation {rank:.2f}, "
        f"correlation {plain:.2f}"
    )


def _pairs(
    sae: Any, model: Any, text: np.ndarray, n: int, random: np.random.Generator
) -> list[tuple[float, float]]:
    """The estimated and the exact change of the loss, for each of `n` pairs."""
    gradient = _gradient(sae, model, text)
    tokens = torch.from_numpy(text).long()
    hook_name = sae.cfg.metadata.hook_name
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor, hook: Any) -> None:
        kept.append(x)

    with torch.no_grad():
        with model.hooks(fwd_hooks=[(hook_name, keep)]):
            model(tokens, return_type="logits")
        [x] = kept
        acts = sae.encode(x)[0]
        sites = (acts[FIRST : LENGTH - N_AFTER] > 0).nonzero()
        sites = sites[random.permutation(len(sites))[:n]].tolist()
        changed = x.repeat(len(sites) + 1, 1, 1)  # the first stays as it is
        estimated = []
        for i, (place, latent) in enumerate(sites, start=1):
            part = acts[place + FIRST, latent] * sae.W_dec[latent]
            changed[i, place + FIRST] -= part
            estimated.append(-float(gradient[place + FIRST] @ part))
        with model.hooks(fwd_hooks=[(hook_name, lambda y, hook: changed)]):
            logits = model(tokens.expand(len(changed), -1), return_type="logits")
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(),
            tokens[:, 1:].expand(len(changed), -1),
            reduction="none",
        ).sum(1)
    return list(zip(estimated, (losses[1:] - losses[0]).tolist(), strict=True))


if __name__ == "__main__":
    main()
