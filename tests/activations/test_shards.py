"""Every format and dtype gives the same rows, and what is wrong with a file is named."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features, Value
from datasets import Sequence as Vector
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka.activations.index import BLOCK_ROWS
from sae_lens_matryoshka.activations.shards import Activations, open_activations

D_IN, N_ROWS = 8, 700  # three blocks, the last one not full
Make = Callable[[Path], Any]


def rows(n: int = N_ROWS, d_in: int = D_IN) -> torch.Tensor:
    """Rows that every floating dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-128, 129, (n, d_in), generator=generator).float() / 8


def all_rows(activations: Activations) -> torch.Tensor:
    return torch.cat(list(activations.chunks(2))).float()


def npy(path: Path, x: torch.Tensor | None = None, dtype: str = "float32") -> Path:
    np.save(path, (rows() if x is None else x).numpy().astype(dtype))
    return path


def st(path: Path, dtype: torch.dtype, x: torch.Tensor | None = None) -> Path:
    save_file({"any name": (rows() if x is None else x).to(dtype)}, path)
    return path


def int8(path: Path, scales: torch.Tensor | None = None) -> Path:
    scales = torch.full((N_ROWS,), 1 / 8) if scales is None else scales
    values = (rows() * 8).clamp(-127, 127).to(torch.int8)
    save_file({"activations": values, "scales": scales}, path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    npy(path / "0.npy", rows()[:300], "float16")
    st(path / "1.safetensors", torch.float16, rows()[300:301])
    npy(path / "2.npy", rows()[301:].reshape(3, 133, D_IN), "float16")
    (path / ".3.unfinished.npy").write_text("half a shard")
    (path / "notes.txt").write_text("of another kind")
    return path


def dataset(dtype: str, shape: tuple[int, ...] = (D_IN,)) -> Dataset:
    x = rows().reshape(-1, *shape).numpy()
    feature: Any = Vector(Value(dtype)) if len(shape) == 1 else Array2D(shape, dtype)
    features = Features({"blocks.1.hook": feature, "token_ids": Vector(Value("int32"))})
    return Dataset.from_dict(
        {"blocks.1.hook": list(x), "token_ids": [[1, 2]] * len(x)}, features=features
    )


def saved(data: Any, path: Path) -> Path:
    data.save_to_disk(path)
    return path


FORMATS: dict[str, Make] = {
    **{
        f"npy {dtype}": lambda d, dtype=dtype: npy(d / "x.npy", dtype=dtype)
        for dtype in ("float16", "float32", "float64")
    },
    **{
        f"safetensors {dtype}": lambda d, dtype=dtype: st(d / "x.safetensors", dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    },
    "npy of three dimensions": lambda d: npy(d / "x.npy", rows().reshape(7, 100, D_IN)),
    "folder": lambda d: folder(d / "shards"),
    "path as text": lambda d: str(folder(d / "shards")),
    "vectors on disk": lambda d: saved(dataset("float32"), d / "data"),
    "vectors in float16": lambda d: dataset("float16"),
    "arrays on disk": lambda d: saved(dataset("float32", (7, D_IN)), d / "data"),
    "chosen rows of a data set": lambda d: Dataset.from_dict({"x": rows().flip(0).tolist()}).select(
        range(N_ROWS)[::-1]
    ),
    "tensor": lambda d: rows(),
    "array": lambda d: rows().numpy(),
    "tensors": lambda d: [*rows().to(torch.bfloat16).split(99)],
    "opened before": lambda d: open_activations(rows()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    activations = open_activations(FORMATS[name](tmp_path))
    assert (activations.n_rows, activations.d_in) == (N_ROWS, D_IN)
    assert torch.equal(all_rows(activations), rows())
    sizes = [len(activations.read_block(i)) for i in range(len(activations.block_rows))]
    assert sizes == activations.block_rows.tolist()
    assert max(sizes) <= BLOCK_ROWS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8_is_scaled_row_by_row(tmp_path: Path, dtype: torch.dtype) -> None:
    scales = torch.rand(N_ROWS, 1, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.1
    activations = open_activations(int8(tmp_path / "x.safetensors", scales))
    assert activations.dtype == torch.int8
    expected = (rows() * 8).clamp(-127, 127) * scales.float()
    assert torch.equal(all_rows(activations), expected)


def test_hook_of_a_data_set_is_kept() -> None:
    assert open_activations(dataset("float32")).metadata == {"hook_name": "blocks.1.hook"}
    assert open_activations(rows()).metadata == {}


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    for i in range(300):
        np.save(tmp_path / f"{i:03}.npy", np.full((2, D_IN), i, np.float16))
    activations = open_activations(tmp_path)
    assert torch.equal(all_rows(activations)[:, 0], torch.arange(300.0).repeat_interleave(2))
    assert activations._open.cache_info().currsize == 256


def test_reading_imports_neither_saelens_nor_transformerlens(tmp_path: Path) -> None:
    npy(tmp_path / "x.npy")
    script = (
        "import sys; from sae_lens_matryoshka.activations.batches import ActivationBatches\n"
        "assert next(ActivationBatches(sys.argv[1], 64)).shape == (64, 8)\n"
        "print([name for name in ('sae_lens', 'transformer_lens') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.npy")]
    assert subprocess.run(command, stdout=-1, text=True, check=True).stdout == "[]\n"


def truncated(path: Path, n_bytes: int = 1000) -> Path:
    path.write_bytes(path.read_bytes()[:-n_bytes])
    return path


def with_nan(x: torch.Tensor, row: int, value: float = torch.nan) -> torch.Tensor:
    x = x.clone()
    x[row, 3] = value
    return x


def two(d: Path, first: torch.Tensor, second: torch.Tensor) -> Path:
    np.save(d / "0.npy", first.numpy())
    np.save(d / "1.npy", second.numpy())
    return d


def tensors(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


WRONG: dict[str, tuple[Make, str]] = {
    "missing": (lambda d: d / "none", "none' is not accepted: give an existing folder"),
    "other file": (lambda d: FORMATS["path as text"](d) + "/notes.txt", "notes.txt' is not acc"),
    "no shards": (lambda d: d, "holds no shards: give files of .npy or .safetensors"),
    "no tensors": (lambda d: [], "the activations holds no shards"),
    "widths": (
        lambda d: two(d, rows(4), rows(4, 9)),
        r"1.npy and .*0.npy differ: columns 9 and 8",
    ),
    "dtypes": (
        lambda d: two(d, rows(4), rows(4).half()),
        r"1.npy and .*0.npy differ: numbers of type float16 and float32",
    ),
    "no columns": (lambda d: npy(d / "x.npy", rows(4, 0)), "x.npy holds rows without columns"),
    "one dimension": (lambda d: npy(d / "x.npy", rows()[0]), r"x.npy .* shape \(8,\): give two"),
    "integers": (lambda d: npy(d / "x.npy", dtype="int64"), "x.npy holds numbers of type int64"),
    "int8 without scales": (
        lambda d: tensors(d / "x.safetensors", activations=rows().to(torch.int8)),
        "x.safetensors holds numbers of type int8: give .* int8 activations and their scales",
    ),
    "scales of other rows": (
        lambda d: int8(d / "x.safetensors", torch.ones(5)),
        "holds 5 scales for 700 rows of type int8: give one for each",
    ),
    "scales of floats": (
        lambda d: tensors(d / "x.safetensors", activations=rows(), scales=torch.ones(N_ROWS)),
        "holds 700 scales for 700 rows of type float32",
    ),
    "two tensors": (
        lambda d: tensors(d / "x.safetensors", a=rows(), b=rows()),
        "holds 2 tensors: give one, or call the one to read 'activations'",
    ),
    "truncated npy": (lambda d: truncated(npy(d / "x.npy")), "x.npy can't be read"),
    "truncated safetensors": (
        lambda d: truncated(st(d / "x.safetensors", torch.float32)),
        "x.safetensors can't be read",
    ),
    "pickle": (
        lambda d: (np.save(d / "x.npy", np.array([{}])), d / "x.npy")[1],
        "x.npy can't be read",
    ),
    "splits": (
        lambda d: saved(DatasetDict(train=dataset("float32")), d / "data"),
        "data holds the splits train: give one's folder",
    ),
    "no vectors": (
        lambda d: Dataset.from_dict({"text": ["a"], "n": [1.0]}),
        "the data set needs one column of vectors of numbers; it has none",
    ),
    "two columns": (
        lambda d: Dataset.from_dict({"a": [[1.0]], "b": [[1.0]]}),
        "needs one column of vectors of numbers; it has a, b",
    ),
    "empty data set": (lambda d: dataset("float32").select([]), "the data set is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistake_is_named_before_reading(name: str, tmp_path: Path) -> None:
    make, message = WRONG[name]
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_activations(source)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_number_that_is_not_finite_is_named_when_read(
    tmp_path: Path, dtype: str, value: float
) -> None:
    two(tmp_path, rows(300), with_nan(rows(600), 517, value))
    activations = open_activations(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / '1.npy'}, row 517: not finite.")):
        all_rows(activations)


def test_large_numbers_are_finite() -> None:
    x = torch.full((300, D_IN), 3e38)
    assert torch.equal(all_rows(open_activations(x)), x)


def test_ragged_data_set_is_named_when_read() -> None:
    data = Dataset.from_dict({"x": [[1.0, 2.0], [1.0, 2.0], [3.0]]})
    with pytest.raises(ValueError, match="column x, items 0 to 2: not all of the shape"):
        all_rows(open_activations(data))


def test_opening_reads_no_rows(tmp_path: Path) -> None:
    path = st(tmp_path / "x.safetensors", torch.float32)
    activations = open_activations(path)
    st(path, torch.float32, rows() + 1)
    assert torch.equal(all_rows(activations), load_file(path)["any name"])
