"""What the demo refuses, and that its config is the one in configs/."""

import os
import re
from pathlib import Path

import pytest

from sae_lens_matryoshka.demo import compare, run
from sae_lens_matryoshka.runs.config import load_run_config

REPOSITORY = Path(__file__).parents[2]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=re.escape(f"out={str(tmp_path)!r} holds something other")):
        run.run_demo(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_config_file_is_the_demo_run() -> None:
    from_file = load_run_config(REPOSITORY / "configs" / "demo.yaml").to_dict()
    in_demo = compare.run_config(compare.sae_configs()[0]).to_dict()
    for cfg in (from_file, in_demo):
        del cfg["checkpoint_path"]  # the demo is too short to need any
    assert from_file == in_demo
