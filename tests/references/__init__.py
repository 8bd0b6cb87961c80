"""Slow plain references: every formula written out, nothing fused, nothing shared with the code under test."""
