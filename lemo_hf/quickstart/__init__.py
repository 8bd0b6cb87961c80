"""The quickstart: three fine-tuning arms on the embedded base model; `python -m lemo_hf.quickstart` runs it."""
