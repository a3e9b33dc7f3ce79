"""Training of `kinora-tiny` from scratch: autoencoder, denoiser, export (see `docs/tiny.md`)."""
