"""Run by torchrun: selects and trains on shares of joined batches, and on the whole of them."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.kernels.joined_selection import select_joined
from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from tests.runs.variants import SHARDED, VARIANTS, variant_config
from tests.steps import relative_error

N_STEPS, BATCH_SIZE, D_IN, D_SAE = 30, 24, 8, 48


def train(
    name: str,
    dtype: str,
    batches: torch.Tensor,
    group: dist.ProcessGroup | None,
    shard_moments: bool = False,
) -> dict[str, torch.Tensor]:
    """What a training depends on and leaves behind."""
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(variant_config(name, D_IN, D_SAE, dtype).to_dict())
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=N_STEPS * BATCH_SIZE,
        device="cpu",
        autocast=False,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=5,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=10,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH_SIZE,
        dead_feature_window=3,
        feature_sampling_window=20,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=4,
    )
    trainer = MatryoshkaTrainer(
        cfg=cfg,
        sae=sae,
        data_provider=iter(batches),
        evaluator=None,
        group=group,
        shard_moments=shard_moments,
    )
    losses: list[torch.Tensor] = []
    step = trainer.step

    def recording_step(batch: torch.Tensor) -> Any:
        output = step(batch)
        losses.append(output.loss.detach())
        return output

    trainer.step = recording_step  # type: ignore[method-assign]
    trainer.fit()
    sae.join_statistics()
    loss = torch.stack(losses)
    if group is not None:
        dist.all_reduce(loss, group=group)
        loss /= dist.get_world_size(group)
    saved = dict(sae.state_dict())
    sae.process_state_dict_for_saving_inference(saved)
    return {
        **dict(sae.state_dict()),
        **{f"saved.{key}": value for key, value in saved.items()},
        "loss": loss,
        "firings": trainer.act_freq_scores,
        "passes_since_fired": trainer.n_forward_passes_since_fired,
        "n_training_samples": torch.tensor(trainer.n_training_samples),
    }


def select(scores: torch.Tensor, n_keep: int) -> Codes:
    """The n_keep largest positive scores, ties by index."""
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:n_keep]
    kept = order[(flat[order] <= 0).logical_not()].sort().values  # NaN is kept
    rows, latents = kept // scores.shape[1], kept % scores.shape[1]
    return Codes(rows, latents, flat[kept], flat[kept], cut=0.0)


def score_matrices(n: int) -> dict[str, torch.Tensor]:
    """Scores of n processes with 4 rows each."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4 * n, 32, generator=generator)
    uneven = plain.abs()
    uneven[:4] += 10  # all that are kept are on rank 0
    few = plain.clone()
    few[few < few.flatten().topk(7).values[-1]] = -1
    nan = plain.clone()
    nan[5, 3] = -torch.nan
    return {
        "plain": plain,
        "float64": plain.double() + 1e-12 * plain.T.double().reshape(plain.shape),
        "bfloat16": plain.bfloat16(),
        "uneven": uneven,
        "fewer positive than are kept": few,
        "none positive": -uneven,
        "all equal": torch.ones_like(plain),
        "ties": (4 * plain).round(),
        "tiny and huge": plain * 10.0 ** torch.randint(-40, 38, plain.shape, generator=generator),
        "NaN": nan,
        "infinite": plain / (plain.abs() > 0.1),
    }


def misplaced(scores: torch.Tensor, n_keep: int) -> int:
    """On how many entries `select_joined` differs from `select` of the joined batch."""
    rank = dist.get_rank()
    own = scores[4 * rank : 4 * rank + 4]
    group = dist.group.WORLD
    assert group is not None
    codes = select_joined(lambda n: select(own, n), n_keep, own.numel(), group)
    is_kept = torch.zeros_like(own, dtype=torch.bool)
    is_kept[codes.rows, codes.latents] = True
    expected = torch.zeros_like(scores, dtype=torch.bool)
    joined = select(scores, n_keep)
    expected[joined.rows, joined.latents] = True
    return int((is_kept != expected[4 * rank : 4 * rank + 4]).sum())


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    errors: dict[str, dict[str, float]] = {}
    for name, scores in score_matrices(n).items():
        wrong = torch.tensor([misplaced(scores, n_keep) for n_keep in (0, 1, 20, scores.numel())])
        dist.all_reduce(wrong)
        errors[name] = {"misplaced": int(wrong.sum())}
    for name in VARIANTS:
        for dtype in ("float64", "float32"):
            generator = torch.Generator().manual_seed(1)
            shape = (N_STEPS + 4, BATCH_SIZE, D_IN)
            batches = torch.randn(shape, generator=generator, dtype=torch.float64).to(
                getattr(torch, dtype)
            )
            share = batches.unflatten(1, (n, -1))[:, rank]
            joined = train(name, dtype, share, dist.group.WORLD, name in SHARDED)
            if rank == 0:
                alone = train(name, dtype, batches, None)
                errors[f"{name} {dtype}"] = {
                    key: relative_error(joined[key], value) for key, value in alone.items()
                }
    if rank == 0:
        out.write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
