"""The architectures that Helios serves. Each is a description in one file. Does not import torch."""
