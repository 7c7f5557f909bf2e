"""`python -m sae_lens_matryoshka`: the command `sae-matryoshka`."""

import sys

from sae_lens_matryoshka.cli import main

sys.exit(main())
