"""`lemo estimate`: memory, FLOPs and time of a step from a model's config, on fake tensors."""
