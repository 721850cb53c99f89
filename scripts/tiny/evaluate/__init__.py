"""Scoring a checkpoint by signal processing alone."""
