"""Measured results: taking turns, result files, tables, plots; for tools.bench and experiments."""
