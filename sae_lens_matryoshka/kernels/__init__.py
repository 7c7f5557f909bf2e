"""The sparse arithmetic of a step, in PyTorch and as Triton kernels."""
