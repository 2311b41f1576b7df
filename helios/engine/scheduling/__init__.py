"""Decides which sequences a step computes: their states, blocks and chunks, and the resulting batch."""
