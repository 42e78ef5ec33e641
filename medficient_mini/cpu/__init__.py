"""The same networks, faster on a CPU. Everything works without this room."""
