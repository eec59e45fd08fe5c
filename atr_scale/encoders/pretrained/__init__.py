"""Original checkpoints: their layouts, reading them without running code from them, loading them strictly."""
