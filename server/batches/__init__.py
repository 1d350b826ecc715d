"""Many requests in one file, answered in idle capacity and kept on disk."""
