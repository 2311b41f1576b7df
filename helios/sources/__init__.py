"""Where models come from: a folder, the hub, a GGUF file, or a wheel of a package index."""
