"""swath: one engine that pretrains Earth-observation backbones on unlabelled imagery."""

__version__ = "0.1.0"
