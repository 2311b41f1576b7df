"""The architectures that Helios serves, each a description in one file. Free of torch."""
