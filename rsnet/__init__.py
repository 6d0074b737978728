"""Resolution Switchable Networks (Wang et al., ECCV 2020). Knows no data backend."""

__version__ = "0.1.0"
