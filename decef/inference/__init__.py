"""Fast inference with a trained network: measure its forms and engines, or export it for other engines."""
