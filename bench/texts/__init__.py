"""Texts that the bundled models were not trained on."""
