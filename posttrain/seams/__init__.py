"""Seams: the only modules that import TRL."""
