"""Four small synthetic cases, so that the first command has something to segment (make.py draws them)."""
