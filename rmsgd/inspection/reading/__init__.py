"""Reading checkpoints: files, mappings and modules as named tensors."""
