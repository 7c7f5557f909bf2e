"""Training SAEs with the nested objective: configs, the objective, a file for each architecture."""
