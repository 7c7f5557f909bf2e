"""Compiles every kernel for CUDA as a step launches it, on a machine that needs no GPU.

`python -m tests.kernels.compiled_kernels CAPABILITY D_IN D_SAE DTYPE AUTOCAST BATCH_SIZE` prints a
line of JSON for each kernel: its name, threads of a program, registers of a thread, spilled bytes,
shared memory in bytes, and the bits of its widest load. With a BATCH_SIZE of 1 there is one level,
and one code to select, counted in 64 bits: Triton makes constants of integers that are 1. Not under
TRITON_INTERPRET, with which kernels are no longer compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from sae_lens_matryoshka.kernels import (
    cut_triton,
    layout_triton,
    screen_triton,
    selection_triton,
    sums_triton,
)
from sae_lens_matryoshka.kernels.codes import Codes
from sae_lens_matryoshka.training.prefixes import level_of_latent
from sae_lens_matryoshka.training.widths import paper_widths

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source_of(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[ASTSource, dict]:
    """The kernel specialised as a launch with these arguments specialises it, and its options."""
    options = {"num_warps": kwargs.pop("num_warps", 4)}
    named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        is_tensor = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (not is_tensor and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def launches(
    d_in: int, d_sae: int, dtype: torch.dtype, autocast: bool, batch_size: int
) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """What one step launches, each kernel once for each way in which it is specialised."""
    recorded: list[tuple[JITFunction, tuple, dict[str, Any]]] = []

    def record(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        recorded.append(
            (kernel, args, {k: v for k, v in kwargs.items() if k not in ("grid", "warmup")})
        )

    JITFunction.run = record  # type: ignore[method-assign]
    n, n_keep = (128, 1) if batch_size == 1 else (10 * batch_size, 10 * batch_size)
    cut_triton._INT32_SCORES = 0 if batch_size == 1 else 2**31
    widths = [d_sae] if batch_size == 1 else paper_widths(d_sae)
    x = torch.randn(batch_size, d_in, dtype=dtype)
    W_dec = torch.randn(d_sae, d_in, dtype=dtype)
    biases, norms = W_dec[:, 0].clone(), W_dec.norm(dim=-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # the kernels are not run, so neither screen settles anything
        selection_triton.select(x, W_dec.T, biases, norms, n_keep, torch.nan, "screen")
    if dtype == torch.float32 and not autocast:
        screen_triton.select_screened(x, W_dec.T, biases, None, n_keep, 1.0)
    latents = torch.arange(n) % d_sae
    values = torch.rand(n, dtype=torch.float32 if autocast else dtype)
    codes = Codes(torch.arange(n) * batch_size // n, latents, values, values, 0.0)
    levels = level_of_latent(tuple(widths), "cpu")
    for is_sorted in (False, True):
        _, layout = layout_triton.lay_out(codes, batch_size, levels, len(widths), is_sorted)
    residuals, losses, sae_out = sums_triton.level_residuals(
        values, W_dec, x[0], x, layout, len(widths)
    )
    for stop_gradient in ("none", "all", "inner"):
        for grad_out in (None, sae_out):
            sums_triton.level_gradients(residuals, losses, grad_out, stop_gradient, W_dec, layout)
    for with_totals in (False, True):
        sums_triton.sum_by_latent(x, layout.bags, values.to(dtype), layout, with_totals)
    return recorded


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert numbers is not None, said
    return {"registers": int(numbers[1]), "stack": int(numbers[2])}


def widest_load(ptx: str) -> int:
    """Bits that a thread loads from global memory at once."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+) ", ptx)
    return max((int(n or 1) * int(bits) for n, bits in loads), default=0)


def main(
    capability: int, d_in: int, d_sae: int, dtype: str, autocast: bool, batch_size: int
) -> None:
    target = GPUTarget("cuda", capability, 32)
    seen = set()
    steps = launches(d_in, d_sae, getattr(torch, dtype), autocast, batch_size)
    for kernel, args, kwargs in steps:
        source, options = source_of(kernel, args, kwargs)
        key = (kernel.__name__, str(source.signature), str(source.constants), str(source.attrs))
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_kernel(source, target=target, options=options)
        record = {"kernel": kernel.__name__, "shared": compiled.metadata.shared}
        record |= resources(compiled.asm["cubin"])
        record["threads"] = 32 * options["num_warps"]
        record["load"] = widest_load(compiled.asm["ptx"])
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    capability, d_in, d_sae, dtype, autocast, batch_size = sys.argv[1:]
    main(int(capability), int(d_in), int(d_sae), dtype, autocast == "True", int(batch_size))
