"""Networks: reader.py what one with an embedding matrix reads, config.py the shape of the denoiser, blocks.py a block,
attention.py its attention and cache, denoiser.py the network around them, kinds.py how a run says which."""

from klflow_ext.model.attention import Cache
from klflow_ext.model.config import DenoiserConfig
from klflow_ext.model.denoiser import Denoiser
from klflow_ext.model.kinds import describe, remake
from klflow_ext.model.reader import Reader

__all__ = ["Cache", "Denoiser", "DenoiserConfig", "Reader", "describe", "remake"]
