"""The quality of what was served, request by request."""
