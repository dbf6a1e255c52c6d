"""Training: losses, batches, the engine, checkpoints, exports, and the memory plan."""

# the entries of a training's directory
CHECKPOINTS = "checkpoints"
POLICY = "policy"
ADAPTER = "adapter"
CURVE = "curve.json"
SUMMARY = "summary.json"
# the driver makes this file to stop the ranks: signals reach the driver, and not the workers of Ray
STOP = "STOP"
