"""What can go as a whole: layers, branches inside them, experts of mixtures."""
