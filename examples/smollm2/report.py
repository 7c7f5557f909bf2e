"""The tables and pictures of docs/results/smollm2.md, from the files that `run.py` writes.

    python -m examples.smollm2.report

Each table stands in the page between `<!-- table NAME -->` and `<!-- end -->`, and is replaced there.
± is half of Student's 95 % interval of the mean over the seeds of training.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from scipy import stats

from examples.smollm2.arms import Arm, all_arms, tuning_arms
from sae_lens_matryoshka.util.files import atomic_file
from sae_lens_matryoshka.util.markdown import markdown_table

RESULTS = Path(__file__).parents[2] / "docs" / "results"
