"""Pages of small worlds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tree.pages import HOOK, N_TOKENS, Arrays, World, families, model, written
from tests.tree.worlds import CHILD, D_IN, PARENT, exact_sae


@pytest.fixture(scope="module")
def sae() -> Any:
    sae = exact_sae(8, [1, 2, 8])
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture(scope="module")
def odd(sae, tmp_path_factory) -> Path:
    name = "odd </script><script>alert(3)</script>"
    folder = tmp_path_factory.mktemp("page with spaces & ünicode#1")
    return written(folder, sae, World(), N_TOKENS, model=model(), name=name)


@pytest.fixture(scope="module")
def labelled(sae, tmp_path_factory) -> Path:
    """In one file, with labels and made-up changes of the loss."""
    return written(
        tmp_path_factory.mktemp("one file"),
        sae,
        World(),
        N_TOKENS,
        model=model(),
        labels={PARENT: "general", CHILD: "from <i>a</i> file"},
        ablation=np.where(np.arange(8) == CHILD, -0.25, np.nan),
        single_file=True,
    )


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    sae = exact_sae(1000, [10, 1000], d_in=1000)
    return written(tmp_path_factory.mktemp("1000"), sae, Arrays(families(1000, 10)), 2560)


@pytest.fixture(scope="module")
def none(tmp_path_factory) -> Path:
    sae = exact_sae(8)
    x = torch.rand(2560, D_IN, generator=torch.Generator().manual_seed(0)) * 0.55
    return written(tmp_path_factory.mktemp("none"), sae, Arrays(x), 2560)
