"""The latent cache: posteriors and token ids of a data set, computed once."""
