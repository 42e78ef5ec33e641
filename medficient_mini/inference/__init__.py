"""From an image or a volume and boxes to masks: reading, geometry, prediction, composition, checkpoints."""
