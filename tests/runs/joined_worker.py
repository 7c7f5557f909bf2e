"""Run by torchrun: trains on shares of joined batches, and on rank 0 on the whole batches too."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_matryoshka.runs.trainer import MatryoshkaTrainer
from tests.runs.variants import VARIANTS, variant_config

N_STEPS, BATCH_SIZE, D_IN, D_SAE = 50, 24, 8, 48


def train(
    name: str, dtype: str, batches: torch.Tensor, group: dist.ProcessGroup | None
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
        cfg=cfg, sae=sae, data_provider=iter(batches), evaluator=None, group=group
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


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    errors: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        for dtype in ("float64", "float32"):
            generator = torch.Generator().manual_seed(1)
            shape = (N_STEPS + 4, BATCH_SIZE, D_IN)
            batches = torch.randn(shape, generator=generator, dtype=torch.float64).to(
                getattr(torch, dtype)
            )
            share = batches.unflatten(1, (n, -1))[:, rank]
            joined = train(name, dtype, share, dist.group.WORLD)
            alone = train(name, dtype, batches, None)
            errors[f"{name} {dtype}"] = {
                key: (
                    (joined[key] - alone[key]).double().norm() / (1 + alone[key].double().norm())
                ).item()
                for key in alone
            }
    if rank == 0:
        out.write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
