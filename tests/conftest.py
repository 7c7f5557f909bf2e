"""Settings of every test: one thread, a Hub on loopback, W&B silent unless asked for."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.loopback_hub import LoopbackHub

HUB = LoopbackHub().start()
# The Hub's client reads these when it is imported, in this process and those that tests start.
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # with it the client uploads to another service, unasked
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ.pop("HF_TOKEN", None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic products ask for
else:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when a kernel is defined
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(1)  # the tensors are small, and threads would wait for each other


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub that every client of the tests talks to, empty."""
    HUB.reset()
    yield HUB
    HUB.reset()


SHORT_DEMO = """
from sae_lens_matryoshka.demo import compare

run_config = compare.run_config

def short_run_config(sae, seed=0):
    cfg = run_config(sae, seed)
    cfg.training_tokens, cfg.lr_decay_steps = 1024 * 120, 20
    return cfg

compare.run_config, compare.N_EVAL_BATCHES = short_run_config, 4
del compare.EVALUATIONS["absorption"]
compare.EVALUATIONS["sparse_probing"].update(probe_train_set_size=200, probe_test_set_size=100)
compare.EVALUATIONS["core"].update(
    n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
)
compare.main(0)
"""


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished demo: the one that DEMO_RUN names, or else of a short one."""
    if "DEMO_RUN" in os.environ:
        return Path(os.environ["DEMO_RUN"])
    from sae_lens_matryoshka.demo import run

    out = tmp_path_factory.mktemp("demo") / "out"
    run_command = subprocess.run

    def run_short(command: list[str], **options):
        assert command == [sys.executable, "-m", "sae_lens_matryoshka.demo.compare", "0"]
        return run_command([sys.executable, "-c", SHORT_DEMO], **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, n in {"N_TEXTS": 2000, "N_HELD_OUT": 400, "N_LABELLED": 1200}.items():
            patch.setattr(run, name, n)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(subprocess, "run", run_short)
        assert run.run_demo(out) == 0
    return out


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return f"kernels (-m gpu): on {where}"
