"""The name under which releases so far told users to import the classifier; see `rsnet.inference`."""

from rsnet.inference.classifier import Prediction, SwitchableClassifier

__all__ = ["Prediction", "SwitchableClassifier"]
