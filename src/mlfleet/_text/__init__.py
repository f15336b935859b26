"""Plain text: YAML and JSON with positions, lines, masking."""
