"""What a Hub repository needs to run a LeMo model: flat files that import torch and transformers only."""
