"""Training: losses, batches, the engine, checkpoints, and small score models."""

# what a training leaves in its directory
CHECKPOINTS = "checkpoints"
POLICY = "policy"
ADAPTER = "adapter"
CURVE = "curve.json"
SUMMARY = "summary.json"
# by this file the driver asks the ranks to commit and end: signals reach it, and not the workers of Ray
STOP = "STOP"
