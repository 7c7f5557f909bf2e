"""Every kernel compiles for the GPUs it is meant for, by Triton's own compiler, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

KERNELS = {
    "_collect",
    "_collect_again",
    "_count",
    "_dot",
    "_find_digit",
    "_histogram",
    "_judge_limit",
    "_mix",
    "_order",
    "_pick_codes",
    "_place",
    "_rank",
    "_residuals",
    "_sort_rows",
    "_sum_by_latent",
    "_sum_chunk",
}
SCREEN = {"_bound", "_round_rows", "_score"}


# what these read most of: rows of matrices
STREAMING = {
    "_collect",
    "_count",
    "_dot",
    "_mix",
    "_residuals",
    "_round_rows",
    "_score",
    "_sum_by_latent",
    "_sum_chunk",
}


@pytest.mark.parametrize(
    ("capability", "d_in", "d_sae", "dtype", "autocast", "batch_size"),
    [
        (90, 2304, 65536, "float32", False, 64),
        (90, 2304, 65536, "float32", True, 64),
        (80, 776, 1001, "bfloat16", False, 64),  # nothing here is a multiple of 16
        (80, 64, 512, "float32", False, 1),  # what can be 1 is
    ],
)
def test_compiles(
    capability: int, d_in: int, d_sae: int, dtype: str, autocast: bool, batch_size: int
) -> None:
    arguments = [str(it) for it in (capability, d_in, d_sae, dtype, autocast, batch_size)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled_kernels", *arguments],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    is_screened = dtype == "float32" and not autocast
    kernels = KERNELS | SCREEN if is_screened else KERNELS
    assert {record["kernel"] for record in records} == kernels
    for record in records:
        assert record["stack"] <= 8, "more than two registers are spilled to memory"
        assert record["registers"] * record["threads"] <= 2**14, (
            "an SM holds fewer than four programs"
        )
        assert record["shared"] <= 48 * 1024, "more than every GPU gives to a program"
    if d_in % 256 == 0:
        loads = {
            kernel: max(record["load"] for record in records if record["kernel"] == kernel)
            for kernel in STREAMING & kernels
        }
        assert set(loads.values()) == {128}, loads
        for record in records:
            if record["kernel"] == "_collect":
                assert 7 * record["registers"] * record["threads"] <= 2**16, "see n_programs"
