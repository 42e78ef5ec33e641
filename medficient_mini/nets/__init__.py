"""The networks as their papers draw them. Attribute names are the published state-dict keys; torch is the only import."""
