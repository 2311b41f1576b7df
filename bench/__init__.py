"""The commands that measure every figure of the README: `helios bench NAME --json FILE`."""
