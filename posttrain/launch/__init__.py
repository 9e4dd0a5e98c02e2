"""Launching: from a recipe to finished runs and a report."""
