"""Labels that a user types, in a file beside the page."""

import json
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.util.files import atomic_file

_FORMAT_VERSION = 1


class Labels:
    """`labels.json`, as the page exports it: {"labels": {"23": "numbers"}, …}.

    Args:
        path: The file; it need not exist.
        d_sae: How many latents the SAE has.
        name: What the SAE is called.
        weights: The hash of the SAE's weights; see `Tree.settings`.

    Raises:
        ValueError: the file can't be read, or is of another SAE.
    """

    def __init__(self, path: Path, d_sae: int, name: str, weights: str):
        self._path, self._about = path, {"sae": name, "weights": weights}
        self.of_latent: dict[int, str] = {}
        if not path.exists():
            return
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format_version={values['format_version']!r}")
            is_other = values["weights"] != weights
            self.of_latent = {int(key): str(text) for key, text in values["labels"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} can't be read as labels: {error}.") from error
        if is_other or any(not 0 <= latent < d_sae for latent in self.of_latent):
            raise ValueError(f"{path} has labels of another SAE: move it away.")

    def set(self, latent: int, text: str) -> None:
        """Write a label, or take it away if the text is empty; OSError if the file can't be."""
        changed = {**self.of_latent, latent: text.strip()}
        changed = {number: label for number, label in sorted(changed.items()) if label}
        values = {"format_version": _FORMAT_VERSION, **self._about, "labels": changed}
        with atomic_file(self._path) as unfinished:
            unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        self.of_latent = changed
