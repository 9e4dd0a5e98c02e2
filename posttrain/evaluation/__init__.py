"""Evaluation: pass@k and what goes with it, measured on one policy, compared between policies, and reported.

`metrics` holds the estimators, `evaluate` samples and judges one policy, `compare` pairs several policies on the same
problems, `report` writes one HTML file. `measures` keeps what else is measured: `diversity`, `divergence` and
`calibration`.
"""
