"""Other engines: their environments, their processes, and what they generate."""
