"""Small reference networks for the demo, the tests and the benchmarks.

Every factory returns `(model, example_input)`, so the command line takes it as `models:digits_resnet`. Images are the
8 x 8 grey digits that scikit-learn ships: float tensors of shape (batch, 1, 8, 8), ten classes. The same seed gives the
same weights, and the caller's random state stays as it was.
"""

from .mobilenet import DigitsMobileNet, digits_mobilenet
from .resnet import DigitsResNet, digits_resnet
from .vit import TinyViT, tiny_vit

__all__ = ["DigitsMobileNet", "DigitsResNet", "TinyViT", "digits_mobilenet", "digits_resnet", "tiny_vit"]
