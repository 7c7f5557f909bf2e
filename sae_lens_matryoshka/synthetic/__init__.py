"""SAEs trained on synthetic activations, whose true features are known, and scored against them."""
