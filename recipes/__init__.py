"""Recipes: YAML, one folder per method; `bases/` holds what several of them share."""
