"""The configuration: defaults, and the errors that name a field, its value and what is accepted."""

import importlib
import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import sae_lens_matryoshka
from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.training.prefixes import level_of_latent
from sae_lens_matryoshka.training.widths import paper_widths, resolve_widths


def test_paper_widths() -> None:
    assert paper_widths(65536) == [2048, 6144, 14336, 30720, 65536]
    assert paper_widths(3) == [1, 3]
    cfg = MatryoshkaTrainingSAEConfig(d_in=8, d_sae=64, k=4)
    assert cfg.matryoshka_widths == [2, 6, 14, 30, 64]


@given(d_sae=st.integers(1, 10**6))
def test_paper_widths_nest_in_any_dictionary(d_sae: int) -> None:
    widths = paper_widths(d_sae)
    assert widths == resolve_widths(widths, d_sae)
    assert widths[-1] == d_sae
    assert 1 <= len(widths) <= 5


@given(st.sets(st.integers(1, 60), min_size=1))
def test_level_of_a_latent_is_the_first_that_contains_it(ends: set[int]) -> None:
    widths = sorted(ends)
    expected = [
        next(level for level, width in enumerate(widths) if latent < width)
        for latent in range(widths[-1])
    ]
    assert level_of_latent(tuple(widths), "cpu").tolist() == expected


def test_missing_last_width_is_added_with_a_warning_to_a_list_of_our_own() -> None:
    widths = [4, 8]
    with pytest.warns(UserWarning, match=r"\[4, 8\] does not end at d_sae=16"):
        cfg = MatryoshkaTrainingSAEConfig(d_in=8, d_sae=16, k=4, matryoshka_widths=widths)
    assert cfg.matryoshka_widths == [4, 8, 16]
    assert widths == [4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka_widths": [8, 4, 16]}, r"matryoshka_widths=\[8, 4, 16\].*strictly increas"),
        ({"matryoshka_widths": [4, 4, 16]}, r"matryoshka_widths=\[4, 4, 16\].*strictly increas"),
        ({"matryoshka_widths": [0, 16]}, r"holds 0, outside 1 to 16"),
        ({"matryoshka_widths": [-3, 16]}, r"holds -3, outside 1 to 16"),
        ({"matryoshka_widths": [4.5, 16]}, r"holds 4\.5, which is not an integer"),
        ({"matryoshka_widths": [True, 16]}, r"holds True, which is not an integer"),
        ({"matryoshka_widths": [4, 32]}, r"holds 32, outside 1 to 16.*\[1, 2, 4, 8, 16\]"),
        ({"matryoshka_widths": "4,16"}, r"matryoshka_widths='4,16' is not a list"),
        ({"k": 0}, r"k=0 .*above 0 and at most d_sae=16"),
        ({"k": -1.5}, r"k=-1\.5 "),
        ({"k": 17}, r"k=17 .*at most d_sae=16"),
        ({"k": float("nan")}, r"k=nan "),
        ({"k": "many"}, r"k='many' "),
        ({"d_sae": 0}, r"d_sae=0 .*positive integer"),
        ({"implementation": "fast"}, r"implementation='fast'.*'auto', 'reference', 'sparse'"),
        ({"normalize_activations": "layer_norm"}, r"'layer_norm'.*aux_loss_coefficient=1\.0"),
        ({"normalize_activations": "constant_norm_rescale"}, r"'constant_norm_rescale'.*'none'"),
        ({"normalize_activations": "rms"}, r"rms"),
        ({"dtype": "float99"}, r"dtype='float99' .*float32"),
        (
            {
                "normalize_activations": "layer_norm",
                "aux_loss_coefficient": 0,
                "implementation": "sparse",
            },
            r"implementation='sparse'.*'layer_norm'.*'auto' or 'reference'",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatryoshkaTrainingSAEConfig(**{"d_in": 8, "d_sae": 16, "k": 4, **options})


def test_round_trip_through_saelens() -> None:
    cfg = MatryoshkaTrainingSAEConfig(d_in=8, d_sae=16, k=2.5, matryoshka_widths=[4, 16])
    assert cfg.architecture() == "matryoshka"
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert isinstance(again, MatryoshkaTrainingSAEConfig)
    assert again.to_dict() == cfg.to_dict()
    assert isinstance(TrainingSAE.from_dict(cfg.to_dict()), MatryoshkaTrainingSAE)


def test_numpy_numbers_can_be_saved() -> None:
    cfg = MatryoshkaTrainingSAEConfig(
        d_in=np.int64(8),  # type: ignore[arg-type]
        d_sae=np.int32(16),  # type: ignore[arg-type]
        k=np.float32(2.5),  # type: ignore[arg-type]
        matryoshka_widths=list(np.array([4, 16])),
    )
    assert json.loads(json.dumps(cfg.to_dict()))["k"] == 2.5


def test_importing_twice_registers_once() -> None:
    before = dict(SAE_TRAINING_CLASS_REGISTRY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(sae_lens_matryoshka)
    assert SAE_TRAINING_CLASS_REGISTRY.keys() == before.keys()
    assert SAE_TRAINING_CLASS_REGISTRY["matryoshka"][0] is MatryoshkaTrainingSAE


def test_a_name_taken_by_another_package_is_a_clear_message() -> None:
    code = (
        "import sae_lens\n"
        "class Other(sae_lens.BatchTopKTrainingSAE): ...\n"
        "sae_lens.register_sae_training_class('matryoshka', Other, sae_lens.TrainingSAEConfig)\n"
        "try:\n"
        "    import sae_lens_matryoshka\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    message = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'matryoshka' is already taken by __main__.Other" in message
    assert "sae_lens_matryoshka.training.batchtopk.MatryoshkaTrainingSAE" in message
