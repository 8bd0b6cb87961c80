"""Several processes: what they settle, share and save together."""
