"""Other engines: their environments, their processes and their output."""
