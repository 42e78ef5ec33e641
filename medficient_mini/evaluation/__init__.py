"""Scores as the challenge computes them, tables, and baselines without a network."""
