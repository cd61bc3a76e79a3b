"""Where observations end: plain files, W&B."""
