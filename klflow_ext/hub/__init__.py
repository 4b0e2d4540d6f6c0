"""Models as folders and repositories of the Hugging Face Hub: folder.py writes, reads and sends them, card.py says what they are.

Functions, and no base class for models as huggingface_hub has one: a model is of no use without its path and tokenizer, which go
with it here, and any torch.nn.Module may be one."""

from klflow_ext.hub.folder import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
