"""Latent cache: the posterior moments and token ids of a data set, computed once before training."""
