"""Rollouts: one engine interface for sampling and scoring, and the store of pre-sampled answers."""
