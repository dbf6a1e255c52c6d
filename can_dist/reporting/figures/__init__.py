"""The figures: each one small SVG, or a file of its own."""
