"""The same networks, faster on a CPU. The package works without this room."""
