"""The plan as data, and everything that is done with one: surgery, proof, storage, history."""
