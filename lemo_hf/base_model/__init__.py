"""The embedded base model: how it was trained (`python -m lemo_hf.base_model RECIPE`), measured and given predictors."""
