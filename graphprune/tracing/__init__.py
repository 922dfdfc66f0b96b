"""One real run, recorded as an `fx` graph: what was computed, from which parameters, with which sizes."""
