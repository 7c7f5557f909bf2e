"""Caching: the shards hold the model's activations, survive what stops them, and are checked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, StandardTrainingSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka import cli
from sae_lens_matryoshka.activations.caching import Cache
from sae_lens_matryoshka.activations.index import BLOCK_ROWS, Index, block_checksums
from sae_lens_matryoshka.activations.shards import open_activations
from tests.cli.conftest import own_environment, refusal  # noqa: F401
from tests.tiny import D_MODEL, N_CTX, runner_config, tiny_model, token_dataset

N_ROWS, BATCH = 2000, 4 * N_CTX  # rows of a batch of prompts
MODEL, DATA = tiny_model(), token_dataset()
HERE = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}


def config(folder: Path, **options: Any) -> LanguageModelSAERunnerConfig[Any]:
    settings = {"training_tokens": N_ROWS, "store_batch_size_prompts": 4, **options}
    return runner_config(StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=1), folder, **settings)


def cache(folder: Path, dtype: str = "float32", rows: int = 10 * BATCH, **options: Any) -> Cache:
    return Cache(config(folder, **options), folder / "acts", dtype, rows)


def write(cache: Cache) -> bool:
    return cache.write(override_model=MODEL, override_dataset=DATA)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def model_rows(n_batches: int, **options: Any) -> torch.Tensor:
    """What SAELens' store gives, in its order."""
    store = ActivationsStore.from_config(MODEL, config(Path(), **options), DATA)
    return torch.cat([store.get_filtered_llm_batch() for _ in range(n_batches)])


def sort(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 0].argsort()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert write(cache(folder)) is True
    return folder / "acts"


@pytest.fixture
def acts(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "acts"))


def test_shards_hold_the_models_activations_mixed(whole: Path) -> None:
    index = Index.read(whole)
    assert [shard.n_rows for shard in index.shards] == [640, 640, 640, 80]
    assert [shard.n_batches for shard in index.shards] == [10, 10, 10, 2]
    expected = model_rows(32)[:N_ROWS]
    for i, shard in enumerate(index.shards):
        rows = load_file(whole / shard.name)["activations"]
        of_shard = expected[640 * i :][: len(rows)]
        assert not torch.equal(rows, of_shard)
        torch.testing.assert_close(sort(rows), sort(of_shard), rtol=0, atol=0)
    activations = open_activations(whole)
    assert (activations.n_rows, activations.d_in) == (N_ROWS, D_MODEL)
    assert activations.metadata == {
        "model_name": "tiny",
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "hook_name": "blocks.1.hook_resid_pre",
        "hook_head_index": None,
        "dataset_path": "tokens",
        "context_size": N_CTX,
        "seqpos_slice": [None],
        "prepend_bos": False,
        "exclude_special_tokens": False,
        "sequence_separator_token": "bos",
        "disable_concat_sequences": False,
    }


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [("float16", 5e-4, 0), ("bfloat16", 4e-3, 0), ("int8", 0, 1 / 254)]
)
def test_dtypes_on_disk(tmp_path: Path, whole: Path, dtype: str, rtol: float, atol: float) -> None:
    write(cache(tmp_path, dtype))
    rows = torch.cat(list(open_activations(tmp_path / "acts").chunks(4))).float()
    exact = torch.cat(list(open_activations(whole).chunks(4)))
    allowed = rtol * exact.abs() + atol * exact.abs().amax(1, keepdim=True) * 1.001
    assert ((rows - exact).abs() <= allowed + 1e-7).all()
    assert not torch.equal(rows, exact)


def test_special_tokens_and_positions_are_left_out(tmp_path: Path) -> None:
    options = {"exclude_special_tokens": [1, 2, 3], "seqpos_slice": (2, -1)}
    write(cache(tmp_path, **options))
    rows = torch.cat(list(open_activations(tmp_path / "acts").chunks(4)))
    index = Index.read(tmp_path / "acts")
    n_batches = sum(shard.n_batches for shard in index.shards)
    expected = model_rows(n_batches, **options)[:N_ROWS]
    torch.testing.assert_close(sort(rows), sort(expected), rtol=0, atol=0)


def test_complete_cache_is_left_alone_and_a_larger_one_adds_to_it(
    tmp_path: Path, acts: Path
) -> None:
    before = files(acts)
    assert cache(tmp_path).write(override_model=object()) is True
    assert files(acts) == before
    assert write(cache(tmp_path, training_tokens=2640)) is True
    after = files(acts)
    assert {name: after[name] for name in before if name != "activations.json"} == {
        name: data for name, data in before.items() if name != "activations.json"
    }
    assert open_activations(acts).n_rows == 2640


def test_end_of_the_texts(tmp_path: Path) -> None:
    """600 prompts, of which 75 batches of 8: they are not read again, as SAELens would."""
    options = {"training_tokens": 10**6, "store_batch_size_prompts": 8}
    for _ in range(2):
        assert write(cache(tmp_path, rows=2000, **options)) is False
        index = Index.read(tmp_path / "acts")
        assert index.n_rows == 600 * N_CTX
        assert sum(shard.n_batches for shard in index.shards) == 75
    with pytest.raises(ValueError, match="the data set ends before the 75 batches of prompts"):
        cache(tmp_path, rows=2000, **options).write(MODEL, token_dataset(30))
    (tmp_path / "acts" / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match="the data set ends before the 75 batches of prompts"):
        cache(tmp_path, rows=2000, **options).write(MODEL, token_dataset(30))
    assert len(Index.read(tmp_path / "acts").shards) == 5


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.activations.test_caching import cache, write
from sae_lens_matryoshka.activations import index

def dies(function, before=lambda *args: None):
    "The function, whose n-th call kills the process."
    calls = []
    def call(*args):
        calls.append(args)
        if len(calls) == int(sys.argv[3]):
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
write_bytes = Path.write_bytes
if sys.argv[2] == "in a shard":
    Path.write_bytes = dies(write_bytes, lambda path, data: write_bytes(path, data[:1000]))
else:
    index.Index.write = dies(index.Index.write)
write(cache(Path(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("place", "n", "n_whole"),
    [
        ("in a shard", 1, 0),
        ("in a shard", 3, 2),
        ("before the index", 1 + 3, 2),  # the first one is written before the first shard
    ],
)
def test_killed_process_loses_nothing_whole(
    tmp_path: Path, whole: Path, place: str, n: int, n_whole: int
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), place, str(n)]
    env = os.environ | HERE
    assert subprocess.run(command, env=env, check=False).returncode == -signal.SIGKILL
    acts = tmp_path / "acts"
    assert len(Index.read(acts).shards) == n_whole
    unfinished = acts / f".{n_whole:05}.unfinished.safetensors"
    assert unfinished.is_file() == (place == "in a shard")
    if n_whole:
        assert open_activations(acts).n_rows == 640 * n_whole, "what is whole can be trained on"
    assert write(cache(tmp_path)) is True
    assert files(acts) == files(whole)


def test_resuming_runs_the_model_on_new_texts_only(
    tmp_path: Path, acts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.read(acts)
    index.shards = index.shards[:2]
    index.write(acts)
    n_runs = 0
    get_activations = ActivationsStore.get_activations

    def count(store: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal n_runs
        n_runs += 1
        return get_activations(store, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", count)
    write(cache(tmp_path))
    assert n_runs == 12


def test_full_disk_keeps_whole_shards(tmp_path: Path, whole: Path) -> None:
    size = (whole / "00000.safetensors").stat().st_size
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.activations.test_caching import cache, write\n"
        "first = cache(Path(sys.argv[1]), training_tokens=1280); write(first)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "write(cache(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | HERE, stderr=-1, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        r"OSError: .*00002.safetensors can't be written: .*File too large.*\. The 2 shards before "
        r"it are whole; the same command resumes after them\.",
        done.stderr.splitlines()[-1],
    )
    assert sorted(files(tmp_path / "acts")) == [
        "00000.safetensors",
        "00001.safetensors",
        "activations.json",
    ]
    assert write(cache(tmp_path)) is True
    assert files(tmp_path / "acts") == files(whole)


def swap(acts: Path) -> None:
    first, second = acts / "00000.safetensors", acts / "00001.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def edit(acts: Path) -> None:
    """One number of row 300 changes, in the memory of the file."""
    path = acts / "00001.safetensors"
    tensors = load_file(path)
    tensors["activations"][300, 5] += 1
    save_file(tensors, path)


def edit_with_checksum(acts: Path) -> None:
    path = acts / "00001.safetensors"
    tensors = load_file(path)
    tensors["activations"][300, 5] += 1
    tensors["checksums"] = block_checksums(tensors["activations"])
    save_file(tensors, path)


def cut(acts: Path) -> None:
    path = acts / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BROKEN = {
    cut: r"00001.safetensors holds 41,\d+ bytes of the 41,\d+ that were written",
    lambda acts: (acts / "00002.safetensors").unlink(): "00002.safetensors holds 0 bytes of",
    swap: "00000.safetensors is not the shard that was written, its checksum differs",
    edit: "00001.safetensors, rows 256 to 511: not what was written, their checksum differs",
    edit_with_checksum: "00001.safetensors is not the shard that was written",
    lambda acts: (acts / "activations.json").write_text("{"): "activations.json can't be read",
    lambda acts: (acts / "activations.json").write_text(
        '{"format_version": 2}'
    ): "activations.json can't be read: its format_version is 2, not 1",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_shards_are_named(acts: Path, damage: Any) -> None:
    damage(acts)
    with pytest.raises(ValueError, match=BROKEN[damage]):
        list(open_activations(acts).chunks(1))


@pytest.mark.parametrize("names", [["00001"], ["00000", "00002", "00003"]])
@pytest.mark.parametrize("training_tokens", [N_ROWS, 2640])
def test_shards_that_are_not_whole_are_written_anew(
    tmp_path: Path, acts: Path, whole: Path, names: list[str], training_tokens: int
) -> None:
    for name in names:
        path = acts / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    (acts / f"{names[-1]}.safetensors").unlink()
    kept = {name: data for name, data in files(acts).items() if name[:5] not in names}
    again = cache(tmp_path, training_tokens=training_tokens)
    assert not again.is_complete
    assert write(again) is True
    after, shards = files(acts), files(whole)
    shards.pop("activations.json")
    assert {name: after[name] for name in shards} == shards
    assert kept.keys() <= after.keys()
    assert open_activations(acts).n_rows == training_tokens
    if training_tokens == N_ROWS:
        assert after == files(whole)


def test_checksums_cover_blocks(whole: Path) -> None:
    tensors = load_file(whole / "00000.safetensors")
    assert tensors["checksums"].shape == (-(-640 // BLOCK_ROWS),)
    assert torch.equal(tensors["checksums"], block_checksums(tensors["activations"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook_name": "blocks.0.hook_resid_pre"}, "hook_name='blocks.1.hook_resid_pre', and this"),
        ({"context_size": 8}, "context_size=16, and this run has context_size=8"),
        ({"seed": 1}, "seed=42, and this run has seed=1"),
        ({"dtype": "float16"}, "dtype='float32', and this run has dtype='float16'"),
        ({"store_batch_size_prompts": 8}, "store_batch_size_prompts=4, and this run has"),
        ({"seqpos_slice": (1,)}, r"seqpos_slice=\[None\], and this run has seqpos_slice=\[1\]"),
    ],
)
def test_folder_of_another_config_is_refused(
    tmp_path: Path, acts: Path, options: dict[str, Any], message: str
) -> None:
    before = files(acts)
    with pytest.raises(ValueError, match=f"acts holds activations with {message}"):
        cache(tmp_path, **options)
    assert files(acts) == before


def test_other_options_may_change(tmp_path: Path, acts: Path) -> None:
    other = cache(tmp_path, rows=100, lr=1.0, training_tokens=2100, output_path=None)
    assert write(other) is True
    assert open_activations(acts).n_rows == 2100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype='float64' is not accepted: give one of float16, bfloat16"),
        ({"rows": 0}, "rows_per_shard=0 is not accepted"),
        ({"seed": -1}, "seed=-1 is not accepted"),
    ],
)
def test_option_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache(tmp_path, **options)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="acts holds something else: give a new or an empty"):
        cache(tmp_path)


def scaled(factor: float) -> Any:
    model = tiny_model()
    model.W_E.data *= factor
    return model


@pytest.mark.parametrize(
    ("dtype", "factor", "message"),
    [
        (
            "float16",
            1e7,
            r"the activations reach \d.*, and float16 holds at most 65,504. Give bfloat16\.",
        ),
        ("float16", float("nan"), "the model's activations are not finite"),
        ("float32", float("inf"), "the model's activations are not finite"),
    ],
)
def test_numbers_that_do_not_fit_are_named(
    tmp_path: Path, dtype: str, factor: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cache(tmp_path, dtype).write(scaled(factor), DATA)
    assert list(files(tmp_path / "acts")) == ["activations.json"]
    if factor < float("inf"):  # a folder that holds no shard takes another dtype
        assert cache(tmp_path, "bfloat16").write(scaled(factor), DATA) is True
        new = Cache(config(tmp_path), tmp_path / "int8", "int8")
        assert new.write(scaled(factor), DATA) is True


def test_unknown_hook_is_named(tmp_path: Path) -> None:
    new = cache(tmp_path, hook_name="blocks.7.hook_resid_pre")
    with pytest.raises(ValueError, match=r"hook_name='blocks.7.hook_resid_pre' is not accepted"):
        write(new)


# The command


@pytest.fixture
def yaml_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config for the tiny model and its texts, which the command loads under another name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sae_lens_matryoshka.activations.caching.load_model", lambda *_, **__: MODEL
    )
    DATA.to_parquet("tokens/train.parquet")
    cfg = {
        "model_name": "gpt2",
        "hook_name": "blocks.1.hook_resid_pre",
        "dataset_path": "tokens",
        "streaming": False,
        "prepend_bos": False,
        "context_size": N_CTX,
        "store_batch_size_prompts": 4,
        "training_tokens": 1500,
        "train_batch_size_tokens": 64,
        "verbose": False,
        "checkpoint_path": None,
        "output_path": "out",
        "sae": {"d_in": D_MODEL, "d_sae": 64, "k": 4},
        "logger": {"log_to_wandb": False},
    }
    monkeypatch.setattr(
        "sae_lens_matryoshka.util.hook_names.get_pretrained_model_config", lambda _: MODEL.cfg
    )
    Path("run.yaml").write_text(yaml.safe_dump(cfg))
    return Path("run.yaml")


def test_command_caches_and_the_next_one_trains(
    yaml_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cache", str(yaml_config), "--out", "acts", "--training_tokens", "2_000"]
    assert cli.main([*words, "--rows_per_shard", "640", "--sae.k", "999"]) == 0
    said = capsys.readouterr()
    assert said.out == "acts holds 2,000 rows in 4 whole shards.\n"
    assert "\r" not in said.err, "a bar that is redrawn is for a terminal"
    assert cli.main(["train", str(yaml_config), "--activations", "acts"]) == 0
    metadata = json.loads(Path("out/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gpt2", "blocks.1.hook_resid_pre")
    assert metadata["context_size"] == N_CTX
    assert cli.main(["levels", "out", "--activations", "acts"]) == 0
    assert cli.main([*words, "--training_tokens", "1_000_000"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("acts holds 9,552 rows in 5 whole shards.\n")  # but for the 48 cut off
    assert "The texts end before training_tokens=1,000,000 are reached." in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cache", "cache needs a config"),
        ("cache --out acts", "cache needs a config"),
        ("cache run.yaml", "--out is missing: the folder to write to."),
        ("cache run.yaml --out acts --dtype float8", "dtype='float8' is not accepted: give one of"),
        ("cache run.yaml --out acts --rows_per_shard x", "rows_per_shard='x' is not accepted"),
        ("cache run.yaml --out run.yaml", "out='run.yaml' can't be written to"),
        ("cache run.yaml --out acts --trainin_tokens 3", "did you mean training_tokens?"),
        ("cache run.yaml --out acts --model_name gtp2", "does not know the model 'gtp2'"),
    ],
)
@pytest.mark.usefixtures("yaml_config")
def test_mistake_in_the_command_is_named(words: str, message: str, refusal: Any) -> None:  # noqa: F811
    assert message in refusal(*words.split())
    assert not Path("acts").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_whole_shards_and_says_how_to_resume(
    yaml_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
) -> None:
    get_activations, n = ActivationsStore.get_activations, 0

    def stop(store: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal n
        n += 1
        if n == 25:
            signal.raise_signal(signum)
            time.sleep(1)
        return get_activations(store, tokens)

    words = f"cache {yaml_config} --out acts --training_tokens 2000 --rows_per_shard 640".split()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(ActivationsStore, "get_activations", stop)
        assert cli.main(words) == 128 + signum
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr().err.endswith(
        f"{signum.name}: stopped; acts holds 1,280 rows in 2 whole shards.\n"
        f"Resume with: sae-matryoshka {' '.join(words)}\n"
    )
    assert sorted(files(Path("acts"))) == [
        "00000.safetensors",
        "00001.safetensors",
        "activations.json",
    ]
    assert cli.main(words) == 0
    assert open_activations("acts").n_rows == 2000
