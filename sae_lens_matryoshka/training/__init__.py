"""Training SAEs with the nested objective: configs, the objective, a file for each architecture."""

# Importing SAELens registers the architectures, which has to come before any module here.
import sae_lens  # noqa: F401
