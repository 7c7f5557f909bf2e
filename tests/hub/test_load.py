"""`load_sae` gives what the checkpoint's own library computes, or one clear error."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from sae_lens import SAE, JumpReLUSAE

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.hub.load import load_sae
from sae_lens_matryoshka.levels.slicing import decode_levels, levels, truncate, widths_of
from tests import checkpoints as made
from tests.checkpoints import (
    D_IN,
    D_SAE,
    GROUP_SIZES,
    WIDTHS,
    Files,
    StateDict,
    one_threshold,
    pickled,
    placed,
    random_weights,
    under,
)
from tests.loopback_hub import LoopbackHub, use_cache

REPO = "ann/saes"
LAYER = "resid_post/layer_12_width_16k_l0_medium"  # Gemma Scope 2's name for a folder
CHANIND = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
CHANIND_RELEASE, CHANIND_ID = "gemma-2-2b-res-matryoshka-dc", "blocks.0.hook_resid_post"
SAEBENCH = "saebench_gemma-2-2b_width-2pow14_date-0107"
SAEBENCH_ID = "blocks.12.hook_resid_post__trainer_0"
SUITE = "gemma-2-2b_matryoshka_batch_top_k_width-2pow14_date-0107"
SAEBENCH_FOLDER = f"{SUITE}/resid_post_layer_12/trainer_0"


class Case(NamedTuple):
    files: Files
    weights: StateDict
    says_widths: bool = True
    folder: str = "some/folder"
    formula: tuple[str, ...] = ()


BARTBUSSMANN = made.bartbussmann(one_threshold())
DICTIONARY_LEARNING = made.dictionary_learning(one_threshold())
GEMMA_SCOPE_2 = made.gemma_scope_2(random_weights())
SAELENS_6, SAELENS_5 = made.saelens_6(one_threshold()), made.saelens_5(random_weights())
UNTRAINED = made.dictionary_learning(one_threshold(-1.0))
NEWER = made.dictionary_learning(
    {**one_threshold(), "group_sizes": torch.tensor(GROUP_SIZES)}, group_sizes=None
)
PLAIN = made.bartbussmann(one_threshold(), GROUP_SIZES, unit_norm=False)
CASES = {
    "saelens_6": Case(SAELENS_6, one_threshold(), formula=("rescaled",)),
    "saelens_5": Case(SAELENS_5, random_weights(), False),
    "dictionary_learning": Case(DICTIONARY_LEARNING, one_threshold()),
    "dictionary_learning_newer": Case(NEWER, one_threshold()),
    "dictionary_learning_untrained": Case(UNTRAINED, one_threshold(-1.0)),
    "bartbussmann": Case(BARTBUSSMANN, one_threshold(), formula=("no_b_enc", "unit_norm")),
    "bartbussmann_plain": Case(PLAIN, one_threshold(), formula=("no_b_enc",)),
    "gemma_scope_2": Case(GEMMA_SCOPE_2, random_weights(), False, LAYER, ("not_centred",)),
}
FORMATS = ["saelens_6", "dictionary_learning", "bartbussmann", "gemma_scope_2"]


def by_formula(
    raw: StateDict, x: torch.Tensor, options: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and every level's reconstruction, from the tensors that the library itself saved."""
    inner, mean, std = x, torch.zeros(()), torch.ones(())
    if "unit_norm" in options:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        inner = (x - mean) / (std + 1e-5)
    norms = raw["W_dec"].norm(dim=1) if "rescaled" in options else torch.ones(())
    pre = (inner if "not_centred" in options else inner - raw["b_dec"]) @ raw["W_enc"]
    pre = (pre if "no_b_enc" in options else pre + raw["b_enc"]) * norms
    acts = torch.where(pre > raw["threshold"], pre.relu(), 0.0)
    assert 0 < (acts > 0).float().mean() < 1
    parts = [(acts / norms)[..., :width] @ raw["W_dec"][:width] for width in WIDTHS]
    return acts, torch.stack(parts).add(raw["b_dec"]) * std + mean


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def same_weights(one: SAE[Any], other: SAE[Any]) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def activations() -> torch.Tensor:
    return 2 * torch.randn(4, 5, D_IN, generator=torch.Generator().manual_seed(1)) + 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache")


Load = Callable[..., SAE[Any]]


@pytest.fixture(params=["folder", "Hub"])
def load(request: pytest.FixtureRequest, hub: LoopbackHub, tmp_path: Path) -> Load:
    """Loads the SAE of some files, from a folder or from the Hub."""

    def load(files: Files, folder: str = "some/folder", **options: Any) -> SAE[Any]:
        if request.param == "folder":
            return load_sae(placed(files, tmp_path / folder), **options)
        hub.add(REPO, under(folder, files))
        return load_sae(REPO, folder, **options)

    load.__name__ = request.param
    return load


@pytest.mark.parametrize("name", CASES)
def test_levels_are_what_the_formula_gives(name: str, load: Load) -> None:
    files, weights, says_widths, folder, formula = CASES[name]
    sae = load(files, folder)
    if says_widths:
        assert sae.cfg.metadata.training_architecture_details["k"] == made.K
    else:
        with pytest.raises(ValueError, match=r"20 latents has no level widths.*matryoshka_widths="):
            widths_of(sae)
        sae = load(files, folder, matryoshka_widths=WIDTHS)
    assert (type(sae), widths_of(sae)) == (JumpReLUSAE, WIDTHS)
    assert sae.cfg.metadata.training_architecture_details["matryoshka_widths"] == WIDTHS
    x = activations()
    acts, reconstructions = by_formula(weights, x, formula)
    close(sae.encode(x), acts)
    close(decode_levels(sae, sae.encode(x)), reconstructions)
    close(sae(x), reconstructions[-1])
    for level, width, expected in zip(levels(sae), WIDTHS, reconstructions, strict=True):
        close(level.encode(x), acts[..., :width])
        close(level(x), expected)
        close(truncate(sae, width)(x), expected)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_dtype_and_widths_as_asked(name: str, load: Load, dtype: str) -> None:
    files, _, _, folder, _ = CASES[name]
    sae = load(files, folder, dtype=dtype, matryoshka_widths=[4, 7, D_SAE])
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {getattr(torch, dtype)}
    assert (sae.dtype, sae.cfg.dtype) == (getattr(torch, dtype), dtype)
    assert (sae.device.type, sae.cfg.device) == ("cpu", "cpu")
    assert widths_of(sae) == [4, 7, D_SAE]
    plain = load(files, folder)
    assert plain.dtype == torch.float32
    if dtype == "float64":
        close(sae(activations()).float(), plain(activations()))
    with pytest.raises(ValueError, match="int3"):
        load(files, folder, dtype="int3")


@pytest.mark.parametrize("name", ["saelens_6", "dictionary_learning", "bartbussmann"])
def test_a_folder_keeps_the_dtype_it_was_saved_in(name: str, tmp_path: Path) -> None:
    files = dict(CASES[name].files)
    if name == "saelens_6":
        weights = safetensors.torch.load(files["sae_weights.safetensors"])
        half = {name: tensor.half() for name, tensor in weights.items()}
        files["sae_weights.safetensors"] = safetensors.torch.save(half)
        files["cfg.json"] = files["cfg.json"].replace(b'"float32"', b'"float16"')
    else:
        half = {name: tensor.half() for name, tensor in one_threshold().items()}
        files["ae.pt" if "ae.pt" in files else "sae.pt"] = pickled(half)
    assert load_sae(placed(files, tmp_path / "half")).dtype == torch.float16


def test_widths_that_only_a_readme_tells(hub: LoopbackHub) -> None:
    widths, folder = [128, 512, 2048, 8192, 32768], f"standard/{CHANIND_ID}"
    weights = random_weights(d_in=4, d_sae=widths[-1])
    hub.add(CHANIND, under(folder, made.saelens_5(weights)))
    sae = load_sae(CHANIND_RELEASE, CHANIND_ID)
    assert widths_of(sae) == widths
    assert sae.cfg.metadata.training_architecture_details == {"matryoshka_widths": widths, "k": 40}
    x = torch.ones(2, 4)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    acts = pre * (pre > weights["threshold"])
    for width, reconstruction in zip(widths, decode_levels(sae, sae.encode(x)), strict=True):
        expected = acts[:, :width] @ weights["W_dec"][:width] + weights["b_dec"]
        for actual in (reconstruction, truncate(sae, width)(x)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)  # sums in the 100s
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert widths_of(load_sae(CHANIND, folder)) == widths
    assert widths_of(load_sae(CHANIND, folder, matryoshka_widths=[1, 32768])) == [1, 32768]


@pytest.mark.parametrize("files", [DICTIONARY_LEARNING, NEWER, UNTRAINED])
def test_dictionary_learning_is_as_saelens_loads_it(hub: LoopbackHub, files: Files) -> None:
    hub.add(f"canrager/{SAEBENCH}", under(SAEBENCH_FOLDER, files))
    ours, theirs = load_sae(SAEBENCH, SAEBENCH_ID), SAE.from_pretrained(SAEBENCH, SAEBENCH_ID)
    same_weights(ours, theirs)
    for name in theirs.cfg.to_dict().keys() - {"metadata"}:
        assert getattr(ours.cfg, name) == getattr(theirs.cfg, name), name
    told = {
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "monology/pile-uncopyrighted",
        "neuronpedia_id": "gemma-2-2b/12-sae_bench-matryoshka-res-16k__trainer_0_step_final",
    }
    for sae in (ours, theirs):
        assert {name: sae.cfg.metadata[name] for name in told} == told
    assert widths_of(ours) == WIDTHS
    # By its folder in the repository it is the same, except for what is only in SAELens' table.
    by_repo = load_sae(f"canrager/{SAEBENCH}", SAEBENCH_FOLDER)
    same_weights(by_repo, ours)
    assert (widths_of(by_repo), by_repo.cfg.metadata.neuronpedia_id) == (WIDTHS, None)
    # SAELens did not train it.
    assert theirs.cfg.metadata.sae_lens_training_version is None
    assert ours.cfg.metadata.sae_lens_training_version is None


def test_another_class_of_dictionary_learning_is_as_saelens_loads_it(hub: LoopbackHub) -> None:
    files = made.topk_of_dictionary_learning(one_threshold())
    hub.add(f"canrager/{SAEBENCH}", under(SAEBENCH_FOLDER, files))
    ours, theirs = load_sae(SAEBENCH, SAEBENCH_ID), SAE.from_pretrained(SAEBENCH, SAEBENCH_ID)
    assert (ours.cfg.architecture(), ours.cfg.to_dict()) == ("topk", theirs.cfg.to_dict())
    by_repo = load_sae(f"canrager/{SAEBENCH}", SAEBENCH_FOLDER, matryoshka_widths=WIDTHS)
    for sae in (ours, by_repo):
        same_weights(sae, theirs)
        assert (sae.encode(activations()) > 0).sum(-1).max() == made.K
    assert widths_of(by_repo) == WIDTHS
    with pytest.raises(ValueError, match="TopKSAE of 20 latents has no level widths"):
        widths_of(ours)


@pytest.mark.parametrize(
    ("size", "layer", "model"),
    [("4b", 17, "google/gemma-3-4b-pt"), ("270m", 12, "google/gemma-3-270m")],
)
def test_gemma_scope_2_never_published_its_widths(
    hub: LoopbackHub, tmp_path: Path, size: str, layer: int, model: str
) -> None:
    repo_id, sae_id = f"google/gemma-scope-2-{size}-pt", f"layer_{layer}_width_16k_l0_medium"
    files = made.gemma_scope_2(random_weights(), f"gemma-v3-{size}-pt", layer)
    hub.add(repo_id, under(f"resid_post/{sae_id}", files))
    never = f"widths of {repo_id} were never published.*matryoshka_widths="
    for source in ((f"gemma-scope-2-{size}-pt-res", sae_id), (repo_id, f"resid_post/{sae_id}")):
        with pytest.warns(UserWarning, match=never) as caught:
            sae = load_sae(*source)
        assert [warning.filename for warning in caught] == [__file__]
        with pytest.raises(ValueError, match="no level widths"):
            widths_of(sae)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = load_sae(f"gemma-scope-2-{size}-pt-res", sae_id, matryoshka_widths=WIDTHS)
        local = load_sae(placed(files, tmp_path / sae_id), matryoshka_widths=WIDTHS)
    _, reconstructions = by_formula(random_weights(), activations(), ("not_centred",))
    close(decode_levels(sae, sae.encode(activations())), reconstructions)
    same_weights(local, sae)
    told = sae.cfg.metadata
    assert told.neuronpedia_id == f"gemma-3-{size}/{layer}-gemmascope-2-res-16k"
    assert (told.model_name, told.hook_name) == (model, f"blocks.{layer}.hook_resid_post")
    for name in ("model_name", "hook_name", "hf_hook_name", "context_size", "dataset_path"):
        assert local.cfg.metadata[name] == told[name], name


def test_sae_without_levels(load: Load) -> None:
    files = made.without_levels()
    sae = load(files)
    saved = safetensors.torch.load(files["sae_weights.safetensors"])
    torch.testing.assert_close(dict(sae.state_dict()), saved, rtol=0, atol=0)
    with pytest.raises(ValueError, match="StandardSAE of 20 latents has no level widths"):
        widths_of(sae)


def assert_whole(hub: LoopbackHub, cache: Path) -> None:
    """Every file in the cache is one of the Hub's, except those named incomplete."""
    commits = [files for repo in hub.repos.values() for files in repo.commits.values()]
    whole = {data for files in commits for data in files.values()}
    for pattern in ("models--*/snapshots/**/*", "models--*/blobs/*"):
        for path in cache.glob(pattern):
            assert path.is_dir() or path.suffix == ".incomplete" or path.read_bytes() in whole


@contextmanager
def refused(hub: LoopbackHub, cache: Path, kind: type[Exception], *words: str) -> Iterator[None]:
    """Asserts a one-line error and a clean cache, and that what was cached still loads."""
    hub.add("ann/cached", under("one", SAELENS_6))
    before = load_sae("ann/cached", "one")
    with pytest.raises(kind) as caught:
        yield
    said = str(caught.value)
    assert (type(caught.value), said.count("\n")) == (kind, 0)
    assert [word for word in words if word.lower() not in said.lower()] == [], said
    assert not re.search(r"('[^']+').*did you mean.*\1", said), said
    assert_whole(hub, cache)
    same_weights(load_sae("ann/cached", "one"), before)


def without(weights: StateDict, name: str) -> StateDict:
    return {key: tensor for key, tensor in weights.items() if key != name}


def _broken() -> dict[str, tuple[Files, str]]:
    """Files that hold no valid SAE, and what the error has to contain."""
    broken: dict[str, tuple[Files, str]] = {}

    def add(label: str, files: Files, file: str, data: bytes, said: str) -> None:
        broken[f"{file} {label}"] = ({**files, file: data}, said)

    raw = one_threshold()
    legacy = pickled(raw, _use_new_zipfile_serialization=False)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    for make, file in ((made.dictionary_learning, "ae.pt"), (made.bartbussmann, "sae.pt")):
        files = make(raw)
        for label, data, said in (
            ("truncated", files[file][:-300], "is broken"),
            ("of old, truncated", legacy[:-100], "is broken"),
            ("of old, truncated early", legacy[: legacy.index(b"X") + 3], "is broken"),
            ("empty", b"", "is broken"),
            ("of Git LFS", pointer, "was not unpickled"),
            ("of other text", b"jpeg", "is"),
            ("with a list", pickled([1, 2]), "holds no state dict"),
            ("with a module", pickled(torch.nn.ReLU()), "was not unpickled: it would run torch"),
        ):
            add(label, files, file, data, f"{file} {said}")
        for name, tensor in (
            ("W_dec", raw["W_dec"].T),
            ("W_enc", raw["W_enc"].flatten()),
            ("W_enc", torch.ones(D_IN, 0)),
            ("b_enc", raw["b_enc"][1:]),
            ("b_dec", raw["b_enc"]),
            ("threshold", raw["b_enc"][1:]),
        ):
            shape, data = tuple(tensor.shape), pickled({**raw, name: tensor})
            add(f"{name} {shape}", files, file, data, f"{file}: {name} has the shape {shape}")
        for name in raw:
            data = pickled(without(raw, name))
            add(f"without {name}", files, file, data, f"{file} lacks {name}")
        for sizes in ([3, 5], [3, 5, 13], [-3, 11, 12], [0, 8, 12], [0.5] * 40, [True, 19], 20, ""):
            said = f"group_sizes={sizes!r} is not"
            add(f"beside group_sizes {sizes}", make(raw, sizes), file, files[file], said)
        for data in (b"{'a': 1}", files["config.json"][:-9], b'{"a": "\xff"}'):
            add(f"{file} {data[-9:]!r}", files, "config.json", data, "config.json is not JSON")
        add(f"{file} a list", files, "config.json", b"[1]", "config.json holds no JSON object")
    buffer = pickled({**raw, "group_sizes": torch.tensor([3, 5])})
    add("with group_sizes [3, 5]", DICTIONARY_LEARNING, "ae.pt", buffer, "sum to d_sae=20")
    for config, said in (
        ({"buffer": {}}, "trainer"),
        ({"trainer": "text"}, "trainer"),
        ({"trainer": {"dict_class": "MatryoshkaBatchTopKSAE"}, "buffer": "text"}, "buffer"),
        ({"trainer": {"group_sizes": GROUP_SIZES}, "buffer": {}}, "dict_class"),
    ):
        data = json.dumps(config).encode()
        add(f"ae.pt {config}", DICTIONARY_LEARNING, "config.json", data, said)

    for files, file in (
        (SAELENS_6, "sae_weights.safetensors"),
        (GEMMA_SCOPE_2, "params.safetensors"),
    ):
        raw = safetensors.torch.load(files[file])
        encoder, decoder = sorted((name for name in raw if raw[name].ndim == 2), reverse=True)
        for label, data in (
            ("truncated", files[file][:-100]),
            ("truncated early", files[file][:50]),
            ("empty", b""),
            ("of Git LFS", pointer),
            ("not UTF-8", files[file][:9] + b"\xff" + files[file][10:]),
        ):
            add(label, files, file, data, "can't be read")
        for name, tensor in (
            (decoder, raw[decoder].T.contiguous()),
            (encoder, raw[encoder].flatten()),
            ("b_enc", raw["b_enc"][1:].clone()),
        ):
            data = safetensors.torch.save({**raw, name: tensor})
            add(f"{name} {tuple(tensor.shape)}", files, file, data, name)
        for name in raw:
            add(f"without {name}", files, file, safetensors.torch.save(without(raw, name)), name)
    cfg, old_cfg = SAELENS_6["cfg.json"], SAELENS_5["cfg.json"]
    for label, data, said in (
        ("not JSON", b"{", "cfg.json"),
        ("a list", b"[]", "cfg.json"),
        ("of another size", cfg.replace(b"20", b"21"), "size mismatch for W_dec"),
        ("without d_sae", cfg.replace(b'"d_sae"', b'"d"'), "d_sae"),
        ("of no architecture", old_cfg.replace(b"jumprelu", b"jump"), "jump"),
    ):
        add(label, SAELENS_6, "cfg.json", data, said)
    add("params", GEMMA_SCOPE_2, "config.json", b"jump_relu", "config.json is not JSON")
    return broken


BROKEN = _broken()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, load: Load, hub: LoopbackHub, cache: Path) -> None:
    files, said = BROKEN[name]
    folder = LAYER if "params.safetensors" in files else "some/folder"
    with refused(hub, cache, ValueError, folder, said):
        load(files, folder)


@pytest.mark.parametrize("make", [made.dictionary_learning, made.bartbussmann, "AutoEncoderTopK"])
def test_a_pickle_never_runs_code(
    make: Callable[..., Files] | str, load: Load, hub: LoopbackHub, cache: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    code, said = made.CodeRunning(ran), "it would run posix.mkdir"
    for weights in ({**one_threshold(), "extra": code}, {"W_enc": code}):
        if isinstance(make, str):
            files = made.dictionary_learning(weights, dict_class=make)
            said = f"{make}' is not accepted from a folder" if load.__name__ == "folder" else said
        else:
            files = make(weights)
        with refused(hub, cache, ValueError, "some/folder", said):
            load(files)
    assert not ran.exists()
    torch.load(
        io.BytesIO(pickled(code)), weights_only=False
    )  # runs it, so the test means something
    assert ran.is_dir()


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("layer0.sae.pt", b""),
        ("layer0.sae.pt", pickled(torch.nn.ReLU())),
        ("layer0.sae.pt", pickled(one_threshold())[:-300]),
        ("params.npz", b""),
        ("params.npz", b"PK\x03\x04 and so on"),
    ],
)
def test_broken_files_in_formats_of_saelens(
    hub: LoopbackHub, cache: Path, file: str, data: bytes
) -> None:
    release, sae_id = "qwen-scope-3-1.7b-base-w32k-l50", "layer0"
    repo_id = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    if file == "params.npz":
        release, sae_id = "gemma-scope-27b-pt-res", "layer_10/width_131k/average_l0_106"
        repo_id, file = f"google/{release}", f"{sae_id}/{file}"
    hub.add(repo_id, {file: data})
    with refused(hub, cache, ValueError, repo_id, sae_id):
        load_sae(release, sae_id)


@pytest.mark.parametrize(
    ("release", "sae_id", "said"),
    [
        ("none", "any", "'none' is neither a release of SAELens nor a repository"),
        (CHANIND_RELEASE[:-1], "any", f"; did you mean '{CHANIND_RELEASE}' or"),
        (CHANIND_RELEASE, CHANIND_ID[:-1], f"did you mean '{CHANIND_ID}'"),
        (CHANIND_RELEASE, "42", f"has no SAE '42'; there is '{CHANIND_ID}'"),
        (CHANIND_RELEASE, CHANIND_ID, f"no repository '{CHANIND}' on the Hub"),
        (CHANIND[:-1], "any", f"no repository '{CHANIND[:-1]}' on the Hub"),
        (CHANIND[:-1], "any", f"did you mean '{CHANIND}'"),
        ("one/two/three", "any", "no repository 'one/two/three' on the Hub"),
        ("ann/cached", "onne", "'ann/cached' has no SAE 'onne'; did you mean 'one'?"),
        ("ann/cached", "42", "'ann/cached' has no SAE '42'; there is 'one'. (accepted"),
        ("ann/empty", "one", "'ann/empty' has no SAE 'one'. (accepted: cfg.json with sae_weights."),
        ("ann/empty", "one", "config.json with ae.pt (dictionary_learning)"),
    ],
)
def test_unknown_names(hub: LoopbackHub, cache: Path, release: str, sae_id: str, said: str) -> None:
    hub.add("ann/empty", {"README.md": b"# Nothing", "one/optimizer.pt": b"1"})
    with refused(hub, cache, ValueError, said):
        load_sae(release, sae_id)


@pytest.mark.parametrize("name", FORMATS)
def test_one_of_the_files_is_missing(name: str, load: Load, hub: LoopbackHub, cache: Path) -> None:
    files, folder = CASES[name].files, CASES[name].folder
    for file in files:
        rest = {other: data for other, data in files.items() if other != file}
        place = f"without_{file}/{folder}"
        if (load.__name__, name, file) == ("Hub", "gemma_scope_2", "config.json"):
            inferred = load(rest, place)  # by SAELens, from the name of the folder
            same_weights(inferred, load(files, folder))
            continue
        with refused(hub, cache, ValueError, "no SAE", "accepted: cfg.json with sae_weights"):
            load(rest, place)


def test_folders_without_an_sae(tmp_path: Path) -> None:
    transcoder = GEMMA_SCOPE_2["config.json"].replace(b"output", b"mlp.input")
    for files, said in (
        ({}, "holds no SAE (accepted: cfg.json with"),
        ({}, "found nothing"),
        ({"README.md": b"", "ae.pt": b""}, "found README.md, ae.pt"),
        ({**SAELENS_6, "trainer_state.pt": b""}, "is a training checkpoint, not"),
        ({**GEMMA_SCOPE_2, "config.json": transcoder}, "'model.layers.12.mlp.input' is not accept"),
    ):
        folder = placed(files, tmp_path / said[:8])
        with pytest.raises(ValueError, match=re.escape(said)):
            load_sae(folder)
    # Saved without a trainer's state, an SAE in training is recognised by its architecture.
    in_training = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, k=3))
    in_training.save_model(tmp_path / "in_training")
    for folder, said in (
        (tmp_path / "in_training", r"training checkpoint.*TrainingSAE\.load_from_disk"),
        (tmp_path / "missing", "There is no folder '.*missing'; to load from the Hub"),
        (placed({"file": b""}, tmp_path / "with_file") / "file", "file is a file: give its folder"),
        (CHANIND_RELEASE, f"needs an SAE's id as well.*'{CHANIND_ID}'"),
    ):
        with pytest.raises(ValueError, match=said):
            load_sae(folder)


def test_widths_that_do_not_fit(load: Load, hub: LoopbackHub, cache: Path) -> None:
    for widths, said in (
        ([3, 21], "holds 21, outside 1 to 20"),
        ([0, 20], "holds 0, outside 1 to 20"),
        ([8, 3, 20], "does not strictly increase"),
        ([3, 3, 20], "does not strictly increase"),
        ([2.5, 20], "holds 2.5, which is not an integer"),
        ("3, 20", "is not a list"),
    ):
        with refused(hub, cache, ValueError, "matryoshka_widths", said):
            load(SAELENS_6, matryoshka_widths=widths)
    with pytest.warns(UserWarning, match="a last level of 20 latents is added"):
        assert widths_of(load(SAELENS_6, matryoshka_widths=[3, 8])) == WIDTHS
    wrong = SAELENS_6["cfg.json"].replace(b"[3, 8, 20]", b"[8, 3, 20]")
    with pytest.raises(ValueError, match=r"\[8, 3, 20\] does not strictly increase"):
        widths_of(load({**SAELENS_6, "cfg.json": wrong}))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "fault",
    [
        (0, "", ConnectionError, "The Hub can't be reached for ann/saes"),
        (401, "", PermissionError, "HF_TOKEN"),
        (401, "RepoNotFound", ValueError, "no repository 'ann/saes' on the Hub"),
        (403, "", PermissionError, "HF_TOKEN"),
        (403, "GatedRepo", PermissionError, "ann/saes is gated"),
        (404, "", ConnectionError, "status 404"),
        (404, "RepoNotFound", ValueError, "no repository 'ann/saes' on the Hub"),
        (429, "", ConnectionError, "status 429"),
        (500, "", ConnectionError, "status 500"),
        (503, "", ConnectionError, "status 503"),
    ],
)
def test_hub_that_fails(
    hub: LoopbackHub, cache: Path, name: str, fault: tuple[int, str, type[Exception], str]
) -> None:
    files, _, _, folder, _ = CASES[name]
    status, code, kind, said = fault
    hub.add(REPO, under(folder, files))
    for only in ("", *([] if code or not status else files)):  # all files, or this one
        failing = hub.answer_with(status, code, only) if status else hub.down()
        with refused(hub, cache, kind, said), failing:
            load_sae(REPO, folder)
        hub.add(REPO, {"README.md": only.encode()})  # a new commit, of which nothing is cached
    assert widths_of(load_sae(REPO, folder, matryoshka_widths=WIDTHS)) == WIDTHS


@pytest.mark.parametrize("name", FORMATS)
def test_cached_sae_loads_while_the_hub_is_down(hub: LoopbackHub, name: str) -> None:
    files, _, _, folder, _ = CASES[name]
    hub.add(REPO, under(folder, files))
    before = load_sae(REPO, folder)
    with hub.down():
        same_weights(load_sae(REPO, folder), before)


@pytest.mark.parametrize("name", FORMATS)
def test_download_cut_short(hub: LoopbackHub, cache: Path, name: str) -> None:
    files, _, _, folder, _ = CASES[name]
    hub.add(REPO, under(folder, files))
    for file in reversed(list(files)):  # the weights first, so that none are cached
        cut = hub.cut_short(f"{REPO}/{folder}/{file}")
        with refused(hub, cache, ConnectionError, "can't be reached for ann/saes"), cut:
            load_sae(REPO, folder)
        assert not list(cache.glob(f"models--ann--saes/snapshots/*/{folder}/{file}"))
    assert widths_of(load_sae(REPO, folder, matryoshka_widths=WIDTHS)) == WIDTHS


@pytest.mark.parametrize("name", FORMATS)
def test_private_repository(
    hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    files, _, _, folder, _ = CASES[name]
    hub.add("bob/private", under(folder, files), private=True)
    bob, other = hub.add_user("bob"), hub.add_user("ann")
    for token in ("", other):
        monkeypatch.setenv("HF_TOKEN", token)
        with refused(hub, cache, ValueError, "it is private and HF_TOKEN or `hf auth login`"):
            load_sae("bob/private", folder)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(PermissionError, match=r"status 401.*HF_TOKEN to a token that has access"):
        load_sae("bob/private", folder)
    monkeypatch.setenv("HF_TOKEN", bob)
    sae = load_sae("bob/private", folder, matryoshka_widths=WIDTHS)
    assert (widths_of(sae), sae.cfg.d_in) == (WIDTHS, D_IN)


DISK_FULL = """
import resource
from sae_lens_matryoshka.hub.load import load_sae

soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (100, 16384, soft):  # too small for cfg.json, for the weights, for nothing
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        print(load_sae("ann/saes", "one").cfg.d_sae)
    except Exception as error:
        print(type(error).__name__, error.errno)
"""


def test_disk_that_is_full(hub: LoopbackHub, cache: Path) -> None:
    """Python ignores SIGXFSZ, so a write beyond the limit fails like one to a full disk."""
    hub.add(REPO, under("one", made.saelens_5(random_weights(32, 256))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DISK_FULL],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [f"OSError {errno.EFBIG}"] * 2 + ["256"], done.stderr
    assert_whole(hub, cache)


IMPORTS = """
import sys

import torch
from sae_lens_matryoshka import decode_levels, load_sae, truncate

decode_levels(truncate(load_sae(sys.argv[1]), 3), torch.ones(2, 3))
print(*sys.modules)
"""


def test_loading_imports_no_kernel_and_no_training_class(tmp_path: Path) -> None:
    folder = placed(SAELENS_6, tmp_path / "sae")
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, str(folder)]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    package = "sae_lens_matryoshka."
    ours = {name.removeprefix(package) for name in imported if name.startswith(package)}
    assert {"hub.load", "levels.slicing"} <= ours
    assert not [name for name in ours if name.startswith("kernels")]
    of_training = {"training", "training.latent_order", "training.registration", "training.widths"}
    assert {name for name in ours if name.startswith("training")} == of_training
