"""A trained network, fast: its forms and engines, measured, and files for other engines."""
