"""Models as folders and repositories of the Hugging Face Hub: folder.py writes, reads and sends them, card.py says what they are."""

from klflow_ext.hub.folder import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
