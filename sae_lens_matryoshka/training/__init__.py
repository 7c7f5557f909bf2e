"""Training SAEs with the nested objective: configs, the objective, a file for each architecture."""

# SAELens' import hook imports `registration`, so importing that directly would be circular.
import sae_lens  # noqa: F401
