"""The denoiser: config.py its shape, blocks.py a block and its cache, denoiser.py the network around them."""

from klflow_ext.model.attention import Cache
from klflow_ext.model.config import DenoiserConfig
from klflow_ext.model.denoiser import Denoiser

__all__ = ["Cache", "Denoiser", "DenoiserConfig"]
