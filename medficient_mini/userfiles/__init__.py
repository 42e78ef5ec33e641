"""Users' own pictures and volumes: reading, prompts, the window to draw boxes in, conversion.

Errors of files are ValueErrors of one line, "<file name>: <field>: expected …, found …".
"""
