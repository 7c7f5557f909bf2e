"""Training SAEs with the nested objective: configs, the objective, a file for each architecture."""

# Before any module here, so that the architectures can be registered as soon as SAELens is imported.
import sae_lens  # noqa: F401
