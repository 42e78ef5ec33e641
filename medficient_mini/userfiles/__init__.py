"""Users' own pictures and volumes: reading, prompts, the window to draw boxes in, conversion."""
