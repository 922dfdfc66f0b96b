"""Repair without training: means into biases, batch norms re-estimated, layers refitted by least squares."""
