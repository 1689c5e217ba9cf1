"""Scores, data sets, plots and a small trainer for experiments with the models."""
