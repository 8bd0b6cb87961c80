"""The run: arguments, the phases as callbacks, predictor training, threshold search, the trainer."""
