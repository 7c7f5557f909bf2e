"""The wheel alone, away from the clone: `sae-matryoshka demo` finds all that it needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import sae_lens_matryoshka

PACKAGE = Path(sae_lens_matryoshka.__file__).parent
# The demo's first stage, and the SAE of its last
FIRST_STAGE = """
import sys
from pathlib import Path
import sae_lens_matryoshka
from sae_lens_matryoshka.demo import run
assert str(Path(sae_lens_matryoshka.__file__)).startswith(sys.argv[1]), sae_lens_matryoshka.__file__
sae = sae_lens_matryoshka.load_sae("smollm2-135m-matryoshka")
assert sae_lens_matryoshka.widths_of(sae) == [128, 384, 896, 1920, 4096]
out = Path("demo_run")
run.N_TEXTS, run.N_HELD_OUT, run.N_LABELLED = 40, 40, 40
run.write_model_and_texts(out, seed=0)
assert (out / run.MODEL_NAME / "model.safetensors").stat().st_size > 4_000_000
assert len(list(out.rglob("*.parquet"))) == 4
"""


def test_wheel_starts_the_demo(tmp_path: Path) -> None:
    def run(*words: str | Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, PACKAGE.parent)
    [wheel] = tmp_path.glob("*.whl")
    files = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert files <= set(zipfile.ZipFile(wheel).namelist())

    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    run(*pip, tmp_path / "installed", wheel)
    run("-c", FIRST_STAGE, tmp_path / "installed")
    assert "--out OUT" in run(tmp_path / "installed/bin/sae-matryoshka", "demo", "--help")
