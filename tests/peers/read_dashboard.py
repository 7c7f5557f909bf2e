"""Neuronpedia's batches as sae-dashboard reads and writes them.

    PYTHONPATH=FOLDER python tests/peers/read_dashboard.py OUT

FOLDER is where requirements.txt is installed. For each OUT/batch-N.json, OUT/read-N.json is what
sae-dashboard writes of what it has read.
"""

import json
import sys
from pathlib import Path

import sae_dashboard
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

if sae_dashboard.__version__ != "0.8.0":
    sys.exit(f"sae-dashboard {sae_dashboard.__version__} was imported, not that of the folder.")
for path in Path(sys.argv[1]).glob("batch-*.json"):
    batch = NeuronpediaDashboardBatch(**json.loads(path.read_text()))
    read = path.with_name(path.name.replace("batch", "read"))
    read.write_text(json.dumps(batch.to_dict()))
