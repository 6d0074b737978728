"""The name under which releases so far told users to import the classifier; see `rsnet.inference`."""

from rsnet.inference.classifier import SwitchableClassifier

__all__ = ["SwitchableClassifier"]
