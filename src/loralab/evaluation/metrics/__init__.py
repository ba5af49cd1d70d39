"""Task metrics: one table, every figure with its count and interval."""
