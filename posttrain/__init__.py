"""posttrain: post-training of language models on top of Hugging Face TRL.

Nothing heavy is imported here: `import posttrain` costs no torch. Start at `posttrain.trainers` (the methods),
`posttrain.rewards` (the verifiers) or the command line (`posttrain --help`).
"""

import os

# TRL reports usage to the hub unless told otherwise, and a training run should not phone home by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
