"""Objectives: pure functions of tensors, each under its equation. They return tokens; `reduce` averages."""
