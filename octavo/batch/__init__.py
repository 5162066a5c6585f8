"""Offline jobs: many requests from a file or a dataset, results that survive interruption."""
