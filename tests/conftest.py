"""Settings of every test: two threads at most, no network, W&B silent unless a test asks for it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by the clients when they are imported
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")

import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(min(2, os.cpu_count() or 1))
