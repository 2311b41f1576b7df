"""Which sequences a step computes: their states, blocks and chunks, and the batch made of them."""
