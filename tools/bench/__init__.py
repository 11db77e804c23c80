"""Measure speed beside peers and the machine's limits; see __main__.py."""
