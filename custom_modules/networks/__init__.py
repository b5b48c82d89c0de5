"""The networks of the paper: wavelets, autoencoder, attention, denoiser, and the weights on disk."""
