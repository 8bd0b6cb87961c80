"""What a training step costs: bytes saved for backward and FLOPs."""
