"""Where the kernels' tests run: on a GPU where there is one, else in Triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
