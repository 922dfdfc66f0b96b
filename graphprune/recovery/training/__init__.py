"""Repair by training: loops that can stop and resume, distillation, evaluation, optimizers that go on."""
