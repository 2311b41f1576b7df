"""`helios bench paper`: HELIOS against the paper's claims (arXiv 2504.10724), section by section."""
