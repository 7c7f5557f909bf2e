"""Labels of latents from a file: typed on the page, or written by SAEBench's autointerp."""

import json
from pathlib import Path
from typing import Any

_ACCEPTED = (
    'labels are JSON such as {"23": "weather"}, what the page exports, or a result of SAEBench\'s '
    "autointerp"
)


def read_labels(path: Path, d_sae: int, weights: str) -> dict[int, str]:
    """The labels in a file, by latent.

    Args:
        path: A JSON object from latents to labels, one with such an object under `labels`, as the
            page exports it, or a result of SAEBench's autointerp, whose explanations are taken.
        d_sae: Number of latents.
        weights: Of the SAE, as `gather` names them; an export names the SAE that it is for.

    Raises:
        ValueError: the file can't be read, is none of these, or is for another SAE.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read ({error}): {_ACCEPTED}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no labels: {_ACCEPTED}.")
    if values.get("weights", weights) != weights:
        raise ValueError(f"{path} has labels of another SAE, {values.get('sae')!r}.")
    if values.get("eval_type_id") == "autointerp":
        values = _explanations(values)
    labels: Any = values.get("labels", values)
    if not isinstance(labels, dict) or not all(
        latent.isdecimal() and isinstance(label, str) for latent, label in labels.items()
    ):
        raise ValueError(f"{path} holds no labels: {_ACCEPTED}.")
    beyond = [latent for latent in labels if int(latent) >= d_sae]
    if beyond:
        raise ValueError(
            f"{path} has a label of latent {beyond[0]}, and this SAE has latents 0 to {d_sae - 1}."
        )
    return {int(latent): label.strip() for latent, label in labels.items() if label.strip()}


def _explanations(result: dict[str, Any]) -> dict[str, Any]:
    details = result.get("eval_result_unstructured")
    if not isinstance(details, dict):
        return result
    return {
        latent: detail.get("explanation") if isinstance(detail, dict) else None
        for latent, detail in details.items()
    }
