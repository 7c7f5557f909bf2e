"""Settings of every test: one thread, a Hub on loopback, W&B silent unless asked for."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run keeps its process off the Hub, which later tests need."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The Hub that every client of the tests talks to, empty."""
    HUB.reset()
    yield HUB
    HUB.reset()


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return f"kernels (-m gpu): on {where}"
