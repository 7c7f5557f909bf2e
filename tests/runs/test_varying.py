"""Which SAEs `--vary` gives, and what it refuses before anything loads."""

import re
from typing import Any

import pytest

from sae_lens_matryoshka.runs.varying import plan_sweep

VALUES: dict[str, Any] = {
    "training_tokens": 1_000_000,
    "output_path": "out",
    "checkpoint_path": "checkpoints",
    "logger.log_to_wandb": False,
    "logger.wandb_id": "id",
    "verbose": False,
    "sae.d_in": 16,
    "sae.d_sae": 64,
    "sae.k": 4,
}


def test_all_combinations_each_in_its_folder():
    flags = {"resume_from_checkpoint": ["checkpoints/id/320"], "seed": ["9"]}
    sweep = plan_sweep(VALUES, flags, ["k=2,3", "sae.matryoshka_widths=8/64,4/8/64", "seed=0,1"])
    labels = ["k=2", "k=3"], ["8-64", "4-8-64"], ["seed=0", "seed=1"]
    assert list(sweep.cfgs) == [
        f"{k}_matryoshka_widths={widths}_{seed}"
        for k in labels[0]
        for widths in labels[1]
        for seed in labels[2]
    ]
    name = "k=3_matryoshka_widths=4-8-64_seed=1"
    cfg = sweep.cfgs[name]
    assert (cfg.sae.k, cfg.sae.matryoshka_widths, cfg.seed) == (3, [4, 8, 64], 1)
    assert cfg.output_path == f"out/{name}"
    assert cfg.checkpoint_path == f"checkpoints/id/{name}"
    assert cfg.resume_from_checkpoint == f"checkpoints/id/320/{name}"
    # what they share: the run's own seed orders its data
    assert (sweep.cfg.seed, sweep.cfg.sae.k, sweep.cfg.resume_from_checkpoint) == (9, 2, None)
    assert (sweep.cfg.output_path, sweep.cfg.checkpoint_path) == ("out", "checkpoints/id")


def test_sampled_prefixes_take_each_saes_seed():
    sweep = plan_sweep({**VALUES, "sae.prefix_sampling": "uniform"}, {}, ["seed=5,6"])
    assert [cfg.sae.prefix_seed for cfg in sweep.cfgs.values()] == [5, 6]


def test_a_field_that_an_architecture_lacks_is_left_out_for_it():
    values = {**VALUES, "sae.matryoshka_widths": [8, 64]}
    vary = ["k=2,3", "architecture=matryoshka,batchtopk", "level_weights=1,0.5"]
    sweep = plan_sweep(values, {"sae.bias_level": ["true"]}, vary)
    assert list(sweep.cfgs) == [
        "architecture=matryoshka_k=2_level_weights=1",
        "architecture=matryoshka_k=2_level_weights=0.5",
        "architecture=matryoshka_k=3_level_weights=1",
        "architecture=matryoshka_k=3_level_weights=0.5",
        "architecture=batchtopk_k=2",
        "architecture=batchtopk_k=3",
    ]
    architectures = [cfg.sae.architecture() for cfg in sweep.cfgs.values()]
    assert architectures == ["matryoshka"] * 4 + ["batchtopk"] * 2
    assert sweep.cfgs["architecture=matryoshka_k=3_level_weights=0.5"].sae.bias_level is True


def test_a_required_field_may_be_given_by_varying_it():
    values = {name: value for name, value in VALUES.items() if name != "sae.d_sae"}
    sweep = plan_sweep(values, {}, ["d_sae=64,128"])
    assert [cfg.sae.matryoshka_widths[-1] for cfg in sweep.cfgs.values()] == [64, 128]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["kk=2"], "kk is not a field of a training config; did you mean k"),
        (["sae.kk=2"], "kk is not a field"),
        (
            ["lr=1e-3,1e-4"],
            "--vary lr is not accepted: the SAEs of a sweep share it. What can vary",
        ),
        (["training_tokens=1,2"], "--vary training_tokens is not accepted: the SAEs of a sweep"),
        (["normalize_activations=none,layer_norm"], "normalize_activations is not accepted"),
        (["d_in=8,16"], "--vary d_in is not accepted: the SAEs of a sweep share it"),
        (["dtype=float32"], "--vary dtype is not accepted"),
        (["logger.run_name=a,b"], "--vary logger.run_name is not accepted"),
        (["k"], "--vary 'k' is not accepted: give k=value,value,…"),
        (["k=1,,2"], "give k=value,value,…"),
        (["=1"], "give FIELD=value,value,…"),
        ([""], "give FIELD=value,value,…"),
        (["k=2", "sae.k=3"], "--vary 'k=3' is not accepted: k is varied twice"),
        (["k=2,3,2"], "variant k=2 is given twice"),
        (
            ["matryoshka_widths=8/64,8/65"],
            "matryoshka_widths=8-65: matryoshka_widths=[8, 65] holds 65",
        ),
        (["k=2,many"], "k=many: sae.k='many' is not accepted: give a valid number"),
        (["seed=0,1.5"], "seed=1.5: seed=1.5 is not accepted: give a valid integer"),
        (["seed=0", "k=2,65"], "seed=0_k=65: k=65 is not accepted: give a number above 0 and at m"),
        (
            ["architecture=matryoshka,topkk"],
            "sae.architecture='topkk' is not accepted: give one of",
        ),
        (["architecture=batchtopk,topk", "level_weights=1"], "level_weights is not a field"),
        (["k_start=5,9"], "k_start=5: k_start"),
    ],
)
def test_mistakes(vary, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_sweep(VALUES, {}, vary)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("output_path", None, "output_path=None is not accepted: give the folder for the SAEs"),
        ("from_pretrained_path", "x", "from_pretrained_path='x' is not accepted"),
        ("lrr", 1, "k=2: lrr is not a field of a training config; did you mean lr?"),
    ],
)
def test_runs_that_cannot_be_swept(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_sweep({**VALUES, field: value}, {}, ["k=2,3"])
