"""The levels of a Matryoshka SAE as pictures: handwritten digits, no language model.

    pip install sae-lens-matryoshka scikit-learn
    python examples/vision.py --out digits

A small convolutional network learns scikit-learn's digits. Its last hidden layer is written as an
array, and an SAE trains on it whose first 8 latents, first 24 and all 64 must each reconstruct it.
What is printed and drawn comes from images held out of both. For your own array, see `train_sae`.

The first latents are active on many images of several digits, later ones on few images, mostly of
one digit. The nine strongest images hide this: on every level, a latent's are mostly of one digit.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.levels.report import level_table
from sae_lens_matryoshka.levels.stats import measure_levels
from sae_lens_matryoshka.runs.runner import MatryoshkaTrainingRunner

WIDTHS = [8, 24, 64]  # of the levels
D_IN = 64  # width of the layer
N_TRAIN = 1347  # images; the other 450 are held out


def load_images() -> tuple[Tensor, Tensor]:
    """Each image in 9 places on a larger canvas, (1797, 9, 10, 10), and its digit, (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    images = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 8, 8) / 16
    places = [nn.functional.pad(images, (x, 2 - x, y, 2 - y)) for y in range(3) for x in range(3)]
    return torch.stack(places, dim=1), torch.tensor(labels)[order]


def train_network(images: Tensor, labels: Tensor) -> nn.Sequential:
    """A network that tells which digit is on an image, from images (n, 10, 10)."""
    conv = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)]
    body = [nn.Unflatten(1, (1, 10)), conv[0], nn.ReLU(), conv[1], nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*body, nn.Linear(288, D_IN), nn.ReLU(), nn.Linear(D_IN, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(1000):
        batch = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return network.requires_grad_(False)


def train_sae(activations: Path, out: Path, n_steps: int) -> SAE:
    """Train an SAE on an array (rows, D_IN), save it, and load it as any SAE of SAELens."""
    cfg = LanguageModelSAERunnerConfig(
        sae=MatryoshkaTrainingSAEConfig(
            d_in=D_IN,
            d_sae=WIDTHS[-1],
            matryoshka_widths=WIDTHS,
            k=4,  # latents that are active on a row, on average
            normalize_activations="expected_average_only_in",  # lr then suits any scale
        ),
        training_tokens=n_steps * 512,  # rows; the array is repeated, each time in another order
        train_batch_size_tokens=512,
        lr=2e-3,
        dead_feature_window=100,  # a latent is dead after as many steps without activity
        output_path=str(out / "sae"),
        checkpoint_path=str(out / "checkpoints"),  # if the run is interrupted
        logger=LoggingConfig(log_to_wandb=False),
    )
    MatryoshkaTrainingRunner(cfg, activations=activations).run()
    return SAE.load_from_disk(out / "sae")


def shares_of_digits(weights: Tensor, labels: Tensor) -> Tensor:
    """Each digit's share, (10, latents), of the weights of images, (images, latents)."""
    sums = torch.stack([weights[labels == digit].sum(0) for digit in range(10)])
    return sums / sums.sum(0)


def one_digit(weights: Tensor, labels: Tensor) -> str:
    """The share of each latent's commonest digit, averaged over latents."""
    return f"{shares_of_digits(weights, labels).amax(0).mean():.0%}"


def draw(row: SubFigure, color: str, latents: list[int], images: Tensor, shares: Tensor) -> None:
    """Draw 9 images of each latent, (9, latents, 10, 10), and digits' shares, (10, latents)."""
    axes = row.subplots(2, 8, height_ratios=[3, 1])
    axes[0, 0].set_ylabel("nine strongest")
    axes[1, 0].set_ylabel("digits of all")
    for tiles, bars, latent in zip(*axes, latents, strict=False):
        framed = nn.functional.pad(images[:, latent], (1, 1, 1, 1), value=1)
        tiles.imshow(framed.view(3, 3, 12, 12).transpose(1, 2).reshape(36, 36), cmap="gray")
        tiles.set(title=f"latent {latent}", xticks=[], yticks=[], frame_on=False)
        bars.bar(range(10), shares[:, latent], color=color)
        bars.set(ylim=(0, 1), xticks=range(10), yticks=[], frame_on=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="A Matryoshka SAE on a network of digits.")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the SAE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of sums, and so the numbers, depend on it

    images, labels = load_images()
    network = train_network(images[:N_TRAIN].flatten(0, 1), labels[:N_TRAIN].repeat_interleave(9))
    activations = network[:-1](images.flatten(0, 1)).unflatten(0, images.shape[:2])
    np.save(args.out / "activations.npy", activations[:N_TRAIN].numpy())
    sae = train_sae(args.out / "activations.npy", args.out, args.steps)

    images, labels, activations = images[N_TRAIN:], labels[N_TRAIN:], activations[N_TRAIN:]
    is_right = network[-1](activations).argmax(-1) == labels[:, None]
    print(f"The network is right on {is_right.float().mean():.1%} of the held-out images.\n")
    print(level_table(measure_levels(sae, activations)), end="\n\n")

    codes = sae.encode(activations).detach()  # (images, places, latents)
    active = (codes > 0).float().mean(1)  # in which share of its places an image activates a latent
    strengths, places = codes.max(1)  # where a latent is strongest on an image
    top = strengths.topk(9, dim=0)
    is_top = torch.zeros_like(active).scatter(0, top.indices, 1)
    top_images = images[top.indices, places.gather(0, top.indices)]
    shuffled = labels[torch.randperm(len(labels))]
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    rows = figure.subfigures(len(WIDTHS), squeeze=False, hspace=0.03)[:, 0]
    for row, color, (start, end) in zip(
        rows, ("C0", "C1", "C2"), pairwise([0, *WIDTHS]), strict=True
    ):
        latents = [i for i in range(start, end) if top.values[-1, i] > 0]  # on 9 images or more
        on, on_top = active[:, latents], is_top[:, latents]
        text = (
            f"Latents {start} to {end - 1}: active on {on.mean():.0%} of the images on average; "
            f"{one_digit(on, labels)} of these, {one_digit(on_top, labels)} of the nine strongest "
            f"show one digit (shuffled: {one_digit(on, shuffled)}, {one_digit(on_top, shuffled)})."
        )
        print(text)
        row.suptitle(text, x=0.01, ha="left", color=color)
        draw(row, color, latents[:8], top_images, shares_of_digits(active, labels))
    figure.savefig(args.out / "digits_levels.png", dpi=110)


if __name__ == "__main__":
    main()
