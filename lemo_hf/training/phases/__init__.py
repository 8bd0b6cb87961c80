"""What a run does before and between its steps: predictors, thresholds, recall probes, and the documents they read."""
