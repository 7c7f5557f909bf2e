"""The stages of the demo, a line for each."""

import os
import time

START = "SAE_MATRYOSHKA_DEMO_START"  # in the environment: when the command began, by time.time()


def stage(text: str) -> None:
    """Say what begins, and how many seconds after the command."""
    now = time.time()
    print(f"\n[{now - float(os.environ.get(START, now)):3.0f} s] {text}", flush=True)
