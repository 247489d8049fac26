"""Per-record clipping: the sum of clipped gradients of one physical batch, by several engines."""
