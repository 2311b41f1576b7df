"""Load for an engine or for services, and the times at which tokens arrived."""
